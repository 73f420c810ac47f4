"""The part of the recipe's schema about MEL: the options of the method `mel`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from posttrain.recipe.data_schema import Section

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
{question}

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
Earlier work on the question below has left notes: key steps, typical pitfalls and heuristics.

{experience}

Take them in as your own experience, then think about the question independently and thoroughly and give a \
complete answer.

{question}"""

QUERY = """\
Before solving the problem below, write down what experience with it has taught: where reasoning goes wrong, \
what makes it succeed, and rules to follow. Answer in four sections that begin with the lines \
"### Failure path", "### Success factors", "### Reflection" and "### Heuristics".

{question}"""


class ExperienceFormat(Section):
    """How a policy is asked for a meta-experience and given one, and how it is read.

    The defaults have the content of the paper's prompts (Huang et al., 2026, arXiv:2602.10224) in our words.
    Slots are replaced as they stand; every other brace stays.
    """

    analysis: str = ANALYSIS
    """Asks for the analysis of a wrong and a right solution: `{question}`, `{wrong}`, `{right}`."""
    replay: str = REPLAY
    """Asks the question with a meta-experience before it: `{experience}`, `{question}`."""
    query: str = QUERY
    """Asks for a meta-experience from the question alone (target `query`): `{question}`."""
    sections: list[str] = Field(default=list(SECTIONS), min_length=1)
    """The texts that open the sections of an analysis, in order. The last section holds the heuristics: rules
    for problems to come."""
    question: str | None = None
    """Column with the bare question; None takes the last message of the prompt, or a plain prompt as a
    whole."""
    format: Literal["auto", "chat", "text"] = "auto"
    """How the prompts are rendered; as `format` of a data source, which it has to agree with."""

    @field_validator("analysis", "replay", "query")
    @classmethod
    def _has_its_slots(cls, template: str, info: ValidationInfo) -> str:
        slots = SLOTS[str(info.field_name)]
        missing = [slot for slot in slots if slot not in template]
        if missing:
            raise ValueError(f"the template has no {missing[0]}")
        return template


SLOTS = {
    "analysis": ("{question}", "{wrong}", "{right}"),
    "replay": ("{experience}", "{question}"),
    "query": ("{question}",),
}
