"""The reproductions' own arithmetic, and that they run from end to end."""

import json
import math

import pytest
import reproduce
from helpers import make_tiny_model
from reproductions import common, hdpo


def test_claims_say_what_was_measured():
    made = common.claim("gain", ">= 0.1", [0.2, 0.4], True)
    assert (made["measured"], made["interval"], made["interval_kind"]) == (
        0.3,
        [0.2, 0.4],
        "range over seeds",
    )
    assert "why" not in common.claim("gain", ">= 0.1", [0.2], True, why="because")
    assert common.claim("gain", ">= 0.1", [0.0], False, why="because")["why"] == "because"


def test_paired_interval_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, 4.303 / sqrt(3) on each side.
    low, high = common.paired_interval([2, 4, 6], [1, 2, 3])
    assert (low, high) == (pytest.approx(2 - 2.4843, abs=1e-3), pytest.approx(2 + 2.4843, abs=1e-3))
    assert common.paired_interval([1], [2]) == (-math.inf, math.inf)


def write_run(folder, tokens, saved):
    """What is read of a run that sampled so many tokens a step and saved models after some."""
    (folder / "models" / "01-train").mkdir(parents=True)
    for step in saved:
        (folder / "checkpoints" / "01-train" / f"step-{step}").mkdir(parents=True)
    lines = [{"step": step, "tokens/sampled": count} for step, count in enumerate(tokens, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_models_at_equal_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "model_of", lambda folder: str(folder / "models" / "01-train"))
    write_run(tmp_path / "short", [100, 80, 60], saved=[1, 2])
    write_run(tmp_path / "long", [100, 100, 100, 100], saved=[1, 2, 3])
    short, long = common.at_equal_tokens([tmp_path / "short", tmp_path / "long"])
    assert short == common.Saved(tmp_path / "short" / "models" / "01-train", 240, True)
    assert long == common.Saved(tmp_path / "long" / "checkpoints" / "01-train" / "step-2", 200, False)


def test_a_run_is_repeated_when_the_weights_it_started_from_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: a\n"
        f"model: {{path: {tmp_path / 'model'}}}\n"
        "data: {eval: {task: arithmetic, size: 1, split: test}}\n"
        "rollout: {max_tokens: 1}\n"
        "rewards: [exact_match]\n"
        "stages: [evaluate: {samples: 1}]\n"
    )
    make_tiny_model(tmp_path / "model", seed=0)

    def when():
        return (common.run(recipe, "kept") / "summary.json").stat().st_mtime_ns

    first = when()
    assert when() == first
    make_tiny_model(tmp_path / "model", seed=1)
    second = when()
    assert second != first
    assert when() == second
    assert "Weights of" in (tmp_path / "runs" / "kept" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("prompt", "family"), [("<|user|>7+5=", "easy"), ("48+37=", "medium"), ("482*37=", "hard")]
)
def test_families_are_known_by_their_problems(prompt, family):
    assert hdpo.family_of(prompt) == family


def test_auroc_by_hand():
    # Pairs: 1 > 0.5, 1 > 0, 0.5 = 0.5, 0.5 > 0: 3.5 of 4.
    assert hdpo.auroc([1.0, 0.5, 0.5, 0.0], [True, True, False, False]) == 0.875
    assert math.isnan(hdpo.auroc([1.0], [True]))


def test_criteria():
    good = {"use/easy": 0.1, "use/hard": 0.9, "accuracy": 0.88, "redundant": 0.02, "auroc": 0.9}
    grpo = {"accuracy": 0.9}
    assert all(hdpo.criteria([good], [grpo]).values())
    for key, value in {
        "use/easy": 0.2,
        "use/hard": 0.8,
        "accuracy": 0.87,
        "redundant": 0.03,
        "auroc": 0.8,
    }.items():
        met = hdpo.criteria([good | {key: value}], [grpo])
        assert [name for name, is_met in met.items() if not is_met] == [key.removeprefix("use/")]


def test_repeated_calls():
    calls = [{"arguments": text} for text in ("1+1", "2+2", "1+1")]
    assert hdpo.is_redundant(calls)
    assert not hdpo.is_redundant(calls[:2])


def test_hdpo_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["hdpo", "--fast"])
    result = json.loads((tmp_path / "hdpo-fast.json").read_text())
    arms = {"cold start", "grpo", "hdpo 0.15", "coupled 0.02 (noisy)"}
    assert set(result["arms"]) == arms | {"grpo, equal tokens", "hdpo 0.15, equal tokens"}
    assert len(result["claims"]) == 9
    assert all(0 <= arm["use/easy"][0] <= 1 for arm in result["arms"].values())
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == 4  # of one step, nothing was saved on the way
    written = (tmp_path / folders[0] / "summary.json").stat().st_mtime_ns
    reproduce.main(["hdpo", "--fast"])  # what is there is kept
    assert (tmp_path / folders[0] / "summary.json").stat().st_mtime_ns == written


def test_reward_model_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RUNS", tmp_path)
    reproduce.main(["reward_model", "--fast"])
    result = json.loads((tmp_path / "reward_model-fast.json").read_text())
    for arm in ("raw pairs", "annotated"):
        assert 0 <= result["arms"][arm]["held-out accuracy"][0] <= 1
    assert 0 <= result["votes"]["auc"][0] <= 1
    assert len(result["grpo"][0]["preference"]) == 2
    (made,) = result["claims"]
    assert made["measured"] == pytest.approx(
        result["arms"]["annotated"]["held-out accuracy"][0]
        - result["arms"]["raw pairs"]["held-out accuracy"][0],
        abs=1e-4,
    )
