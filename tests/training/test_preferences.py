"""The loss, the votes and the treatments, with numbers worked out by hand; then the same at work on a toy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from posttrain.training.preferences import (
    assign_folds,
    preference_loss,
    preference_strength,
    ranking_auc,
    suspects,
    treat,
    vote_margin,
)


def loss(chosen, rejected, **numbers):
    tensors = {name: torch.tensor([value]) for name, value in numbers.items()}
    return preference_loss(torch.tensor([chosen]), torch.tensor([rejected]), **tensors).item()


# ln 3 is where σ is 3/4, so that losses are ln(4/3) = 0.287682 and ln 4 = 1.386294.
LN3 = math.log(3)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, math.log(4 / 3)),
        ({"target": 1.0, "weight": 1.0, "margin": 0.0}, math.log(4 / 3)),
        ({"target": 0.0}, math.log(4)),  # flipped
        ({"target": 0.9}, 0.9 * math.log(4 / 3) + 0.1 * math.log(4)),  # smoothed
        ({"target": 0.5}, 0.5 * math.log(16 / 3)),
        ({"margin": LN3}, math.log(2)),  # z = 0
        ({"margin": 2 * LN3}, math.log(4)),  # z = -ln 3
        ({"margin": -LN3}, math.log(10 / 9)),  # σ(2 ln 3) = 9/10
        ({"weight": 0.25}, 0.25 * math.log(4 / 3)),
        ({"weight": 0.0}, 0.0),
        ({"margin": LN3, "target": 0.2, "weight": 3.0}, 3 * math.log(2)),
    ],
)
def test_worked_losses(numbers, expected):
    assert loss(2.0 + LN3, 2.0, **numbers) == pytest.approx(expected, abs=1e-6)


def test_a_margin_has_a_gradient():
    """It is inside of the sigmoid: dL/dz = -σ(-z), at z = ln 3 - ln 3 = 0 one half."""
    chosen = torch.tensor([LN3], requires_grad=True)
    preference_loss(chosen, torch.zeros(1), margin=torch.tensor([LN3])).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5)


def test_flipping_is_swapping():
    chosen, rejected = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    flipped = preference_loss(chosen, rejected, target=torch.zeros(50))
    torch.testing.assert_close(flipped, preference_loss(rejected, chosen))


def test_large_gaps_stay_finite():
    """-log σ(-1000) is 1000; in bfloat16 the gap is taken in float32."""
    assert loss(-500.0, 500.0) == 1000.0
    assert loss(500.0, -500.0, target=0.5) == 500.0
    low = preference_loss(
        torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.0], dtype=torch.bfloat16)
    )
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(-logsigmoid(torch.tensor(1.0)).item())


def test_strength():
    mean, deviation = preference_strength(np.array([[1.0, 3.0], [-2.0, -2.0], [4.0, -4.0]]))
    assert mean.tolist() == [2.0, -2.0, 0.0]
    assert deviation.tolist() == [1.0, 0.0, 4.0]


def test_folds_keep_a_prompt_together():
    prompts = [f"p{number % 10}" for number in range(30)]
    folds = assign_folds(prompts, 3, seed=0, member=0)
    assert all(
        len({fold for p, fold in zip(prompts, folds, strict=True) if p == name}) == 1 for name in prompts
    )
    assert sorted(np.bincount(folds).tolist()) == [9, 9, 12]
    assert (folds == assign_folds(prompts, 3, seed=0, member=0)).all()
    assert (folds != assign_folds(prompts, 3, seed=0, member=1)).any()
    assert (folds != assign_folds(prompts, 3, seed=1, member=0)).any()
    with pytest.raises(ValueError, match="11 folds need as many different prompts; there are 10"):
        assign_folds(prompts, 11, seed=0, member=0)


def test_suspects():
    mean = np.array([0.5, -0.1, 2.0, -3.0, -0.1])
    assert suspects(mean).tolist() == [False, True, False, True, True]
    assert suspects(mean, threshold=-1.0).tolist() == [False, False, False, True, False]
    assert suspects(mean, share=0.4).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("kind", "margin", "target", "weight"),
    [
        ("none", [0, 0, 0], [1, 1, 1], [1, 1, 1]),
        ("drop", [0, 0, 0], [1, 1, 1], [1, 0, 1]),
        ("flip", [0, 0, 0], [1, 0, 1], [1, 1, 1]),
        ("smooth", [0, 0, 0], [1, 0.8, 1], [1, 1, 1]),
        ("margin", [0.5, -0.5, 2], [1, 1, 1], [1, 1, 1]),
        ("smooth_margin", [0.5, -0.5, 2], [1, 0.8, 1], [1, 1, 1]),
    ],
)
def test_treatments(kind, margin, target, weight):
    """The mean of |1|, |-1| and |4| is 2."""
    mean = np.array([1.0, -1.0, 4.0])
    treated = treat(kind, mean, suspects(mean), alpha=0.2)
    assert treated.margin.tolist() == margin
    assert treated.target.tolist() == target
    assert treated.weight.tolist() == weight


def test_margins_are_cut():
    assert vote_margin(np.array([1.0] * 9 + [-31.0])).tolist() == [0.25] * 9 + [-3.0]
    assert vote_margin(np.zeros(2)).tolist() == [0.0, 0.0]


def test_auc():
    """Of the six (wrong, right) combinations four are in order and one is a tie."""
    wrong = np.array([True, True, False, False, False])
    assert ranking_auc(np.array([0.0, 2.0, 1.0, 2.0, 3.0]), wrong) == pytest.approx(4.5 / 6)
    assert math.isnan(ranking_auc(np.array([1.0]), np.array([True])))


# --- at work ----------------------------------------------------------------------------------------------

FEATURES, PAIRS, TEST = 20, 1500, 2000
GAIN = 0.03


def draw_pairs(count, rng):
    """Features of two answers, the first of which is the better one: their true reward is not linear."""
    both = rng.normal(size=(2, count, FEATURES)).astype(np.float32)
    weights = np.random.default_rng(0).normal(size=(FEATURES, 4)) / FEATURES**0.5
    reward = np.tanh(both @ weights).sum(-1) + (both @ weights).sum(-1) / 2
    return np.where((reward[0] > reward[1])[:, None], both, both[::-1])


def fit(pairs, epochs, seed, treated=None):
    """A small reward network trained with the loss under test. Returns the gap of given pairs."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    data = torch.from_numpy(np.ascontiguousarray(pairs))
    numbers = {} if treated is None else vars(treated)
    numbers = {name: torch.from_numpy(values).float() for name, values in numbers.items()}
    for _ in range(epochs):
        for rows in torch.randperm(data.shape[1]).split(75):
            chosen, rejected = net(data[:, rows]).squeeze(-1)
            part = {name: values[rows] for name, values in numbers.items()}
            optimizer.zero_grad()
            preference_loss(chosen, rejected, **part).mean().backward()
            optimizer.step()

    @torch.no_grad()
    def gap(others):
        chosen, rejected = net(torch.from_numpy(np.ascontiguousarray(others))).squeeze(-1)
        return (chosen - rejected).double().numpy()

    return gap


def vote(pairs, members=3, folds=2):
    votes = np.zeros((pairs.shape[1], members))
    for member in range(members):
        fold_of = assign_folds(range(pairs.shape[1]), folds, seed=0, member=member)
        for fold in range(folds):
            gap = fit(pairs[:, fold_of != fold], epochs=3, seed=10 * member + fold)
            votes[fold_of == fold, member] = gap(pairs[:, fold_of == fold])
    return preference_strength(votes)[0]


def accuracy(pairs, test, mean, treatment):
    treated = treat(treatment, mean, suspects(mean))
    gap = fit(pairs, epochs=15, seed=99, treated=treated)
    return float((gap(test) > 0).mean())


def swap(pairs, wrong):
    return np.where(wrong[:, None], pairs[::-1], pairs)


def test_random_noise_is_found_and_dropping_it_helps():
    rng = np.random.default_rng(1)
    clean, test = draw_pairs(PAIRS, rng), draw_pairs(TEST, rng)
    wrong = rng.random(PAIRS) < 0.2
    pairs = swap(clean, wrong)
    mean = vote(pairs)
    assert ranking_auc(mean, wrong) >= 0.9
    base = accuracy(pairs, test, mean, "none")
    assert accuracy(pairs, test, mean, "drop") >= base + GAIN
    assert accuracy(pairs, test, mean, "flip") >= base + GAIN


def test_systematic_noise_is_not_found_and_flipping_does_not_help():
    """Annotators who prefer the answer with a cue (a list, say) wherever one of the two has it.

    Every member learns to like the cue, so it votes for the wrong labels, and with the more conviction.
    """
    rng = np.random.default_rng(2)
    clean, test = draw_pairs(PAIRS, rng), draw_pairs(TEST, rng)
    for pairs in (clean, test):
        pairs[..., 0] = 3.0 * (rng.random(pairs.shape[:2]) < 0.25)
    wrong = clean[1, :, 0] > clean[0, :, 0]
    assert 0.15 < wrong.mean() < 0.22
    pairs = swap(clean, wrong)
    mean = vote(pairs)
    assert ranking_auc(mean, wrong) < 0.6
    base = accuracy(pairs, test, mean, "none")
    assert accuracy(pairs, test, mean, "flip") < base + GAIN
