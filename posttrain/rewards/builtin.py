r"""The rewards that come with posttrain. Each is 1 for good and 0 for not, unless it says otherwise.

An answer is what `posttrain.data.answers.extract_answer` finds, in the completion and in the example's
answer alike (so that a worked solution ending in `#### 18` is a good reference). Where the example has no
answer, the rewards that compare with it do not apply.

    math_answer      equal as mathematics, by math-verify
    exact_match      equal as text
    numeric_match    equal as numbers
    format           tags or a regular expression
    length_penalty   soft overlong punishment, -1 to 0
    reasoning_gym    the score of the reasoning-gym dataset itself
    code             share of tests that the program in the completion passes, in a sandbox
    http             what a server says (`posttrain.rewards.http`)
    llm_judge        what a language model says (`posttrain.rewards.judge`)
"""

from __future__ import annotations

import functools
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, get_args

from posttrain.data.answers import extract_answer
from posttrain.errors import RecipeError
from posttrain.rewards.code_tests import CodeRun, extract_code, parse_tests
from posttrain.rewards.maths import differ_at_a_point, same_plain_numbers, undelimited
from posttrain.rewards.registry import reward
from posttrain.rewards.sandbox import Isolation, Limits, Sandbox
from posttrain.rollout.types import Completion, Example


@reward("math_answer", version="1", range=(0.0, 1.0), timeout=5.0)
class MathAnswer:
    r"""Whether the answer equals the example's as mathematics, by math-verify.

    `1/2`, `\frac{1}{2}`, `$0.5$` and `50\%` are equal. An answer that cannot be parsed is wrong; an example's
    answer that cannot be parsed is an error, as are a comparison that fails or takes longer than 5 s.
    """

    def __init__(self) -> None:
        # Here, since the import takes seconds, which are not the first sample's.
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the missing time-out
        self._library = math_verify
        self._parse = functools.lru_cache(maxsize=4096)(self._parse_uncached)

    def __call__(self, completion: Completion, example: Example) -> float | None:
        """1 or 0, None without an answer to compare with."""
        answer, reference = answer_pair(completion, example)
        if reference is None:
            return None
        same = None if answer is None else same_plain_numbers(answer, reference)
        if same is not None:
            return float(same)
        gold = self._parse(reference)
        if not gold:
            raise ValueError(f"answer {reference!r} of the example cannot be parsed")
        if answer is None:
            return 0.0
        if undelimited(answer) == undelimited(reference):
            return 1.0
        parsed = self._parse(answer)
        if differ_at_a_point(gold, parsed):
            return 0.0
        # No time-out of its own, which is by SIGALRM: the process is killed instead.
        return float(self._library.verify(gold, parsed, timeout_seconds=None, raise_on_error=True))

    def _parse_uncached(self, text: str) -> list[Any]:
        r"""What math-verify reads in an answer; empty if nothing.

        It looks for LaTeX only between delimiters, so an answer that is neither a plain number nor prose nor
        delimited already is put into a \boxed.
        """
        text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)  # it would read 1e3 as 1, or with Euler's e
        number = "\\" not in text and parse_number(text) is not None
        plain = number or _TEXT.search(text) is not None
        forms = [text, f"\\boxed{{{text}}}"]
        for form in forms if plain else reversed(forms):
            expressions = self._library.parse(form, parsing_timeout=None)
            if expressions:
                return list(expressions)
        return []


@reward("exact_match", version="1", range=(0.0, 1.0))
def exact_match(completion: Completion, example: Example) -> float | None:
    """Whether the answer equals the example's as text.

    Before the comparison both are normalised: Unicode NFKC, case folded, runs of white space are one space,
    and a final full stop is dropped.
    """
    answer, reference = answer_pair(completion, example)
    if reference is None:
        return None
    return float(answer is not None and _normalise(answer) == _normalise(reference))


@reward("numeric_match", version="1", range=(0.0, 1.0))
def numeric_match(
    completion: Completion, example: Example, *, rel_tol: float = 1e-6, abs_tol: float = 1e-9
) -> float | None:
    r"""Whether the answer equals the example's as a number, within the larger of the two tolerances.

    Reads `1,234.5`, `-3`, `1e-4`, `3/4`, `\frac{3}{4}` and `75%` (which is 0.75), with or without `$` around
    or before. An answer that is not one number is wrong; an example's answer that is not, is an error.
    """
    answer, reference = answer_pair(completion, example)
    if reference is None:
        return None
    expected = parse_number(reference)
    if expected is None:
        raise ValueError(f"answer {reference!r} of the example is not a number")
    number = None if answer is None else parse_number(answer)
    return float(number is not None and math.isclose(number, expected, rel_tol=rel_tol, abs_tol=abs_tol))


@reward("format", version="1", range=(0.0, 1.0))
class Format:
    """Whether the whole completion has a format.

    Args (exactly one of the first two):
        tags: names such as [think, answer]: every tag is opened and closed once, in this order, and outside
            of them is nothing but white space.
        pattern: a regular expression for the whole completion; `.` matches line ends, too.
        text_after: with `tags`, allow text after the last closing tag.
    """

    def __init__(self, tags: Sequence[str] = (), pattern: str | None = None, text_after: bool = False):
        if bool(tags) == (pattern is not None) or isinstance(tags, str):
            raise RecipeError("reward 'format' needs either tags, a list of names, or pattern")
        if text_after and not tags:
            raise RecipeError("reward 'format': text_after goes with tags")
        try:
            self._pattern = re.compile(pattern, re.DOTALL) if pattern is not None else None
        except re.error as error:
            raise RecipeError(f"reward 'format': {pattern!r} is not a regular expression: {error}") from error
        self._marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
        self._text_after = text_after

    def __call__(self, completion: Completion, example: Example) -> float:
        """1 or 0."""
        if self._pattern is not None:
            return float(self._pattern.fullmatch(completion.written) is not None)
        return float(self._has_tags(completion.written))

    def _has_tags(self, text: str) -> bool:
        if any(text.count(mark) != 1 for mark in self._marks):
            return False
        for index, mark in enumerate(self._marks):
            before, _, text = text.partition(mark)
            outside = index % 2 == 0
            # The marks are in the text once each, so one that is out of order is missing from the rest.
            if (outside and before.strip()) or not all(later in text for later in self._marks[index + 1 :]):
                return False
        return self._text_after or not text.strip()


@reward("length_penalty", version="1", range=(-1.0, 0.0))
class LengthPenalty:
    """Soft overlong punishment (Yu et al., "DAPO", 2025, equation 13), from -1 to 0.

    0 up to `max_tokens` - `buffer` tokens, then falling linearly, -1 from `max_tokens` on.

    Args:
        max_tokens: L_max, usually `rollout.max_tokens`.
        buffer: L_cache, the tokens before it in which the punishment grows.
    """

    def __init__(self, max_tokens: int, buffer: int):
        if not 0 < buffer <= max_tokens:
            raise RecipeError(
                f"reward 'length_penalty' needs 0 < buffer <= max_tokens, not {buffer}, {max_tokens}"
            )
        self._free = max_tokens - buffer
        self._buffer = buffer

    def __call__(self, completion: Completion, example: Example) -> float:
        """A value in [-1, 0]."""
        excess = len(completion.token_ids) - self._free
        return -min(max(excess / self._buffer, 0.0), 1.0)


@reward("reasoning_gym", version="1", range=(0.0, 1.0))
class ReasoningGym:
    """The score that the reasoning-gym dataset of the example gives to the answer, partial credit included.

    Needs the columns `source_dataset` and `metadata`, which data sources of that kind have.
    """

    def __init__(self) -> None:
        import reasoning_gym  # takes seconds, which are not the first sample's

        self._scorer_of = functools.cache(reasoning_gym.get_score_answer_fn)

    def __call__(self, completion: Completion, example: Example) -> float:
        """A value in [0, 1]."""
        missing = [name for name in ("source_dataset", "metadata") if name not in example.columns]
        if missing:
            raise ValueError(f"the example has no column {missing[0]!r}; is it from reasoning_gym?")
        entry = {
            "question": example.columns.get("question", example.prompt),
            "answer": example.answer,
            "metadata": example.columns["metadata"],
        }
        return float(
            self._scorer_of(example.columns["source_dataset"])(extract_answer(completion.written), entry)
        )


@reward("code", version="1", range=(0.0, 1.0), deterministic=False, timeout=60.0)
class Code:
    """Share of the example's tests that the completion's Python program passes, run in a sandbox.

    The program is what `posttrain.rewards.code_tests.extract_code` finds; every test runs it anew, without
    packages besides the standard library. A program that is missing, fails, takes too long or uses more than
    it may has not passed: that is a wrong answer, 0 for the test. A sandbox that fails is an error, as are
    tests that cannot be read; an example whose tests are empty does not apply. What the sandbox protects
    from, and what not, is written in `posttrain.rewards.sandbox`.

    Tests of the kinds code and call run in the same process as the program, so a program made for it can
    deceive the first (with values equal to everything, say); what is expected of a call or of an output is
    compared outside, where no program gets.

    Args:
        column: the dataset column with the tests; `posttrain.rewards.code_tests.parse_tests` says what it
            may hold.
        isolation: required, which refuses to start where the machine does not allow it, or none.
        test_timeout: seconds for each test.
        total_timeout: seconds for all tests of a completion; those left then have not been passed. The
            reward's own `timeout` has to be 25 s longer, as a sample that reaches that one is unscored.
        memory_mib: address space of each of the program's processes.
        all_or_nothing: 1 if all tests are passed, otherwise 0.

    Raises:
        RecipeError: an argument is wrong.
        RewardError: isolation is required and not possible.
    """

    def __init__(
        self,
        column: str = "tests",
        isolation: Isolation = "required",
        test_timeout: float = 5.0,
        total_timeout: float = 30.0,
        memory_mib: int = 512,
        all_or_nothing: bool = False,
    ):
        if isolation not in get_args(Isolation):
            raise RecipeError(f"reward 'code': isolation is required or none, not {isolation!r}")
        if not 0 < test_timeout <= total_timeout:
            raise RecipeError("reward 'code' needs 0 < test_timeout <= total_timeout")
        if memory_mib < 64:
            raise RecipeError("reward 'code' needs memory_mib of at least 64")
        self._column = column
        self._all_or_nothing = all_or_nothing
        self._sandbox = Sandbox(isolation, Limits(test_timeout, total_timeout, memory_mib))

    def __call__(self, completion: Completion, example: Example) -> float | None:
        """A value in [0, 1], None without tests."""
        if self._column not in example.columns:
            raise ValueError(f"the example has no column {self._column!r} with the tests of its program")
        value = example.columns[self._column]
        tests = parse_tests(value) if value is not None else []
        if not tests:
            return None
        code = extract_code(completion.written)
        if code is None:
            return 0.0
        runs = [CodeRun.of(code, test) for test in tests]
        results = self._sandbox.run([run.program for run in runs], stop_at_failure=self._all_or_nothing)
        passed = sum(run.passed(result) for run, result in zip(runs, results, strict=False))
        return float(passed == len(runs)) if self._all_or_nothing else passed / len(runs)


def answer_pair(completion: Completion, example: Example) -> tuple[str | None, str | None]:
    """The completion's answer and the example's."""
    reference = example.answer
    if reference is not None:
        reference = extract_answer(reference) or reference.strip()
    return extract_answer(completion.written), reference


CANONICAL_INPUTS: dict[str, Callable[[Completion, Example], Hashable]] = {"math_answer": answer_pair}
"""What the value of a built-in depends on, where that is less than the whole sample."""


HEAVY = ("math_answer", "reasoning_gym")
"""Built-ins that import much and have no arguments."""
LINEAR = ("exact_match", "numeric_match", "format", "length_penalty")
"""Built-ins that take linear time, if they have no pattern."""


def runs_in_process(name: str, args: Mapping[str, Any]) -> bool:
    """Whether a built-in takes linear time whatever the completion, so that it needs no killable process."""
    return name in LINEAR and "pattern" not in args


# --- reading answers --------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[+-]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_MAX_NUMBER = 400
"""Characters; longer ones are no numbers but floods of digits."""


def parse_number(text: str) -> float | None:
    """The number that a text is, or None if it is anything else."""
    if len(text) > _MAX_NUMBER:
        return None
    text = text.replace("\\%", "%").replace("\\$", "$").replace("−", "-").strip().rstrip(".").strip("$ ")
    sign = -1.0 if text.startswith("-$") else 1.0
    text = text.removeprefix("-$")
    scale = 0.01 if text.endswith("%") else 1.0
    text = text.removesuffix("%").strip()
    latex = _FRACTION.fullmatch(text)
    over, slash, under = (latex[1] + latex[2], "/", latex[3]) if latex else text.partition("/")
    parts = [part.strip() for part in ([over, under] if slash else [over])]
    if not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    numbers = [float(part.replace(",", "")) for part in parts]
    if len(numbers) == 2:
        if numbers[1] == 0:
            return None
        numbers = [numbers[0] / numbers[1]]
    value = sign * numbers[0] * scale
    return value if math.isfinite(value) else None


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


_SCIENTIFIC = re.compile(r"(\d)[eE]([+-]?\d+)")
_TEXT = re.compile(r"\$|\\boxed|(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")
"""Delimiters of mathematics, or two words."""
