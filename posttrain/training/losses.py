"""Policy losses: pure functions on flat tokens.

The N trained tokens of all S completions of a micro-batch lie one after the other in tensors [N], and
`sequence` [N] says which completion, 0 to S-1, each belongs to; prompts, padding and tokens that the policy
did not write are not among them. A loss is a sum over these tokens divided by *global* denominators, so the
sum of the losses of all micro-batches and ranks, and of their gradients, does not depend on how the batch was
cut. The tokens of one completion must be in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from posttrain.recipe.schema import ImportanceConfig, LossConfig, LossKind
from posttrain.training.advantages import token_factor

Stats = dict[str, torch.Tensor]

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before the exponential: e²⁰ is far outside every clip range, and an infinite ratio
times a zero advantage would be NaN."""


@dataclass(frozen=True)
class Denominators:
    """What a loss term is divided by, counted over all micro-batches and ranks of one update.

    `sequences` and `tokens` are those that the term trains; `max_tokens` is the cap on a completion, the
    constant of dr_grpo.
    """

    sequences: float
    tokens: float
    max_tokens: int


def token_weights(
    kind: LossKind, sequence: torch.Tensor, denominators: Denominators, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The factor [N] of each token in the sum that is the loss, see `token_factor`."""
    lengths = _lengths(sequence).to(dtype)
    counts = (denominators.sequences, denominators.tokens, denominators.max_tokens)
    return torch.ones_like(lengths) * token_factor(kind, lengths, *counts)


def policy_loss(
    config: LossConfig,
    *,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequence: torch.Tensor,
    denominators: Denominators,
    old_logprobs: torch.Tensor | None = None,
    sampling_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Loss of the tokens given, to be minimised, and sums for logging.

    loss = Σ_t weight_t · (importance_t · surrogate_t + kl · ratio_t · k3_t) - entropy · mean over tokens of H

    The ratio policy / old in front of k3 makes the gradient that of KL(policy ‖ reference), at ratio 1 too;
    without it k3 pulls along KL(reference ‖ policy) (DeepSeek-V3.2, section 3.1; TRL's default). The entropy
    bonus is a token mean under every kind, as in TRL. gspo and rloo have one ratio for a completion and the
    gradient flows through it, so where advantages differ between its tokens their mean counts.

    Args:
        config: kind, clip range, weights and importance correction.
        logprobs: of the tokens under the policy, with gradient [N].
        advantages: of the tokens [N].
        sequence: completion of each token [N].
        denominators: global counts.
        old_logprobs: under the policy at the start of the updates on this batch; None when this is the first
            update, where they equal `logprobs`.
        sampling_logprobs: as the engine reported them; None leaves out the importance correction.
        reference_logprobs: under the reference; needed when `config.kl` is not 0.
        entropy: of the next-token distributions [N]; needed, with gradient, when `config.entropy` is not 0.

    Returns:
        The loss (a scalar, 0 with a gradient of 0 when there are no tokens) and its stats, see `merge_stats`.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    weights = token_weights(config.kind, sequence, denominators, logprobs.dtype)
    ratio = _log_ratio(config.kind, logprobs - old, sequence).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    surrogate = _surrogate(config, ratio, logprobs, advantages, sequence)
    stats = _clip_stats(config, ratio.detach(), advantages)
    if sampling_logprobs is not None:
        importance = importance_weights(config.importance, old, sampling_logprobs, sequence)
        surrogate = importance * surrogate
        stats |= _importance_stats(importance, old, sampling_logprobs)
    loss = (weights * surrogate).sum()
    if config.kl or reference_logprobs is not None:
        assert reference_logprobs is not None, "kl needs reference log-probs"
        kl = ratio * k3(logprobs, reference_logprobs)
        loss = loss + config.kl * (weights * kl).sum()
        stats["kl"] = kl.detach().sum()
    if config.entropy or entropy is not None:
        assert entropy is not None, "the entropy bonus needs entropies"
        loss = loss - config.entropy * entropy.sum() / max(denominators.tokens, 1.0)
        stats["entropy"] = entropy.detach().sum()
    return loss, stats


def nll_loss(logprobs: torch.Tensor, weights: torch.Tensor, denominator: float) -> torch.Tensor:
    """Weighted negative log-likelihood of supervised terms: -Σ weights · logprobs / denominator."""
    return -(weights * logprobs).sum() / denominator


def k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Schulman's (2020) k3 estimate of KL(policy ‖ reference): r - 1 - log r, with r = reference / policy.

    Never negative, and unbiased for tokens that the policy sampled.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def importance_weights(
    config: ImportanceConfig,
    old_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    sequence: torch.Tensor,
) -> torch.Tensor:
    """Weights [N] that correct for sampling from the engine instead of the trainer's policy; no gradient.

    The weight is the ratio trainer / engine of a token's probabilities, or in the sequence modes the product
    over its completion; above `cap` it becomes `cap` (truncate; Yao et al. 2025) or 0 (mask).
    """
    difference = (old_logprobs - sampling_logprobs).detach()
    if config.mode == "none":
        return torch.ones_like(difference)
    if config.mode.startswith("sequence"):
        difference = _sequence_sums(difference, sequence)
    ratio = difference.exp()
    if config.mode.endswith("truncate"):
        return ratio.clamp(max=config.cap)
    return ratio.masked_fill(ratio > config.cap, 0.0)


def _clip_range(config: LossConfig) -> tuple[float, float]:
    return 1 - config.clip_low, 1 + (config.clip_high or config.clip_low)


def _surrogate(
    config: LossConfig,
    ratio: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    sequence: torch.Tensor,
) -> torch.Tensor:
    """The policy-gradient term of each token [N]."""
    low, high = _clip_range(config)
    if config.kind == "cispo":
        # MiniMax 2025: the ratio only weights REINFORCE's gradient, so no token's gradient is cut off.
        return -ratio.detach().clamp(max=high) * advantages * logprobs
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if config.dual_clip is not None:
        bounded = torch.minimum(surrogate, -config.dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    if config.kind == "rloo":
        # The term belongs to the completion and its tokens share it; `token_weights` sums over them.
        surrogate = surrogate / _lengths(sequence)
    return surrogate


def _clip_stats(config: LossConfig, ratio: torch.Tensor, advantages: torch.Tensor) -> Stats:
    low, high = _clip_range(config)
    clipped_low = (ratio < low) & (advantages < 0) & (config.kind != "cispo")
    return {
        "tokens": torch.tensor(float(len(ratio)), device=ratio.device),
        "ratio": ratio.sum(),
        "clipped_low": clipped_low.sum().float(),
        "clipped_high": ((ratio > high) & (advantages > 0)).sum().float(),
    }


def _log_ratio(kind: LossKind, difference: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Log-ratio policy / old policy that applies to each token [N], from those of the tokens."""
    if kind == "gspo":  # Zheng et al. 2025: the geometric mean over the completion
        return _sequence_sums(difference, sequence) / _lengths(sequence)
    if kind == "rloo":
        return _sequence_sums(difference, sequence)
    return difference


def _lengths(sequence: torch.Tensor) -> torch.Tensor:
    """For each token, the number of tokens of its completion [N]."""
    return torch.bincount(sequence)[sequence]


def _sequence_sums(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """For each token, the sum over the tokens of its completion [N]."""
    count = int(sequence.max()) + 1 if len(sequence) else 0
    return values.new_zeros(count).index_add(0, sequence, values)[sequence]


def _importance_stats(importance: torch.Tensor, old: torch.Tensor, sampling: torch.Tensor) -> Stats:
    # The infinities keep the keys the same on a rank without tokens, and lose against any number.
    infinity = importance.new_full((1,), float("inf"))
    return {
        "mismatch": (old - sampling).detach().abs().sum(),
        "importance": importance.sum(),
        "importance_min": torch.cat([importance, infinity]).min(),
        "importance_max": torch.cat([importance, -infinity]).max(),
    }


def merge_stats(parts: Iterable[Stats]) -> Stats:
    """Stats of several micro-batches or ranks as one.

    Keys that end in `_min` and `_max` are extrema, all others sums over tokens: tokens, ratio (policy / old),
    clipped_low and clipped_high (tokens that the clip took out), kl, entropy, importance (weights after the
    cap), mismatch (absolute difference of trainer's and engine's log-probs).
    """
    merged: Stats = {}
    for part in parts:
        for key, value in part.items():
            if key not in merged:
                merged[key] = value
            elif key.endswith("_min"):
                merged[key] = torch.minimum(merged[key], value)
            elif key.endswith("_max"):
                merged[key] = torch.maximum(merged[key], value)
            else:
                merged[key] = merged[key] + value
    return merged


def mean_stats(stats: Stats) -> dict[str, float]:
    """Merged stats for the log: extrema and `tokens` as they are, everything else per token.

    `NAME/…` is per token of `NAME/tokens`.
    """
    means = {}
    for key, value in stats.items():
        name, slash, own = key.rpartition("/")
        is_sum = own != "tokens" and not own.endswith(("_min", "_max"))
        means[key] = float(value) / (max(float(stats[f"{name}{slash}tokens"]), 1.0) if is_sum else 1.0)
    return means
