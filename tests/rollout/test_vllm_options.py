"""What is asked of vLLM for bans and scores, and how its answers are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from posttrain.errors import RolloutError
from posttrain.rollout.types import Example, RolloutRequest, Sampling
from posttrain.rollout.vllm_options import sampling_options, scored_logits


def options(reserved: tuple[int, ...] = (), **sampling: Any) -> dict[str, Any]:
    asked = RolloutRequest((1, 2), Example("a", "b"), "a", Sampling(8, **sampling))
    return sampling_options(asked, 0, 64, [2], reserved)


def test_reserved_ids_are_banned_with_those_of_the_request() -> None:
    assert "logit_bias" not in options()
    assert options((9, 8), banned_ids=(3, 9))["logit_bias"] == {3: -100.0, 8: -100.0, 9: -100.0}
    assert options(scored_ids=(8, 3))["logprob_token_ids"] == [8, 3]


def test_scores_are_logits_before_ban_and_temperature() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 3))
    sampling = Sampling(5, temperature=0.5, scored_ids=(4, 5, 6), banned_ids=(4,))
    processed = (logits + np.array([-100.0, -100.0, 0.0])) / 0.5
    read = scored_logits(processed - 7.0, sampling, reserved=(5,))
    assert np.allclose(read - logits, (read - logits)[:, :1])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"scored_ids": tuple(range(129))}, "scores 129 token ids; vLLM reads at most 128"),
        ({"scored_ids": (3,), "top_k": 5}, "only without top_p and top_k"),
        ({"scored_ids": (3,), "top_p": 0.9}, "only without top_p and top_k"),
    ],
)
def test_scores_that_vllm_cannot_give(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        options(**sampling)
