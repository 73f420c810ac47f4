from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.recipe.schema import ImportanceConfig, LossConfig, LossKind
from posttrain.training.losses import (
    Denominators,
    importance_weights,
    k3,
    mean_stats,
    merge_stats,
    nll_loss,
    policy_loss,
    token_weights,
)

KINDS = get_args(LossKind)
MODES = get_args(ImportanceConfig.model_fields["mode"].annotation)

# Two completions of three tokens and one. Ratios policy / old 1.5, 1, 0.5 | 1.1; advantages 1 and -2.
SEQUENCE = torch.tensor([0, 0, 0, 1])
LOGPROBS = torch.tensor([-1.0, -2.0, -3.0, -0.5])
RATIOS = torch.tensor([1.5, 1.0, 0.5, 1.1])
ADVANTAGES = torch.tensor([1.0, 1.0, 1.0, -2.0])
DENOMINATORS = Denominators(sequences=2, tokens=4, max_tokens=10)


def example_loss(config, **extra):
    """Loss, gradient with respect to the log-probs, and stats of the example."""
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, stats = policy_loss(
        config,
        logprobs=logprobs,
        advantages=ADVANTAGES,
        sequence=SEQUENCE,
        denominators=DENOMINATORS,
        **{"old_logprobs": LOGPROBS - RATIOS.log(), **extra},
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.tolist(), stats


# With clip 0.2 the tokens' terms are -min(1.5, 1.2), -min(1, 1), -min(0.5, 0.8), -min(-2.2, -2.2), that is
# -1.2, -1, -0.5, 2.2. The first has no gradient; d(r·A)/d logp = r·A for the others.
WORKED = {
    "grpo": ((-2.7 / 3 + 2.2) / 2, [0, -1 / 6, -0.5 / 6, 2.2 / 2]),
    "dr_grpo": ((-2.7 + 2.2) / (2 * 10), [0, -1 / 20, -0.5 / 20, 2.2 / 20]),
    "dapo": ((-2.7 + 2.2) / 4, [0, -1 / 4, -0.5 / 4, 2.2 / 4]),
    "bnpo": ((-2.7 + 2.2) / 4, [0, -1 / 4, -0.5 / 4, 2.2 / 4]),
    "reinforce_pp": ((-2.7 + 2.2) / 4, [0, -1 / 4, -0.5 / 4, 2.2 / 4]),
    # -min(r, 1.2)·A·logp: 1.2, 2, 1.5 and -1.1, every token with gradient
    "cispo": ((1.2 + 2 + 1.5 - 1.1) / 4, [-1.2 / 4, -1 / 4, -0.5 / 4, 2.2 / 4]),
    # one ratio (1.5 · 1 · 0.5)^⅓ = 0.908560 for the three tokens, whose gradients are a third of it
    "gspo": ((-0.908560 + 2.2) / 2, [-0.908560 / 6] * 3 + [2.2 / 2]),
    # one ratio 1.5 · 1 · 0.5 = 0.75, below min(0.75, 0.8), and each token's gradient is all of it
    "rloo": ((-0.75 + 2.2) / 2, [-0.75 / 2] * 3 + [2.2 / 2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_worked_examples(kind):
    loss, gradient, _ = example_loss(LossConfig(kind=kind))
    expected_loss, expected_gradient = WORKED[kind]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradient == pytest.approx(expected_gradient, rel=1e-5, abs=1e-7)


def test_clip_higher():
    # -min(1.5, 1.28) instead of -1.2
    loss, _, _ = example_loss(LossConfig(kind="dapo", clip_high=0.28))
    assert loss == pytest.approx((-1.28 - 1 - 0.5 + 2.2) / 4, rel=1e-5)
    loss, _, _ = example_loss(LossConfig(kind="cispo", clip_high=0.4))
    assert loss == pytest.approx((1.4 + 2 + 1.5 - 1.1) / 4, rel=1e-5)


def test_clip_low_cuts_only_negative_advantages():
    # ratio 0.5 with advantage -2: -min(-1, -1.6) = 1.6 and no gradient
    loss, stats = policy_loss(
        LossConfig(kind="dapo"),
        logprobs=(logprobs := torch.tensor([-1.0], requires_grad=True)),
        old_logprobs=torch.tensor([-1.0 - math.log(0.5)]),
        advantages=torch.tensor([-2.0]),
        sequence=torch.tensor([0]),
        denominators=Denominators(1, 1, 1),
    )
    assert loss.item() == pytest.approx(1.6)
    assert torch.autograd.grad(loss, logprobs)[0].item() == 0.0
    assert (stats["clipped_low"].item(), stats["clipped_high"].item()) == (1, 0)


# reference / policy 2, 1, 0.5, 1: k3 = 2-1-ln 2, 0, 0.5-1+ln 2, 0 = 0.306853, 0, 0.193147, 0
REFERENCE = LOGPROBS + torch.tensor([2.0, 1.0, 0.5, 1.0]).log()


def test_k3():
    torch.testing.assert_close(k3(LOGPROBS, REFERENCE), torch.tensor([0.306853, 0.0, 0.193147, 0.0]))


@pytest.mark.parametrize(
    ("kind", "expected", "weight"),
    [
        # times the ratios 1.5 and 0.5: 0.460279 + 0.096574 = 0.556853
        ("grpo", 0.556853, 1 / 3 / 2),
        ("dapo", 0.556853, 1 / 4),
        ("dr_grpo", 0.556853, 1 / 20),
        # times the completion's ratio 0.75: 0.375
        ("rloo", 0.375, 1 / 2),
    ],
)
def test_kl_has_the_weights_of_the_loss(kind, expected, weight):
    without, gradient_without, _ = example_loss(LossConfig(kind=kind))
    loss, gradient, stats = example_loss(LossConfig(kind=kind, kl=0.3), reference_logprobs=REFERENCE)
    assert stats["kl"].item() == pytest.approx(expected, rel=1e-5)
    assert loss - without == pytest.approx(0.3 * weight * expected, rel=1e-4)
    difference = [(a - b) / (0.3 * weight) for a, b in zip(gradient, gradient_without, strict=True)]
    if kind == "rloo":
        # d (r Σ k3) / d logp_t = r (Σ k3 + 1 - reference/policy) = 0.75 (0.5 + (-1, 0, 0.5))
        assert difference == pytest.approx([-0.375, 0.375, 0.75, 0], abs=1e-5)
    else:
        # d (r k3) / d logp = r log(policy/reference) = -1.5 ln 2, 0, 0.5 ln 2, 0
        assert difference == pytest.approx([-1.039721, 0, 0.346574, 0], abs=1e-5)


def test_kl_gradient_is_that_of_the_exact_kl():
    """Averaged over all tokens the policy may sample, on its first update."""
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        loss, _ = policy_loss(
            LossConfig(kind="dapo", kl=1.0),
            logprobs=policy[token : token + 1],
            advantages=torch.zeros(1, dtype=torch.float64),
            sequence=torch.tensor([0]),
            denominators=Denominators(1, 1, 1),
            reference_logprobs=reference[token : token + 1],
        )
        estimate += policy[token].exp().item() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(estimate, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_bonus_is_a_token_mean_and_lowers_the_loss(kind):
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    without, _, _ = example_loss(LossConfig(kind=kind))
    loss, _ = policy_loss(
        LossConfig(kind=kind, entropy=0.1),
        logprobs=LOGPROBS,
        old_logprobs=LOGPROBS - RATIOS.log(),
        advantages=ADVANTAGES,
        sequence=SEQUENCE,
        denominators=DENOMINATORS,
        entropy=entropy,
    )
    assert loss.item() - without == pytest.approx(-0.1 * 10 / 4, rel=1e-4)
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.1 / 4] * 4)


# old / sampling 3, 1, 0.5 | 2.5; products over the completions 1.5 | 2.5; cap 2
OLD = LOGPROBS - RATIOS.log()
SAMPLING = OLD - torch.tensor([3.0, 1.0, 0.5, 2.5]).log()
IMPORTANCE = {
    "none": [1.0, 1.0, 1.0, 1.0],
    "token_truncate": [2.0, 1.0, 0.5, 2.0],
    "token_mask": [0.0, 1.0, 0.5, 0.0],
    "sequence_truncate": [1.5, 1.5, 1.5, 2.0],
    "sequence_mask": [1.5, 1.5, 1.5, 0.0],
}


@pytest.mark.parametrize("mode", MODES)
def test_importance_correction(mode):
    config = ImportanceConfig(mode=mode)
    weights = IMPORTANCE[mode]
    old = OLD.clone().requires_grad_()
    actual = importance_weights(config, old, SAMPLING, SEQUENCE)
    assert not actual.requires_grad
    assert actual.tolist() == pytest.approx(weights, rel=1e-5)
    loss, _, stats = example_loss(LossConfig(kind="dapo", importance=config), sampling_logprobs=SAMPLING)
    terms = [-1.2, -1.0, -0.5, 2.2]
    assert loss == pytest.approx(sum(w * t for w, t in zip(weights, terms, strict=True)) / 4, rel=1e-5)
    assert stats["importance"].item() == pytest.approx(sum(weights), rel=1e-5)
    assert stats["importance_min"].item() == pytest.approx(min(weights), rel=1e-5)
    assert stats["importance_max"].item() == pytest.approx(max(weights), rel=1e-5)
    # ln 3 + 0 + ln 2 + ln 2.5
    assert stats["mismatch"].item() == pytest.approx(2.708050, rel=1e-5)


def test_stats_of_the_example():
    _, _, stats = example_loss(LossConfig(kind="dapo"), entropy=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert not any(value.requires_grad for value in stats.values())
    values = {key: value.item() for key, value in stats.items()}
    assert values == pytest.approx(
        {"tokens": 4, "ratio": 4.1, "clipped_low": 0, "clipped_high": 1, "entropy": 10}, rel=1e-5
    )
    assert mean_stats(stats) == pytest.approx(
        {"tokens": 4, "ratio": 1.025, "clipped_low": 0, "clipped_high": 0.25, "entropy": 2.5}, rel=1e-5
    )


def test_stats_of_a_channel_are_over_its_own_tokens():
    stats = {"tokens": 8, "clipped_low": 2, "extra/tokens": 4, "extra/clipped_low": 3, "importance_max": 5}
    assert mean_stats({key: torch.tensor(float(value)) for key, value in stats.items()}) == {
        "tokens": 8, "clipped_low": 0.25, "extra/tokens": 4, "extra/clipped_low": 0.75, "importance_max": 5,
    }  # fmt: skip


def test_stats_merge():
    def part(tokens, low, high):
        return {
            key: torch.tensor(value)
            for key, value in {"tokens": tokens, "importance_min": low, "importance_max": high}.items()
        }

    merged = merge_stats([part(2.0, 0.5, 1.5), part(0.0, math.inf, -math.inf), part(3.0, 0.7, 1.9)])
    assert {key: value.item() for key, value in merged.items()} == pytest.approx(
        {"tokens": 5, "importance_min": 0.5, "importance_max": 1.9}
    )


def test_nll():
    # -(1·-1 + 0·-2 + 0.5·-3 + 2·-0.5) / 7 = 3.5 / 7
    assert nll_loss(LOGPROBS, torch.tensor([1.0, 0.0, 0.5, 2.0]), 7.0).item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_first_update_is_reinforce(kind):
    """At ratio 1 the gradient is that of -Σ weight · A · logp."""
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, _ = policy_loss(
        LossConfig(kind=kind),
        logprobs=logprobs,
        advantages=ADVANTAGES,
        sequence=SEQUENCE,
        denominators=DENOMINATORS,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    weights = token_weights(kind, SEQUENCE, DENOMINATORS)
    torch.testing.assert_close(gradient, -weights * ADVANTAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_zero_give_no_gradient(kind):
    logprobs = torch.tensor([-1.0, -500.0, -1e-8], requires_grad=True)  # ratio e^499: not 0 · ∞
    loss, _ = policy_loss(
        LossConfig(kind=kind),
        logprobs=logprobs,
        old_logprobs=torch.tensor([-500.0, -1.0, -1e-8]),
        advantages=torch.zeros(3),
        sequence=torch.tensor([0, 1, 2]),
        denominators=Denominators(3, 3, 4),
    )
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    empty = torch.zeros(0)
    logprobs = torch.zeros(0, requires_grad=True)
    loss, stats = policy_loss(
        LossConfig(kind=kind, kl=0.1, entropy=0.1),
        logprobs=logprobs,
        advantages=empty,
        sequence=torch.zeros(0, dtype=torch.long),
        denominators=Denominators(0, 0, 4),
        sampling_logprobs=empty,
        reference_logprobs=empty,
        entropy=empty,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert stats["tokens"].item() == 0.0


# ---- the result does not depend on how a batch is cut


@st.composite
def batches(draw):
    """Lengths of up to seven completions (some empty), an order and a cut into micro-batches, and a seed."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=7).filter(any))
    order = draw(st.permutations(range(len(lengths))))
    cuts = draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
    micro_batches = [[order[0]]]
    for index, cut in zip(order[1:], cuts, strict=True):
        if cut:
            micro_batches.append([])
        micro_batches[-1].append(index)
    return lengths, micro_batches, draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=150)
@given(batch=batches(), kind=st.sampled_from(KINDS), mode=st.sampled_from(MODES), one_update=st.booleans())
def test_any_cut_and_order_give_the_same_loss_and_gradient(batch, kind, mode, one_update):
    lengths, micro_batches, seed = batch
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    values = torch.randn(6, total, generator=generator, dtype=torch.float64) * 0.3
    logprobs, entropy = (-values[0].exp()).requires_grad_(), values[5].exp().requires_grad_()
    old, sampling, reference = (logprobs.detach() + values[i] for i in (1, 2, 3))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    config = LossConfig(kind=kind, kl=0.2, entropy=0.1, clip_high=0.3, importance={"mode": mode, "cap": 1.2})
    denominators = Denominators(len(lengths), total, 8)

    def loss_of(completions):
        tokens = torch.tensor(
            [starts[c] + t for c in completions for t in range(lengths[c])], dtype=torch.long
        )
        sequence = torch.tensor([s for s, c in enumerate(completions) for _ in range(lengths[c])])
        return policy_loss(
            config,
            logprobs=logprobs[tokens],
            old_logprobs=None if one_update else old[tokens],
            advantages=values[4][tokens],
            sequence=sequence.long(),
            denominators=denominators,
            sampling_logprobs=sampling[tokens],
            reference_logprobs=reference[tokens],
            entropy=entropy[tokens],
        )

    def summed(cut):
        parts = [loss_of(completions) for completions in cut]
        loss = torch.stack([loss for loss, _ in parts]).sum()
        return loss, torch.autograd.grad(loss, (logprobs, entropy)), merge_stats(stats for _, stats in parts)

    expected_loss, expected_gradients, expected_stats = summed([list(range(len(lengths)))])
    loss, gradients, stats = summed(micro_batches)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected_gradients)
    torch.testing.assert_close(stats, expected_stats)
