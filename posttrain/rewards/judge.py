"""The reward `llm_judge`: what a language model says about a completion.

The judge answers at an OpenAI-compatible server (`POST URL/chat/completions`: vLLM, SGLang, hosted ones), or
it is the policy itself on the run's own engine (`engine: shared`, `posttrain.rewards.shared`). What it is
asked and how it is understood is the same in both cases (`posttrain.rewards.judge_text`, `…judge_rounds`).

Besides what the client counts (`posttrain.rewards.client`) and the plan (`posttrain.rewards.judge_rounds`):

    prompt_tokens, completion_tokens   as the server reports them, of unreadable answers too
    cost                               of these tokens, where the recipe has a price
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from posttrain.errors import RecipeError, RewardError, RewardUnavailable
from posttrain.rewards.counts import count
from posttrain.rewards.judge_rounds import Answer, JudgePlan, Question, Rounds, Values
from posttrain.rewards.judge_text import (
    RUBRICS,
    TEMPLATES,
    Mode,
    VerdictForm,
    check_template,
    text_or_file,
)
from posttrain.rewards.registry import RewardInfo, reward
from posttrain.rollout.types import Completion, Example

if TYPE_CHECKING:
    from posttrain.rewards.client import JsonClient

GROUPS_AT_ONCE = 4
"""Groups that a pairwise judge has under way: the questions of one are many, the last of them few."""
MOST_COMPARED = 64
"""Completions of a group that the time-out of a pairwise judge reckons with."""


@reward("llm_judge", version="1", range=(0.0, 1.0), deterministic=False)
class LlmJudge:
    """What a language model says: a score, agreement with the reference answer, or a preference.

    `pointwise` rates a completion on a scale and `reference` its agreement with the example's answer (it does
    not apply without one); the value is the score mapped to [0, 1], or the score itself with `raw`.
    `pairwise` compares the completions of a group with each other, every pair in both orders; if the orders
    disagree it is a tie. The value is the share of its comparisons that a completion has won, a tie being a
    half: it says how good a completion is within its group, and cannot be compared between groups. A group
    of one does not apply, nor does a completion that is drawn again after the rest of its group is scored.

    An answer without a verdict in the stated form is asked for again, with another seed and a temperature of
    at least 0.5; a completion whose every question stays without one is unscored.

    Args:
        url: base of an OpenAI-compatible API, e.g. `http://node1:8000/v1`.
        engine: `shared` asks the policy itself, on the run's engine, instead of `url`.
        model: the name the server knows the judge by.
        mode: pointwise, reference or pairwise.
        rubric: the criteria, as text or as the path of a .txt or .md file; None are those of the mode.
        template: everything the judge is told, as text or file, with the fields {prompt}, {completion} (or
            {completion_a} and {completion_b}), {reference}, {rubric}, {low}, {high}, {columns.NAME}, {mark}
            (of the tags around all material) and {verdict} (how to answer). None is that of the mode.
        scale: lowest and highest score, integers.
        raw: the value is the mean score instead of its place on the scale.
        structured: answers are JSON, constrained to a schema by the server (`response_format`).
        reason: characters that a structured answer may spend on reasons before its verdict; 0 for none.
        show_thinking: off shows the judge what comes after `</think>` alone.
        samples: votes for each question, whose mean counts.
        opponents: pairwise: every completion meets the first so many of its group; None is all of them.
        temperature: of the judge.
        max_tokens: of an answer, thinking included. One that is cut off has no verdict.
        seed: goes into the seed of every question, with all that the question says.
        parse_retries: how often an answer without a verdict is asked for again.
        body: further keys of each request, e.g. `{chat_template_kwargs: {enable_thinking: false}}`.
        token_env: environment variable with a bearer token.
        timeout: seconds of one attempt.
        retries: repetitions of an attempt that failed.
        rate: requests per second; None sets no limit. Like `concurrency`, of each process that trains.
        concurrency: requests under way at once.
        price: of a million prompt tokens and of a million completion tokens.
        deterministic: known completions are not judged again.

    Raises:
        RecipeError: an argument is wrong, or the environment variable is not set.
    """

    def __init__(
        self,
        url: str | None = None,
        engine: Literal["shared"] | None = None,
        model: str | None = None,
        mode: Mode = "pointwise",
        rubric: str | None = None,
        template: str | None = None,
        scale: Sequence[int] = (1, 10),
        raw: bool = False,
        structured: bool = False,
        reason: int = 600,
        show_thinking: bool = True,
        samples: int = 1,
        opponents: int | None = None,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        seed: int = 0,
        parse_retries: int = 2,
        body: Mapping[str, Any] | None = None,
        token_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        rate: float | None = None,
        concurrency: int = 32,
        price: Sequence[float] | None = None,
        deterministic: bool = False,
    ):
        _check_place(url, engine, structured or deterministic)
        _check_judging(mode, scale, samples, opponents, temperature)
        if min(max_tokens, concurrency) < 1 or min(reason, parse_retries, retries) < 0 or temperature < 0:
            _refuse("max_tokens and concurrency have to be at least 1, and no number negative")
        if timeout <= 0 or (rate is not None and rate <= 0):
            _refuse("timeout and rate have to be positive")
        if price is not None and (len(price) != 2 or min(price) < 0):
            _refuse("price is [per million prompt tokens, per million completion tokens]")
        criteria = RUBRICS[mode] if rubric is None else text_or_file("llm_judge", "rubric", rubric)
        form = TEMPLATES[mode] if template is None else text_or_file("llm_judge", "template", template)
        check_template("llm_judge", form, mode)
        self._plan = JudgePlan(
            form=VerdictForm(mode, (scale[0], scale[1]), structured, reason),
            template=form,
            rubric=criteria.strip(),
            raw=raw and mode != "pairwise",
            show_thinking=show_thinking,
            samples=samples,
            opponents=opponents,
            temperature=temperature,
            parse_retries=parse_retries,
            seed=seed,
        )
        self.max_tokens = max_tokens
        self._body = {
            "max_tokens": max_tokens,
            **({} if model is None else {"model": model}),
            **({} if not structured else {"response_format": _response_format(self._plan.form)}),
            **(body or {}),
        }
        self._price = (0.0, 0.0) if price is None else (float(price[0]), float(price[1]))
        self._deterministic = deterministic
        self._concurrency = concurrency
        import asyncio  # slow to import, and `posttrain plan` gets to this module

        self._turns = asyncio.Semaphore(concurrency)
        self._client: JsonClient | None = None
        if url is not None:
            from posttrain.rewards.client import JsonClient  # imports what `posttrain plan` need not wait for

            self._client = JsonClient(
                "llm_judge", url, token_env=token_env, timeout=timeout, retries=retries, rate=rate
            )

    def declare(self, info: RewardInfo) -> RewardInfo:
        """With what the arguments say.

        Template and rubric are part of the version. The time-out is what all attempts, waits and rounds may
        take together.
        """
        plan = self._plan
        pairwise = plan.form.mode == "pairwise"
        told = hashlib.sha256(f"{plan.template}\0{plan.rubric}".encode()).hexdigest()[:8]
        timeout = info.timeout
        groups = min(GROUPS_AT_ONCE, self._concurrency)
        if self._client is not None:
            # For each completion: its questions, with those of the others under way, one turn after another.
            turns = max(groups * 2 * MOST_COMPARED / self._concurrency, 1.0) if pairwise else 1.0
            rounds = (1 + plan.parse_retries) * plan.samples * turns
            timeout = rounds * self._client.patience(self._concurrency)
        low, high = plan.form.scale
        return replace(
            info,
            version=f"{info.version}-{told}",
            range=(float(low), float(high)) if plan.raw else (0.0, 1.0),
            deterministic=self._deterministic,
            batched=pairwise,
            concurrency=groups if pairwise else self._concurrency,
            timeout=timeout,
        )

    def rounds(
        self, completions: Sequence[Completion], examples: Sequence[Example], control: Collection[str] = ()
    ) -> Rounds:
        """The questions about one completion, or, pairwise, those of a group (see `JudgePlan.rounds`)."""
        return self._plan.rounds(completions, examples, control)

    async def __call__(self, completions: Sequence[Completion], examples: Sequence[Example]) -> Values:
        """One value for each completion, None, or why there is none."""
        if self._client is None:
            raise RewardError("the run's own engine is asked by the trainer, not by a reward worker")
        import asyncio

        rounds = self.rounds(completions, examples)
        try:
            questions = next(rounds)
            while True:
                answers = await asyncio.gather(*(self._ask(self._client, asked) for asked in questions))
                away = next((answer for answer in answers if isinstance(answer, RewardUnavailable)), None)
                if away is not None:
                    raise away
                questions = rounds.send(answers)
        except StopIteration as end:
            return end.value

    async def _ask(self, client: JsonClient, question: Question) -> Answer | RewardError:
        """The judge's answer, or why there is none: other questions may have one."""
        body = {
            "messages": [{"role": "user", "content": question.text}],
            "temperature": question.temperature,
            "seed": question.seed,
            **self._body,
        }
        async with self._turns:
            try:
                return await client.post(body, "/chat/completions", check=self._read)
            except RewardError as error:
                return error

    def _read(self, reply: Any) -> Answer:
        """What a chat completion says; its tokens are counted whatever that is, as they are paid."""
        usage = reply.get("usage") or {}
        used = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
        count("prompt_tokens", used[0])
        count("completion_tokens", used[1])
        if any(self._price):
            count("cost", sum(tokens * price for tokens, price in zip(used, self._price, strict=True)) / 1e6)
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        if not isinstance(text, str):
            raise ValueError(f"the message's content is a {type(text).__name__}")
        return Answer(text, finished=choice.get("finish_reason") != "length")


def _response_format(form: VerdictForm) -> dict[str, Any]:
    """How an OpenAI-compatible server is asked for answers of a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": form.schema}}


def _check_place(url: str | None, engine: str | None, needs_server: bool) -> None:
    if engine not in (None, "shared") or (url is None) == (engine is None):
        _refuse("either url or engine: shared says who judges")
    if engine is not None and needs_server:
        _refuse("with engine: shared it can be neither structured nor, as the policy changes, deterministic")


def _check_judging(
    mode: str, scale: Sequence[int], samples: int, opponents: int | None, temperature: float
) -> None:
    if mode not in get_args(Mode):
        _refuse(f"mode is pointwise, reference or pairwise, not {mode!r}")
    if not (len(scale) == 2 and all(type(end) is int for end in scale) and scale[0] < scale[1]):
        _refuse(f"scale is [lowest, highest] in integers, not {list(scale)}")
    if samples < 1 or (samples > 1 and temperature == 0):
        _refuse("samples is at least 1; several at temperature 0 would be the same answer")
    if opponents is not None and (opponents < 1 or mode != "pairwise"):
        _refuse("opponents is a number from 1 on, for mode pairwise")


def _refuse(why: str) -> NoReturn:
    raise RecipeError(f"reward 'llm_judge': {why}")
