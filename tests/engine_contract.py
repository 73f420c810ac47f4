"""What every rollout engine promises, as tests. A test module subclasses the two classes for its engine.

`EngineLifecycleContract` builds engines of its own and must come first in a module whose engine cannot be
open twice in a process; `EngineContract` shares one engine, given by a module-scoped fixture
`shared_engine`, which every test starts from the policy at `model_path`.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import VOCAB_SIZE, make_tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from posttrain.errors import RolloutError
from posttrain.recipe.tools_schema import ToolsConfig
from posttrain.rollout.engine import RolloutEngine, require_finite
from posttrain.rollout.tools_engine import ToolEngine, prompts_of
from posttrain.rollout.tools_pool import ToolPool
from posttrain.rollout.types import (
    Completion,
    Example,
    Rollout,
    RolloutRequest,
    Sampling,
    derive_seed,
    make_rollouts,
)

MAX_MODEL_LEN = 128
EOS = 2
TOLERANCE = 1e-4  # of float32 log-probs, as the engines promise


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def request(text: str = "1+2=", max_tokens: int = 12, **sampling: Any) -> RolloutRequest:
    ids = tuple(3 + "\n !\"#$%&'()*+,-./0123456789:;<=>?".index(character) for character in text)
    return RolloutRequest(ids, Example(text or "nothing", text), text, Sampling(max_tokens, **sampling))


def plain_logprobs(policy: Any, request: RolloutRequest, completion: Completion) -> torch.Tensor:
    """Log-probs (T, V) of a completion at the request's temperature, by one plain forward pass."""
    ids = torch.tensor([request.prompt_ids + completion.token_ids], device=policy.device)
    with torch.no_grad():
        logits = policy(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
    logits[:, list(request.sampling.banned_ids)] = -torch.inf
    return (logits / (request.sampling.temperature or 1.0)).log_softmax(-1)


def assert_sampled_from(
    policy: Any, requests: list[RolloutRequest], answers: list[list[Completion]], tolerance: float = TOLERANCE
) -> None:
    """The answers belong to the requests, in order, and carry the policy's log-probs."""
    assert [len(completions) for completions in answers] == [r.sampling.n for r in requests]
    for asked, completions in zip(requests, answers, strict=True):
        for completion in completions:
            tokens = torch.tensor(completion.token_ids)[:, None]
            expected = plain_logprobs(policy, asked, completion).gather(-1, tokens).squeeze(-1)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=tolerance, rtol=0)


def perturbed(path: Path, only: str = "") -> PreTrainedModel:
    """The policy at `path` with noise on all weights, or on those whose name contains `only`."""
    policy = load(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters(remove_duplicate=False):
            if only in name:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return policy


def adapted_policy(base: PreTrainedModel, r: int = 4) -> PeftModel:
    """`base` with a LoRA adapter that changes what it does."""
    adapted = get_peft_model(base, LoraConfig(r=r, lora_alpha=8, target_modules="all-linear")).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return adapted


def tokens_of(answers: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in completions] for completions in answers]


def child_processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def tensor_bytes() -> int:
    """Memory of all tensors that this process can reach."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {}
    for tensor in tensors:
        with contextlib.suppress(RuntimeError):  # left by torch.compile's tracing: it has no memory
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


MIXED = [
    request("1+2=", 9, n=3, seed=1),
    request("17*3", 5, n=1, temperature=0.7, seed=2),
    request("9", 20, n=2, temperature=0, seed=3),
    request("(1+2)*(3+4)=", 14, n=4, seed=4),
]


LONG = [request("1+" * 50, n=2, seed=1)]  # long enough for a prefix that an engine may keep


class EngineLifecycleContract:
    @staticmethod
    def build(path: Path, **options: Any) -> RolloutEngine:
        """A new engine for the model at `path`, with a context of `MAX_MODEL_LEN`."""
        raise NotImplementedError

    def test_close_frees_memory_and_processes_and_the_next_engine_works(self, model_path: Path) -> None:
        self.build(model_path).close()  # whatever stays after a first import is not of this test
        children, tensors = child_processes(), tensor_bytes()
        engine = self.build(model_path)
        first = engine.generate(MIXED)
        assert tensor_bytes() > tensors
        engine.close()
        engine.close()
        with pytest.raises(RolloutError, match="closed"):
            engine.generate(MIXED)
        with pytest.raises(RolloutError, match="closed"):
            engine.sync(load(model_path))
        assert child_processes() <= children
        assert tensor_bytes() <= tensors

        engine = self.build(model_path)
        assert tokens_of(engine.generate(MIXED)) == tokens_of(first)
        engine.close()

    def test_untied_head_is_synced(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path / "untied", seed=5, tie=False)
        engine = self.build(path)
        assert_sampled_from(load(path), MIXED, engine.generate(MIXED))
        changed = perturbed(path, only="lm_head")
        engine.sync(changed)
        assert_sampled_from(changed, MIXED, engine.generate(MIXED))
        engine.close()


class EngineContract:
    @pytest.fixture
    def policy(self, model_path: Path) -> PreTrainedModel:
        return load(model_path)

    @pytest.fixture
    def engine(self, shared_engine: RolloutEngine, policy: PreTrainedModel) -> RolloutEngine:
        shared_engine.sync(policy)
        return shared_engine

    def test_order_and_logprobs(self, engine: RolloutEngine, policy: PreTrainedModel) -> None:
        requests = [*MIXED, *reversed(MIXED)]
        answers = engine.generate(requests)
        assert_sampled_from(policy, requests, answers)
        assert tokens_of(answers)[: len(MIXED)] == tokens_of(answers)[: len(MIXED) - 1 : -1]

    def test_more_prompt_tokens_than_fit_in_one_pass(
        self, engine: RolloutEngine, policy: PreTrainedModel
    ) -> None:
        requests = [request(f"{row}+" + "9*" * 50, 4, n=2, seed=row) for row in range(60)]
        answers = engine.generate(requests)
        assert_sampled_from(policy, requests, answers)
        assert tokens_of(answers[-1:]) == tokens_of(engine.generate(requests[-1:]))

    def test_no_requests(self, engine: RolloutEngine) -> None:
        assert engine.generate([]) == []

    def test_caps_differ_within_one_call(self, engine: RolloutEngine) -> None:
        requests = [request("1+2=", cap, n=4, seed=cap) for cap in (1, 7, 40, 2)]
        for asked, completions in zip(requests, engine.generate(requests), strict=True):
            for completion in completions:
                ended = completion.token_ids[-1] == EOS
                assert completion.finish_reason == ("stop" if ended else "length")
                assert len(completion.token_ids) == len(completion.logprobs)
                assert EOS not in completion.token_ids[:-1]
                assert len(completion.token_ids) == asked.sampling.max_tokens or ended
                assert len(completion.token_ids) <= asked.sampling.max_tokens

    def test_end_of_sequence_token_ends_a_completion(self, engine: RolloutEngine, model_path: Path) -> None:
        policy = load(model_path)
        with torch.no_grad():
            policy.lm_head.weight[EOS] *= 2.5  # becomes frequent
        engine.sync(policy)
        (completions,) = engine.generate([request("1+2=", 60, n=16, seed=3)])
        stopped = [completion for completion in completions if completion.finish_reason == "stop"]
        assert stopped
        for completion in stopped:
            assert completion.token_ids[-1] == EOS
            assert EOS not in completion.token_ids[:-1]
            assert "<|im_end|>" not in completion.text

    def test_stop_token_ids(self, engine: RolloutEngine) -> None:
        free = request("1+2=", 30, n=4, seed=8)
        (unstopped,) = engine.generate([free])
        stops = (unstopped[0].token_ids[6], unstopped[1].token_ids[11])
        stopping = request("1+2=", 30, n=4, seed=8, stop_token_ids=stops)
        other, stopped = engine.generate([free, stopping])
        assert tokens_of([other]) == tokens_of([unstopped])
        for completion, whole in zip(stopped, unstopped, strict=True):
            ends = [at for at, token in enumerate(whole.token_ids) if token in (*stops, EOS)]
            length = ends[0] + 1 if ends else 30
            assert completion.token_ids == whole.token_ids[:length]
            assert completion.finish_reason == ("stop" if ends else "length")
        assert stopped[0].finish_reason == stopped[1].finish_reason == "stop"

    def test_stop_strings(self, engine: RolloutEngine, model_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        free = request("1+2=", 40, n=4, seed=9)
        (unstopped,) = engine.generate([free])
        # Two letters and three letters, each from the middle of a completion: matches cross token borders.
        strings = (unstopped[0].text[4:6], unstopped[1].text[6:9])
        stopping = request("1+2=", 40, n=4, seed=9, stop=strings)
        stopped, other = engine.generate([stopping, free])
        assert tokens_of([other]) == tokens_of([unstopped])
        for completion, whole in zip(stopped, unstopped, strict=True):
            texts = [
                tokenizer.decode(whole.token_ids[: at + 1], skip_special_tokens=True)
                for at in range(len(whole.token_ids))
            ]
            ends = [at for at, text in enumerate(texts) if any(string in text for string in strings)]
            length = ends[0] + 1 if ends else len(whole.token_ids)
            assert completion.token_ids == whole.token_ids[:length]
            assert completion.text == texts[length - 1]
            assert completion.finish_reason == ("stop" if ends else whole.finish_reason)
        assert stopped[0].text.endswith(strings[0])
        assert len(stopped[1].token_ids) < len(unstopped[1].token_ids)

    def test_text_keeps_markers_and_drops_special_tokens(
        self, engine: RolloutEngine, model_path: Path
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        marker = tokenizer.convert_tokens_to_ids("<think>")
        policy = load(model_path)
        with torch.no_grad():
            policy.lm_head.weight[[marker, 1]] *= 2.5  # both become frequent
        engine.sync(policy)
        (completions,) = engine.generate([request("1+2=", 30, n=16, seed=3)])
        tokens = [token for completion in completions for token in completion.token_ids]
        assert marker in tokens
        assert 1 in tokens  # <|im_start|>
        for completion in completions:
            assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            assert completion.text.count("<think>") == completion.token_ids.count(marker)
            assert "<|im_start|>" not in completion.text

    def test_same_seed_same_completions(self, engine: RolloutEngine) -> None:
        answers = [engine.generate([request(n=4, seed=seed)]) for seed in (5, 5, 6)]
        assert answers[0] == answers[1]
        assert set(tokens_of(answers[0])[0]).isdisjoint(tokens_of(answers[2])[0])
        assert len(set(tokens_of(answers[0])[0])) == 4

    def test_a_completion_depends_on_its_index_alone(self, engine: RolloutEngine) -> None:
        few = engine.generate([request(n=2, seed=5)])
        many = engine.generate([*MIXED, request(n=6, seed=5), request("2*2", 30, n=5)])[len(MIXED)]
        assert tokens_of(few)[0] == tokens_of([many])[0][:2]

    def test_tokens_are_banned_and_read_in_the_same_pass(
        self, engine: RolloutEngine, policy: PreTrainedModel
    ) -> None:
        """Scores are those of a separate forward pass; what is banned, or sampled at which temperature, does
        not matter to them. Requests without scores, or with other ones, are in the same batch.
        """
        reserved = tuple(range(180, 236))
        asked = [
            request("1+2=", 12, n=2, seed=1, banned_ids=reserved, scored_ids=reserved),
            request("17*3", 12, seed=2, temperature=0.7, banned_ids=reserved, scored_ids=(*reserved[:5], 40)),
            request("9", 12, seed=3, temperature=0, scored_ids=(7, 200)),
            request("(1+2)", 12, seed=4, banned_ids=(7, 8)),
        ]
        answers = engine.generate(asked)
        assert_sampled_from(policy, asked, answers)
        assert answers[3][0].scored is None
        for request_, completions in zip(asked[:3], answers, strict=False):
            ids = list(request_.sampling.scored_ids)
            unbanned = replace(request_, sampling=Sampling(12))
            for completion in completions:
                assert not set(completion.token_ids) & set(request_.sampling.banned_ids)
                expected = plain_logprobs(policy, unbanned, completion)[:, ids].log_softmax(-1)
                assert completion.scored is not None
                torch.testing.assert_close(
                    torch.from_numpy(completion.scored), expected, atol=TOLERANCE, rtol=0
                )

    def test_truncated_sampling_renormalises(self, engine: RolloutEngine, policy: PreTrainedModel) -> None:
        requests = [
            request("1+2=", 20, n=4, top_k=5, seed=1),
            request("1+2=", 20, n=4, top_p=0.4, temperature=0.7, seed=2),
            request("1+2=", 20, n=4, top_k=20, top_p=0.5, seed=3),
            request("1+2=", 20, n=4, seed=4),
        ]
        for asked, completions in zip(requests, engine.generate(requests), strict=True):
            sampling = asked.sampling
            for completion in completions:
                ordered, order = plain_logprobs(policy, asked, completion).sort(-1, descending=True)
                if sampling.top_k:
                    ordered[:, sampling.top_k :] = -torch.inf
                ordered = ordered.log_softmax(-1)
                if sampling.top_p < 1:
                    cut = ordered.exp().cumsum(-1) - ordered.exp() >= sampling.top_p
                    ordered = ordered.masked_fill(cut, -torch.inf).log_softmax(-1)
                chosen = order == torch.tensor(completion.token_ids)[:, None]
                expected = ordered[chosen]
                torch.testing.assert_close(
                    torch.tensor(completion.logprobs), expected, atol=TOLERANCE, rtol=0
                )

    def test_samples_follow_the_distribution(self, engine: RolloutEngine, policy: PreTrainedModel) -> None:
        """A chi-square test of the first token; the same statistic tells another temperature apart."""
        asked = request("1+2=", 1, n=2000, temperature=0.6, seed=11)
        (completions,) = engine.generate([asked])
        probs = plain_logprobs(policy, asked, completions[0])[0].exp()
        counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCAB_SIZE)

        def excess(probs: torch.Tensor) -> float:
            expected = probs * counts.sum()
            frequent = expected >= 5
            rest = expected[~frequent].sum()
            statistic = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
            statistic += (counts[~frequent].sum() - rest) ** 2 / rest
            degrees = int(frequent.sum())
            return float((statistic - degrees) / (2 * degrees) ** 0.5)

        assert excess(probs) < 4
        assert excess((probs.log() / 1.5).softmax(-1)) > 10

    def test_extreme_temperatures(self, engine: RolloutEngine, policy: PreTrainedModel) -> None:
        requests = [request(n=4, temperature=t, max_tokens=8, seed=1) for t in (2.0, 0.01, 0.0)]
        hot, cold, greedy = engine.generate(requests)
        assert_sampled_from(policy, requests[:1], [hot])
        assert_sampled_from(policy, requests[1:2], [cold], tolerance=100 * TOLERANCE)  # logits times 100
        assert_sampled_from(policy, requests[2:], [greedy])
        assert len(set(tokens_of([hot])[0])) == 4
        assert len(set(tokens_of([greedy])[0])) == 1
        for completions, gap in (
            (cold, 0.15),
            (greedy, 1e-5),
        ):  # a token e^-15 as likely as the best never comes
            for completion in completions:
                logprobs = plain_logprobs(policy, requests[2], completion)
                chosen = logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])
                assert (logprobs.max(dim=-1, keepdim=True).values - chosen).max() < gap

    def test_context_end(self, engine: RolloutEngine, policy: PreTrainedModel) -> None:
        requests = [request("1" * (MAX_MODEL_LEN - room), 50, n=2, seed=room) for room in (1, 3)]
        answers = engine.generate(requests)
        assert_sampled_from(policy, requests, answers)
        for room, completions in zip((1, 3), answers, strict=True):
            for completion in completions:
                assert len(completion.token_ids) == room or completion.token_ids[-1] == EOS
                assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (request(""), "example 'nothing' is empty"),
            (request("1" * MAX_MODEL_LEN), f"has {MAX_MODEL_LEN} tokens"),
            (request("1", max_tokens=0), "max_tokens=0"),
            (request("1", scored_ids=(4, VOCAB_SIZE)), f"scores token id {VOCAB_SIZE}"),
        ],
    )
    def test_impossible_requests(self, engine: RolloutEngine, bad: RolloutRequest, message: str) -> None:
        expected = engine.generate(MIXED)
        with pytest.raises(RolloutError, match=message):
            engine.generate([*MIXED, bad])
        assert engine.generate(MIXED) == expected

    def test_a_changed_policy_is_used_after_the_sync_and_not_before(
        self, engine: RolloutEngine, policy: PreTrainedModel, model_path: Path
    ) -> None:
        changed = perturbed(model_path)
        assert_sampled_from(policy, MIXED, engine.generate(MIXED))
        assert_sampled_from(policy, LONG, engine.generate(LONG))
        version = engine.version
        engine.sync(changed)
        assert engine.version == version + 1
        answers = engine.generate(MIXED)
        assert_sampled_from(changed, MIXED, answers)
        assert_sampled_from(changed, LONG, engine.generate(LONG))
        with pytest.raises(AssertionError):
            assert_sampled_from(policy, MIXED, answers, tolerance=0.05)

    def test_a_changed_tied_head_is_synced(
        self, engine: RolloutEngine, policy: PreTrainedModel, model_path: Path
    ) -> None:
        changed = perturbed(model_path, only="embed_tokens")
        assert not torch.equal(changed.lm_head.weight, policy.lm_head.weight)
        engine.sync(changed)
        assert_sampled_from(changed, MIXED, engine.generate(MIXED))

    def test_lora_policy(self, engine: RolloutEngine, model_path: Path) -> None:
        adapted = adapted_policy(load(model_path))
        before = fingerprint(adapted)
        engine.sync(adapted)
        answers = engine.generate(MIXED)
        assert_sampled_from(adapted, MIXED, answers)
        assert fingerprint(adapted) == before
        with pytest.raises(AssertionError), adapted.disable_adapter():
            assert_sampled_from(adapted, MIXED, answers, tolerance=0.05)

    def test_log_probs_of_broken_weights_are_not_finite(
        self, engine: RolloutEngine, policy: PreTrainedModel
    ) -> None:
        require_finite(MIXED, engine.generate(MIXED))
        with torch.no_grad():
            policy.model.norm.weight[0] = torch.nan
        engine.sync(policy)
        answers = engine.generate(MIXED)
        assert [len(completions) for completions in answers] == [r.sampling.n for r in MIXED]
        assert not math.isfinite(sum(answers[1][0].logprobs))
        with pytest.raises(RolloutError, match=r"log-probs of example '1\+2=' are not finite"):
            require_finite(MIXED, answers)

    def test_forks_continue_as_their_prompt_and_prefix_would(
        self, engine: RolloutEngine, policy: PreTrainedModel
    ) -> None:
        rollout = sampled_rollout(engine, request("(1+2)*(3+4)=", 70, seed=6))
        length = len(rollout.completion.token_ids)
        assert length > 40
        cuts = [length, 0, 33, 34, 7]
        answers = engine.fork(rollout, cuts, 3, Sampling(9, n=99, temperature=0.8, seed=5))
        asked = [prefix_request(rollout, cut, Sampling(9, n=3, temperature=0.8, seed=5)) for cut in cuts]
        assert_sampled_from(policy, asked, answers)
        assert tokens_of(answers) == tokens_of([engine.generate([one])[0] for one in asked])
        assert len({completion.token_ids for answer in answers for completion in answer}) == 3 * len(cuts)
        assert (
            tokens_of(engine.fork(rollout, [33], 2, Sampling(9, temperature=0.8, seed=5)))[0]
            == (tokens_of(answers)[2][:2])
        )

    def test_tools_work_on_it(self, engine: RolloutEngine, policy: PreTrainedModel, model_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        asked = [request("1+2=", 30, n=8, seed=5), request("9*9", 30, n=8, seed=6)]
        plain = engine.generate(asked)
        # A character that the model, whose weights are random, writes often ends a call.
        often = Counter("".join(c.text for row in plain for c in row)).most_common(1)[0][0]
        tools = ToolsConfig(use=["calculator"], calls="bare", close=often, result=("[", "]"), workers=1)
        pool = ToolPool(tools)
        try:
            answers = ToolEngine(engine, pool, prompts_of(tools, tokenizer, "text"), tools).generate(asked)
        finally:
            pool.close()
        assert any(completion.tool_calls for row in answers for completion in row)
        for one, row in zip(asked, answers, strict=True):
            for completion in row:
                assert len(completion.token_ids) <= 30
                expected = plain_logprobs(policy, one, completion)
                for turn in completion.turns:
                    ids = torch.tensor(completion.token_ids[turn.start : turn.stop])[:, None]
                    found = torch.tensor(completion.logprobs[turn.start : turn.stop])
                    wanted = expected[turn.start : turn.stop].gather(-1, ids).squeeze(-1)
                    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)

    def test_greedy_forks_of_a_greedy_rollout_write_it_again(self, engine: RolloutEngine) -> None:
        rollout = sampled_rollout(engine, request("1+2=", 60, temperature=0))
        tokens = rollout.completion.token_ids
        cuts = list(range(0, len(tokens), 7))
        for cut, answer in zip(cuts, engine.fork(rollout, cuts, 1, Sampling(60, temperature=0)), strict=True):
            assert answer[0].token_ids[: len(tokens) - cut] == tokens[cut:]

    def test_forks_end_at_stop_strings_and_at_the_end_of_the_context(self, engine: RolloutEngine) -> None:
        rollout = sampled_rollout(engine, request("1" * 60, MAX_MODEL_LEN, seed=4))
        length = len(rollout.completion.token_ids)
        assert 60 + length == MAX_MODEL_LEN
        (free,) = engine.fork(rollout, [length - 20], 1, Sampling(50, seed=2))[0]
        assert len(free.token_ids) == 20
        string = free.text[5:7]
        (stopped,) = engine.fork(rollout, [length - 20], 1, Sampling(50, seed=2, stop=(string,)))[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text == free.text[: free.text.index(string) + 2]
        with pytest.raises(RolloutError, match="leaves no room"):
            engine.fork(rollout, [3, length], 1, Sampling(5))

    @pytest.mark.parametrize("cut", [-1, 13])
    def test_cuts_outside_the_completion(self, engine: RolloutEngine, cut: int) -> None:
        rollout = sampled_rollout(engine, request("1+2=", 12, seed=1))
        assert len(rollout.completion.token_ids) == 12
        with pytest.raises(RolloutError, match=f"has 12 tokens: it cannot be cut at {cut}"):
            engine.fork(rollout, [4, cut], 1, Sampling(5))

    def test_random_state_of_the_process_is_left_alone(
        self, engine: RolloutEngine, policy: PreTrainedModel
    ) -> None:
        before = torch.get_rng_state()
        engine.generate(MIXED)
        engine.sync(policy)
        assert torch.equal(torch.get_rng_state(), before)


def sampled_rollout(engine: RolloutEngine, asked: RolloutRequest) -> Rollout:
    """A rollout of `asked`, with the first seed from its own on whose completion reaches its cap."""
    for seed in range(asked.sampling.seed, asked.sampling.seed + 20):
        free = replace(asked, sampling=replace(asked.sampling, seed=seed))
        (rollout,) = make_rollouts([free], engine.generate([free]), engine.version)
        if rollout.truncated:
            return rollout
    raise AssertionError("the tiny model ends every completion")


def prefix_request(rollout: Rollout, cut: int, sampling: Sampling) -> RolloutRequest:
    """What a fork at `cut` stands for: the prefix is the prompt, the seed is of this rollout and cut."""
    seed = derive_seed(sampling.seed, rollout.id, cut)
    prefix = rollout.request.prompt_ids + rollout.completion.token_ids[:cut]
    return replace(rollout.request, prompt_ids=prefix, sampling=replace(sampling, seed=seed))


def fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()
