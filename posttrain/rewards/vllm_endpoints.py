"""Reward models on a vLLM server: its routes /classify, /score and /pooling, as of vLLM 0.32.

    served_by       route      what the server runs                            what it reads
    vllm_classify   /classify  sequence classification, any number of labels   template, or its chat template
    vllm_score      /score     sequence classification with one label          a pair that it puts together
    vllm_pooling    /pooling   as /classify; or, with `head: token`, token     template, or its chat template
                               classification, a row of scores for each token

A vLLM server does one kind of pooling: a checkpoint for sequence classification answers /classify and
/pooling, and /score if it has one label; one for token classification answers /pooling alone.

Every text is a request, many at once: the server puts them into batches by itself, and says of each how many
tokens it has read. It is asked for raw outputs (`use_activation: false`); activations are applied here, so
that the values are those of the same model loaded here. It cuts a text that is too long from its beginning, a
beginning-of-sequence token included; the places of steps are asked of its /tokenize, as the score of a step
is that of its last token.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from posttrain.errors import DataError, RewardError
from posttrain.recipe.rewards_schema import RewardModelConfig
from posttrain.rewards.client import JsonClient
from posttrain.rewards.counts import count
from posttrain.rewards.texts import fill_pair, plain_prompt, reduce_steps, split_steps, well_formed
from posttrain.rollout.types import Message, Prompt

ROUTES = {"vllm_classify": "/classify", "vllm_score": "/score", "vllm_pooling": "/pooling"}


class VllmEndpoint:
    """One reward model on a vLLM server.

    Args:
        client: of the server, without a path.
        config: the model's, whose `served_by` is one of ROUTES.

    Raises:
        RewardError: a setting that the route has nothing for.
    """

    def __init__(self, client: JsonClient, config: RewardModelConfig):
        self._client = client
        self._config = config
        self._limit = config.max_length
        route = ROUTES[config.served_by]
        if isinstance(config.label, str):
            raise RewardError(f"{client.place} does not say the names of its labels: set label to a number")
        if config.served_by == "vllm_score" and config.template is not None:
            raise RewardError(f"{route} of {client.place} makes its text by itself: it takes no template")
        if config.head == "token" and config.served_by != "vllm_pooling":
            raise RewardError(f"{route} of {client.place} has no scores of tokens: use vllm_pooling")

    async def scores(self, samples: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Scores of prompts and completions.

        Counts `tokens` that the server has read, and `truncated` texts.

        Raises:
            RewardUnavailable: the server is away.
            RewardError: it cannot score one of the samples, or what it serves does not fit the settings.
        """
        return list(await asyncio.gather(*(self._score(prompt, text) for prompt, text in samples)))

    async def _score(self, prompt: Prompt, completion: str) -> float:
        config, limit = self._config, await self._max_length()
        ends: tuple[int, ...] = ()
        completion = well_formed(completion)
        if config.head == "token":
            try:
                completion, ends = split_steps(completion, config.step_separator)
            except DataError as error:
                raise RewardError(str(error)) from error
        body = {
            **self._content(prompt, completion),
            "use_activation": False,
            "truncate_prompt_tokens": limit,
            "truncation_side": "left",
        }
        rows, tokens = await self._client.post(body, ROUTES[config.served_by], check=self._read)
        count("tokens", tokens)
        cut = await self._cut(prompt, completion, tokens) if tokens >= limit else 0
        if config.head != "token":
            return self._activate(rows[0])
        places = await asyncio.gather(
            *(self._length(prompt, completion[:end], open_end=True) for end in ends)
        )
        return reduce_steps([self._activate(rows[place - 1 - cut]) for place in places], config.step_reduce)

    async def _cut(self, prompt: Prompt, completion: str, tokens: int) -> int:
        """How many tokens the server has cut from the beginning of a text of which it has read `tokens`."""
        cut = await self._length(prompt, completion) - tokens
        if cut <= 0:
            return 0
        alone = await self._tokenize({"prompt": completion, "add_special_tokens": False})
        if alone >= tokens:
            raise RewardError(f"the completion alone has {alone} tokens, of which {tokens} are read")
        count("truncated")
        return cut

    def _content(self, prompt: Prompt, completion: str) -> dict[str, Any]:
        """The text of a request as the route wants it."""
        config = self._config
        if config.served_by == "vllm_score":
            return {"text_1": plain_prompt(prompt), "text_2": completion}
        if config.template is not None:
            return {"input": fill_pair(config.template, plain_prompt(prompt), completion)}
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        clean = [{**message, "content": well_formed(message["content"])} for message in messages]
        return {"messages": [*clean, {"role": "assistant", "content": completion}]}

    async def _length(self, prompt: Prompt, completion: str, open_end: bool = False) -> int:
        """Tokens of a text; with `open_end` up to the end of the completion."""
        content = self._content(prompt, completion)
        if "messages" in content:
            options = {"add_generation_prompt": False, "continue_final_message": open_end}
            return await self._tokenize({**content, **options})
        if self._config.served_by == "vllm_score":
            return await self._tokenize({"prompt": content["text_1"] + content["text_2"]})
        text = content["input"]
        if open_end:
            assert self._config.template is not None
            before = self._config.template[: self._config.template.index("{completion}")]
            text = fill_pair(before, plain_prompt(prompt), "") + completion
        return await self._tokenize({"prompt": text})

    async def _tokenize(self, body: dict[str, Any]) -> int:
        """The server's count of tokens."""
        return await self._client.post(body, "/tokenize", check=lambda answer: int(answer["count"]))

    async def _max_length(self) -> int:
        """Tokens that a text may have: `max_length`, or what the server says."""
        if self._limit is None:
            models = await self._client.get("/v1/models", check=lambda answer: answer["data"])
            self._limit = int(models[0]["max_model_len"])
        return self._limit

    def _read(self, answer: Any) -> tuple[list[list[float]], int]:
        """A row of outputs for each token, or one for the text; and how many tokens were read."""
        (data,) = answer["data"]
        tokens = int(answer["usage"]["prompt_tokens"])
        if self._config.served_by == "vllm_score":
            rows = [[data["score"]]]
        elif self._config.served_by == "vllm_classify":
            rows = [data["probs"]]
        else:
            nested = bool(data["data"]) and isinstance(data["data"][0], list)
            rows = data["data"] if nested else [data["data"]]
            if nested != (self._config.head == "token"):
                kind = "token" if nested else "sequence"
                raise RewardError(f"{self._client.place} serves {kind} classification: set head to {kind}")
            if nested and len(rows) != tokens:
                raise ValueError(f"{len(rows)} rows for {tokens} tokens")
        values = [value for row in rows for value in row]
        if not values or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError("the outputs are not finite numbers")
        return rows, tokens

    def _activate(self, row: Sequence[float]) -> float:
        """The output of the label that counts, after the activation."""
        label, activation = self._config.label, self._config.activation
        if label is None and len(row) > 1:
            raise RewardError(
                f"{self._client.place} serves {len(row)} labels: set label to the number of one"
            )
        if activation == "softmax" and len(row) == 1:
            raise RewardError(f"{self._client.place} serves one label, whose softmax is always 1")
        number = int(label or 0)
        if not 0 <= number < len(row):
            raise RewardError(f"{self._client.place} serves {len(row)} labels, and label is {number}")
        if activation == "none":
            return float(row[number])
        if activation == "sigmoid":
            return 0.5 * (1.0 + math.tanh(0.5 * row[number]))
        largest = max(row)
        powers = [math.exp(value - largest) for value in row]
        return powers[number] / sum(powers)
