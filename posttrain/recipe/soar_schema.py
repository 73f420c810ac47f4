"""The part of the recipe's schema about SOAR (arXiv:2601.18778): hard problems, a teacher, its students.

The defaults are the paper's table of hyper-parameters.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.recipe.data_schema import DataSource, Section
from posttrain.recipe.rewards_schema import RewardSpec, reward_specs
from posttrain.recipe.stage_schema import CorrectConfig, LossConfig, OptimizerConfig, PolicyStage

TEACHER_PROMPT = """You write new mathematics problems with which a mathematics assistant is trained.

Write one original problem from one of these areas: algebra, counting and probability, geometry,
intermediate algebra, number theory, prealgebra, precalculus. It has to be demanding, with at least two or
three steps of reasoning, and to have a single answer that can be checked.

Write the problem between <question> and </question>. Then write its answer between <answer> and </answer>,
in a \\boxed{}. Working may stand outside of these tags, nothing else inside of them. Write exactly one
problem and keep to this format to the letter. Begin now."""
"""After the structure of the paper's prompt: role, areas, contract of the output, constraints, closing
cue."""

Loss = dict[str, Any]
RLOO: Loss = {"kind": "rloo", "kl": 0.001}
STUDENT_OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-5}
TEACHER_OPTIMIZER: dict[str, Any] = {"learning_rate": 1e-5, "schedule": "cosine", "warmup_steps": 20}


def _or_defaults(value: Any, defaults: dict[str, Any]) -> Any:
    """What a recipe says, over the defaults of a place."""
    return {**defaults, **value} if isinstance(value, dict) else value


class ProposalFormat(Section):
    """What a proposal of the teacher's looks like, and what is refused."""

    question: tuple[str, str] = ("<question>", "</question>")
    """Opening and closing tag; a second opening tag closes, too, as the paper prints it."""
    answer: tuple[str, str] = ("<answer>", "</answer>")
    """Opening and closing tag."""
    boxed: bool = True
    r"""The answer is what the last `\boxed{…}` between its tags holds."""
    max_question_tokens: int = Field(default=512, ge=1)
    """Longer questions are refused, as are those that do not fit with `rollout.max_tokens`."""
    max_answer_chars: int = Field(default=200, ge=1)
    """Longer answers are refused."""

    @field_validator("question", "answer", mode="before")
    @classmethod
    def _pair(cls, tags: Any) -> Any:
        return tuple(tags) if isinstance(tags, list) else tags  # YAML has no tuples

    @field_validator("question", "answer")
    @classmethod
    def _not_empty(cls, tags: tuple[str, str]) -> tuple[str, str]:
        if not all(tags):
            raise ValueError("a tag is empty")
        return tags


class TeacherConfig(Section):
    """The teacher: how it is asked, and how it learns."""

    prompt: str = TEACHER_PROMPT
    """The one prompt, the same at every step; it shows no hard problem and no example."""
    max_tokens: int = Field(default=512, ge=1)
    """Cap on a proposal."""
    max_draws: int = Field(default=20, ge=1)
    """Proposals drawn for every one that is needed, at most; if too few can be read, the step is skipped."""
    format: ProposalFormat = ProposalFormat.model_construct()
    loss: LossConfig = LossConfig.model_construct(**RLOO)
    """RLOO with a KL of 0.001 to the base model, of the size of the rewards (about 0.01)."""
    optimizer: OptimizerConfig = OptimizerConfig.model_construct(**TEACHER_OPTIMIZER)
    """Cosine over `steps`, one update each."""

    @field_validator("loss", mode="before")
    @classmethod
    def _rloo(cls, loss: Any) -> Any:
        return _or_defaults(loss, RLOO)

    @field_validator("optimizer", mode="before")
    @classmethod
    def _slow(cls, optimizer: Any) -> Any:
        return _or_defaults(optimizer, TEACHER_OPTIMIZER)


class StudentConfig(Section):
    """The inner loop: a few RL steps from the baseline on one proposed set."""

    steps: int = Field(default=10, ge=1)
    """Optimiser steps before the first promotion."""
    extra_steps: int = Field(default=5, ge=0)
    """More of them after each promotion."""
    max_steps: int = Field(default=20, ge=1)
    """Never more than these."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Questions of one step; a set with fewer is gone through again."""
    group_size: int = Field(default=32, ge=2)
    """Completions of one question."""
    loss: LossConfig = LossConfig.model_construct(**RLOO)
    """RLOO with a KL of 0.001 to the run's own start, which rewards up to 120 make invisible."""
    optimizer: OptimizerConfig = OptimizerConfig.model_construct(**STUDENT_OPTIMIZER)
    """Constant over the few steps; its state is fresh in every run."""

    @field_validator("loss", mode="before")
    @classmethod
    def _rloo(cls, loss: Any) -> Any:
        return _or_defaults(loss, RLOO)

    @field_validator("optimizer", mode="before")
    @classmethod
    def _fast(cls, optimizer: Any) -> Any:
        return _or_defaults(optimizer, STUDENT_OPTIMIZER)

    def steps_after(self, promotions: int) -> int:
        """Length of an inner loop after so many promotions."""
        return max(self.steps, min(self.steps + self.extra_steps * promotions, self.max_steps))


class PromotionConfig(Section):
    """When a trained student becomes the baseline."""

    enabled: bool = True
    """Off is the ablation: every student starts from the base model."""
    threshold: float = 0.01
    """The moving average of the mean reward has to be above it (τ)."""
    window: int = Field(default=3, ge=1)
    """Outer steps that the average is over (m)."""
    clear_window: bool = True
    """Forget the rewards before a promotion: they were gains over another baseline."""


class SoarStage(Section):
    """A teacher learns to write problems that make students better at hard ones (SOAR)."""

    name: str = "soar"
    """Name of the stage in the run folder; `data: {stage: NAME}` are its promotion questions."""
    data: DataSource | None = None
    """The hard problems, of which the teacher sees only the score; None is `data.train`. Its template and
    system message are put around proposed questions, too."""
    rewards: list[RewardSpec] | None = None
    """Of the students' answers; None is the recipe's `rewards`."""
    correct: CorrectConfig = CorrectConfig.model_construct()
    """What counts as solved."""
    steps: int = Field(default=200, ge=1)
    """Outer steps: proposals, students, one update of the teacher (T)."""
    datasets: int = Field(default=4, ge=2)
    """Sets of questions in a step, which are the teacher's RLOO group (g)."""
    questions: int = Field(default=64, ge=1)
    """Questions of a set (n)."""
    students: int = Field(default=4, ge=1)
    """Students trained on each set (r), over all processes."""
    reward: Literal["grounded", "learnability"] = "grounded"
    """`grounded` is the students' gain on hard problems; `learnability` the intrinsic reward, one minus the
    share of the baseline's answers that agree with the teacher's, or 0 if none does. It trains no student."""
    reward_questions: int = Field(default=64, ge=1)
    """Hard problems that gains are measured on, drawn anew in every step (M)."""
    reward_samples: int = Field(default=0, ge=0)
    """Sampled answers to each of them; 0 is one greedy answer."""
    learnability_samples: int = Field(default=32, ge=1)
    """Answers to each proposed question with `reward: learnability`."""
    teacher: TeacherConfig = TeacherConfig.model_construct()
    student: StudentConfig = StudentConfig.model_construct()
    promotion: PromotionConfig = PromotionConfig.model_construct()
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one forward and backward pass: sets the peak memory, never the result."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_student_updates: int | None = Field(default=None, ge=1)
    """Budget: no outer step is begun after so many optimiser steps of students."""
    max_sampled_tokens: int | None = Field(default=None, ge=1)
    """Budget: no outer step is begun after so many sampled tokens, the teacher's included."""
    max_bad_steps: int = Field(default=3, ge=1)
    """Updates in a row whose loss or gradient is not finite, after which the run stops."""
    save_steps: int = Field(default=1, ge=1)
    """A checkpoint every so many outer steps. Students that are finished in between are never lost."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The newest ones that are kept."""
    log_rollouts: int = Field(default=1, ge=0)
    """Write the proposals of every n-th outer step; 0 writes none."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _names(cls, rewards: Any) -> Any:
        return reward_specs(rewards)

    def inner(self) -> PolicyStage:
        """The inner loop as a stage of the policy trainer's kind."""
        student = self.student
        return PolicyStage(
            name=self.name,
            steps=student.steps,
            prompts_per_step=student.prompts_per_step,
            group_size=student.group_size,
            micro_batch_tokens=self.micro_batch_tokens,
            gradient_checkpointing=self.gradient_checkpointing,
            loss=student.loss,
            optimizer=student.optimizer,
            max_bad_steps=self.max_bad_steps,
        )


class HardSubsetStage(Section):
    """Find the problems that the model never solves (fail@N), and split them in two."""

    name: str = "hard_subset"
    """Name of the stage; `data: {stage: NAME, split: train}` and `split: test` are its halves."""
    data: DataSource | None = None
    """The pool; None is `data.train`. Use a set that the model has not been trained on."""
    rewards: list[RewardSpec] | None = None
    """None is the recipe's `rewards`."""
    correct: CorrectConfig = CorrectConfig.model_construct()
    """What counts as solved."""
    samples: int = Field(default=128, ge=1)
    """Completions of a problem, none of which may be right (N). Sampled as the students are: the same prompt,
    temperature and cap."""
    first: int = Field(default=8, ge=1)
    """Completions of the first round; each further one has twice as many. A solved problem is out at once."""
    problems_at_a_time: int = Field(default=256, ge=1)
    """Problems whose outcome is written down together: what an interruption loses at most."""
    train_share: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the hard problems in the split `train`; large test halves since accuracies are tiny."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _names(cls, rewards: Any) -> Any:
        return reward_specs(rewards)

    @model_validator(mode="after")
    def _rounds(self) -> HardSubsetStage:
        if self.first > self.samples:
            raise ValueError(f"first is {self.first}, samples only {self.samples}")
        return self
