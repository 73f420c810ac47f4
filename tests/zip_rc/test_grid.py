"""The grid: index arithmetic, bins, labels and what is read off a joint. Numbers worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoConfig, Qwen2Config

from posttrain.errors import DataError
from posttrain.zip_rc.grid import (
    OUTCOMES,
    VALUES,
    Grid,
    expected_length,
    expected_reward,
    grid_of,
    labels,
    length_marginal,
    quantile_edges,
    reward_marginal,
    value_label,
)

EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
QWEN = Grid(151669, VALUES, EDGES)
SMALL = Grid(100, OUTCOMES, (0, 4, 8, 16))


def test_cells_and_token_ids():
    assert QWEN.size == 56
    assert QWEN.ids[6 * 8 + 2] == 151719
    assert QWEN.ids[-1] == 151724
    assert QWEN.lengths.tolist() == [128, 384, 768, 1536, 3072, 6144, 12288, 24576]
    assert np.allclose(QWEN.reward_edges, [0, 1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12, 1])
    assert QWEN.cells([0.95, 1.0], [600, 40000]).tolist() == [6 * 8 + 2, 6 * 8 + 7]


def test_bins():
    assert QWEN.length_bin([0, 255, 256, 32767, 32768, 10**6]).tolist() == [0, 0, 1, 7, 7, 7]
    assert QWEN.reward_bin([-0.5, 0.0, 0.0834, 0.95, 1.0, 1.5]).tolist() == [0, 0, 1, 6, 6, 6]
    assert SMALL.reward_bin([0.0, 0.49, 0.5, 1.0]).tolist() == [0, 0, 1, 1]


def test_every_position_of_a_rollout_is_labelled():
    """A completion of 4 tokens: its positions have 3, 2, 1 and 0 tokens after the next one."""
    grid = Grid(0, OUTCOMES, (0, 1, 2, 3, 4))
    assert (labels(grid, 1.0, 4) - 4).tolist() == [3, 2, 1, 0]
    assert labels(grid, 0.0, 4).tolist() == [3, 2, 1, 0]
    assert labels(SMALL, 0.7, 9).tolist() == [3 + 2] + [3 + 1] * 4 + [3 + 0] * 4


def test_value_label_is_the_mean_over_the_last_positions():
    assert value_label([0.0, 0.2, 0.4, 0.6], last=2) == pytest.approx(0.5)
    assert value_label([0.2, 0.4], last=512) == pytest.approx(0.3)
    assert value_label([1.0 + 1e-9], last=1) == 1.0


def test_readings_of_a_joint():
    """The two samples of the worked decision: rewards 0 and 1, lengths 2, 6 and 12."""
    joint = np.array([[[0.10, 0.10, 0.10], [0.20, 0.30, 0.20]], [[0.05, 0.15, 0.40], [0.05, 0.10, 0.25]]])
    assert np.allclose(expected_reward(SMALL, joint), [0.7, 0.4])
    assert np.allclose(expected_length(SMALL, joint), [6.6, 9.5])
    assert np.allclose(reward_marginal(joint[0]), [0.3, 0.7])
    assert np.allclose(length_marginal(joint[0]), [0.3, 0.4, 0.3])
    assert np.allclose(SMALL.joint(np.log(joint).reshape(2, 6)), joint)


def test_joint_does_not_depend_on_the_normaliser():
    logits = np.random.default_rng(0).normal(size=(4, 106))
    full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    joint = SMALL.joint(logits[:, 100:])
    assert np.allclose(joint, SMALL.joint(full[:, 100:]), atol=1e-12)
    assert np.allclose(joint, SMALL.joint(logits[:, 100:] - 1000.0), atol=1e-12)
    assert joint.shape == (4, 2, 3)
    assert np.allclose(joint.sum((-1, -2)), 1)
    assert joint[1, 1, 2] == pytest.approx(np.exp(logits[1, 105]) / np.exp(logits[1, 100:]).sum())


def test_grid_is_kept_in_a_model_s_configuration(tmp_path):
    config = Qwen2Config(num_hidden_layers=1)
    assert grid_of(config) is None
    config.zip_rc = QWEN.to_config()
    config.save_pretrained(tmp_path)
    assert grid_of(AutoConfig.from_pretrained(tmp_path)) == QWEN
    assert Grid.from_config(json.loads(json.dumps(QWEN.to_config()))) == QWEN


def test_edges_at_quantiles():
    edges = quantile_edges([8, 8, 8, 8], bins=4)
    assert edges == (0, 2, 4, 6, 8)
    assert quantile_edges([2, 1], bins=8) == (0, 1, 2)  # no more bins than there are lengths
    lengths = np.random.default_rng(1).integers(5, 60, size=500).tolist()
    grid = Grid(0, OUTCOMES, quantile_edges(lengths, bins=8))
    remaining = np.concatenate([np.arange(length) for length in lengths])
    shares = np.bincount(grid.length_bin(remaining)) / len(remaining)
    assert len(shares) == 8
    assert 0.08 < shares.min() <= shares.max() < 0.17


@pytest.mark.parametrize(
    ("values", "edges", "first"),
    [
        ((0.0,), (0, 4), 0),
        ((0.5, 0.2), (0, 4), 0),
        ((0.0, 1.2), (0, 4), 0),
        (OUTCOMES, (1, 4), 0),
        (OUTCOMES, (0,), 0),
        (OUTCOMES, (0, 4, 4), 0),
        (OUTCOMES, (0, 4), -1),
    ],
)
def test_what_is_no_grid(values, edges, first):
    with pytest.raises(DataError):
        Grid(first, values, edges)


@pytest.mark.parametrize(
    "config", [{}, [], {"first_id": "x", "reward_values": [0, 1], "length_edges": [0, 1]}]
)
def test_malformed_configurations_are_named(config):
    with pytest.raises(DataError, match=r"zip_rc in the model's config.json"):
        Grid.from_config(config)
