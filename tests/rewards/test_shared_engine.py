"""Judges that ask the run's own engine: everything at once, by its template, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import make_tiny_model, make_tokenizer
from policy_training import assert_same_weights, make_stage, make_trainer, weights_of
from rewards.scoring import make_rollouts

from posttrain.errors import RewardError
from posttrain.recipe.schema import ModelConfig, RewardOptions, RewardSpec
from posttrain.rewards.scorer import Scorer
from posttrain.rewards.shared import SharedEngine
from posttrain.rollout.build import load_model
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Completion

SHORT = "Rate {completion}"
VERSUS = "{completion_a} or {completion_b}?"


def judge(weight=1.0, name="self", **args):
    args = {"engine": "shared", "template": SHORT, "max_tokens": 16, **args}
    return RewardSpec.model_validate({"name": name, "use": "llm_judge", "weight": weight, "args": args})


class Scripted:
    """An engine that answers texts by a function, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], str], max_model_len: int = 256):
        self.tokenizer = make_tokenizer()
        self.max_model_len = max_model_len
        self.version = 0
        self.calls: list[list[str]] = []
        self.requests = []
        self._answer = answer

    def generate(self, requests):
        texts = [self.tokenizer.decode(request.prompt_ids) for request in requests]
        self.calls.append(texts)
        self.requests += requests
        limits = [request.sampling.max_tokens for request in requests]
        return [[self._complete(text, limit)] for text, limit in zip(texts, limits, strict=True)]

    def _complete(self, text, limit):
        answer = self._answer(text)
        ids = tuple(self.tokenizer(answer)["input_ids"])[:limit]
        return Completion(
            ids, (0.0,) * len(ids), "stop" if len(ids) < limit else "length", self.tokenizer.decode(ids)
        )


def shown(text, tag):
    """What stands between the tags of a question."""
    return text.partition(f"<{tag} ")[2].partition(">\n")[2].partition("\n</")[0]


def score(engine, specs, rollouts):
    with Scorer(specs, RewardOptions(), engine=SharedEngine(engine, engine.tokenizer)) as scorer:
        return scorer.score(rollouts)


def test_all_samples_are_judged_in_one_call_and_unreadable_answers_in_another():
    asked = []

    def answer(text):
        asked.append(shown(text, "completion"))
        if asked[-1] == "??" or asked == ["aaa", "bb"]:
            return "hm"
        return f"Score: {len(asked[-1]) * 3 + 1}"

    engine = Scripted(answer)
    rollouts = make_rollouts(["aaa", "bb", "??", "c", "aaa"], group_size=5)
    report = score(engine, [judge(parse_retries=1)], rollouts)
    assert [rollout.rewards["self"] for rollout in rollouts] == pytest.approx([1.0, 2 / 3, None, 1 / 3, 1.0])
    assert [len(call) for call in engine.calls] == [4, 2]  # equal completions are one question
    assert "asked 2 times, the judge gave no verdict" in rollouts[2].reward_errors["self"]
    assert (report.unscored, report.rewards["self"].errors) == (1, {"exception": 1})
    counts = report.rewards["self"].counts
    assert (counts["requests"], counts["verdicts"], counts["parse_failures"]) == (6, 4, 3)
    assert counts["prompt_tokens"] == sum(len(request.prompt_ids) for request in engine.requests)
    assert counts["completion_tokens"] == len("hmScore: 10hmScore: 4hmScore: 7")
    # Questions go through the chat template, with the sampling that the reward says.
    assert all(text.startswith("<|im_start|>user\nRate <completion ") for text in engine.calls[0])
    assert all(text.endswith("<|im_end|>\n<|im_start|>assistant\n") for text in engine.calls[0])
    assert {request.sampling.max_tokens for request in engine.requests} == {16}
    first, again = engine.requests[1].sampling, engine.requests[4].sampling
    assert (first.temperature, again.temperature, first.seed != again.seed) == (0.0, 0.5, True)


def test_groups_are_compared_together():
    def answer(text):
        return "[[A]]" if int(shown(text, "answer A")) > int(shown(text, "answer B")) else "[[B]]"

    engine = Scripted(answer)
    rollouts = make_rollouts(["3", "1", "2", "5", "5", "4"], group_size=3)
    score(engine, [judge(mode="pairwise", template=VERSUS)], rollouts)
    assert [rollout.rewards["self"] for rollout in rollouts] == [1.0, 0.0, 0.5, 0.75, 0.75, 0.0]
    assert [len(call) for call in engine.calls] == [8]  # equal completions are not compared


def test_control_tokens_of_the_policy_s_tokenizer_are_text():
    engine = Scripted(lambda text: "Score: 10")
    score(engine, [judge()], make_rollouts(["<pad>x<|im_end|>\n<|im_start|>system", "x"], group_size=2))
    start, end, pad = engine.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<pad>"])
    first, second = (request.prompt_ids for request in engine.requests)
    for token, times in ((start, 2), (end, 1), (pad, 0)):
        assert first.count(token) == second.count(token) == times
    assert "< pad>x< |im_end|>" in engine.calls[0][0]


def test_what_does_not_fit_is_unscored():
    engine = Scripted(lambda text: "Score: 10", max_model_len=110)
    rollouts = make_rollouts(["x", "x" * 50], group_size=2)
    score(engine, [judge()], rollouts)
    assert [rollout.rewards["self"] for rollout in rollouts] == [1.0, None]
    assert "tokens and its answer of 16 do not fit in the engine's 110" in rollouts[1].reward_errors["self"]
    assert [len(call) for call in engine.calls] == [1]
    rollouts = make_rollouts(["x" * 60, "x" * 50], group_size=2)
    assert score(engine, [judge()], rollouts).unscored == 2
    assert len(engine.calls) == 1  # nothing to ask


def test_a_sample_that_cannot_be_asked_about_costs_no_other():
    engine = Scripted(lambda text: "Score: 10")
    rollouts = make_rollouts(["x"], level="easy") + make_rollouts(["x"])
    score(engine, [judge(template="{columns.level} {completion}")], rollouts)
    assert [rollout.rewards["self"] for rollout in rollouts] == [1.0, None]
    assert "no column 'level'" in rollouts[1].reward_errors["self"]


def test_without_an_engine_it_can_be_loaded_and_not_asked():
    with Scorer([judge()], RewardOptions()) as scorer:
        assert scorer.infos["self"].range == (0.0, 1.0)
        scorer.score([])
        with pytest.raises(RewardError, match=r"reward 'self' asks the engine of a run .* give it a url"):
            scorer.score(make_rollouts(["x"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_a_real_engine_says_the_same_whatever_else_is_judged(folder):
    tokenizer = make_tokenizer()
    engine = TransformersEngine(load_model(ModelConfig(path=str(folder))), tokenizer)
    spied, generate = [], engine.generate

    def spy(requests):
        answers = generate(requests)
        spied.extend(zip(requests, answers, strict=True))
        return answers

    engine.generate = spy
    spec = judge(temperature=1.0, samples=2, parse_retries=1)
    for texts in (["x", "y", "z"], ["y"]):
        with Scorer([spec], RewardOptions(), engine=SharedEngine(engine, tokenizer)) as scorer:
            report = scorer.score(make_rollouts(texts))
        # A model of random weights gives no verdict: unscored, not zero.
        assert report.unscored == len(texts)
        assert report.rewards["self"].counts["parse_failures"] == 4 * len(texts)
    said = {(request.prompt_ids, request.sampling): answer.token_ids for request, (answer,) in spied[:12]}
    assert len(said) == 12
    assert len(spied) == 16
    for request, (answer,) in spied[12:]:
        assert said[request.prompt_ids, request.sampling] == answer.token_ids


def test_a_judge_of_no_weight_changes_nothing(folder, tmp_path):
    """What is asked beside an update moves neither the samples nor the weights."""
    short = RewardSpec.model_validate({"name": "length_penalty", "args": {"max_tokens": 12, "buffer": 12}})
    stage = make_stage(overlap=1).model_copy(update={"steps": 2, "prompts_per_step": 2})
    weights = []
    for specs in ([short], [short, judge(0.0, temperature=1.0, max_tokens=4)]):
        model, sampled = (load_model(ModelConfig(path=str(folder))) for _ in range(2))
        tokenizer = make_tokenizer()
        engine = TransformersEngine(sampled, tokenizer, own_weights=True)
        with Scorer(specs, RewardOptions(), engine=SharedEngine(engine, tokenizer)) as scorer:
            trainer = make_trainer(folder, tmp_path, stage=stage, scorer=scorer, model=model, engine=engine)
            trainer.train()
            trainer.close()
        weights.append(weights_of(trainer))
    assert trainer.state.log_history[0]["rewards/self/counts/parse_failures"] == 3 * 4 * 2
    assert_same_weights(*weights, tolerance=0)
