"""What `posttrain plan` knows about SOAR: its cost in samples before anything starts, and what cannot
work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.recipe.schema import HardSubsetStage, Recipe, SoarStage
from posttrain.recipe.spelling import did_you_mean


@dataclass(frozen=True)
class SoarCost:
    """Upper bounds of what a SOAR stage samples and trains, if every proposal can be read.

    `first_*` are those of an outer step before the first promotion, when inner loops are shortest.
    """

    first_students: int
    first_greedy: int
    proposals: int
    first_updates: int
    student_completions: int
    hard_answers: int
    updates: int
    tokens: int
    steps: int

    @property
    def rollouts(self) -> int:
        """All completions of the stage."""
        return self.student_completions + self.hard_answers + self.steps * self.proposals


def soar_cost(stage: SoarStage, cap: int) -> SoarCost:
    """The arithmetic of a stage; `cap` is on a student's completion. Promotions come as early as they can."""
    proposals = stage.datasets * stage.questions
    student, runs = stage.student, stage.datasets * stage.students
    window = stage.promotion.window
    if stage.reward == "learnability":
        answers = proposals * stage.learnability_samples
        return _total(stage, cap, [0] * stage.steps, 0, answers, proposals)
    hard = (runs + 1) * stage.reward_questions * max(stage.reward_samples, 1)
    # A promotion is possible when the window is full; where it is cleared, only every so many steps.
    every = window if stage.promotion.clear_window else 1
    promoted = (
        (lambda step: 0 if step < window else 1 + (step - window) // every)
        if stage.promotion.enabled
        else (lambda step: 0)
    )
    lengths = [student.steps_after(promoted(step)) for step in range(stage.steps)]
    return _total(stage, cap, lengths, runs, hard, proposals)


def _total(
    stage: SoarStage, cap: int, lengths: list[int], runs: int, answers: int, proposals: int
) -> SoarCost:
    each = stage.student.prompts_per_step * stage.student.group_size
    steps, updates, tokens = 0, 0, 0
    for length in lengths:
        if stage.max_student_updates is not None and updates >= stage.max_student_updates:
            break
        if stage.max_sampled_tokens is not None and tokens >= stage.max_sampled_tokens:
            break
        steps += 1
        updates += runs * length
        tokens += (runs * length * each + answers) * cap + proposals * stage.teacher.max_tokens
    return SoarCost(
        first_students=runs * lengths[0] * each,
        first_greedy=answers,
        proposals=proposals,
        first_updates=runs * lengths[0],
        student_completions=updates * each,
        hard_answers=steps * answers,
        updates=updates,
        tokens=tokens,
        steps=steps,
    )


def soar_line(stage: SoarStage, cap: int) -> str:
    """One line of the plan: an outer step, and all of them."""
    cost = soar_cost(stage, cap)
    sets = f"{stage.datasets} sets × {stage.questions} questions"
    if stage.reward == "learnability":
        work = f"{cost.first_greedy:,} answers for the learnability of {sets}"
        return f"{cost.steps:,} outer steps × ({work}), at most {_count(cost.tokens)} sampled tokens"
    answers = "greedy answers" if stage.reward_samples == 0 else "answers"
    work = (
        f"{sets} × {stage.students} students × {stage.student.steps} updates = {cost.first_students:,} "
        f"completions and {cost.first_greedy:,} {answers} to hard problems"
    )
    return (
        f"{cost.steps:,} outer steps × ({work}); with inner loops of up to {stage.student.max_steps} updates "
        f"at most {cost.updates:,} updates of students and {_count(cost.tokens)} sampled tokens"
    )


def hard_subset_line(stage: HardSubsetStage, rows: int | None, cap: int) -> str:
    """One line of the plan."""
    problems = "every problem" if rows is None else f"{rows:,} problems"
    most = "" if rows is None else f", at most {_count(rows * stage.samples * cap)} sampled tokens"
    return f"up to {stage.samples} completions of {problems}, of which the never solved ones are kept{most}"


def soar_problems(recipe: Recipe, stage: SoarStage | HardSubsetStage, key: str) -> Iterator[tuple[str, str]]:
    """Keys and sentences about what would end the stage later."""
    if stage.data is None and recipe.data.train is None:
        yield key, "has no data: set data.train, or data in the stage."
    rewards = recipe.rewards_of(stage)
    names = [spec.name for spec in rewards]
    if not names:
        yield key, "cannot tell what is right: there are no rewards."
    wanted = stage.correct.reward
    if names and wanted is not None and wanted not in names:
        text = f"there is no reward {wanted!r}; there are {', '.join(names)}."
        yield f"{key}.correct.reward", text + did_you_mean(wanted, names)
    if recipe.tools is not None:
        yield "tools", f"stage {stage.name} cannot give its model tools."
    if isinstance(stage, HardSubsetStage):
        return
    if recipe.reward_options.combine != "sum_then_normalize":
        yield "reward_options.combine", f"stage {stage.name} takes advantages of the weighted sum of rewards."
    source, data_key = (stage.data, f"{key}.data") if stage.data else (recipe.data.train, "data.train")
    if source is not None and source.split != "train" and source.stage is not None:
        yield f"{data_key}.split", "is for reporting only: the teacher is rewarded on the train half."
    for part, loss in (("teacher", stage.teacher.loss), ("student", stage.student.loss)):
        if loss.kind == "reinforce_pp" or loss.scale == "batch":
            yield f"{key}.{part}.loss", "needs a baseline within groups: take rloo."
    if stage.reward == "learnability" and stage.promotion.enabled:
        yield f"{key}.promotion.enabled", "reward learnability trains no student to promote: set it to false."
    if stage.student.max_steps < stage.student.steps:
        text = f"is below steps {stage.student.steps}: inner loops would never be as short."
        yield f"{key}.student.max_steps", text


def _count(number: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
