"""The part of the recipe's schema about MEL: the options of the method `mel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from posttrain.recipe.data_schema import Section
from posttrain.recipe.stage_schema import CorrectConfig

if TYPE_CHECKING:
    from posttrain.recipe.schema import PolicyStage, Recipe

SECTIONS = ("### Failure path", "### Success factors", "### Reflection", "### Heuristics")

ANALYSIS = """\
You study how reasoning goes wrong and what can be learned from it in general. Below are a problem and two \
solutions of it, the first with a wrong final answer, the second with a right one; the labels are about the \
final answer only, and either solution may take detours. Compare how they think, not how they look.

- The right solution: if it corrected itself, what made it do so? If it did not have to, which definition, \
representation or habit of checking kept it out of the trap?
- The wrong solution: name the point where a line of thought that was still right became wrong, the defect \
behind it (a concept confused, a rigid frame, a case left out, a misleading intuition), and the fact or \
constraint that it violates.
- What separates the two: which insight into the structure of the problem decided it?
- In the last two sections do not mention this problem's numbers, names or answer. Turn the lesson into \
rules with a condition.

Answer in exactly four sections that begin with these lines:
### Failure path
The point of failure and the pattern of thought behind it; no slips of the pen.
### Success factors
The turning point, if there is one, what made the solution robust, and why that works.
### Reflection
In the first person: what I review, what I have understood, how I will think next time.
### Heuristics
Several rules, each as "[name]: if <condition>, then <action>" or "[name]: with <concept>, always verify \
<constraint>".

Problem:
{problem}

Solution 1:
<answer>
{wrong}
</answer>
Verdict: Incorrect

Solution 2:
<answer>
{right}
</answer>
Verdict: Correct"""

REPLAY = """\
Earlier work on the problem below has left notes: key steps, typical pitfalls and heuristics.

{experience}

Take them in as your own experience, then think about the problem independently and thoroughly and give a \
complete answer.

{problem}"""

QUERY = """\
Before solving the problem below, write down what experience with it has taught: where reasoning goes wrong, \
what makes it succeed, and rules to follow. Answer in four sections that begin with the lines \
"### Failure path", "### Success factors", "### Reflection" and "### Heuristics".

{problem}"""


SLOTS = {
    "analysis": ("{problem}", "{wrong}", "{right}"),
    "replay": ("{experience}", "{problem}"),
    "query": ("{problem}",),
}
"""What every template has to contain."""


class ExperienceFormat(Section):
    """How a policy is asked for a meta-experience and given one, and how it is read.

    The defaults have the content of the paper's prompts (Huang et al., 2026, arXiv:2602.10224) in our words.
    Slots are replaced as they stand; every other brace stays. `{problem}` is the last message of a prompt, or
    a plain prompt as a whole.
    """

    analysis: str = ANALYSIS
    """Asks for the analysis of a wrong and a right solution: `{problem}`, `{wrong}`, `{right}`."""
    replay: str = REPLAY
    """Poses the problem with a meta-experience before it: `{experience}`, `{problem}`."""
    query: str = QUERY
    """Asks for a meta-experience from the problem alone (target `query`): `{problem}`."""
    sections: list[str] = Field(default=list(SECTIONS), min_length=1)
    """The texts that open the sections of an analysis, in order. The last section holds the heuristics: rules
    for problems to come."""
    format: Literal["auto", "chat", "text"] = "auto"
    """How the prompts are rendered; as `format` of a data source, which it has to agree with."""

    @field_validator("analysis", "replay", "query")
    @classmethod
    def _has_its_slots(cls, template: str, info: ValidationInfo) -> str:
        missing = [slot for slot in SLOTS[str(info.field_name)] if slot not in template]
        if missing:
            raise ValueError(f"the template has no {missing[0]}")
        return template

    @field_validator("sections")
    @classmethod
    def _has_text(cls, sections: list[str]) -> list[str]:
        if not all(section.strip() for section in sections):
            raise ValueError("a section needs a text that opens it")
        return sections


class MelConfig(Section):
    """Options of MEL. The defaults are the paper's where it says what it does."""

    target: Literal["retro", "query", "distill", "solution"] = "retro"
    """What is learned for a verified meta-experience. `retro`: its text after the analysis prompt, as in the
    paper. `query`: its text after the problem alone. `distill`: the right replay, after the problem alone
    (ours). `solution`: the right solution of its pair, after the problem: a control that learns about as many
    tokens and none of what was found out."""
    weight: float = Field(default=1.0, ge=0.0)
    """Of the term beside the policy loss; the paper has none, that is 1. 0 samples and measures only."""
    reduction: Literal["problem", "experience"] = "problem"
    """`problem`: the mean over all problems of the step, those without a meta-experience counting 0, as in
    the paper's joint objective. `experience`: the mean over the meta-experiences, as in its equation 7."""
    pairs: int = Field(default=1, ge=1)
    """Contrast pairs of a problem at most; the paper does not say how many it takes."""
    pairing: Literal["random", "shortest", "closest"] = "random"
    """Which pairs of a wrong and a right solution: drawn, those with the fewest tokens, or those with the
    longest common beginning."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Contrast pairs of a step at most, over all processes; None is no limit."""
    max_prompt: int | None = Field(default=None, ge=1)
    """Tokens of an analysis prompt at most; None is what leaves room for the analysis. A longer one gives way
    to the problem's shortest pair, and is left out where that is too long, too. Nothing is cut."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Cap on an analysis; None is that of a solution. One that is cut is rejected."""
    validation: Literal["replay", "none"] = "replay"
    """`none` keeps every well-formed meta-experience: a control."""
    replays: int = Field(default=1, ge=1)
    """Solutions with a meta-experience in context that decide about it."""
    min_passes: int = Field(default=1, ge=1)
    """How many of them have to be right."""
    shuffle: bool = False
    """Give every pair the meta-experience of another problem, before it is validated: a control."""
    leak: Literal["keep", "heuristics", "anywhere"] = "keep"
    """Reject a meta-experience that has the answer in its heuristics, or anywhere; the paper keeps it."""
    correct: CorrectConfig = CorrectConfig.model_construct()
    """What a right solution is; one that was cut is neither right nor wrong."""
    store: str | None = None
    """Folder where verified meta-experiences are kept as parquet files, each once; None keeps none."""
    prompts: ExperienceFormat = ExperienceFormat.model_construct()

    @model_validator(mode="after")
    def _can_pass(self) -> MelConfig:
        if self.min_passes > self.replays:
            raise ValueError(f"min_passes is {self.min_passes}, but there are only {self.replays} replays")
        if self.validation == "none" and self.target == "distill":
            raise ValueError("target distill learns the replays, and validation is none")
        return self


OPTIONS = MelConfig


def problems(recipe: Recipe, stage: PolicyStage) -> Iterator[tuple[str, str]]:
    """What of a recipe and a policy stage MEL cannot be combined with: keys and sentences."""
    if recipe.tools is not None:
        yield "tools", "method mel cannot be used with tools: its replays would be asked without them."
    if stage.updates_per_batch > 1:
        times = stage.updates_per_batch
        yield "updates_per_batch", f"method mel would learn every meta-experience {times} times: it takes 1."
    if stage.group_size == 1:
        yield (
            "group_size",
            "method mel needs a wrong and a right completion of a problem, so 2 or more.",
        )
