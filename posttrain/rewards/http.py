"""The reward `http`: what a server says about a completion.

Request (POST, one for each completion):

    {"prompt": "What is 2+2?",            or a list of {"role": …, "content": …}
     "completion": "4",
     "answer": "4",                       or null
     "columns": {…},                      the dataset's other columns
     "example_id": "row-17"}

Answer: `{"score": 0.5}`, or `{"score": null}` where the reward does not apply. Anything else is no score: the
request is repeated, and when that does not help, the sample is left unscored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.errors import RecipeError
from posttrain.rewards.registry import RewardInfo, reward
from posttrain.rollout.types import Completion, Example


@reward("http", version="1", deterministic=False)
class Http:
    """The score that a server gives; see `posttrain.rewards.http` for what it is sent and what it answers.

    A recipe that asks several servers names each with `use`: `{name: style, use: http, args: {url: …}}`.
    While a server is away the run pauses (`reward_options.max_outage`).

    Args:
        url: where the server listens, e.g. `http://node1:8000/score`.
        token_env: environment variable with a bearer token.
        headers: further headers; no place for secrets, which a recipe must not have.
        score_key: the key of the score in the answer.
        timeout: seconds of one attempt.
        retries: repetitions of an attempt that failed.
        rate: requests per second; None sets no limit. Like `concurrency`, of each process that trains.
        concurrency: requests under way at once.
        range: lowest and highest score; anything outside is an error.
        deterministic: equal samples have equal scores, so that known ones need no request.
        version: of the server's model, to be changed with it.

    Raises:
        RecipeError: an argument is wrong, or the environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        token_env: str | None = None,
        headers: Mapping[str, str] | None = None,
        score_key: str = "score",
        timeout: float = 30.0,
        retries: int = 4,
        rate: float | None = None,
        concurrency: int = 32,
        range: Sequence[float] | None = None,
        deterministic: bool = False,
        version: str = "1",
    ):
        if timeout <= 0 or retries < 0 or concurrency < 1 or (rate is not None and rate <= 0):
            raise RecipeError("reward 'http' needs positive timeout, rate and concurrency, and retries >= 0")
        if range is not None and not (len(range) == 2 and range[0] < range[1]):
            raise RecipeError(f"reward 'http': its range is [lowest, highest], not {range}")
        from posttrain.rewards.client import JsonClient  # imports what `posttrain plan` need not wait for

        self._client = JsonClient(
            "http", url, headers=headers, token_env=token_env, timeout=timeout, retries=retries, rate=rate
        )
        self._key = score_key
        self._declared: dict[str, Any] = {
            "version": str(version),
            "deterministic": deterministic,
            "range": None if range is None else (float(range[0]), float(range[1])),
            "concurrency": concurrency,
            "timeout": self._client.patience(concurrency),
        }

    def declare(self, info: RewardInfo) -> RewardInfo:
        """With what the arguments say; the time-out is what all attempts and waits may take together."""
        return replace(info, **self._declared)

    async def __call__(self, completion: Completion, example: Example) -> float | None:
        """The server's score."""
        body = {
            "prompt": example.prompt,
            "completion": completion.text,
            "answer": example.answer,
            "columns": plain(example.columns),
            "example_id": example.id,
        }
        return await self._client.post(body, check=self._score)

    def _score(self, answer: Any) -> float | None:
        score = answer[self._key]
        if score is None:
            return None
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{self._key} is {score!r} instead of a number or null")
        return float(score)


def plain(value: Any) -> Any:
    """A value of a dataset as JSON has it: lists of arrays, texts of times, null for what is not finite.

    Raises:
        TypeError: JSON has nothing for it.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if callable(getattr(value, "tolist", None)):
        return plain(value.tolist())
    if callable(getattr(value, "isoformat", None)):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a column holds a {type(value).__name__}, which JSON has not")
