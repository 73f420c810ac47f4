"""MEL: errors become memory (meta-experience learning, Huang et al., 2026, arXiv:2602.10224).

Outcome rewards say that a solution is wrong, not where or why. MEL has the policy say so itself:

    for each problem x that some of the G rollouts solve and some do not:
        take a wrong and a right one, y- and y+                             contrast pair
        M ~ policy(. | instruction, x, y-, y+)                              one structured analysis
        y ~ policy(. | x, M); keep M if y is right                          validation by replay
    loss = L_GRPO + weight · (1 / problems) · sum over kept M of
           mean over t of -log policy(M_t | instruction, x, y-, y+, M_<t)

The second term has a denominator of its own, so that the policy gradient is what it is without. M is data. As
the policy has sampled it, the expected gradient of the term is that of writing texts which make the replay
succeed; nothing of it trains the policy to solve x without M, which is what targets `query` (M from x alone)
and `distill` (the replay from x alone, our extension) are for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, takewhile
from typing import Any

import numpy as np

from posttrain.data.experience_store import Experience, ExperienceStore
from posttrain.data.experiences import (
    analysis_example,
    fingerprint,
    leaks,
    problem_of,
    query_example,
    read_sections,
    replay_example,
)
from posttrain.data.prompts import encode_prompt
from posttrain.errors import RecipeError
from posttrain.methods.base import LossTerm, Method, StepContext
from posttrain.recipe.mel_schema import MelConfig
from posttrain.rollout.types import Example, Rollout, RolloutBatch, RolloutRequest, derive_seed

SOLUTION, ANALYSIS, REPLAY = "solution", "analysis", "replay"
EXPERIENCE = "experience"
"""Name of the loss term."""

TokenIds = tuple[int, ...]
Counts = defaultdict[str, float]


@dataclass(frozen=True)
class Pair:
    """A wrong and a right solution of one problem, the question about them, and the problem's pass rate."""

    wrong: Rollout
    right: Rollout
    question: RolloutRequest
    base_rate: float

    @property
    def group(self) -> str:
        """The problem's group of solutions."""
        return self.right.request.group

    @property
    def example(self) -> Example:
        """The problem."""
        return self.right.request.example


@dataclass
class Candidate:
    """A meta-experience and the replays with it in context; `sections` are what could be read of it."""

    pair: Pair
    analysis: Rollout
    sections: list[str]
    replays: list[Rollout] = field(default_factory=list)
    passes: int = 0

    @property
    def text(self) -> str:
        """The whole meta-experience."""
        return self.analysis.completion.text


def order_pairs(
    wrong: Sequence[TokenIds], right: Sequence[TokenIds], pairing: str, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """All pairs of a wrong and a right solution, by their indices, in the order in which they are used.

    Args:
        wrong: token ids of the wrong solutions.
        right: of the right ones.
        pairing: `random`, `shortest` (fewest tokens first) or `closest` (longest common beginning first).
        rng: for `random`.
    """
    pairs = list(product(range(len(wrong)), range(len(right))))
    match pairing:
        case "random":
            return [pairs[index] for index in rng.permutation(len(pairs))]
        case "shortest":
            return sorted(pairs, key=lambda pair: len(wrong[pair[0]]) + len(right[pair[1]]))
        case _:
            return sorted(pairs, key=lambda pair: -common_prefix(wrong[pair[0]], right[pair[1]]))


def common_prefix(one: TokenIds, other: TokenIds) -> int:
    """How many tokens two completions begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def row_weights(lengths: Sequence[int], groups: Sequence[str], reduction: str) -> list[float]:
    """The weight of each token of every learned text: 1 / its tokens, so that a text counts as its mean.

    With reduction `problem`, also by one over the texts of its problem.
    """
    of_problem = Counter(groups) if reduction == "problem" else dict.fromkeys(groups, 1)
    return [1.0 / (length * of_problem[group]) for length, group in zip(lengths, groups, strict=True)]


class Mel(Method):
    """See the module."""

    name = "mel"
    Config = MelConfig
    config: MelConfig

    def __init__(self, config: MelConfig):
        super().__init__(config)
        self.store = ExperienceStore(config.store) if config.store is not None else None
        self.term: dict[str, Any] = {"rows": [], "row_weights": [], "total": 0.0}
        """This rank's part of the loss term of the batch that was extended last."""
        self.candidates: list[Candidate] = []
        """The meta-experiences of that batch that were validated, or could have been."""

    def extend(self, batch: RolloutBatch, context: StepContext) -> RolloutBatch:
        """Analyse contrast pairs, replay the problems with what was found, and keep what helped."""
        groups = batch.with_role(SOLUTION).groups()
        counts: Counts = defaultdict(float, problems=len(groups))
        pairs = [pair for group in groups.values() for pair in self._pairs(group, context, counts)]
        pairs = self._limited(pairs, context)
        analyses = context.generate([pair.question for pair in pairs])
        candidates = self._read(pairs, analyses.rollouts, counts)
        replays = RolloutBatch([])
        if self.config.validation == "replay":
            replays = self._replay(candidates, context, counts)
            candidates = [candidate for candidate in candidates if candidate.replays]
        self.candidates = candidates
        kept = [candidate for candidate in candidates if self.is_verified(candidate)]
        self._learn(kept, len(groups), context)
        if self.store is not None:
            self._remember(kept, self.store, context)
        self._count(counts, batch, pairs, analyses, candidates, replays, kept)
        self._log(counts, context)
        return batch + analyses + replays

    def auxiliary(self, context: StepContext) -> list[LossTerm]:
        """The verified texts of this step; every rank has the term, though maybe nothing in it."""
        return [LossTerm(EXPERIENCE, weight=self.config.weight, **self.term)] if self.config.weight else []

    def state_dict(self) -> dict[str, Any]:
        """The term of a batch that waits for its update, and what the store holds."""
        known = None if self.store is None or self.store.known is None else sorted(self.store.known)
        return {"term": self.term, "known": known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        rows = [(tuple(prompt), tuple(completion)) for prompt, completion in state["term"]["rows"]]
        self.term = {**state["term"], "rows": rows}
        if self.store is not None and state["known"] is not None:
            self.store.known = set(state["known"])

    # --- contrast pairs ----------------------------------------------------------------------------------

    def _pairs(self, group: Sequence[Rollout], context: StepContext, counts: Counts) -> list[Pair]:
        """The contrast pairs of a problem; none where all finished solutions are right, or none is."""
        judged = {rollout.id: self._is_right(rollout) for rollout in group}
        right = [rollout for rollout in group if judged[rollout.id]]
        wrong = [rollout for rollout in group if judged[rollout.id] is False and not rollout.truncated]
        if not right or not wrong:
            return []
        counts["mixed"] += 1
        ids = [[rollout.completion.token_ids for rollout in side] for side in (wrong, right)]
        rng = np.random.default_rng(derive_seed(group[0].request.sampling.seed, "pairs"))
        ordered = order_pairs(ids[0], ids[1], self.config.pairing, rng)
        drawn = ordered[: self.config.pairs]
        shortest = [pair for pair in order_pairs(ids[0], ids[1], "shortest", rng)[:1] if pair not in drawn]
        pairs: list[Pair] = []
        for w, r in drawn + shortest:
            if len(pairs) == len(drawn):
                break
            question = self._question(wrong[w], right[r], context)
            if question is None:
                counts["too_long"] += 1
            else:
                pairs.append(Pair(wrong[w], right[r], question, len(right) / len(group)))
        return pairs

    def _is_right(self, rollout: Rollout) -> bool | None:
        """Whether a solution is right; None where the reward does not say. One that was cut is not.

        Raises:
            RecipeError: there is no such reward.
        """
        name = self.config.correct.reward or next(iter(rollout.rewards), None)
        if name is None or name not in rollout.rewards:
            known = ", ".join(rollout.rewards) or "none"
            raise RecipeError(f"methods: mel.correct.reward: there is no reward {name!r}; there are {known}")
        value = rollout.rewards[name]
        return None if value is None else value >= self.config.correct.threshold and not rollout.truncated

    def _question(self, wrong: Rollout, right: Rollout, context: StepContext) -> RolloutRequest | None:
        """The request for the analysis of a pair, or None where there is no room for it."""
        request = right.request
        texts = [rollout.request.given + rollout.completion.text for rollout in (wrong, right)]
        example = analysis_example(request.example, texts[0], texts[1], self.config.prompts)
        key = f"{request.group}.{ANALYSIS}.{wrong.index}.{right.index}"
        example = replace(example, id=f"{example.id}#{key}")
        ids = self._encode(example, context)
        cap = self.config.max_tokens or context.sampling.max_tokens
        room = context.engine.max_model_len - cap
        if len(ids) > min(self.config.max_prompt or room, room):
            return None
        seed = derive_seed(request.sampling.seed, ANALYSIS, wrong.index, right.index)
        sampling = replace(request.sampling, n=1, max_tokens=cap, seed=seed)
        return RolloutRequest(ids, example, f"{request.group}.{ANALYSIS}", sampling, ANALYSIS)

    def _encode(self, example: Example, context: StepContext) -> TokenIds:
        return encode_prompt(example, context.tokenizer, self.config.prompts.format)

    def _limited(self, pairs: list[Pair], context: StepContext) -> list[Pair]:
        """At most `max_pairs` over all ranks: those with the lowest seeds, whatever rank they are on."""
        if self.config.max_pairs is None:
            return pairs
        parts = context.gather([pair.question.sampling.seed for pair in pairs])
        chosen = set(sorted(seed for part in parts for seed in part)[: self.config.max_pairs])
        return [pair for pair in pairs if pair.question.sampling.seed in chosen]

    # --- meta-experiences and their validation -----------------------------------------------------------

    def _read(self, pairs: Sequence[Pair], analyses: Sequence[Rollout], counts: Counts) -> list[Candidate]:
        """The well-formed meta-experiences; with `shuffle` each with a pair of another problem."""
        if self.config.shuffle:
            places = range(len(pairs))
            shifted = [(place + self.config.pairs) % len(pairs) for place in places]
            others = [place for place in places if pairs[place].group != pairs[shifted[place]].group]
            analyses = [analyses[shifted[place]] for place in others]
            pairs = [pairs[place] for place in others]
        candidates = []
        for pair, analysis in zip(pairs, analyses, strict=True):
            sections = read_sections(analysis.completion.text, self.config.prompts.sections)
            if analysis.truncated:
                counts["cut"] += 1
            elif sections is None:
                counts["malformed"] += 1
            elif self._gives_away(sections, pair, analysis):
                counts["rejected_leaks"] += 1
            else:
                candidates.append(Candidate(pair, analysis, sections))
        return candidates

    def _gives_away(self, sections: Sequence[str], pair: Pair, analysis: Rollout) -> bool:
        """Whether a text is to be rejected for containing the answer."""
        if self.config.leak == "keep":
            return False
        text = sections[-1] if self.config.leak == "heuristics" else analysis.completion.text
        return leaks(text, pair.example.answer)

    def _replay(self, candidates: Sequence[Candidate], context: StepContext, counts: Counts) -> RolloutBatch:
        """Solve each problem with its meta-experience in context, and score that.

        A candidate without room for the replays, or of which one could not be scored, stays without replays.
        """
        requests, asked = [], []
        for candidate in candidates:
            request = self._replay_request(candidate, context)
            if request is None:
                counts["too_long"] += 1
            else:
                requests.append(request)
                asked.append(candidate)
        replays = context.generate(requests)
        if len(replays):
            context.score(replays.rollouts)
        for number, candidate in enumerate(asked):
            start = number * self.config.replays
            own = replays.rollouts[start : start + self.config.replays]
            if any(rollout.reward is None for rollout in own):
                counts["unscored"] += 1
                continue
            candidate.replays = own
            candidate.passes = sum(self._is_right(rollout) is True for rollout in own)
        return replays

    def _replay_request(self, candidate: Candidate, context: StepContext) -> RolloutRequest | None:
        pair, solution = candidate.pair, candidate.pair.right.request
        example = replay_example(pair.example, candidate.text, self.config.prompts)
        place = f"{pair.wrong.index}.{pair.right.index}"
        example = replace(example, id=f"{example.id}#{pair.group}.{REPLAY}.{place}")
        ids = self._encode(example, context)
        # The stage's cap: that of the solution is smaller where it went on from a prefix, or was cut.
        cap = context.sampling.max_tokens
        if len(ids) + cap > context.engine.max_model_len:
            return None
        seed = derive_seed(pair.question.sampling.seed, REPLAY)
        sampling = replace(solution.sampling, n=self.config.replays, max_tokens=cap, seed=seed)
        return RolloutRequest(ids, example, f"{pair.group}.{REPLAY}", sampling, REPLAY)

    def is_verified(self, candidate: Candidate) -> bool:
        """Whether enough replays of a meta-experience were right."""
        return self.config.validation == "none" or candidate.passes >= self.config.min_passes

    # --- what is learned and kept ------------------------------------------------------------------------

    def _learn(self, kept: Sequence[Candidate], problems: int, context: StepContext) -> None:
        """Make this rank's part of the loss term of the verified meta-experiences."""
        rows = [self._row(candidate, context) for candidate in kept]
        groups = [candidate.pair.group for candidate in kept]
        self.term = {
            "rows": rows,
            "row_weights": row_weights([len(row[1]) for row in rows], groups, self.config.reduction),
            "total": float(problems if self.config.reduction == "problem" else len(kept)),
        }

    def _row(self, candidate: Candidate, context: StepContext) -> tuple[TokenIds, TokenIds]:
        """What is learned from a meta-experience: a prompt and what to say after it."""
        pair, text = candidate.pair, candidate.analysis.completion.token_ids
        match self.config.target:
            case "retro":
                return pair.question.prompt_ids, text
            case "query":
                return self._encode(query_example(pair.example, self.config.prompts), context), text
            case "distill":
                passed = next(replay for replay in candidate.replays if self._is_right(replay))
                return self._encode(pair.example, context), passed.completion.token_ids
            case "solution":
                return self._encode(pair.example, context), pair.right.completion.token_ids

    def _remember(self, kept: Sequence[Candidate], store: ExperienceStore, context: StepContext) -> None:
        """Store what is new there; of equal texts on all ranks, that of the pair with the lowest seed."""
        prints = [fingerprint(candidate.pair.example, candidate.text) for candidate in kept]
        fresh = store.new(prints)
        claims: dict[int, int] = {}
        places: dict[int, Candidate] = {}
        for one, candidate in zip(prints, kept, strict=True):
            seed = candidate.pair.question.sampling.seed
            if one in fresh and seed < claims.get(one, seed + 1):
                claims[one], places[one] = seed, candidate
        parts = context.gather(claims)
        first = {one: min(part[one] for part in parts if one in part) for part in parts for one in part}
        mine = [one for one, seed in claims.items() if first[one] == seed]
        store.add([self._experience(places[one], one, context.step) for one in mine])
        store.known = (store.known or set()) | first.keys()

    def _experience(self, candidate: Candidate, name: int, step: int) -> Experience:
        pair = candidate.pair
        return Experience(
            fingerprint=name,
            text=candidate.text,
            sections=candidate.sections,
            example_id=pair.example.id,
            problem=problem_of(pair.example),
            answer=pair.example.answer,
            wrong=pair.wrong.request.given + pair.wrong.completion.text,
            right=pair.right.request.given + pair.right.completion.text,
            wrong_id=pair.wrong.id,
            right_id=pair.right.id,
            step=step,
            policy_version=candidate.analysis.policy_version,
            passes=candidate.passes,
            replays=len(candidate.replays),
            base_rate=pair.base_rate,
            leaks=leaks(candidate.text, pair.example.answer),
        )

    # --- what is watched ---------------------------------------------------------------------------------

    def _count(
        self,
        counts: Counts,
        batch: RolloutBatch,
        pairs: Sequence[Pair],
        analyses: RolloutBatch,
        candidates: Sequence[Candidate],
        replays: RolloutBatch,
        kept: Sequence[Candidate],
    ) -> None:
        """Sums over this rank's pairs that the metrics are made of."""
        counts["pairs"] += len(pairs)
        counts["tokens_solution"] += _tokens(batch.with_role(SOLUTION))
        counts["tokens_analysis"] += _tokens(analyses)
        counts["tokens_replay"] += _tokens(replays)
        counts["tokens_trained"] += sum(len(completion) for _, completion in self.term["rows"])
        counts["candidates"] += len(candidates)
        counts["kept"] += len(kept)
        counts["length"] += sum(len(one.analysis.completion.token_ids) for one in candidates)
        counts["nll"] += sum(-float(np.mean(one.analysis.completion.logprobs)) for one in candidates)
        counts["base_rate"] += sum(one.pair.base_rate for one in candidates)
        counts["replay_rate"] += sum(one.passes / len(one.replays) for one in candidates if one.replays)
        for one in candidates:
            kind = "leaking" if leaks(one.text, one.pair.example.answer) else "clean"
            counts[kind] += 1
            counts[f"kept_{kind}"] += self.is_verified(one)

    def _log(self, counts: Counts, context: StepContext) -> None:
        """Shares and means over the pairs of all ranks."""
        total: Counts = defaultdict(float)
        for part in context.gather(dict(counts)):
            for name, count in part.items():
                total[name] += count
        pairs = ("too_long", "cut", "malformed", "rejected_leaks", "unscored")
        means = [(name, name, "pairs") for name in pairs]
        means += [(name, name, "candidates") for name in ("length", "nll", "leaking")]
        means += [
            ("mixed", "mixed", "problems"),
            ("tokens/trained_share", "tokens_trained", "tokens_solution"),
        ]
        if self.config.validation == "replay":
            means += [(name, name, "candidates") for name in ("base_rate", "replay_rate")]
            means += [("retention", "kept", "candidates")]
            means += [(f"retention_{kind}", f"kept_{kind}", kind) for kind in ("leaking", "clean")]
            if total["candidates"]:
                context.log("lift", (total["replay_rate"] - total["base_rate"]) / total["candidates"])
        for name, part, whole in means:
            if total[whole]:
                context.log(name, total[part] / total[whole])
        for name in ("pairs", "kept"):
            context.log(name, total[name])
        for name in ("analysis", "replay", "trained"):
            context.log(f"tokens/{name}", total[f"tokens_{name}"])
        extra = total["tokens_analysis"] + total["tokens_replay"]
        context.log("tokens/share", extra / max(total["tokens_solution"], 1))


def _tokens(rollouts: Iterable[Rollout]) -> int:
    return sum(rollout.completion.sampled_tokens for rollout in rollouts)


METHOD = Mel
