"""The server of a reward model: `posttrain rewards serve`, and what the trainer starts for its own models.

    POST /score    {"samples": [{"prompt": "…" or [{"role": …, "content": …}], "completion": "…"}, …]}
                   → {"scores": […], "tokens": […], "truncated": […], "errors": […]}, one of each per sample;
                   a sample without a score has null there and one sentence among the errors
    GET /info      the model: version, hash of its files, labels, device, limits
    GET /health    200 once the model is loaded
    GET /metrics   counts in Prometheus' text format

Bad requests are answered with a status of 4xx and {"error": "one sentence"}. Samples of all requests that
wait are scored together, those of like length in one batch.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

import posttrain
from posttrain.errors import PosttrainError, RewardError
from posttrain.recipe.rewards_schema import RewardModelConfig
from posttrain.rewards.lease import LOOK_SECONDS, Room, Vigil
from posttrain.rewards.listen import bind_socket
from posttrain.rewards.model import Pair, RewardModel, Score, Text, cut
from posttrain.rewards.serve_metrics import ServerMetrics

MAX_BODY = 64 * 2**20
"""Bytes of a request."""
MAX_SAMPLES = 4096
"""Samples of a request."""
MAX_WAITING = 65536
"""Samples that wait to be scored, over all requests; more are turned away with status 503."""
MAX_FAILURES = 3
"""Batches in a row that the model fails at before the server ends: a GPU may be of no use any more."""
GRACE_SECONDS = 5
"""Time for requests under way when the server is asked to end."""


class BadRequest(Exception):
    """A request that is refused, with a status and one sentence."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


@dataclass
class _Waiting:
    text: Text
    score: asyncio.Future[Score]


class Batcher:
    """Scores the samples of all requests together, a batch at a time.

    A batch is the sample that waits longest, and those of like length. Texts are encoded in one thread and
    scored in another, so that answers about health do not wait for either.
    """

    def __init__(self, model: RewardModel, metrics: ServerMetrics, give_up: Callable[[], None]):
        self._model = model
        self._metrics = metrics
        self._give_up = give_up
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._encoder = ThreadPoolExecutor(1)
        self._scorer = ThreadPoolExecutor(1)
        self._failures = 0

    async def score(self, samples: Sequence[Pair]) -> list[Score]:
        """Scores of the samples of one request.

        Raises:
            BadRequest: too many are waiting.
        """
        if len(self._waiting) + len(samples) > MAX_WAITING:
            raise BadRequest(503, f"{len(self._waiting)} samples are waiting already")
        loop = asyncio.get_running_loop()
        results: list[Awaitable[Score]] = []
        for text in await loop.run_in_executor(self._encoder, self._model.encode, samples):
            score: asyncio.Future[Score] = loop.create_future()
            results.append(score)
            if isinstance(text, Text):
                self._waiting.append(_Waiting(text, score))
            else:
                score.set_result(Score(error=text))
        self._metrics.waiting = len(self._waiting)
        self._arrived.set()
        return list(await asyncio.gather(*results))

    async def run(self) -> None:
        """Score what waits, for ever."""
        while True:
            await self._arrived.wait()
            while self._waiting:
                await self._score_batch(self._take_batch())
            self._arrived.clear()

    def _take_batch(self) -> list[_Waiting]:
        lengths = [len(waiting.text.ids) for waiting in self._waiting]
        chosen = set(next(batch for batch in cut(lengths, self._model.config.batch_tokens) if 0 in batch))
        batch = [self._waiting[number] for number in sorted(chosen)]
        self._waiting = [waiting for number, waiting in enumerate(self._waiting) if number not in chosen]
        self._metrics.waiting = len(self._waiting)
        return batch

    async def _score_batch(self, batch: Sequence[_Waiting]) -> None:
        texts = [waiting.text for waiting in batch]
        loop = asyncio.get_running_loop()
        try:
            with self._metrics.batch(sum(len(text.ids) for text in texts), len(texts)):
                scores = await loop.run_in_executor(self._scorer, self._model.run, texts)
            self._failures = 0
        except Exception as error:
            print(f"a batch failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            reason = f"the model failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            scores = [Score(None, len(text.ids), text.truncated, reason) for text in texts]
            self._failures += 1
            if self._failures == MAX_FAILURES:
                self._give_up()
        for waiting, score in zip(batch, scores, strict=True):
            if not waiting.score.done():
                waiting.score.set_result(score)


def make_app(model: RewardModel, give_up: Callable[[], None], token: str | None = None) -> FastAPI:
    """The server's application.

    `give_up` is called when the model fails again and again. With a `token`, requests other than for health
    need it as bearer token.
    """
    metrics = ServerMetrics()
    batcher = Batcher(model, metrics, give_up)
    info = describe(model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batches = asyncio.create_task(batcher.run())
        yield
        batches.cancel()

    app = FastAPI(title="posttrain reward model", version=posttrain.__version__, lifespan=lifespan)

    @app.middleware("http")
    async def answer(request: Request, route: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("Authorization", "").encode()
        if (
            token is not None
            and request.url.path != "/health"
            and not hmac.compare_digest(given, f"Bearer {token}".encode())
        ):
            response: Response = JSONResponse({"error": "the bearer token is missing or wrong"}, 401)
        else:
            response = await route(request)
        metrics.answered(request.url.path, response.status_code)
        return response

    @app.exception_handler(BadRequest)
    async def refuse(request: Request, error: BadRequest) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        routes = "POST /score, GET /info, /health, /metrics"
        text = f"there is no {request.method} {request.url.path}; there are {routes}"
        return JSONResponse({"error": text}, getattr(error, "status_code", 404))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def model_info() -> dict[str, Any]:
        return info

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counts() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        samples = read_samples(await _body(request))
        scores = await batcher.score(samples)
        metrics.scored(scores)
        return JSONResponse(
            {
                "scores": [score.value for score in scores],
                "tokens": [score.tokens for score in scores],
                "truncated": [score.truncated for score in scores],
                "errors": [score.error or None for score in scores],
            }
        )

    return app


def describe(model: RewardModel) -> dict[str, Any]:
    """What `/info` answers."""
    return {
        "model": model.config.path,
        "version": model.checkpoint.version(model.config),
        "revision": model.checkpoint.commit,
        "sha256": model.checkpoint.sha256(),
        "head": model.head,
        "labels": model.labels,
        "max_length": model.max_length,
        "device": model.device,
        "dtype": model.dtype,
        "settings": model.config.model_dump(mode="json"),
        "posttrain": posttrain.__version__,
    }


def read_samples(body: bytes) -> list[Pair]:
    """The prompts and completions of a request.

    Raises:
        BadRequest: it is something else.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest(400, "the body is not valid JSON") from None
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list) or not samples:
        raise BadRequest(422, 'the body has to be {"samples": [{"prompt": …, "completion": …}, …]}')
    if len(samples) > MAX_SAMPLES:
        raise BadRequest(413, f"{len(samples)} samples in one request; at most {MAX_SAMPLES} are taken")
    return [_pair(number, sample) for number, sample in enumerate(samples)]


def _pair(number: int, sample: Any) -> Pair:
    if not isinstance(sample, dict):
        raise BadRequest(422, f"samples[{number}] is not an object with prompt and completion")
    prompt, completion = sample.get("prompt"), sample.get("completion")
    if not isinstance(completion, str):
        raise BadRequest(422, f"samples[{number}].completion is not a text")
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    )
    if not isinstance(prompt, str) and not messages:
        raise BadRequest(422, f"samples[{number}].prompt is neither a text nor a list of messages")
    return prompt, completion  # type: ignore[return-value]


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise BadRequest(413, f"the body has more than {MAX_BODY >> 20} MiB")
    return bytes(body)


def serve(
    config: RewardModelConfig,
    listener: socket.socket,
    *,
    token: str | None = None,
    vigil: Vigil | None = None,
    ready: Callable[[RewardModel], None] = lambda model: None,
) -> None:
    """Load a model and answer until SIGTERM or Ctrl-C.

    Args:
        config: the model, with `path`.
        listener: a socket that is bound; nobody is answered before the model is loaded.
        token: bearer token that requests need.
        vigil: of a shared server, which ends when nobody uses it.
        ready: called when the model is loaded and requests are answered.

    Raises:
        RewardError: the model cannot be loaded, or failed again and again.
    """
    model = RewardModel(config)
    failed = False

    def give_up() -> None:
        nonlocal failed
        failed = server.should_exit = True

    app = make_app(model, give_up, token)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=GRACE_SECONDS
        )
    )

    async def run() -> None:
        serving = asyncio.create_task(server.serve([listener]))
        announced = False
        while not serving.done():
            if server.started and not announced:
                announced = True
                ready(model)
            if server.started and not server.should_exit and vigil is not None and vigil.over():
                server.should_exit = True
            await asyncio.wait([serving], timeout=LOOK_SECONDS)
        await serving

    # uvicorn ends in good order at either signal, and raises it again afterwards; that is no error here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    asyncio.run(run())
    if failed:
        raise RewardError(
            f"the server of {config.path} ended, as the model failed at {MAX_FAILURES} batches in a row"
        )


def main(job: str) -> int:
    """Run the shared server that a trainer has asked for; returns its exit code.

    `job` is JSON: the `model`, the `room`, and the seconds it may be `idle`.
    """
    asked = json.loads(job)
    config, room = RewardModelConfig.model_validate(asked["model"]), Room(Path(asked["room"]))
    own = room.move_in()
    if own is None:
        print("there is a server already")
        return 0
    try:
        listener = bind_socket(room.socket)
        name = f"{config.path}, process {os.getpid()}"
        serve(
            config,
            listener,
            vigil=Vigil(room, asked["idle"]),
            ready=lambda model: print(f"Serving {name}", flush=True),
        )
    except PosttrainError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(
        code
    )  # whoever has ended the server waits for its memory, and taking the interpreter down is slow
