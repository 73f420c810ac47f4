"""The quickstart's policy stage as a recipe of its own, and the same stage as a TRL script.

`python quickstart.py RECIPE FOLDER [without-vllm]` is the TRL side of the first-step bench.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from posttrain.data.sources import load_examples
from posttrain.recipe.load import load_recipe, recipe_to_dict
from posttrain.recipe.schema import PolicyStage, Recipe
from posttrain.rollout.types import Completion, Example

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "data" / "tiny-reasoner"


def write_recipe(
    folder: Path,
    kind: str,
    seed: int,
    *,
    steps: int | None = None,
    model: Path = MODEL,
    dtype: str = "auto",
    max_tokens: int | None = None,
) -> Path:
    """recipes/tiny/quickstart.yaml with one stage alone, its `sft` or its `policy`, from `model`.

    The run's folder is `folder/KIND`. `steps` and `max_tokens` replace the recipe's.
    """
    recipe = recipe_to_dict(load_recipe(ROOT / "recipes" / "tiny" / "quickstart.yaml").recipe)
    (stage,) = [stage[kind] for stage in recipe["stages"] if kind in stage]
    recipe["stages"] = [{kind: stage | ({} if steps is None else {"steps": steps})}]
    recipe |= {"name": kind, "seed": seed, "output_dir": str(folder)}
    recipe["model"] |= {"path": str(model), "dtype": dtype}
    if max_tokens is not None:
        recipe["rollout"]["max_tokens"] = max_tokens
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run_python(*arguments: str) -> None:
    """Run a Python process in the root of the repository and wait for it."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-4000:]}")


def warm_start(folder: Path, seed: int) -> Path:
    """The model that the quickstart's warm start hands on to its policy stage."""
    run_python("-m", "posttrain", "train", str(write_recipe(folder, "sft", seed)))
    (model,) = (folder / "sft" / "models").glob("*/config.json")
    return model.parent


def policy_stage(recipe: Recipe) -> PolicyStage:
    """The one stage of such a recipe."""
    stage = recipe.stages[0].config
    assert isinstance(stage, PolicyStage)
    return stage


def trl_trainer(path: Path, folder: Path, callbacks: list[Any] | None = None) -> Any:
    """A `GRPOTrainer` with the recipe's model, prompts, sampling, reward, loss and optimiser."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from posttrain.training.arguments import optimizer_arguments

    recipe = load_recipe(path).recipe
    stage = policy_stage(recipe)
    assert recipe.data.train is not None
    assert (stage.loss.kind, recipe.rollout.engine) == ("dapo", "transformers")
    examples = load_examples(recipe.data.train)
    dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
    completions = stage.prompts_per_step * stage.group_size
    # All at once for the tiny model; else about as many tokens as the recipe's micro_batch_tokens.
    micro_batch = completions if dtype == torch.float32 else 4 * stage.group_size
    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=completions // micro_batch,
        num_generations=stage.group_size,
        max_completion_length=recipe.rollout.max_tokens,
        temperature=recipe.rollout.temperature,
        loss_type="dapo",
        epsilon=stage.loss.clip_low,
        epsilon_high=stage.loss.clip_high,
        beta=stage.loss.kl,
        gradient_checkpointing=stage.gradient_checkpointing,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        seed=recipe.seed,
        disable_tqdm=True,
        report_to=[],
        **optimizer_arguments(stage.optimizer, dtype=dtype),
    )
    rows = [
        {"prompt": [{"role": "user", "content": example.prompt}], "answer": example.answer}
        for example in examples
    ]
    return GRPOTrainer(
        model=recipe.model.path,
        reward_funcs=_math_answer(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(recipe.model.path),
        callbacks=callbacks,
    )


def _math_answer() -> Any:
    """The recipe's reward with TRL's signature, called in TRL's own process."""
    from posttrain.rewards.builtin import MathAnswer

    score = MathAnswer()

    def math_answer(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
        return [
            score(Completion((), (), "stop", messages[0]["content"]), Example("", "", reference))
            for messages, reference in zip(completions, answer, strict=True)
        ]

    return math_answer


def main() -> None:
    recipe, folder = map(Path, sys.argv[1:3])
    if "without-vllm" in sys.argv:
        sys.modules["vllm"] = None  # type: ignore[assignment]
    trainer = trl_trainer(recipe, folder)
    trainer.train()
    trainer.save_model(str(folder / "model"))


if __name__ == "__main__":
    main()
