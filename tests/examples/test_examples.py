"""The programs in examples/ do what they say."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import torch
from engine_contract import MIXED, TOLERANCE, perturbed, request, tokens_of
from helpers import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.errors import RolloutError
from posttrain.methods.base import StepContext
from posttrain.recipe.load import load_recipe
from posttrain.recipe.run import run_recipe
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion, Rollout, RolloutBatch, make_rollouts

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPE = """
name: voted
model: {{path: {model}}}
data: {{train: {{task: arithmetic, size: 20, split: train}}}}
rollout: {{max_tokens: 6}}
rewards: [numeric_match]
stages:
  - policy:
      steps: 1
      prompts_per_step: 2
      group_size: 4
      methods: [{{"{examples}/majority_vote.py:MajorityVote": {{min_share: 0.25}}}}]
"""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def code_lines(name: str) -> int:
    return len((EXAMPLES / f"{name}.py").read_text().splitlines())


def test_examples_are_as_short_as_they_say() -> None:
    assert code_lines("grpo_from_scratch") < 300
    assert code_lines("majority_vote") <= 60
    programs = [path for path in EXAMPLES.iterdir() if path.suffix == ".py"]
    assert {path.stem for path in programs} == {"grpo_from_scratch", "majority_vote", "plain_engine"}
    for path in programs:
        assert ast.get_docstring(ast.parse(path.read_text()))


def test_grpo_from_scratch_changes_the_weights_and_repeats_itself(model: Path) -> None:
    grpo = example("grpo_from_scratch")
    settings = grpo.Settings(
        model=str(model), steps=3, prompts=3, group=4, max_tokens=6, micro_batch_tokens=64
    )
    first = list(grpo.train(settings))
    assert [line["step"] for line in first] == [1, 2, 3]
    assert all(line["unscored"] == 0 and 0 <= line["reward"] <= 1 for line in first)
    assert first == list(grpo.train(settings))


def test_grpo_from_scratch_learns_what_is_rewarded(model: Path) -> None:
    """With a reward that can be had: completions that begin with a digit become frequent."""
    grpo = example("grpo_from_scratch")
    policy = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = grpo.Settings(learning_rate=1e-2, max_tokens=1, seed=1)
    learner, engine = grpo.Learner(policy, settings), TransformersEngine(policy, tokenizer)
    shares = []
    for step in range(12):
        engine.sync(policy)
        asked = [request("1+2=", 1, n=32, seed=step), request("9*", 1, n=32, seed=100 + step)]
        rollouts = make_rollouts(asked, engine.generate(asked), engine.version).rollouts
        for rollout in rollouts:
            rollout.reward = float(rollout.completion.text[:1].isdigit())
        shares.append(sum(rollout.reward or 0.0 for rollout in rollouts) / len(rollouts))
        learner.update(grpo.rows_of(rollouts))
    assert shares[0] < 0.4
    assert shares[-1] > 0.9


def voters(*answers: str, group: str = "a") -> list[Rollout]:
    asked = replace(request("1+2=", n=len(answers)), group=group)
    return [
        Rollout(asked, Completion((1,), (0.0,), "stop", text), index, policy_version=1)
        for index, text in enumerate(answers)
    ]


def test_the_majority_is_right() -> None:
    votes = example("majority_vote")
    logged: list[float] = []
    context = StepContext(
        step=0,
        engine=None,  # type: ignore[arg-type]
        tokenizer=None,
        model=None,
        rng=None,  # type: ignore[arg-type]
        log=lambda name, value: logged.append(value),
        score=lambda rollouts: None,
    )
    method = votes.MajorityVote(votes.MajorityConfig(min_share=0.5))
    answers = [f"<answer>{answer}</answer>" for answer in ("3", "3", "3", "4")]
    batch = RolloutBatch([*voters(*answers), *voters("<answer>1</answer>", "nothing", "no", "?", group="b")])
    (channel,) = method.channels(batch, context)
    # Of 3, 3, 3, 4: votes 1, 1, 1, 0 with mean 3/4 and standard deviation 1/2.
    assert [channel.advantages[f"a/solution/{index}"] for index in range(4)] == pytest.approx(
        [0.5, 0.5, 0.5, -1.5], rel=1e-3
    )
    assert len(channel.advantages) == 4  # in b a quarter agrees, which is too few
    assert logged == [0.75, 0.25]


def test_a_recipe_uses_the_method(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "voted.yaml"
    path.write_text(RECIPE.format(model=model, examples=EXAMPLES))
    folder = run_recipe(load_recipe(path, [f"output_dir={tmp_path}"]))
    (line,) = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert line["kind"] == "policy"
    assert "reward" in line


def test_the_plain_engine_gives_what_the_embedded_one_gives(model: Path) -> None:
    plain_engine = example("plain_engine")
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [*MIXED, request("1+2=", 12, n=2, seed=9, stop=("a", "7"), scored_ids=(7, 200), banned_ids=(9,))]
    plain = plain_engine.PlainEngine(policy, tokenizer)
    embedded = TransformersEngine(policy, tokenizer)
    ours, theirs = plain.generate(asked), embedded.generate(asked)
    assert tokens_of(ours) == tokens_of(theirs)
    for mine, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert mine.text == other.text
        assert mine.finish_reason == other.finish_reason
        torch.testing.assert_close(
            torch.tensor(mine.logprobs), torch.tensor(other.logprobs), atol=TOLERANCE, rtol=0
        )
        assert (mine.scored is None) == (other.scored is None)

    rollout = make_rollouts(asked[:1], ours[:1], 0).rollouts[0]
    cuts = [0, 2]
    forked = [engine.fork(rollout, cuts, 2, asked[0].sampling) for engine in (plain, embedded)]
    assert tokens_of(forked[0]) == tokens_of(forked[1])

    changed = perturbed(model)
    plain.sync(changed)
    embedded.sync(changed)
    assert plain.version == 1
    assert tokens_of(plain.generate(MIXED[:1])) == tokens_of(embedded.generate(MIXED[:1]))
    plain.close()
    with pytest.raises(RolloutError, match="closed"):
        plain.generate(MIXED)
