"""The part of the recipe's schema about self-predictions: how a policy is asked to assess a problem."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from posttrain.recipe.data_schema import Section

TEMPLATE = """\
Before solving, assess the problem below. Inside <meta></meta> reason carefully about (1) which mathematical \
notions a correct solution would use - none that the statement already names -, (2) in how many of {levels} \
attempts you would get it right, (3) how many tokens a correct solution takes; justify each with an example. \
Then output one JSON object on a single line, keys in this order:
{"math_notion": [..strings..], "pass_rate": <int 0-{levels}>, "solution_length": \
<int {min_length}-{max_length}>}

Problem: {problem}"""


class MetaFormat(Section):
    """The question about a problem, and how its answer is read (Kim et al., 2025, arXiv:2510.03259)."""

    system: str | None = "You are a helpful assistant."
    """System message of the question; None has none, as for prompts that are plain text."""
    template: str = TEMPLATE
    """The question. `{problem}`, `{levels}`, `{min_length}` and `{max_length}` are filled in, every other
    brace stays; the default is the paper's content in our words."""
    problem: str | None = None
    """Column with the bare problem, without instructions on how to answer; None takes the last message of the
    prompt, or a plain prompt as a whole."""
    notions_key: str = "math_notion"
    """JSON key of the predicted notions; other subjects may want another word."""
    pass_rate_key: str = "pass_rate"
    """JSON key of the predicted pass rate."""
    length_key: str = "solution_length"
    """JSON key of the predicted number of tokens of a correct solution."""
    levels: int = Field(default=8, ge=1)
    """Pass rates are whole numbers from 0 to this. Coarse on purpose, and not tied to the group size."""
    min_length: int = Field(default=128, ge=1)
    """The shortest length the question asks for."""
    parser: Literal["robust", "official"] = "robust"
    """`robust` takes any JSON object that has a key; `official` reads as the paper's released code does."""
    format: Literal["auto", "chat", "text"] = "auto"
    """How the question is rendered; as `format` of a data source, which it has to agree with."""

    @field_validator("template")
    @classmethod
    def _has_the_problem(cls, template: str) -> str:
        if "{problem}" not in template:
            raise ValueError("template has no {problem}")
        return template


class AlignmentConfig(Section):
    """How a self-prediction is rewarded against the policy's own solutions."""

    base: float = Field(default=0.01, gt=0.0, lt=1.0)
    """The reward of a pass rate is this to the power of the error; 0.01 halves it every eighth or so."""
    length_bounds: Literal["inclusive", "strict"] = "inclusive"
    """Whether a length may equal the shortest or longest correct solution: the papers' equation says so, the
    released code does not, and then a single correct solution never rewards a length."""
    notion_match: Literal["substring", "words"] = "substring"
    """`substring` is case-sensitive, as in the released code; `words` ignores case, matches at the beginning
    of a word and takes no notion below three characters."""


class MetaEvaluation(Section):
    """Metric `meta`: a model's self-predictions against its own solutions of the same problems."""

    samples: int = Field(default=8, ge=1)
    """Self-predictions of one problem; the solutions are the stage's `samples`, which should be 8 or more."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Cap on a self-prediction; None is that of a solution."""
    question: MetaFormat = MetaFormat.model_construct()
    reward: AlignmentConfig = AlignmentConfig.model_construct()
