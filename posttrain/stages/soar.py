"""SOAR: a teacher writes questions, students that train on them are measured on hard problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from peft import PeftModel
from transformers import set_seed

from posttrain.data.prompts import Prompts, check_lengths
from posttrain.data.sources import dress, load_examples
from posttrain.errors import TrainingError
from posttrain.recipe.schema import DataSource, SoarStage
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.build import build_engine, load_model, load_tokenizer
from posttrain.rollout.engine import RolloutEngine
from posttrain.rollout.types import Example
from posttrain.soar.gains import Promotions
from posttrain.soar.learner import Forward, Learner, optimizer_settings
from posttrain.soar.loop import OuterLoop, OuterRecord
from posttrain.soar.proposals import Question, Unreadable
from posttrain.soar.snapshots import References, SharedModel
from posttrain.soar.state import Journal, SoarState, load_state, save_state
from posttrain.soar.student import Asked, Students, Workbench
from posttrain.soar.teacher import Proposer
from posttrain.stages.context import ROWS, StageContext, StageResult
from posttrain.training.distributed import splits_weights
from posttrain.training.load import compute_dtype, load_policy
from posttrain.training.manifest import checkpoint_step, find_checkpoint
from posttrain.training.ranks import on_first_rank
from posttrain.training.record import remove_rollouts, replacing, rollout_rows, write_rollouts


def run(stage: SoarStage, context: StageContext) -> StageResult:
    """Run the stage. The promoted student is handed on; the teacher is saved beside it, as `STAGE-teacher`.

    Raises:
        TrainingError: the launcher was told to split the weights over processes.
    """
    if splits_weights():
        raise TrainingError(
            f"stage {stage.name}: every process trains students of its own and needs whole weights; FSDP and "
            f"ZeRO-3 cannot be used"
        )
    recipe = context.recipe
    source = context.data(stage.data or recipe.data.train)
    tokenizer = load_tokenizer(context.model)
    set_seed(recipe.seed)
    model = load_policy(context.model)
    arguments = optimizer_settings(stage.student.optimizer, str(context.run_dir))
    model.to(arguments.device)
    engine = build_engine(recipe.rollout, context.model, tokenizer, model=model, seed=recipe.seed)
    try:
        with context.scorer(recipe.rewards_of(stage), SharedEngine(engine, tokenizer)) as scorer:
            parts = Parts(stage, context, source, tokenizer, model, engine, scorer)
            loop = parts.loop()
            _train(parts, loop)
    finally:
        engine.close()
    return _hand_over(parts, loop)


class Parts:
    """What the stage is made of."""

    def __init__(
        self,
        stage: SoarStage,
        context: StageContext,
        source: DataSource,
        tokenizer: Any,
        model: Any,
        engine: RolloutEngine,
        scorer: Scorer,
    ):
        self.stage = stage
        self.context = context
        self.source = source
        self.tokenizer = tokenizer
        self.model = model
        self.engine = engine
        self.scorer = scorer
        self.prompts = Prompts(tokenizer, source.format)
        self.room = engine.max_model_len - context.recipe.rollout.max_tokens
        rollout = context.recipe.rollout
        self.forward = Forward(
            model,
            compute_dtype(context.model),
            temperature=rollout.temperature,
            micro_batch_tokens=stage.micro_batch_tokens,
        )
        if stage.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.shared = SharedModel(model)
        base = self.shared.capture()
        self.references = self._references()
        settings = optimizer_settings(stage.teacher.optimizer, str(context.run_dir))
        self.learner = Learner(
            self.forward,
            loss=stage.teacher.loss,
            arguments=settings,
            max_tokens=stage.teacher.max_tokens,
            steps=stage.steps,
            seed=context.recipe.seed,
            max_bad_steps=stage.max_bad_steps,
        )
        promotion = stage.promotion
        threshold = promotion.threshold if promotion.enabled else float("inf")
        promotions = Promotions(threshold, promotion.window, promotion.clear_window)
        self.state = SoarState(teacher=base, baseline=base, promotions=promotions)

    def loop(self) -> OuterLoop:
        """The outer loop, at its beginning."""
        stage, context, recipe = self.stage, self.context, self.context.recipe
        bench = Workbench(self.shared, self.engine, self.forward)
        students = Students(
            bench,
            stage=stage.inner(),
            arguments=optimizer_settings(stage.student.optimizer, str(context.run_dir)),
            rollout=recipe.rollout,
            rewards=recipe.reward_options,
            scorer=self.scorer,
            correct=stage.correct,
            references=self.references if stage.student.loss.kl else None,
            tokenizer=self.tokenizer,
            check=context.stop.check,
        )
        proposer = Proposer(
            stage.teacher,
            prompt=self.prompts.encode(Example("teacher", stage.teacher.prompt)),
            temperature=recipe.rollout.temperature,
            generate=bench.generate,
            scorer=self.scorer,
            threshold=stage.correct.threshold,
            reward=stage.correct.reward or recipe.rewards_of(stage)[0].name,
            admit=self.admit,
        )
        examples = load_examples(self.source)
        hard, _ = check_lengths([(e, self.prompts.encode(e)) for e in examples], self.room, "error")
        return OuterLoop(
            stage,
            state=self.state,
            proposer=proposer,
            students=students,
            learner=self.learner,
            references=self.references,
            hard=hard,
            ask=self.ask,
            journal=Journal(context.folder("journal"), context.rank),
            seed=recipe.seed,
            rank=context.rank,
            world=context.world,
            say=context.say,
            check=context.stop.check,
        )

    def ask(self, name: str, question: Question) -> Asked:
        """A proposed question as students see it: dressed as the hard problems are."""
        prompt = dress(question.question, self.source, f"proposal {name}")
        example = Example(name, prompt, question.answer)
        return example, self.prompts.encode(example)

    def admit(self, question: str) -> None:
        """Refuse a question that is too long for the context, or spells the tokenizer's special tokens."""
        bare = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        if len(bare) > self.stage.teacher.format.max_question_tokens:
            raise Unreadable("long_question")
        if set(bare) & set(self.tokenizer.all_special_ids):
            raise Unreadable("special_tokens")
        if len(self.ask("", Question(question, ""))[1]) > self.room:
            raise Unreadable("long_question")

    def _references(self) -> References | None:
        """A second set of weights, where a loss has a KL term."""
        if not (self.stage.teacher.loss.kl or self.stage.student.loss.kl):
            return None
        if isinstance(self.model, PeftModel):
            return References(self.model, None)
        # In the type that is trained, so that snapshots fit bit for bit.
        frozen = load_model(self.context.model.model_copy(update={"dtype": "float32"}))
        return References(self.model, frozen.to(self.forward.device).eval().requires_grad_(False))


def _train(parts: Parts, loop: OuterLoop) -> None:
    """All outer steps that are left."""
    stage, context, state = parts.stage, parts.context, parts.state
    folder = context.folder("checkpoints")
    start = on_first_rank(lambda: find_checkpoint(folder, context.say))
    if start is not None:
        context.clock.restart(load_state(start, state, parts.learner))
        context.say(f"   resumed from {start}")
    step = checkpoint_step(start) if start is not None else 0

    def rewind() -> None:
        context.metrics.cut(context.name, step)
        remove_rollouts(context.run_dir / "rollouts" / context.name, step)

    on_first_rank(rewind)
    while not loop.finished():
        record = loop.step()
        if context.rank == 0:
            _write(record, parts)
            context.log_step(record.step, stage.steps, record.metrics)
        due = record.step % stage.save_steps == 0 and not loop.finished()
        if due:
            on_first_rank(
                lambda: save_state(
                    folder,
                    state,
                    parts.learner,
                    stage=context.name,
                    seconds=context.clock.seconds(),
                    keep=stage.keep_checkpoints,
                )
            )


def _write(record: OuterRecord, parts: Parts) -> None:
    """The proposals of a step, accepted and refused."""
    stage, context = parts.stage, parts.context
    if not stage.log_rollouts or (record.step - 1) % stage.log_rollouts:
        return
    proposals = record.proposals
    trained = len(record.advantages) == len(proposals.accepted)
    status = {r.id: "trained" if trained else "skipped" for r in proposals.accepted}
    status |= {r.id: f"refused: {proposals.reasons[r.id]}" for r in proposals.refused}
    advantages: dict[str, list[float]] = {}
    for index, rollout in enumerate(proposals.accepted if trained else []):
        advantages[rollout.id] = [record.advantages[index]] * len(rollout.completion.token_ids)
        rollout.reward = (record.rewards or [])[index // stage.questions]
    rows = rollout_rows(
        [*proposals.accepted, *proposals.refused],
        step=record.step,
        prompt_text={"teacher": parts.prompts.render(Example("teacher", stage.teacher.prompt))},
        status=status,
        advantages={"teacher": advantages},
        weights={"teacher": 1.0},
    )
    write_rollouts(Path(context.folder("rollouts")) / f"step-{record.step:06d}.parquet", rows)


def _hand_over(parts: Parts, loop: OuterLoop) -> StageResult:
    """Save both models and the promotion questions."""
    context, state = parts.context, parts.state
    rows = question_rows(state.kept)

    def write() -> None:
        with replacing(context.folder("data") / ROWS) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=QUESTIONS), file)

    on_first_rank(write)
    parts.shared.restore(state.teacher)
    teacher = context.save(parts.model, parts.tokenizer, f"{context.name}-teacher")
    parts.shared.restore(state.baseline)
    summary = {
        "soar": {
            "outer_steps": state.step,
            "promotions": state.promotions.count,
            "promotion_questions": len(rows),
            "student_updates": state.spent.updates,
            "student_completions": state.spent.completions,
            "student_tokens": state.spent.sampled,
            "teacher_tokens": state.teacher_tokens,
            "teacher": teacher.adapter or teacher.path,
        },
        "tokens/sampled": state.sampled_tokens,
        "tokens/trained": state.spent.trained,
    }
    return StageResult(context.save(parts.model, parts.tokenizer), summary)


QUESTIONS = pa.schema([("prompt", pa.string()), ("answer", pa.string()), ("step", pa.int64())])


def question_rows(kept: Sequence[tuple[int, Sequence[Question]]]) -> list[dict[str, Any]]:
    """Rows of the promotion questions; duplicates stay."""
    return [
        {"prompt": item.question, "answer": item.answer, "step": step}
        for step, questions in kept
        for item in questions
    ]
