"""What the policy trainer makes of several rewards, of known values and of errors."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import make_tiny_model
from policy_training import EvenTokens, make_stage, make_trainer

from posttrain.methods.base import Method
from posttrain.recipe.schema import RewardOptions, RewardSpec
from posttrain.rewards.combine import Combination
from posttrain.rewards.scorer import Scorer
from posttrain.training.advantages import decoupled_rewards


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class TwoRewards(EvenTokens):
    """A second reward a hundred times larger, which does not apply to the first of a group."""

    combination = Combination([RewardSpec(name="even"), RewardSpec(name="last", weight={0: 0.5, 2: 1.5})])

    def score(self, rollouts, step=None):
        report = super().score(rollouts, step)
        for rollout in rollouts:
            last = 100.0 * (rollout.completion.token_ids[-1] % 3)
            rollout.rewards["last"] = None if rollout.index == 0 else last
            rollout.reward = self.combination.total(rollout.rewards, {}, step)
        return report


def test_each_reward_is_normalised_before_the_sum(model_folder, tmp_path):
    records = []
    trainer = make_trainer(
        model_folder,
        tmp_path,
        stage=make_stage(),
        scorer=TwoRewards(),
        combine="normalize_then_sum",
        on_rollouts=records.append,
    )
    trainer.train()
    assert len(records) == 3
    for step, record in enumerate(records):
        rollouts = record.collected.batch.rollouts
        values = np.array([[r.rewards["even"], r.rewards["last"]] for r in rollouts], dtype=float)
        weights = np.array([1.0, 0.5 + step / 2])
        total = decoupled_rewards(values, weights, [r.request.group for r in rollouts])
        expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
        found = [record.channels[0].advantages[r.id] for r in rollouts]
        np.testing.assert_allclose(found, np.where(total == 0, 0.0, expected), atol=1e-9)
        assert np.abs(found).max() > 1


def test_dynamic_sampling_keeps_groups_whose_rewards_only_cancel(model_folder, tmp_path):
    class Cancelling(EvenTokens):
        combination = Combination([RewardSpec(name="even"), RewardSpec(name="odd", weight=0.5)])

        def score(self, rollouts, step=None):
            report = super().score(rollouts, step)
            for rollout in rollouts:  # the reward never differs, but what it is the sum of does
                high = float(rollout.index == 0)
                rollout.rewards = {"even": high, "odd": 1.0 - high}
                rollout.reward = 1.0
            return report

    records, log = [], []
    for combine in ("sum_then_normalize", "normalize_then_sum"):
        make_trainer(
            model_folder,
            tmp_path,
            stage=make_stage(dynamic_sampling=1),
            scorer=Cancelling(),
            combine=combine,
            on_rollouts=records.append,
            on_log=lambda step, steps, metrics: log.append(metrics),
        ).train()
    assert [len(record.collected.dropped) for record in records] == [12] * 3 + [0] * 3
    assert [bool(metrics["tokens/with_advantage"]) for metrics in log] == [False] * 3 + [True] * 3


REWARD = """
from posttrain import reward

@reward("parity", range=(0, 1))
def parity(completion, example):
    if completion.token_ids[0] % 3 == 0:
        raise ValueError("boom")
    return float(completion.token_ids[-1] % 2)
"""


def test_metrics_count_errors_and_known_values(model_folder, tmp_path):
    (tmp_path / "parity.py").write_text(REWARD)
    spec = RewardSpec.model_validate({"name": "parity", "from": str(tmp_path / "parity.py")})
    logs, records = [], []
    for attempt in range(2):
        log = []
        with Scorer([spec], RewardOptions(workers=1), tmp_path / "cache" / f"{attempt}.jsonl") as scorer:
            trainer = make_trainer(
                model_folder,
                tmp_path,
                scorer=scorer,
                on_error="drop",
                on_rollouts=records.append,
                on_log=lambda step, steps, metrics, log=log: log.append(metrics),
            )
            trainer.train()
        logs.append(log)
    first, again = logs
    for metrics, record in zip(first, records[:3], strict=True):
        sampled = [*record.collected.batch, *record.collected.dropped]
        broken = [rollout for rollout in sampled if rollout.completion.token_ids[0] % 3 == 0]
        assert broken
        assert {rollout.id for rollout in broken} == {rollout.id for rollout in record.collected.dropped}
        assert metrics["rewards/parity/errors/exception"] == len(broken)
        assert metrics["rewards/unscored"] == len(broken) / len(sampled)
        assert all(rollout.reward_versions["parity"].startswith("1 sha256:") for rollout in sampled)
    # The second time all that has a value is known, and nothing else is different.
    assert [metrics["rewards/cache_hits"] for metrics in again] == [
        len(record.collected.batch) for record in records[:3]
    ]
    assert [metrics["loss"] for metrics in again] == [metrics["loss"] for metrics in first]


class FollowUps(Method):
    """Samples every prompt once more and has that scored, for nothing but the score."""

    name = "follow_ups"

    def extend(self, batch, context):
        requests = [group[0].request for group in batch.groups().values()]
        again = context.generate([replace(r, sampling=replace(r.sampling, n=2, seed=7)) for r in requests])
        context.score(again.rollouts)
        self.failed = sum("parity" in rollout.reward_errors for rollout in again)
        return batch


def test_follow_ups_of_methods_are_in_the_counts(model_folder, tmp_path):
    (tmp_path / "parity.py").write_text(REWARD)
    spec = RewardSpec.model_validate({"name": "parity", "from": str(tmp_path / "parity.py")})
    records, errors, failed, method = [], [], [], FollowUps(None)
    with Scorer([spec], RewardOptions(workers=1)) as scorer:
        make_trainer(
            model_folder,
            tmp_path,
            scorer=scorer,
            methods=[method],
            on_error="drop",
            on_rollouts=lambda record: (records.append(record), failed.append(method.failed)),
            on_log=lambda step, steps, metrics: errors.append(
                metrics.get("rewards/parity/errors/exception", 0)
            ),
        ).train()
    dropped = [len(record.collected.dropped) for record in records]
    assert sum(failed) > 0
    assert errors == [one + other for one, other in zip(dropped, failed, strict=True)]
