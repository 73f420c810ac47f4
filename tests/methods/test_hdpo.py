"""HDPO's advantages and losses by hand, in the trainer, and on the table where everything can be computed."""

import numpy as np
import pytest
import torch
from helpers import make_tiny_model
from policy_training import assert_same_weights, make_stage, make_trainer, weights_of
from reproductions.hdpo_table import Arm, train

from posttrain.errors import TrainingError
from posttrain.methods.base import Channel, StepContext
from posttrain.methods.hdpo import Hdpo, costs, economy, efficiency_advantages
from posttrain.recipe.hdpo_schema import HdpoConfig
from posttrain.recipe.schema import LossConfig
from posttrain.rollout.types import (
    Completion,
    Example,
    Rollout,
    RolloutBatch,
    RolloutRequest,
    Sampling,
    ToolCall,
)
from posttrain.training.advantages import group_advantages
from posttrain.training.batch import rollout_row
from posttrain.training.losses import Denominators, policy_loss

ROWS = {
    "A": {
        "ans": [1, 1, 1, 0], "calls": [0, 1, 3, 2],
        "accuracy": [0.5, 0.5, 0.5, -1.5], "tool": [1.0911, -0.2182, -0.8729, 0],
        "coupled": [0.6238, 0.4726, 0.3970, -1.4933], "unconditional": [1.3175, 0.1464, -0.4392, -1.0247],
    },
    "B": {
        "ans": [1, 1, 1, 1], "calls": [0, 1, 1, 2],
        "accuracy": [0, 0, 0, 0], "tool": [1.4434, -0.2887, -0.2887, -0.8660],
        "coupled": [1.4434, -0.2887, -0.2887, -0.8660], "unconditional": [1.4434, -0.2887, -0.2887, -0.8660],
    },
    "C": {
        "ans": [1, 1, 1, 0], "calls": [1, 1, 1, 0],
        "accuracy": [0.5, 0.5, 0.5, -1.5], "tool": [0, 0, 0, 0],
        "coupled": [0.5, 0.5, 0.5, -1.5], "unconditional": [0.5, 0.5, 0.5, -1.5],
    },
    "D": {
        "ans": [1, 0, 0, 0], "calls": [2, 0, 0, 1],
        "accuracy": [1.5, -0.5, -0.5, -0.5], "tool": [0, 0, 0, 0],
        "coupled": [1.5, -0.5, -0.5, -0.5], "unconditional": [1.5, -0.5, -0.5, -0.5],
    },
    "E": {
        "ans": [0, 0, 0, 0], "fmt": [1, 1, 1, 0], "calls": [0, 1, 2, 3],
        "accuracy": [0.5, 0.5, 0.5, -1.5], "tool": [0, 0, 0, 0],
        "coupled": [0.5, 0.5, 0.5, -1.5], "unconditional": [0, 0, 0, 0],
    },
    "F": {
        "ans": [1, 1, 0, 0], "calls": [0, 1, 0, 0],
        "accuracy": [0.8660, 0.8660, -0.8660, -0.8660], "tool": [0.7071, -0.7071, 0, 0],
        "coupled": [0.9289, 0.8008, -0.8648, -0.8648], "unconditional": [1.3056, 0.2611, -0.7833, -0.7833],
    },
    "G": {
        "ans": [1, 1, 0, 0], "fmt": [0, 1, 1, 1], "calls": [0, 2, 0, 0],
        "accuracy": [0.7615, 0.9646, -0.8630, -0.8630], "tool": [0.7071, -0.7071, 0, 0],
        "coupled": [0.8660, 0.8660, -0.8660, -0.8660], "unconditional": [1.4142, 0, -0.7071, -0.7071],
    },
    "H": {
        "ans": [1, 1, 1, 1, 0, 0, 0, 0], "calls": [0, 0, 1, 3, 0, 0, 2, 1],
        "accuracy": [0.9354] * 4 + [-0.9354] * 4, "tool": [0.8333, 0.8333, -0.5, -1.1667, 0, 0, 0, 0],
        "coupled": [1.0204, 1.0204, 0.8809, 0.8111] + [-0.9332] * 4,
        "unconditional": [1.4849, 1.4849, 0.3536, -0.2121] + [-0.7778] * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_worked_examples(row):
    correct = np.array(row["ans"], dtype=bool)
    accuracy = 0.9 * correct + 0.1 * np.array(row.get("fmt", [1] * len(correct)))
    saved = economy(np.array(row["calls"], dtype=float), correct)
    groups = ["g"] * len(correct)

    def by_group(rewards):
        return group_advantages(rewards, groups, eps=1e-6)

    close = {"rtol": 0, "atol": 6e-5}
    np.testing.assert_allclose(by_group(accuracy), row["accuracy"], **close)
    np.testing.assert_allclose(efficiency_advantages(saved, correct, groups), row["tool"], **close)
    np.testing.assert_allclose(by_group(accuracy + 0.15 * saved), row["coupled"], **close)
    everyone = np.ones(len(correct), dtype=bool)
    np.testing.assert_allclose(efficiency_advantages(saved, everyone, groups), row["unconditional"], **close)


def test_why_coupling_fails_by_hand():
    def coupled(accuracy, extra):
        return group_advantages(np.array(accuracy) + np.array(extra), ["g"] * 4, eps=1e-6)

    mild = coupled([1, 1, 1, 0.1], 0.01 * np.array([1, 0.5, 0.25, 0]))
    np.testing.assert_allclose(mild, [0.50919, 0.49815, 0.49263, -1.49996], atol=2e-5)
    strong = coupled([1, 1, 1, 0.1], 2 * np.array([1, 1, 0.25, 0]))  # a right answer is punished
    np.testing.assert_allclose(strong, [0.79, 0.79, -0.287, -1.29], atol=5e-3)
    penalty = coupled([1, 1, 0.1, 0.1], -0.5 * np.array([2, 2, 0, 0]))  # wrong ones win
    np.testing.assert_allclose(penalty, [-0.866, -0.866, 0.866, 0.866], atol=1e-3)
    hopeless = coupled([0.1] * 4, -0.5 * np.arange(4))
    np.testing.assert_allclose(hopeless, [1.16, 0.39, -0.39, -1.16], atol=5e-3)


def draw(rng, groups=6):
    sizes = rng.integers(1, 9, groups)
    keys = [key for key, size in enumerate(sizes) for _ in range(size)]
    correct = rng.random(len(keys)) < 0.6
    return keys, correct, economy(rng.integers(0, 4, len(keys)).astype(float), correct)


@pytest.mark.parametrize("seed", range(5))
def test_properties_of_the_advantages(seed):
    rng = np.random.default_rng(seed)
    keys, correct, saved = draw(rng)
    found = efficiency_advantages(saved, correct, keys)
    assert np.isfinite(found).all()
    assert (found[~correct] == 0).all()
    for key in set(keys):
        members = np.array([k == key for k in keys]) & correct
        values = found[members]
        assert abs(values.sum()) < 1e-9
        if members.sum() >= 2 and np.ptp(saved[members]) > 0:
            assert np.var(values, ddof=1) == pytest.approx(1, abs=1e-4)
        else:
            assert (values == 0).all()
    right = np.flatnonzero(correct)  # without the wrong ones
    alone = efficiency_advantages(saved[right], correct[right], [keys[i] for i in right])
    np.testing.assert_allclose(alone, found[right], atol=1e-12)
    moved = efficiency_advantages(3 * saved + 7, correct, keys)
    np.testing.assert_allclose(moved, found, atol=1e-4)
    order = rng.permutation(len(keys))
    shuffled = efficiency_advantages(saved[order], correct[order], [keys[i] for i in order])
    np.testing.assert_allclose(shuffled, found[order], atol=1e-12)


@pytest.mark.parametrize("calls", [(0, 1), (0, 9), (3, 4)])
def test_two_correct_completions_get_plus_and_minus_the_same(calls):
    saved = economy(np.array(calls, dtype=float), np.array([True, True]))
    np.testing.assert_allclose(
        efficiency_advantages(saved, np.array([True] * 2), [0, 0]), [0.7071, -0.7071], atol=1e-4
    )
    centred = efficiency_advantages(saved, np.array([True] * 2), [0, 0], divide_by_std=False)
    np.testing.assert_allclose(centred, saved - saved.mean())


# --- the method -------------------------------------------------------------------------------------------


def rollout(index, correct, calls, length, seconds=1.0):
    completion = Completion(
        tuple(range(3, 3 + length)),
        (-1.0,) * length,
        "stop",
        "",
        tool_calls=tuple(ToolCall("calculator", "1+1", "2", seconds) for _ in range(calls)),
    )
    request = RolloutRequest((1, 2), Example("e", "1+1="), "0.0", Sampling(16, n=4))
    found = Rollout(request, completion, index, 0, {"exact": float(correct), "format": 1.0})
    found.reward = 0.9 * correct + 0.1
    return found


def row_a():
    answers, calls, lengths = ROWS["A"]["ans"], ROWS["A"]["calls"], (2, 4, 6, 3)
    return RolloutBatch(
        [rollout(i, *item) for i, item in enumerate(zip(answers, calls, lengths, strict=True))]
    )


def channels_of(batch, logged=None, **options):
    def log(key, value):
        if logged is not None:
            logged.setdefault(key, []).append(float(value))

    context = StepContext(0, None, None, None, np.random.default_rng(0), log, lambda rollouts: None)
    return Hdpo(HdpoConfig(**options)).channels(batch, context)


def losses(batch, channels, ratio=1.0, loss=None):
    """Σ weight · loss of each channel, and the loss of each, at one ratio for all tokens."""
    rows = [row for r in batch if (row := rollout_row(r, channels)) is not None]
    parts = {}
    for channel in channels:
        members = [row for row in rows if channel.name in row.advantages]
        advantages = np.concatenate([row.advantages[channel.name] for row in members])
        sequence = np.repeat(np.arange(len(members)), [len(row.positions) for row in members])
        logprobs = torch.zeros(len(advantages), dtype=torch.float64)
        parts[channel.name], _ = policy_loss(
            loss or LossConfig(),
            logprobs=logprobs,
            advantages=torch.tensor(advantages),
            sequence=torch.tensor(sequence),
            denominators=Denominators(len(members), len(advantages), 16),
            old_logprobs=logprobs - np.log(ratio),
        )
    total = sum(channel.weight * float(parts[channel.name]) for channel in channels)
    return total, {name: float(part) for name, part in parts.items()}


def outcome(batch):
    advantages = group_advantages(np.array([r.reward for r in batch]), ["g"] * len(batch), eps=1e-6)
    return Channel("outcome", {r.id: float(a) for r, a in zip(batch, advantages, strict=True)})


@pytest.mark.parametrize(
    ("normalizer", "efficiency", "total"),
    [("qualifying", 0.327333, -0.050900), ("all", 0.261867, -0.060720)],
)
def test_loss_by_hand(normalizer, efficiency, total):
    batch, logged = row_a(), {}
    channels = [outcome(batch), *channels_of(batch, logged, normalizer=normalizer)]
    whole, parts = losses(batch, channels)
    assert parts["outcome"] == pytest.approx(-0.1, abs=1e-6)
    assert parts["efficiency"] == pytest.approx(efficiency, abs=1e-5)
    assert whole == pytest.approx(total, abs=1e-5)
    assert logged["token_share"] == [pytest.approx(0.8)]
    assert logged["qualifying_groups"] == [1.0]
    assert logged["redundant_calls"] == [0, 0, 1, 1]
    assert logged["conflicts"] == [0.5]
    # At ratio 1 the losses of summed advantages are the same.
    (summed,) = channels_of(batch, normalizer=normalizer, combine="advantage")
    assert losses(batch, [summed])[0] == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "separate", "combined"),
    [(1.1, 0.41019, 0.41019), (1.5, 0.70935, 0.55935), (0.6, 0.39832, 0.29832)],
)
def test_two_clipped_losses_are_not_one(ratio, separate, combined):
    def loss(advantage, weight=1.0):
        value, _ = policy_loss(
            LossConfig(),
            logprobs=torch.zeros(1, dtype=torch.float64),
            advantages=torch.tensor([advantage], dtype=torch.float64),
            sequence=torch.zeros(1, dtype=torch.long),
            denominators=Denominators(1, 1, 16),
            old_logprobs=torch.full((1,), -np.log(ratio), dtype=torch.float64),
        )
        return weight * float(value)

    assert loss(0.5) + loss(-0.8729) == pytest.approx(separate, abs=1e-5)
    assert loss(0.5 - 0.8729) == pytest.approx(combined, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"), [(5.0, -1.0, 3.0), (2.0, -1.0, 2.0), (5.0, 1.0, -1.2)]
)
def test_dual_clip_bounds_the_loss_of_negative_advantages(ratio, advantage, expected):
    found, _ = policy_loss(
        LossConfig(dual_clip=3.0),
        logprobs=torch.zeros(1, dtype=torch.float64),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        sequence=torch.zeros(1, dtype=torch.long),
        denominators=Denominators(1, 1, 16),
        old_logprobs=torch.full((1,), -np.log(ratio), dtype=torch.float64),
    )
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cost", "spent"), [("calls", [0, 1, 3, 2]), ("seconds", [0, 1, 3, 2]), ("tokens", [2, 4, 6, 3])]
)
def test_costs(cost, spent):
    assert costs([r.completion for r in row_a()], cost).tolist() == spent


def test_members_of_the_channel():
    batch = row_a()
    (everyone,) = channels_of(batch)
    assert len(everyone.advantages) == 4
    (qualifying,) = channels_of(batch, normalizer="qualifying")
    assert set(qualifying.advantages) == {r.id for r in batch.rollouts[:3]}
    assert channels_of(batch, weight=0) == []
    (linear,) = channels_of(batch, shape="linear", unit=2)
    values = [linear.advantages[r.id] for r in batch]
    np.testing.assert_allclose(values, [0.8729, 0.2182, -1.0911, 0], atol=1e-4)  # of 0, -0.5, -1.5
    with pytest.raises(TrainingError, match=r"has no value of reward 'accuracy'.*it has exact, format"):
        channels_of(batch, reward="accuracy")


# --- in the trainer ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("hdpo") / "model")


def trained(folder, tmp_path, *methods):
    stage = make_stage(updates_per_batch=2)
    trainer = make_trainer(folder, tmp_path, stage=stage, methods=methods)
    trainer.train()
    return weights_of(trainer)


def test_weight_0_and_a_channel_without_signal_are_plain_grpo(folder, tmp_path):
    plain = trained(folder, tmp_path)
    off = trained(folder, tmp_path, Hdpo(HdpoConfig(weight=0, threshold=0.5)))
    assert_same_weights(plain, off, tolerance=0)
    all_wrong = HdpoConfig(threshold=2.0, normalizer="qualifying")
    silent = trained(folder, tmp_path, Hdpo(all_wrong))
    assert_same_weights(plain, silent, tolerance=1e-7)
    economical = trained(folder, tmp_path, Hdpo(HdpoConfig(cost="tokens", threshold=0.5, weight=1.0)))
    assert any((economical[name] != plain[name]).any() for name in plain)
    assert all(torch.isfinite(weight).all() for weight in economical.values())


@pytest.fixture
def differing(monkeypatch):
    """Costs that differ: the model of the tests neither calls tools nor ends early."""

    def by_first_token(completions, cost):
        return np.array([completion.token_ids[0] % 3 for completion in completions], dtype=float)

    monkeypatch.setattr("posttrain.methods.hdpo.costs", by_first_token)


class Checked(Hdpo):
    """Works out the gradient of the efficiency loss by a backward pass of its own."""

    def channels(self, batch, context):
        self.batch = batch
        return super().channels(batch, context)

    def compared(self, result, context):
        loss, lengths = context.loss.kind, [len(r.completion.token_ids) for r in self.batch]
        parts = []
        for rollout, length in zip(self.batch, lengths, strict=True):
            prompt, own = list(rollout.request.prompt_ids), list(rollout.completion.token_ids)
            logits = context.model(input_ids=torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
            logprob = logits.log_softmax(-1).gather(-1, torch.tensor(own)[:, None]).sum()
            divisor = sum(lengths) if loss == "dapo" else length * len(lengths)
            parts.append(-self._advantages[rollout.id] * logprob / divisor)
        weights = [p for p in context.model.parameters() if p.requires_grad]
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(sum(parts), weights)])
        whole = torch.cat([p.grad.flatten() for p in weights])
        efficiency = self._weight * flat
        accuracy = whole - efficiency
        self.expected = {
            "hdpo/gradient/efficiency": float(efficiency.norm()),
            "hdpo/gradient/accuracy": float(accuracy.norm()),
            "hdpo/gradient/ratio": float(efficiency.norm() / accuracy.norm()),
            "hdpo/gradient/cosine": float(torch.cosine_similarity(accuracy, efficiency, dim=0)),
        }
        super().compared(result, context)


def test_the_trainer_knows_whether_gradients_will_be_compared():
    changes = ({}, {"compare_gradients": 2}, {"compare_gradients": 2, "weight": 0.0})
    assert [Hdpo(HdpoConfig(**change)).compares for change in changes] == [False, True, False]


@pytest.mark.parametrize(("kind", "combine"), [("grpo", "loss"), ("dapo", "loss"), ("dapo", "advantage")])
def test_gradients_of_the_channels_are_compared_now_and_then(folder, tmp_path, differing, kind, combine):
    method = Checked(HdpoConfig(threshold=0.4, weight=0.7, combine=combine, compare_gradients=2))
    log = []
    trainer = make_trainer(
        folder,
        tmp_path,
        stage=make_stage(loss=LossConfig(kind=kind)).model_copy(update={"steps": 2, "group_size": 8}),
        methods=[method],
        on_log=lambda step, steps, metrics: log.append(metrics),
    )
    trainer.train()
    assert {name: log[0][name] for name in method.expected} == pytest.approx(method.expected, rel=1e-3)
    assert not method.expected.keys() & log[1].keys()  # every other step


def test_what_the_clip_takes_out_of_each_channel(folder, tmp_path, differing):
    log = []
    stage = make_stage(updates_per_batch=2, loss=LossConfig(clip_low=0.01))
    trainer = make_trainer(
        folder,
        tmp_path,
        stage=stage.model_copy(update={"steps": 1, "group_size": 8}),
        methods=[Hdpo(HdpoConfig(threshold=0.4, normalizer="qualifying"))],
        on_log=lambda step, steps, metrics: log.append(metrics),
    )
    trainer.train()
    clipped = [f"{place}clipped_{side}" for place in ("", "efficiency/") for side in ("low", "high")]
    first, second = ([line[f"ratio/{name}"] for name in clipped] for line in log)
    assert first == [0, 0, 0, 0]  # the ratio is 1
    assert 0 < second[0] + second[1] <= 1
    assert 0 < second[2] + second[3] <= 1
    assert second[:2] != second[2:]


# --- on a table -------------------------------------------------------------------------------------------

TABLE = [
    ("A", Arm("grpo"), (0.99, 1, 1), 0.934),
    ("A", Arm("coupled", 2.0), (0, 0.07, 1), 0.874),
    ("B", Arm("coupled", 0.02), (0.98, 1, 1), 0.703),
    ("A", Arm("all", 0.15), (0, 1, 1), 0.930),
    ("B", Arm("all", 0.15), (0, 1, 1), 0.700),
    ("A", Arm("qualifying", 0.15), (0, 0, 1), 0.870),
]


@pytest.mark.parametrize(
    ("regime", "arm", "use", "accuracy"), TABLE, ids=[f"{regime}-{arm.name}" for regime, arm, *_ in TABLE]
)
def test_the_table(regime, arm, use, accuracy):
    """One weight is right with a clean and with a noisy verifier; a coupled one fails with either."""
    found = train(arm, regime, seed=0)
    np.testing.assert_allclose(found.use, use, atol=0.05)
    assert found.accuracy == pytest.approx(accuracy, abs=0.05)
