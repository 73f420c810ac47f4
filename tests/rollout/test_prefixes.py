"""Which prompts take their beginning from which, and that the engine then runs only the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import make_tiny_model

from posttrain.recipe.schema import ModelConfig
from posttrain.rollout.build import load_model, load_tokenizer
from posttrain.rollout.engine import fork_requests
from posttrain.rollout.prefixes import Host, find_hosts, prefix_reuse, tail_length
from posttrain.rollout.transformers import TransformersEngine
from posttrain.rollout.types import Example, Rollout, RolloutRequest, Sampling


def test_beginnings_go_with_the_longest():
    hosts = find_hosts({(1, 2), (1, 2, 3), (1, 2, 3, 4), (5,)})
    assert hosts[(1, 2)] == Host((1, 2, 3, 4), 2)
    assert hosts[(1, 2, 3)] == Host((1, 2, 3, 4), 3)
    assert hosts[(5,)] == Host((5,), 1)
    assert tail_length(list(hosts.items())) == 1


@pytest.mark.parametrize("cue", [(0,), (99,), (0, 99, 0)])
def test_cut_traces_with_a_cue_share_the_longest(cue):
    """Whether the cue sorts before or after what the trace went on with."""
    trace = tuple(range(10, 50))
    prompts = [trace[:cut] + cue for cut in (20, 28, 36, 40)]
    hosts = find_hosts(set(prompts))
    assert {host.prompt for host in hosts.values()} == {trace + cue}
    assert [hosts[prompt].shared for prompt in prompts[:-1]] == [20, 28, 36]
    assert tail_length(list(hosts.items())) == len(cue)


def test_unrelated_prompts_are_their_own_hosts():
    prompts = {(1, 2, 3, 4), (1, 9, 3, 4), (2, 2, 3, 4)}
    assert find_hosts(prompts) == {prompt: Host(prompt, 4) for prompt in prompts}


def test_reuse_is_the_share_of_tokens_seen_before():
    assert prefix_reuse([(1, 2, 3, 4), (1, 2, 3, 5), (7, 8)]) == 3 / 10
    assert prefix_reuse([(1, 2), (1, 2)]) == 0.5
    assert prefix_reuse([]) == 0.0


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    config = ModelConfig(path=str(folder))
    return load_model(config), load_tokenizer(config)


def test_forks_with_a_suffix_run_the_trace_once(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    engine = TransformersEngine(model, tokenizer)
    generator = np.random.default_rng(0)
    request = RolloutRequest(
        tuple(generator.integers(5, 90, 10).tolist()), Example("a", "?"), "g", Sampling(max_tokens=60, seed=3)
    )
    rollout = Rollout(request, engine.generate([request])[0][0], 0, 0)
    tokens = len(rollout.completion.token_ids)
    assert tokens > 30
    suffix = (7, 8, 9)
    cuts = list(range(6, tokens, 4))
    requests = fork_requests(rollout, cuts, 2, Sampling(max_tokens=1, seed=1), suffix)
    assert [r.prompt_ids[-3:] for r in requests] == [suffix] * len(cuts)

    run = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    together = engine.generate(requests)
    hook.remove()
    assert sum(run) <= len(requests[-1].prompt_ids) + len(cuts) * len(suffix)
    assert sum(run) < 0.3 * sum(len(r.prompt_ids) for r in requests)
    alone = [engine.generate([r])[0] for r in requests]
    for one, other in zip(together, alone, strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in other]
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)
