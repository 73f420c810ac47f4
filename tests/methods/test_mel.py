"""What MEL asks, keeps and learns, with an engine that says what it is told to."""

from __future__ import annotations

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import torch
from helpers import make_tokenizer

from posttrain.data.error_analysis import SHORT
from posttrain.data.experience_store import read_experiences
from posttrain.data.experiences import analysis_example, leaks, query_example, read_sections, replay_example
from posttrain.errors import DataError, RecipeError
from posttrain.methods.base import LossTerm, StepContext, load_methods
from posttrain.methods.mel import Candidate, Mel, common_prefix, order_pairs, row_weights
from posttrain.recipe.mel_schema import SECTIONS, ExperienceFormat, MelConfig
from posttrain.recipe.stage_schema import CorrectConfig
from posttrain.rollout.types import (
    Completion,
    Example,
    RolloutRequest,
    Sampling,
    derive_seed,
    make_rollouts,
)
from posttrain.training.advantages import group_advantages
from posttrain.training.batch import supervised_rows
from posttrain.training.losses import nll_loss
from posttrain.training.objective import member_counts

TOKENIZER = make_tokenizer()


def encode(text):
    return tuple(TOKENIZER(text)["input_ids"])


class Scripted:
    """Every completion is what `say` makes of its request and index; one that ends in `~` was cut."""

    version = 3

    def __init__(self, say, max_model_len=512):
        self.say, self.max_model_len, self.requests = say, max_model_len, []

    def generate(self, requests):
        self.requests += requests
        return [[self.answer(request, index) for index in range(request.sampling.n)] for request in requests]

    def answer(self, request, index):
        text = self.say(request, index)
        finish = "length" if text.endswith("~") else "stop"
        return Completion(encode(text), (-0.5,) * len(text), finish, text)


def say(request, index):
    """A solution (right for even indices), a meta-experience about the problem, or a right replay."""
    number = request.example.answer
    if request.role == "solution":
        return f"{number}!" if index % 2 == 0 else f"{'x' * index}!"
    return f"at {number};why ones;rule no {number}{number}" if request.role == "analysis" else f"{number}!"


def score(rollouts):
    for rollout in rollouts:
        rollout.reward = float(rollout.completion.text == f"{rollout.request.example.answer}!")
        rollout.rewards = {"right": rollout.reward}


def solutions(engine, problems=4, samples=4):
    requests = [
        RolloutRequest(
            encode(f"p{i}"),
            Example(str(i), f"p{i}", str(i)),
            f"2.{i}",
            Sampling(40, n=samples, seed=derive_seed(i)),
        )
        for i in range(problems)
    ]
    batch = make_rollouts(requests, engine.generate(requests), engine.version)
    score(batch)
    return batch


def extend(method, engine, batch, **options):
    log = {}
    context = StepContext(
        step=2,
        engine=engine,
        tokenizer=TOKENIZER,
        model=None,
        rng=np.random.default_rng(0),
        log=log.__setitem__,
        score=score,
        sampling=Sampling(40),
        **options,
    )
    extended = method.extend(batch, context)
    return extended, method.auxiliary(context), log


def mel(**changes):
    return Mel(MelConfig(prompts=SHORT, **changes))


def run(method, *, answers=say, problems=4, samples=4, max_model_len=512):
    engine = Scripted(answers, max_model_len)
    extended, terms, log = extend(method, engine, solutions(engine, problems, samples))
    return extended, terms, log, engine


def text_of(ids):
    return TOKENIZER.decode(ids)


# --- texts ------------------------------------------------------------------------------------------------


def test_sections_are_read_in_order():
    assert read_sections("so: at 3-9=6;why sign;rule 3-9=-6 ", SHORT.sections) == ["3-9=6", "sign", "3-9=-6"]
    for text in ("at 3;rule 4;why 5", "at 3;why 4", "at ;why 4;rule 5", "", "why 1;rule 2"):
        assert read_sections(text, SHORT.sections) is None
    long = "\n".join(f"{heading}\ntext {n}" for n, heading in enumerate(SECTIONS))
    assert read_sections(long, ExperienceFormat().sections) == [f"text {n}" for n in range(4)]


def test_prompts_have_the_wrong_solution_first():
    example = Example("1", "2+2={wrong}", "4")
    asked = analysis_example(example, "W{right}", "R", ExperienceFormat()).prompt
    assert (
        asked.index("2+2={wrong}") < asked.index("W{right}") < asked.index("Incorrect") < asked.index("R\n</")
    )
    assert "W{right}" in asked  # what a value says is no slot
    assert analysis_example(example, "5", "4", SHORT).prompt == "compare 2+2={wrong}\n-5\n+4"
    assert query_example(example, SHORT).prompt == "recall 2+2={wrong}"
    assert replay_example(example, "at 1", SHORT).prompt == "at 1\nsolve 2+2={wrong}"
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2="}]
    replayed = replay_example(replace(example, prompt=chat), "at 1", SHORT).prompt
    assert replayed == [chat[0], {"role": "user", "content": "at 1\nsolve 2+2="}]


def test_leaks_are_whole_words():
    assert leaks("rule 27-18=9", "9")
    assert leaks("so it is 9.", "9")
    for text in ("rule 27-18=19", "9.5", "0.9", "x9", ""):
        assert not leaks(text, "9")
    assert not leaks("anything", None)


def test_orders_of_pairs():
    wrong, right = [(1, 2, 3), (1, 9)], [(1, 2, 3, 4, 5), (7,)]
    assert order_pairs(wrong, right, "shortest", None) == [(1, 1), (0, 1), (1, 0), (0, 0)]
    assert order_pairs(wrong, right, "closest", None)[:2] == [(0, 0), (1, 0)]
    drawn = [order_pairs(wrong, right, "random", np.random.default_rng(n)) for n in range(60)]
    assert {pairs[0] for pairs in drawn} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(len(set(pairs)) == 4 for pairs in drawn)
    assert common_prefix((1, 2), (1, 2, 3)) == 2


# --- the loss, with numbers worked out by hand -------------------------------------------------------------


def loss_of(texts, groups, reduction, problems):
    """The term's loss for texts that are given as the probabilities of their tokens."""
    lengths = [len(text) for text in texts]
    total = problems if reduction == "problem" else len(texts)
    rows = [((1,), tuple(range(length))) for length in lengths]
    term = LossTerm("m", rows, 1.0, row_weights(lengths, groups, reduction), total)
    made = supervised_rows(term)
    weights = torch.from_numpy(np.concatenate([row.nll_weights["m"] for row in made]))
    logprobs = torch.tensor([p for text in texts for p in text], dtype=torch.float64).log()
    return nll_loss(logprobs, weights, member_counts(made, [], [term])["m"][1]).item()


def test_token_averages_and_the_two_reductions():
    three, six = [0.5, 0.25, 0.8], [0.9] * 6
    assert loss_of([three], ["a"], "experience", 1) == pytest.approx(0.76753, abs=1e-5)
    assert loss_of([three, six], ["a", "b"], "experience", 9) == pytest.approx(0.43644, abs=1e-5)
    # one problem of four has a meta-experience
    assert loss_of([three], ["a"], "problem", 4) == pytest.approx(0.1919, abs=1e-4)
    assert loss_of([three], ["a"], "experience", 4) == pytest.approx(0.7675, abs=1e-4)
    # two of one problem count as their mean
    assert loss_of([three, six], ["a", "a"], "problem", 1) == pytest.approx(0.43644, abs=1e-5)
    assert loss_of([three, six], ["a", "b"], "problem", 4) == pytest.approx((0.76753 + 0.10536) / 4, abs=1e-5)


def texts_of_a_policy(logits):
    """All 15 texts of at most three tokens of three kinds, the third ends one: log-probs and lengths."""
    found = []

    def grow(prefix, steps):
        place = {(): 0, (0,): 1, (1,): 2}.get(
            prefix, 3 + 2 * prefix[0] + prefix[1] if len(prefix) == 2 else 0
        )
        row = torch.log_softmax(logits[place], -1)
        if len(prefix) == 2:  # the third token is the last, whatever it is
            found.extend([*steps, row[token]] for token in range(2))
            return
        found.append([*steps, row[2]])
        for token in range(2):
            grow((*prefix, token), [*steps, row[token]])

    grow((), [])
    return found


def test_all_that_the_loss_teaches_is_in_the_filter():
    """On own texts the expected gradient is 0, filtered it is that of E[v], and 1/|M| favours short ones."""
    torch.manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    logits.data[3:, 2] = -1e9  # third tokens are of two kinds
    texts = texts_of_a_policy(logits)
    logprobs = torch.stack([torch.stack(text).sum() for text in texts])
    lengths = [len(text) for text in texts]
    chance = logprobs.exp()
    assert chance.sum().item() == pytest.approx(1.0)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def learned(kept, mean):
        """The expected gradient of the term, downhill, over texts drawn from the policy."""
        weights = row_weights(lengths, [str(n) for n in range(len(texts))], "experience")
        terms = [
            nll_loss(torch.stack(text), torch.full((len(text),), weight if mean else 1.0), 1.0)
            for text, weight in zip(texts, weights, strict=True)
        ]
        expected = zip(chance.detach(), kept, terms, strict=True)
        return -gradient(sum(p * keep * term for p, keep, term in expected))

    everything = [1.0] * len(texts)
    assert learned(everything, mean=False).abs().max() < 1e-12
    passes = [float(n % 3 == 0) for n in range(len(texts))]
    success = (chance * torch.tensor(passes)).sum()
    torch.testing.assert_close(learned(passes, mean=False), gradient(success))
    torch.testing.assert_close(learned(passes, mean=False) / success.detach(), gradient(success.log()))
    shortness = (chance / torch.tensor(lengths)).sum()
    torch.testing.assert_close(learned(everything, mean=True), gradient(shortness), atol=1e-7, rtol=0)
    assert gradient(shortness).abs().max() > 0.01


def test_the_groups_advantages():
    rewards = np.array([1, 0, 0, 1, 0, 0, 0, 0], dtype=float)
    advantages = group_advantages(rewards, ["g"] * 8, eps=1e-4)
    assert advantages[[0, 1]] == pytest.approx([1.61984, -0.53995], abs=1e-5)


# --- pairs and validation ----------------------------------------------------------------------------------


def test_mixed_problems_of_a_step():
    """P(mixed) = 1 - p^8 - (1-p)^8 where every problem is solved with probability p."""
    engine = Scripted(lambda request, index: request.example.answer + "!")
    method = mel()
    context = StepContext(0, engine, TOKENIZER, None, None, lambda *_: None, score, sampling=Sampling(40))
    mixed = []
    for right in range(9):
        group = solutions(engine, 1, 8).rollouts
        for rollout in group[right:]:
            rollout.rewards = {"right": 0.0}
        pairs = method._pairs(group, context, defaultdict(float))
        mixed.append(bool(pairs))
        assert all(pair.base_rate == right / 8 for pair in pairs)
    assert mixed == [False, *[True] * 7, False]
    for p, chance in ((0.5, 0.9922), (0.1, 0.5695), (0.9, 0.5695), (0.01, 0.0773)):
        found = sum(math.comb(8, k) * p**k * (1 - p) ** (8 - k) for k in range(9) if mixed[k])
        assert found == pytest.approx(chance, abs=1e-4)


@pytest.mark.parametrize(
    ("useful", "helped", "base", "retention", "precision", "twice"),
    [
        (0.5, 0.9, 0.5, 0.70, 0.643, 0.764),
        (0.5, 0.9, 0.25, 0.575, 0.783, 0.928),
        (0.3, 0.9, 0.5, 0.62, 0.435, 0.581),
    ],
)
def test_a_replay_is_a_weak_filter(useful, helped, base, retention, precision, twice):
    """What is kept where a share is useful, with one replay and with two that must both be right."""

    def kept(rate, method):
        n = method.config.replays
        return sum(
            math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
            for k in range(n + 1)
            if method.is_verified(Candidate(None, None, [], passes=k))
        )

    one, two = mel(), mel(replays=2, min_passes=2)
    share = {m: useful * kept(helped, m) + (1 - useful) * kept(base, m) for m in (one, two)}
    assert share[one] == pytest.approx(retention, abs=1e-3)
    assert useful * kept(helped, one) / share[one] == pytest.approx(precision, abs=1e-3)
    assert useful * kept(helped, two) / share[two] == pytest.approx(twice, abs=1e-3)


def test_one_analysis_and_one_replay_of_every_mixed_problem():
    def answers(request, index):
        if request.role == "solution" and request.example.id in "01":  # always right, never right
            return f"{request.example.answer}!" if request.example.id == "0" else "no!"
        if request.role == "replay" and request.example.answer == "3":
            return "wrong!"
        return say(request, index)

    extended, (term,), log, _ = run(mel(), answers=answers)
    roles = {role: extended.with_role(role).rollouts for role in ("solution", "analysis", "replay")}
    assert [len(rollouts) for rollouts in roles.values()] == [16, 2, 2]
    assert len({rollout.id for rollout in extended}) == 20
    analysis, replay = roles["analysis"][0], roles["replay"][0]
    asked = text_of(analysis.request.prompt_ids)
    assert "compare p2\n-" in asked
    assert "x!\n+2!" in asked
    assert "solve p2" in text_of(replay.request.prompt_ids)
    assert "at 2;why ones;rule no 22" in text_of(replay.request.prompt_ids)
    # problem 2 passed; its text is learned after the analysis prompt, over the four problems of the step
    assert term.rows == [(analysis.request.prompt_ids, analysis.completion.token_ids)]
    assert term.row_weights == [1 / len(analysis.completion.token_ids)]
    assert (term.weight, term.total) == (1.0, 4.0)
    assert log["mixed"] == 0.5
    assert (log["pairs"], log["kept"], log["retention"]) == (2, 1, 0.5)
    assert (log["base_rate"], log["replay_rate"], log["lift"]) == (0.5, 0.5, 0.0)
    assert log["nll"] == pytest.approx(0.5)
    extra = sum(len(r.completion.token_ids) for r in roles["analysis"] + roles["replay"])
    sampled = sum(len(r.completion.token_ids) for r in roles["solution"])
    assert log["tokens/share"] == pytest.approx(extra / sampled)
    assert log["tokens/trained"] == len(analysis.completion.token_ids)
    # solutions are what they would be without
    assert roles["solution"] == extended.rollouts[:16]


def test_targets():
    rows = {}
    for target in ("retro", "query", "distill", "solution"):
        _, (term,), _, _ = run(mel(target=target), problems=1)
        rows[target] = [text_of(ids) for ids in term.rows[0]]
    text = "at 0;why ones;rule no 00"
    assert rows["retro"][1] == rows["query"][1] == text
    assert "compare p0" in rows["retro"][0]
    assert "recall p0" in rows["query"][0]
    assert "compare" not in rows["query"][0]
    assert rows["distill"][1] == "0!"
    assert rows["solution"] == rows["distill"]  # which say the same here
    assert "p0" in rows["distill"][0]
    assert not any(word in rows["distill"][0] for word in ("rule", "recall", "solve"))


def test_what_is_rejected():
    def answers(text):
        return lambda request, index: text if request.role == "analysis" else say(request, index)

    for text, name in (("at 1;why 2", "malformed"), ("at 1;why 2;rule 3~", "cut")):
        extended, (term,), log, _ = run(mel(), answers=answers(text))
        assert (log[name], log["kept"], term.rows, term.total) == (1.0, 0, [], 4.0)
        assert not extended.with_role("replay").rollouts
    # the answer, in the heuristics or before them
    kept = {
        (leak, place): run(mel(leak=leak), answers=answers(text), problems=1)[2]["kept"]
        for leak in ("keep", "heuristics", "anywhere")
        for place, text in (("heuristics", "at 5;why 6;rule 0"), ("before", "at 0;why 6;rule 5"))
    }
    assert [key for key, count in kept.items() if not count] == [
        ("heuristics", "heuristics"), ("anywhere", "heuristics"), ("anywhere", "before"),
    ]  # fmt: skip
    log = run(mel(), answers=answers("at 0;why 6;rule 5"), problems=2)[2]
    assert (log["leaking"], log["retention_leaking"], log["retention_clean"]) == (0.5, 1.0, 1.0)


def test_cut_solutions_are_neither_right_nor_wrong():
    def cut(request, index):
        text = say(request, index)
        return "~" if request.role == "solution" and index % 2 else text

    _, (term,), log, _ = run(mel(), answers=cut)
    assert (log["mixed"], log["pairs"], term.rows) == (0.0, 0, [])


def test_limits():
    log = run(mel(pairs=3), samples=4)[2]
    assert log["pairs"] == 12
    assert run(mel(pairs=9), samples=4)[2]["pairs"] == 16
    assert run(mel(pairs=3, max_pairs=5), samples=4)[2]["pairs"] == 5
    # two of a problem count as their mean
    _, (term,), _, _ = run(mel(pairs=3), problems=1)
    assert term.row_weights == [pytest.approx(1 / (3 * len(row[1]))) for row in term.rows]
    assert run(mel(max_tokens=7))[3].requests[4].sampling.max_tokens == 7


def test_a_prompt_that_is_too_long_gives_way_to_the_shortest_or_is_left_out():
    def answers(request, index):
        text = say(request, index)
        return f"{'y' * 200}!" if request.role == "solution" and index == 1 else text

    for limit, pairs in ((120, 8), (10, 0)):
        extended, _, log, _ = run(mel(max_prompt=limit), answers=answers, problems=8, samples=4)
        assert log["pairs"] == pairs
        assert all("yyy" not in text_of(r.request.prompt_ids) for r in extended.with_role("analysis"))
    assert log.get("too_long") is None  # there is no pair to take a share of
    # room for an analysis of 8 tokens after its prompt, but none for a replay of 40
    _, _, log, engine = run(mel(max_tokens=8), problems=2, max_model_len=90)
    assert (log["pairs"], log["too_long"], log["kept"]) == (2, 1.0, 0)
    assert engine.requests[-1].role == "analysis"


def test_an_unscored_replay_decides_nothing():
    method, engine = mel(), Scripted(say)
    batch = solutions(engine, 2)

    def broken(rollouts):
        score(rollouts)
        rollouts[0].reward, rollouts[0].rewards = None, {"right": None}

    log = {}
    context = StepContext(2, engine, TOKENIZER, None, None, log.__setitem__, broken, sampling=Sampling(40))
    method.extend(batch, context)
    assert (log["unscored"], log["kept"], log["retention"]) == (0.5, 1, 1.0)


def test_several_replays():
    def answers(request, index):
        return "no!" if request.role == "replay" and index == 1 else say(request, index)

    assert run(mel(replays=3, min_passes=2), answers=answers)[2]["retention"] == 1.0
    log = run(mel(replays=3, min_passes=3), answers=answers)[2]
    assert (log["retention"], log["replay_rate"]) == (0.0, pytest.approx(2 / 3))


def test_a_replay_of_a_solution_that_was_short_of_tokens_has_the_stages_cap():
    """One that went on from a prefix, or was capped, had fewer; analysis and replay begin anew."""
    engine = Scripted(say)
    batch = solutions(engine)
    for rollout in batch:
        rollout.request = replace(rollout.request, sampling=replace(rollout.request.sampling, max_tokens=7))
    extend(mel(), engine, batch)
    asked = {request.role: request.sampling.max_tokens for request in engine.requests}
    assert (asked["analysis"], asked["replay"]) == (40, 40)


def test_controls():
    extended, (term,), log, _ = run(mel(validation="none"))
    assert (len(extended.with_role("replay")), len(term.rows), "retention" in log) == (0, 4, False)
    _, terms, log, _ = run(mel(weight=0.0))
    assert (terms, log["kept"]) == ([], 4)
    for pairs in (1, 2):
        extended, (term,), log, _ = run(mel(shuffle=True, pairs=pairs), problems=3)
        assert len(term.rows) == 3 * pairs
        for prompt, completion in term.rows:
            asked, learned = text_of(prompt), text_of(completion)
            assert asked.partition("compare p")[2][0] != learned.removeprefix("at ")[0]
        replays = [text_of(r.request.prompt_ids) for r in extended.with_role("replay")]
        assert all(r.partition("at ")[2][0] != r.partition("solve p")[2][0] for r in replays)
    assert run(mel(shuffle=True), problems=1)[2]["kept"] == 0


# --- the store and several ranks ---------------------------------------------------------------------------


def test_the_store_keeps_every_text_once(tmp_path):
    folder = tmp_path / "store"
    _, _, _, engine = run(mel(store=str(folder)))
    found = read_experiences(folder)
    assert [row.problem for row in found] == ["p0", "p1", "p2", "p3"]
    first = found[0]
    assert (first.text, first.sections) == ("at 0;why ones;rule no 00", ["0", "ones", "no 00"])
    assert (first.step, first.policy_version, first.passes, first.replays) == (2, 3, 1, 1)
    assert (first.right, first.base_rate, first.leaks) == ("0!", 0.5, True)
    assert first.wrong_id.startswith("2.0/solution/")
    assert first.wrong.startswith("x")
    assert engine.requests[-1].role == "replay"
    run(mel(store=str(folder), pairs=4))
    assert read_experiences(folder) == found
    (folder / "other.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"other\.parquet is no file of a store"):
        run(mel(store=str(folder)))


def test_ranks_do_together_what_one_does(tmp_path):
    """Limits and the store's duplicates are decided over all ranks."""

    def build(ids):
        engine, example = Scripted(say), Example("1", "p1", "1")
        requests = [
            RolloutRequest(encode("p1"), example, f"2.{i}", Sampling(40, n=4, seed=derive_seed(i)))
            for i in ids
        ]
        batch = make_rollouts(requests, engine.generate(requests), 0)
        score(batch)
        return engine, batch

    def act(ranks, folder):
        barrier, parts = Barrier(len(ranks)), [None] * len(ranks)
        method = [mel(store=str(folder), pairs=2, max_pairs=3) for _ in ranks]

        def one(rank):
            def gather(value):
                barrier.wait()
                parts[rank] = value
                barrier.wait()
                return list(parts)

            engine, batch = build(ranks[rank])
            return extend(method[rank], engine, batch, gather=gather)

        with ThreadPoolExecutor(len(ranks)) as pool:
            results = list(pool.map(one, range(len(ranks))))
        return results, {frozenset(m.state_dict()["known"]) for m in method}

    ((_, (whole,), log),), known = act([range(4)], tmp_path / "one")
    results, split = act([range(2), range(2, 4)], tmp_path / "two")
    assert split == known
    assert [log for _, _, log in results] == [log, log]
    rows = [row for _, (term,), _ in results for row in term.rows]
    assert sorted(rows) == sorted(whole.rows)
    assert len(rows) == 3
    assert sum(term.total for _, (term,), _ in results) == whole.total == 4
    assert read_experiences(tmp_path / "one") == read_experiences(tmp_path / "two")
    assert len(read_experiences(tmp_path / "one")) == 1


def test_options_are_checked():
    (spec,) = load_methods([{"mel": {"target": "query", "weight": 0.1}}])
    assert (spec.config.target, spec.config.pairs, spec.config.validation) == ("query", 1, "replay")
    for options, message in (
        ({"min_passes": 2}, "min_passes is 2, but there are only 1 replays"),
        ({"target": "distill", "validation": "none"}, "learns the replays"),
        ({"prompts": {"analysis": "{wrong} {right}"}}, "the template has no {problem}"),
        ({"prompts": {"sections": ["a", " "]}}, "needs a text that opens it"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_methods([{"mel": options}])
    with pytest.raises(RecipeError, match="no reward 'other'; there are right"):
        run(mel(correct=CorrectConfig(reward="other")))
