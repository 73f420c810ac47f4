"""AMFT's meta-gradient: worked examples, identities, and what Adam makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from posttrain.recipe.amft_schema import AmftConfig
from posttrain.training.mixing import Slopes, entropy_pull, meta_gradient, moved, scheduled


def slopes(v, imitation, policy):
    v, imitation, policy = (np.asarray(vector, dtype=float).ravel() for vector in (v, imitation, policy))
    norm = np.linalg.norm
    return Slopes(float(v @ imitation), float(v @ policy), float(norm(v)), float(norm(imitation - policy)))


A, B, C = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.75, 0.25])
"""Toy of three parabolas: minima of the imitation and of the policy loss, and the best point."""


def parabola_step(theta, mu, rate=0.1):
    imitation, policy = theta - A, theta - B
    after = theta - rate * ((1 - mu) * policy + mu * imitation)
    return imitation, policy, after


def test_parabolas_by_hand():
    imitation, policy, after = parabola_step(np.zeros(2), 0.2)
    np.testing.assert_allclose(after, [0.02, 0.08])
    assert meta_gradient(slopes(C - after, imitation, policy), "raw", 0.1) == pytest.approx(0.056)
    assert meta_gradient(slopes(C, imitation, policy), "raw", 0.1) == pytest.approx(0.050)
    assert meta_gradient(slopes(C, imitation, policy), "per_lr", 0.1) == pytest.approx(0.50)
    expected = 0.5 / (math.hypot(0.75, 0.25) * math.sqrt(2))
    assert meta_gradient(slopes(C, imitation, policy), "cosine", 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_parabolas_find_the_best_mixture_unless_turned_around(sign):
    theta, mu, seen = np.zeros(2), 0.2, {}
    for step in range(1, 401):
        imitation, policy, after = parabola_step(theta, mu)
        gradient = meta_gradient(slopes(C - after, imitation, policy), "raw", 0.1)
        mu = moved(mu, sign * 2 * (gradient or 0.0), 0.05, 0.95)  # none where nothing is left to climb
        _, _, theta = parabola_step(theta, mu)  # the new weight is used in the same step
        seen[step] = mu
    if sign < 0:
        assert mu == 0.05
        return
    assert seen[1] == pytest.approx(0.312, abs=5e-4)
    assert seen[10] == pytest.approx(0.95)
    assert seen[50] == pytest.approx(0.7603, abs=5e-4)
    assert seen[100] == pytest.approx(0.7498, abs=5e-4)
    assert mu == pytest.approx(0.75, abs=1e-4)
    np.testing.assert_allclose(theta, C, atol=1e-3)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bernoulli(theta, mu, frequency, rate=1.0):
    """Meta-gradient of a policy with one parameter, v after the step; demonstrators choose arm 1 so often."""
    p = sigmoid(theta)
    imitation, policy = p - frequency, -p * (1 - p)
    after = theta - rate * ((1 - mu) * policy + mu * imitation)
    slope = sigmoid(after) * (1 - sigmoid(after))
    return after, meta_gradient(slopes([slope], [imitation], [policy]), "raw", rate)


@pytest.mark.parametrize(
    ("theta", "mu", "frequency", "after", "expected"),
    [
        (0.0, 0.0, 1.0, 0.25, 0.061534),
        (0.0, 0.0, 0.5, 0.25, -0.061534),
        (0.0, 0.5, 0.8, 0.275, 0.012267),
        (0.5, 0.5, 0.8, None, -0.012713),
        (0.211935, 0.5, 0.8, None, 0.0),
    ],
)
def test_one_parameter_by_hand(theta, mu, frequency, after, expected):
    ends, gradient = bernoulli(theta, mu, frequency)
    assert gradient == pytest.approx(expected, abs=1e-6)
    if after is not None:
        assert ends == pytest.approx(after)


def test_one_parameter_changes_sign_where_imitation_stops_paying():
    """At p + p (1 - p) = d, so at p = 1 - sqrt(1 - d): mu rises below and falls above."""
    best = 1 - math.sqrt(1 - 0.8)
    assert best == pytest.approx(0.552786, abs=1e-6)
    for p, rises in ((best - 0.01, True), (best + 0.01, False), (0.2, True), (0.9, False)):
        assert (bernoulli(math.log(p / (1 - p)), 0.5, 0.8)[1] > 0) == rises


@pytest.fixture(scope="module")
def three_losses():
    """A small network, and functions for imitation, policy and utility on fixed data, in float64."""
    torch.manual_seed(0)
    x, shown, drawn = (
        torch.randn(3, 8, 5, dtype=torch.float64),
        torch.randint(4, (8,)),
        torch.randint(4, (8,)),
    )
    advantages = torch.randn(8, dtype=torch.float64)
    theta = [torch.randn(5, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)]

    def logprobs(weights, inputs, actions):
        logits = torch.tanh(inputs @ weights[0]) @ weights[1]
        return logits.log_softmax(-1)[torch.arange(8), actions]

    return (
        theta,
        lambda w: -logprobs(w, x[0], shown).mean(),
        lambda w: -(advantages * logprobs(w, x[1], drawn)).mean(),
        lambda w: logprobs(w, x[2], shown).exp().mean(),
    )


def flat_gradient(function, weights):
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    return torch.cat([g.flatten() for g in torch.autograd.grad(function(leaves), leaves)]).numpy()


def looked_ahead(theta, imitate, explore, utility, mu, rate):
    """dU/dmu by differentiating through one explicit step, and the formula with v after the step."""
    leaves = [weight.detach().clone().requires_grad_() for weight in theta]
    weight = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
    loss = (1 - weight) * explore(leaves) + weight * imitate(leaves)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    after = [leaf - rate * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]
    (exact,) = torch.autograd.grad(utility(after), weight)
    parts = slopes(
        flat_gradient(utility, after), flat_gradient(imitate, theta), flat_gradient(explore, theta)
    )
    return float(exact), meta_gradient(parts, "raw", rate)


def test_the_formula_is_the_derivative_of_one_step(three_losses):
    exact, formula = looked_ahead(*three_losses, mu=0.3, rate=0.5)
    assert abs(exact) > 1e-4
    assert formula == pytest.approx(exact, abs=1e-10)


def test_losses_that_change_places_change_the_sign(three_losses):
    theta, imitate, explore, utility = three_losses
    _, one = looked_ahead(theta, imitate, explore, utility, 0.3, 0.5)
    _, other = looked_ahead(theta, explore, imitate, utility, 0.7, 0.5)
    assert other == pytest.approx(-one, abs=1e-15)


def test_equal_losses_are_no_evidence(three_losses):
    theta, imitate, _, utility = three_losses
    gradient = flat_gradient(imitate, theta)
    assert meta_gradient(slopes(flat_gradient(utility, theta), gradient, gradient), "cosine", 1.0) is None


def test_a_utility_that_is_a_loss_votes_for_itself(three_losses):
    """U = -L_S gives a (|g_S|² - <g_S, g_R>); U = -L_R gives a (<g_R, g_S> - |g_R|²)."""
    theta, imitate, explore, _ = three_losses
    own, other = flat_gradient(imitate, theta), flat_gradient(explore, theta)
    rate = 0.5
    assert meta_gradient(slopes(-own, own, other), "raw", rate) == pytest.approx(
        rate * (own @ own - own @ other)
    )
    assert meta_gradient(slopes(-other, own, other), "raw", rate) == pytest.approx(
        rate * (other @ own - other @ other)
    )


def test_the_loss_is_affine_in_the_weight(three_losses):
    theta, imitate, explore, _ = three_losses

    def loss(mu):
        return (1 - mu) * explore(theta) + mu * imitate(theta)

    for mu in (0.05, 0.3, 0.95):
        assert float(loss(mu)) == pytest.approx(float(loss(0.0) + mu * (loss(1.0) - loss(0.0))), abs=1e-15)


def test_imitation_is_entropy_and_divergence_and_a_policy_gradient():
    """NLL = H(demo) + KL(demo | pi), and its gradient is -E_pi[demo / pi · grad log pi]."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    demo = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    policy = logits.softmax(-1)
    nll = -(demo * policy.log()).sum()
    assert float(nll) == pytest.approx(
        float(-(demo * demo.log()).sum() + (demo * (demo / policy).log()).sum()), abs=1e-12
    )
    (gradient,) = torch.autograd.grad(nll, logits, retain_graph=True)
    ratio = (demo / policy).detach()
    (other,) = torch.autograd.grad(-(policy.detach() * ratio * policy.log()).sum(), logits)
    torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_without_evidence_there_is_no_gradient(bad):
    assert meta_gradient(Slopes(0.1, 0.2, 0.0, 1.0), "cosine", 1.0) is None
    assert meta_gradient(Slopes(0.1, 0.2, 1.0, 1e-13), "raw", 1.0) is None
    assert meta_gradient(Slopes(bad, 0.2, 1.0, 1.0), "cosine", 1.0) is None


def test_bounds_and_the_entropy_term():
    assert moved(0.9, 0.2, 0.05, 0.95) == 0.95
    assert moved(0.1, -0.2, 0.05, 0.95) == 0.05
    assert moved(0.1 + 0.2, 0.0, 0.05, 0.95) == 0.1 + 0.2
    assert entropy_pull(0.5, 0.8) == pytest.approx(0.3)
    assert entropy_pull(0.5, 0.8, deadband=0.4) == 0.0
    assert entropy_pull(math.nan, 0.8) == 0.0
    mu = 0.5
    for _ in range(500):  # the released rate: half a nat over 500 steps is hardly anything
        mu = moved(mu, 5e-4 * entropy_pull(0.5, 0.8), 0.05, 0.95)
    assert mu == pytest.approx(0.575)


def test_schedules():
    plan = {0: 1.0, 200: 0.3, 400: 0.0}
    assert [scheduled(plan, step) for step in (0, 199, 200, 399, 400, 999)] == [1.0, 1.0, 0.3, 0.3, 0.0, 0.0]


@pytest.mark.parametrize(("step", "true"), [(1, 0.0), (10, 3.385e-4)])
def test_what_adam_does_to_the_estimate(step, true):
    """The derivative is that of gradient descent. With Adam the sign stays and the size does not; in its
    first step, which is as long as the learning rate whatever the gradient, there is none: hence `first`.
    """
    imitation, policy, v = -0.3, -0.25, 1.0

    def after(mu):
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([weight], lr=0.1)
        if step > 1:
            state = adam.state[weight]
            state["step"] = torch.tensor(float(step - 1))
            state["exp_avg"] = torch.full_like(weight, -0.2).detach()
            state["exp_avg_sq"] = torch.full_like(weight, 0.05).detach()
        weight.grad = torch.full_like(weight, (1 - mu) * policy + mu * imitation)
        adam.step()
        return float(weight.detach())

    found = v * (after(0.501) - after(0.499)) / 0.002
    estimate = meta_gradient(slopes([v], [imitation], [policy]), "raw", 0.1)
    assert estimate == pytest.approx(5.0e-3)
    assert found == pytest.approx(true, abs=1e-6)
    assert AmftConfig.model_fields["first"].default >= 10
