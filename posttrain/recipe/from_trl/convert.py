"""A TRL GRPO configuration, as `trl grpo --config` reads it, as a recipe.

Values keep what they mean, not what they are called: TRL counts completions where a recipe counts prompts,
and scales the advantages of `dr_grpo` where the paper does not. What has no counterpart is listed with the
reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.commented import Commented, plain
from posttrain.recipe.from_trl.config import Config, Tree, whole
from posttrain.recipe.from_trl.keys import CARRIED, LAUNCHER, LEFT_OUT, TRL_VERSION, UNNEEDED
from posttrain.recipe.from_trl.stage import stages
from posttrain.recipe.library import FOLDER
from posttrain.recipe.schema import Recipe
from posttrain.recipe.spelling import did_you_mean

ACCELERATE = {
    "multi_gpu": "ddp_8gpu",
    "zero1": "zero2_8gpu",
    "zero2": "zero2_8gpu",
    "zero3": "zero3_8gpu",
    "fsdp1": "fsdp2_8gpu",
    "fsdp2": "fsdp2_8gpu",
}
"""The configurations that TRL knows by name, and ours."""
EMPTY: tuple[Any, ...] = (None, {}, [], "")
"""What a `GRPOConfig` that was written to a file has for a value that was never set."""
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass
class Converted:
    """What became of a configuration, by key of TRL.

    `recipe` may have comments (`Commented`). `changed` are carried over and mean something else here,
    `left_out` have no counterpart, `unneeded` need none.
    """

    recipe: Tree
    changed: dict[str, str]
    left_out: dict[str, str]
    unneeded: dict[str, str]


def convert(values: dict[str, Any], name: str, processes: int | None = None) -> Converted:
    """A recipe of a configuration. `name` is its file's; `processes` goes before its own number of them.

    Raises:
        RecipeError: a value has the wrong type, or the configuration cannot be a recipe.
    """
    config = Config(name, values)
    world = _world(config, processes)
    recipe: Tree = {
        **_run(config),
        "model": _model(config),
        "data": _data(config),
        "rollout": _rollout(config),
        **_rewards(config),
        "stages": stages(config, world, _rows(config)),
        **_tracking(config),
        **_launch(config, world),
    }
    try:
        Recipe.model_validate(plain(recipe))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{name} makes no valid recipe: {where}: {first['msg']}.") from None
    return Converted(recipe, config.changed, config.left_out | dict(_others(config)), dict(_idle(config)))


def _others(config: Config) -> Iterator[tuple[str, str]]:
    """Keys without a counterpart that the configuration sets, and unknown ones."""
    known = [*CARRIED, *LEFT_OUT, *UNNEEDED, *LAUNCHER]
    for key, value in config.values.items():
        if key in LEFT_OUT and value not in (*EMPTY, LEFT_OUT[key][0]):
            yield key, LEFT_OUT[key][1]
        elif LAUNCHER.get(key):
            yield key, LAUNCHER[key]
        elif key not in known:
            yield key, f"TRL {TRL_VERSION} has no such key.{did_you_mean(key, known)}"


def _idle(config: Config) -> Iterator[tuple[str, str]]:
    for key, value in config.values.items():
        if key in UNNEEDED and value not in (*EMPTY, UNNEEDED[key][0]):
            yield key, UNNEEDED[key][1]


# --- processes ---------------------------------------------------------------------------------------------


def _world(config: Config, processes: int | None) -> int:
    """Training processes, which TRL's batch sizes are multiplied by."""
    if processes is not None:
        return processes
    if config.values.get("num_processes") is not None:
        try:
            return max(whole(config.values["num_processes"]), 1)
        except (TypeError, ValueError):
            found = config.values["num_processes"]
            raise RecipeError(
                f"{config.name}: num_processes should be a whole number, found {found!r}."
            ) from None
    launcher = config.values.get("accelerate_config")
    if launcher in ACCELERATE:
        return 8  # as in TRL's files of these names
    try:
        return int(yaml.safe_load(Path(str(launcher)).read_text())["num_processes"])
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError):
        return 1


def _launch(config: Config, world: int) -> Tree:
    launcher = config.values.get("accelerate_config")
    if launcher is None or launcher == "single_gpu":
        return {"launch": {"num_processes": world}} if world > 1 else {}
    if launcher not in ACCELERATE:
        return {"launch": {"config_file": str(launcher), **({"num_processes": world} if world > 1 else {})}}
    ours = ACCELERATE[launcher]
    if launcher in ("zero1", "fsdp1"):
        config.changed["accelerate_config"] = f"{launcher} is not offered; the nearest is {ours}"
    path = FOLDER / "accelerate" / f"{ours}.yaml"
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return {
        "launch": {"config_file": str(shown), **({"num_processes": world} if world not in (1, 8) else {})}
    }


# --- the run, the model, the data --------------------------------------------------------------------------


def _run(config: Config) -> Tree:
    folder = Path(config.text("output_dir")) if config.given("output_dir") else Path()
    wanted = config.text("run_name") if config.given("run_name") else folder.name or Path(config.name).stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).lstrip("._-") or "from-trl"
    parent = str(folder.parent)
    return {
        "name": name,
        "description": f"From TRL's {Path(config.name).name}.",
        "seed": config.count("seed"),
        **({} if parent == "." else {"output_dir": parent}),
    }


def _model(config: Config) -> Tree:
    if not config.given("model_name_or_path"):
        raise RecipeError(f"{config.name} has no model_name_or_path: add the model to train to it.")
    model: Tree = {"path": config.text("model_name_or_path")}
    options = dict(config.raw("model_init_kwargs") or {}) if _is_mapping(config, "model_init_kwargs") else {}
    revision = options.pop("revision", None) or config.text("model_revision")
    if revision != "main":
        model["revision"] = revision
    half = config.flag("fp16")
    computes = config.flag("bf16") if config.given("bf16") else not half
    held = str(options.pop("dtype", None) or config.text("dtype"))
    model["dtype"] = "bfloat16" if computes or half or held != "float32" else "float32"
    if half:
        config.changed["fp16"] = "bfloat16, which needs no scaling of the loss"
    if held != "float32" and not config.flag("use_peft"):
        config.changed["dtype"] = "weights that are trained are held in float32 and computed in bfloat16"
    if held == "float32" and model["dtype"] == "bfloat16" and config.flag("use_peft"):
        config.changed["dtype"] = "the frozen weights under an adapter are held in bfloat16"
    attention = options.pop("attn_implementation", None)
    attention = attention or (config.given("attn_implementation") and config.text("attn_implementation"))
    if attention:
        model["attn_implementation"] = attention
    if options.pop("trust_remote_code", False) or config.flag("trust_remote_code"):
        model["trust_remote_code"] = True
    if options:
        names = ", ".join(sorted(options))
        config.left_out["model_init_kwargs"] = f"the model is loaded without {names}"
    if config.flag("use_peft"):
        model["lora"] = _lora(config)
    return model


def _lora(config: Config) -> Tree:
    dropout = config.number("lora_dropout") if config.given("lora_dropout") else 0.0
    if not config.given("lora_dropout"):
        config.changed["lora_dropout"] = (
            "0, not TRL's default of 0.05: with dropout the trainer's log-probs are not those of the engine"
        )
    elif dropout:
        config.changed["lora_dropout"] = (
            "the trainer's log-probs differ from the engine's by it; if the first steps stop for that, set 0"
        )
    targets: Any = ["q_proj", "v_proj"]
    if config.given("lora_target_modules"):
        targets = config.texts("lora_target_modules")
        targets = "all-linear" if targets == ["all-linear"] else targets
    else:
        targets = Commented(targets, "peft's default for Qwen and Llama; posttrain's is all-linear")
    return {
        "r": config.positive("lora_r"),
        "alpha": config.positive("lora_alpha"),
        **({"dropout": dropout} if dropout else {}),
        "target_modules": targets,
    }


def _rows(config: Config) -> int | None:
    source = _source(config)
    path = Path(source["jsonl"]).expanduser() if "jsonl" in source else None
    if path is None or not path.is_file():
        return None
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _is_mapping(config: Config, key: str) -> bool:
    value = config.raw(key)
    if value is not None and not isinstance(value, dict):
        raise RecipeError(f"{config.name}: {key} should be a mapping, found {value!r}.")
    return value is not None


def _data(config: Config) -> Tree:
    source, answer = _source(config), _answer(config)
    source["columns"] = {"prompt": "prompt", "answer": answer}
    config.changed["dataset_name" if config.given("dataset_name") else "datasets"] = (
        "a prompt that is plain text is put into the chat template where the tokenizer has one; "
        "format: text takes it as it is, as TRL does"
    )
    if not config.flag("shuffle_dataset"):
        source["shuffle"] = False
    if config.given("data_seed"):
        source["seed"] = config.count("data_seed")
    data = {"train": source}
    if config.text("eval_strategy") != "no":
        data["eval"] = {**source, "split": config.text("dataset_test_split")}
    return data


def _answer(config: Config) -> Any:
    """The column with the reference answer, if a reward of TRL's wants one."""
    if config.given("reward_funcs") and any("accuracy" in name for name in config.texts("reward_funcs")):
        return Commented("solution", "what TRL's accuracy rewards read")
    return None


def _source(config: Config) -> Tree:
    mixture = config.raw("datasets")
    if not mixture:
        if not config.given("dataset_name"):
            raise RecipeError(f"{config.name} has neither dataset_name nor datasets: add one to it.")
        source = {"hub": config.text("dataset_name")}
        if config.given("dataset_config"):
            source["subset"] = config.text("dataset_config")
        return {**source, "split": config.text("dataset_train_split")}
    if not isinstance(mixture, list) or not all(isinstance(one, dict) and "path" in one for one in mixture):
        raise RecipeError(f"{config.name}: datasets should be a list of mappings with a path.")
    first = dict(mixture[0])
    if len(mixture) > 1:
        rest = ", ".join(str(one["path"]) for one in mixture[1:])
        config.left_out["datasets"] = (
            f"a stage has one source; {rest} would have to be put into a file with it"
        )
    kind, files = first.pop("path"), first.pop("data_files", None)
    known = {"json": "jsonl", "parquet": "parquet"}
    if kind in known and isinstance(files, str) and "*" not in files and "://" not in files:
        return {known[kind]: files}
    lost = [key for key in ("data_dir", "columns", "fraction") if first.get(key) is not None]
    if files is not None or lost:
        names = ", ".join([*(["data_files"] if files is not None else []), *lost])
        config.left_out.setdefault("datasets", f"{names} of {kind}: a source is a name, a split, or one file")
    subset = {} if first.get("name") is None else {"subset": first["name"]}
    return {"hub": kind, **subset, "split": first.get("split") or "train"}


# --- rollouts and rewards ----------------------------------------------------------------------------------


def _rollout(config: Config) -> Tree:
    rollout: Tree = {"engine": "transformers"}
    if config.flag("use_vllm"):
        rollout = _vllm(config)
    if "max_completion_length" in config.values and not config.given("max_completion_length"):
        config.changed["max_completion_length"] = "null is no cap in TRL; a recipe has one, here its default"
    rollout["max_tokens"] = config.positive("max_completion_length")
    if config.given("vllm_max_model_length"):
        rollout["max_model_len"] = config.positive("vllm_max_model_length")
    return {**rollout, "temperature": config.number("temperature")}


def _vllm(config: Config) -> Tree:
    mode = config.text("vllm_mode")
    if mode == "colocate":
        return {"engine": "vllm", "memory_fraction": config.number("vllm_gpu_memory_utilization")}
    if mode != "server":
        raise RecipeError(f"{config.name}: vllm_mode should be colocate or server, found {mode!r}.")
    url = f"http://{config.text('vllm_server_host')}:{config.count('vllm_server_port')}"
    if config.given("vllm_server_base_url"):
        url = config.text("vllm_server_base_url")
    config.changed["vllm_mode"] = (
        "the server has to be started as docs/scale.md says, and not by `trl vllm-serve`"
    )
    return {"engine": "vllm_server", "server": {"urls": [url.replace("0.0.0.0", "127.0.0.1")]}}


def _rewards(config: Config) -> Tree:
    rewards: list[Tree] = []
    models: Tree = {}
    if config.given("reward_model_name_or_path"):
        models = {"reward_models": {"reward_model": {"path": config.text("reward_model_name_or_path")}}}
        rewards.append({"name": "reward_model"})
    if config.given("reward_funcs"):
        rewards += [_reward(config, name) for name in config.texts("reward_funcs")]
    if not rewards:
        raise RecipeError(f"{config.name} has neither reward_funcs nor reward_model_name_or_path.")
    if config.given("reward_weights"):
        weights = config.raw("reward_weights")
        if not isinstance(weights, list) or len(weights) != len(rewards):
            raise RecipeError(
                f"{config.name}: reward_weights should be {len(rewards)} numbers, found {weights!r}."
            )
        rewards = [{**one, "weight": _weight(config, w)} for one, w in zip(rewards, weights, strict=True)]
    combine = config.text("multi_objective_aggregation")
    options = {} if combine == "sum_then_normalize" else {"reward_options": {"combine": combine}}
    return {"rewards": rewards, **models, **options}


def _weight(config: Config, weight: Any) -> float:
    try:
        return float(weight)
    except (TypeError, ValueError):
        raise RecipeError(f"{config.name}: reward_weights has {weight!r}, which is no number.") from None


def _reward(config: Config, name: str) -> Tree:
    """TRL's own functions are called as they are, but the one that is built in here, too."""
    if name == "get_soft_overlong_punishment":
        return {"name": "length_penalty", "args": {"max_tokens": 1280, "buffer": 256}}
    if name in ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"):
        return {"name": name, "use": f"trl.rewards:{name}"}
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise RecipeError(
            f"{config.name}: reward_funcs has {name!r}, which is neither TRL's nor a dotted path."
        )
    return {"name": attribute, "use": f"{module}:{attribute}"}


def _tracking(config: Config) -> Tree:
    asked = [] if config.raw("report_to") in ("none", None) else config.texts("report_to")
    lost = [tracker for tracker in asked if tracker not in (*TRACKERS, "none")]
    if lost:
        config.left_out["report_to"] = (
            f"there is no tracker {', '.join(lost)}; there are {', '.join(TRACKERS)}"
        )
    kept = [tracker for tracker in asked if tracker in TRACKERS]
    return {"report_to": kept} if kept else {}
