"""What both vLLM engines ask of vLLM, so that the same requests give the same completions in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from posttrain.errors import RolloutError
from posttrain.rollout.tokens import end_of_sequence_ids
from posttrain.rollout.types import RolloutRequest, Sampling, derive_seed

TEMPERATURES = (0.01, 2.0)
"""vLLM raises lower ones to the first and refuses higher ones."""
BAN = -100.0
"""Added to the logit of a banned token: the largest bias that vLLM takes. It leaves a probability of about
1e-43, and the logits of banned tokens comparable with one another."""
MOST_SCORED = 128
"""Ids whose log-probs vLLM returns for one request."""


def served_dtype(config: PretrainedConfig, dtype: str) -> str:
    """The type to serve in; `auto` is the checkpoint's own (vLLM's would serve float32 ones in 16 bits)."""
    return str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype


def engine_options(
    *,
    dtype: str,
    context: int,
    batch_size: int,
    memory_fraction: float,
    kv_cache_gib: float,
    seed: int,
    on_cpu: bool,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; as options of `vllm serve` they have the same names."""
    return {
        "dtype": dtype,
        "max_model_len": context,
        "max_num_seqs": batch_size,
        "seed": seed,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        # Sampling comes from the request alone, not from the defaults saved with the model.
        "generation_config": "vllm",
        **(_cpu_options(context, kv_cache_gib) if on_cpu else {"gpu_memory_utilization": memory_fraction}),
    }


def _cpu_options(context: int, kv_cache_gib: float) -> dict[str, Any]:
    return {
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enforce_eager": True,
        # A prompt cut in chunks crashes seeded sampling: vLLM winds back the generator after a chunk, and
        # torch's CPU generator has no offset to wind back.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, 4096),
        # The smallest that its attention takes, not its 128: whole blocks are what completions of one prompt
        # share, so that with 128 a shorter prompt is computed for each of them.
        "block_size": 32,
    }


def sampling_options(
    request: RolloutRequest, index: int, context: int, eos: list[int], reserved: Sequence[int]
) -> dict[str, Any]:
    """Sampling parameters of one completion: a request of n becomes n of one, each with its index's seed.

    vLLM's own n derives seeds that overlap between requests with neighbouring seeds. `reserved` are token ids
    that are banned whatever the request says.

    Raises:
        RolloutError: a temperature that vLLM does not offer, or scores that it cannot give.
    """
    sampling = request.sampling
    lowest, highest = TEMPERATURES
    if sampling.temperature != 0 and not lowest <= sampling.temperature <= highest:
        raise RolloutError(
            f"request for example {request.example.id!r}: vLLM samples at temperature 0 or {lowest} to "
            f"{highest}, not {sampling.temperature}"
        )
    if len(sampling.scored_ids) > MOST_SCORED:
        raise RolloutError(
            f"request for example {request.example.id!r} scores {len(sampling.scored_ids)} token ids; vLLM "
            f"reads at most {MOST_SCORED}"
        )
    if sampling.scored_ids and (sampling.top_p < 1 or sampling.top_k > 0):
        raise RolloutError(
            f"request for example {request.example.id!r}: vLLM reads scored_ids only without top_p and top_k"
        )
    options: dict[str, Any] = {
        "max_tokens": min(sampling.max_tokens, context - len(request.prompt_ids)),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": derive_seed(sampling.seed, index),
        "stop": list(sampling.stop),
        "stop_token_ids": sorted({*eos, *sampling.stop_token_ids}),
        "include_stop_str_in_output": True,
        "logprobs": 0,  # of the sampled token, beside those of scored ids
    }
    if banned := {*reserved, *sampling.banned_ids}:
        options["logit_bias"] = dict.fromkeys(sorted(banned), BAN)
    if sampling.scored_ids:
        options["logprob_token_ids"] = list(sampling.scored_ids)
    return options


def scored_logits(logprobs: ArrayLike, sampling: Sampling, reserved: Sequence[int]) -> NDArray[np.float64]:
    """Logits (T, K) of a request's scored ids, up to a constant for each position.

    `logprobs` (T, K) are vLLM's: of the distribution it sampled from, that is after the bias of banned tokens
    and the temperature.
    """
    banned = {*reserved, *sampling.banned_ids}
    bias = np.array([BAN if token in banned else 0.0 for token in sampling.scored_ids])
    return np.asarray(logprobs, dtype=np.float64) * (sampling.temperature or 1.0) - bias


def stop_ids(path: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end every completion of the model at `path`."""
    try:
        generation = GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:  # a checkpoint need not have one
        generation = None
    return sorted(end_of_sequence_ids(generation, tokenizer))
