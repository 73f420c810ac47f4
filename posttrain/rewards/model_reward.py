"""Rewards that are reward models: what a worker process calls, and how one is registered.

Whatever runs the model is a server (`posttrain.rewards.serve`, or one of vLLM's). The trainer sees to it that
there is one (`posttrain.rewards.model_server`); here it is only asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pydantic import ValidationError

from posttrain.errors import RewardError
from posttrain.recipe.rewards_schema import RewardModelConfig
from posttrain.rewards.checkpoint import find_checkpoint
from posttrain.rewards.client import JsonClient
from posttrain.rewards.counts import count
from posttrain.rewards.lease import Room
from posttrain.rewards.registry import Registered, RewardInfo, add
from posttrain.rollout.types import Completion, Example, Prompt

KIND = "reward model"
CONCURRENCY = 128
"""Requests under way at once: what the server can choose texts of like length from."""
ANSWER_SECONDS = 300.0
"""Time for one request, which waits for all those before it."""
RETRIES = 3


class ModelReward:
    """A reward that asks the server of a reward model.

    Args:
        model: what a recipe says about it under `reward_models`.

    Counts, besides those of the client: `tokens` that the model has seen, and `truncated` samples, the
    beginning of whose prompt was cut.
    """

    def __init__(self, model: Mapping[str, Any] | RewardModelConfig):
        self._config = RewardModelConfig.model_validate(model)
        self._endpoint: Endpoint | None = None

    def declare(self, info: RewardInfo) -> RewardInfo:
        """With the model; version and hash are added by who knows its server."""
        return replace(
            info,
            kind=KIND,
            origin=self._config.path or self._config.url or "",
            range=self._config.range,
            concurrency=CONCURRENCY,
            timeout=(RETRIES + 1) * ANSWER_SECONDS,
            model=self._config.model_dump(mode="json"),
        )

    async def __call__(self, completion: Completion, example: Example) -> float:
        """The model's score.

        Raises:
            RewardUnavailable: its server is away.
            RewardError: it cannot score this sample.
        """
        if self._endpoint is None:
            self._endpoint = endpoint(self._connect(), self._config)
        (score,) = await self._endpoint.scores([(example.prompt, completion.text)])
        return score

    def _connect(self) -> JsonClient:
        config = self._config
        limits: dict[str, Any] = {"timeout": ANSWER_SECONDS, "retries": RETRIES}
        if config.url is not None:
            return JsonClient(KIND, config.url, token_env=config.token_env, **limits)
        room = Room.of(config, find_checkpoint(config, download=False))
        return JsonClient(KIND, "http://localhost", socket=str(room.socket), **limits)


class Endpoint(Protocol):
    """A server of one model, and how it is asked."""

    async def scores(self, samples: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Scores of prompts and completions.

        Raises:
            RewardUnavailable: the server is away.
            RewardError: it cannot score one of the samples, or fails.
        """
        ...


def endpoint(client: JsonClient, config: RewardModelConfig) -> Endpoint:
    """What `config.served_by` says of a server that a client connects to.

    Raises:
        RewardError: a setting that such a server has nothing for.
    """
    if config.served_by == "posttrain":
        return PosttrainEndpoint(client)
    from posttrain.rewards.vllm_endpoints import VllmEndpoint

    return VllmEndpoint(client, config)


class PosttrainEndpoint:
    """A model that `posttrain rewards serve` has."""

    def __init__(self, client: JsonClient):
        self._client = client

    async def scores(self, samples: Sequence[tuple[Prompt, str]]) -> list[float]:
        """See `Endpoint.scores`; all samples are one request."""
        body = {"samples": [{"prompt": prompt, "completion": text} for prompt, text in samples]}
        answer = await self._client.post(body, "/score", check=lambda answer: _checked(answer, len(samples)))
        count("tokens", sum(answer["tokens"]))
        if any(answer["truncated"]):
            count("truncated", sum(answer["truncated"]))
        for error in answer["errors"]:
            if error:
                raise RewardError(error)
        return [float(score) for score in answer["scores"]]


def _checked(answer: Any, samples: int) -> Any:
    """An answer of `posttrain rewards serve`, if it is one."""
    for key, kinds in (
        ("scores", int | float | None),
        ("errors", str | None),
        ("tokens", int),
        ("truncated", bool),
    ):
        values = answer[key]
        if len(values) != samples or not all(isinstance(value, kinds) for value in values):
            raise ValueError(f"{key} is not what it should be")
    if any(
        (score is None) != bool(error)
        for score, error in zip(answer["scores"], answer["errors"], strict=True)
    ):
        raise ValueError("there is neither a score nor an error")
    return answer


def prompt_and_text(completion: Completion, example: Example) -> tuple[str, str]:
    """What a score depends on."""
    return json.dumps(example.prompt), completion.text


def register_reward_model(name: str, **settings: Any) -> None:
    """Register a reward model under a name that recipes can list in `rewards`.

        register_reward_model("helpfulness", path="org/reward-model", revision="v2", batch_tokens=32768)

    Call it in a script, in a file that a recipe names (`{name: helpfulness, from: my_models.py}`), or in a
    module of the entry-point group `posttrain.rewards`.

    Args:
        name: what recipes call it.
        settings: `path` or `url`, and the other keys of a recipe's `reward_models`
            (`posttrain.recipe.schema.RewardModelConfig`): revision, template, head, label, activation,
            device, dtype, batch_tokens, max_length, range, …

    Raises:
        RewardError: a setting is wrong, or the name is taken.
    """
    try:
        model = ModelReward(RewardModelConfig.model_validate(settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RewardError(f"reward model {name!r}: {f'{key}: ' if key else ''}{first['msg']}") from error
    add(Registered(model.declare(RewardInfo(name, deterministic=True)), model))
