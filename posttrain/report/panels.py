"""Which curves the report draws of a training stage, and what they mean.

A method's panel shows what its paper is about: whether tools are used where they help (HDPO), what thinking
on is worth (MRT), how many errors become memories that help (MEL), and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.report.run_folder import Stage


@dataclass(frozen=True)
class Chart:
    """A chart of one or more metrics. `lines` are (metric, label); `form` says how values are written."""

    title: str
    about: str
    lines: tuple[tuple[str, str], ...]
    form: str = "number"
    wide: bool = False


ENTROPY = Chart("Entropy", "Mean entropy of the next-token distribution, in nats.", (("entropy", "entropy"),))
LOSS = Chart("Loss", "Mean loss of a step.", (("loss", "loss"),), "fine")
TOKEN_ACCURACY = Chart(
    "Token accuracy",
    "Share of demonstration tokens the model would have chosen.",
    (("mean_token_accuracy", "accuracy"),),
    "percent",
)
OPTIMISER = (
    Chart("Gradient norm", "Before clipping.", (("grad_norm", "norm"),), "fine"),
    Chart("Learning rate", "As scheduled.", (("learning_rate", "rate"),), "fine"),
)
SUPERVISED = (("Learning", (LOSS, TOKEN_ACCURACY, ENTROPY, *OPTIMISER)),)
LEARNING = (
    Chart("Reward", "Mean weighted reward of a step's completions.", (("reward", "reward"),), wide=True),
    Chart(
        "Completion length",
        "Tokens the policy wrote.",
        (("completions/mean_length", "mean"), ("completions/max_length", "longest")),
        "tokens",
    ),
    ENTROPY,
    Chart("KL to the reference", "k3 estimate per token, in nats.", (("kl", "KL"),), "fine"),
    Chart("Reward spread", "Standard deviation of the rewards of a step.", (("reward_std", "std"),)),
)
HEALTH = (
    Chart(
        "Samples that teach little",
        "Share of completions cut at the token cap, of groups whose rewards are all equal, and of samples "
        "without a score.",
        (
            ("completions/truncated", "truncated"),
            ("groups/zero_variance", "zero variance"),
            ("rewards/unscored", "unscored"),
        ),
        "percent",
    ),
    Chart(
        "Engine–trainer mismatch",
        "Mean absolute difference of the log-probs that the engine sampled with and the trainer computed.",
        (("sampling/logprob_difference", "difference"),),
        "fine",
    ),
    Chart(
        "Importance ratio",
        "Mean correction weight between engine and trainer; 1 is no mismatch.",
        (("sampling/importance_ratio", "ratio"),),
        "fine",
    ),
    Chart(
        "Clipped ratios",
        "Share of tokens whose ratio was clipped.",
        (("ratio/clipped", "clipped"),),
        "percent",
    ),
)
SELF_PREDICTIONS = (
    Chart(
        "Pass rate",
        "Mean over a step's problems: what the policy says before solving them, and what it does.",
        (("masa/rate_predicted", "predicted"), ("masa/rate_true", "true")),
        "percent",
    ),
    Chart(
        "Rank correlation",
        "Spearman's, over a step's problems, of predictions and truth.",
        (("masa/rate_spearman", "pass rate"), ("masa/length_spearman", "length")),
    ),
    Chart("Error of the pass rate", "Mean absolute error, of 1.", (("masa/rate_mae", "error"),)),
    Chart(
        "Error of the length", "Mean absolute error, in tokens.", (("masa/length_mae", "error"),), "tokens"
    ),
    Chart(
        "Right parts of predictions",
        "Notions that more right than wrong solutions contain, lengths within the range of the right ones, "
        "and answers of which every part can be read.",
        (("masa/notion_precision", "notions"), ("masa/in_range", "lengths"), ("masa/complete", "complete")),
        "percent",
    ),
    Chart(
        "Gate",
        "Problems left out, and of those that were rolled out all the same the ones that would have taught "
        "something.",
        (("masa/gate/share", "left out"), ("masa/gate/wrong", "wrongly")),
        "percent",
    ),
    Chart(
        "Cap",
        "Capped solutions that were cut, and right uncapped ones that would have been.",
        (("masa/cutoff/cut", "cut"), ("masa/cutoff/false_rate", "right ones")),
        "percent",
    ),
    Chart(
        "Tokens",
        "Sampled in a step.",
        (("masa/tokens/solution", "solutions"), ("masa/tokens/meta", "self-predictions")),
        "tokens",
    ),
)
MIXTURE = (
    Chart(
        "Weight of imitation",
        "Of the demonstrations' loss; the policy gradient has the rest of 1.",
        (("amft/mu", "mu"),),
    ),
    Chart(
        "What each loss climbs",
        "Of the held-out reward, along its own gradient: imitation gains weight while its line is the upper.",
        (("amft/climb/imitation", "imitation"), ("amft/climb/policy", "policy gradient")),
        "fine",
    ),
    Chart("Meta-gradient", "On the scale that the recipe asks for.", (("amft/meta_gradient", "mu"),), "fine"),
    Chart("Held-out reward", "Of prompts that nothing is trained on.", (("amft/utility", "reward"),)),
    Chart(
        "Entropy and its target",
        "In nats a token, estimated from the completions.",
        (("amft/entropy", "entropy"), ("amft/target_entropy", "target")),
    ),
)
TEACHING = (
    Chart(
        "Gains of students",
        "On hard problems, over the baseline: of the best set of a step, and the moving average of all that "
        "decides about promotions.",
        (("reward/best_set", "best set"), ("reward/moving_average", "moving average")),
        "fine",
    ),
    Chart(
        "Baseline",
        "Its accuracy on the hard problems of a step; it rises with promotions.",
        (("baseline/accuracy", "accuracy"),),
        "percent",
    ),
    Chart("Promotions", "So far.", (("promotions", "promotions"),)),
    Chart(
        "Proposals",
        "Share of the teacher's that can be read, and of different ones among those that are used.",
        (("teacher/readable", "readable"), ("teacher/unique", "different")),
        "percent",
    ),
    Chart("Teacher's KL", "To the base model, per token, in nats.", (("teacher/kl", "KL"),), "fine"),
)
TOOL_USE = (
    Chart(
        "Use of tools",
        "Share of the completions with a call, and of the calls that failed.",
        (("tools/use", "with a call"), ("tools/failed", "failed")),
        "percent",
    ),
    Chart("Calls", "Mean of a completion.", (("tools/calls", "calls"),)),
    Chart(
        "Redundant calls",
        "Share of the completions that call the same thing twice.",
        (("hdpo/redundant_calls", "redundant"),),
        "percent",
    ),
    Chart(
        "Where efficiency teaches",
        "Groups with two right solutions or more, those in which they differ, and the share of the policy's "
        "tokens in them.",
        (
            ("hdpo/qualifying_groups", "two are right"),
            ("hdpo/active_groups", "they differ"),
            ("hdpo/token_share", "tokens"),
        ),
        "percent",
    ),
    Chart(
        "Channels that disagree",
        "Share of the completions with an advantage for accuracy and one against efficiency.",
        (("hdpo/conflicts", "conflicts"),),
        "percent",
    ),
    Chart(
        "Gradients of the channels",
        "Norms, weights included.",
        (("hdpo/gradient/accuracy", "accuracy"), ("hdpo/gradient/efficiency", "efficiency")),
        "fine",
    ),
    Chart(
        "Direction of the channels",
        "Cosine of the two gradients: below 0 each undoes some of the other.",
        (("hdpo/gradient/cosine", "cosine"),),
    ),
)
THINKING_ON = (
    Chart(
        "Progress",
        "What an episode, or thinking on from a prefix, adds to the chance of success.",
        (("mrt/progress", "progress"),),
        "fine",
    ),
    Chart(
        "Going on against answering",
        "Success from the same prefixes: of rollouts that think on, and of answers forced there.",
        (("mrt/success_continued", "thinks on"), ("mrt/success_terminated", "answers")),
        "percent",
    ),
    Chart(
        "Wasted episodes",
        "Share of what was measured that did not raise the chance of success, and the chance at first.",
        (("mrt/progress_not_positive", "no progress"), ("mrt/success_before", "success before")),
        "percent",
    ),
    Chart("Episodes", "Of a rollout.", (("mrt/episodes", "episodes"),)),
    Chart(
        "Prefixes",
        "Tokens of the traces that rollouts start from.",
        (("mrt/prefix_tokens", "tokens"),),
        "tokens",
    ),
    Chart(
        "Cost of the measurement",
        "Tokens of forced answers, as a share of those that rollouts took; prompt tokens that probes share.",
        (("mrt/probe_share", "forced answers"), ("mrt/prefix_reuse", "shared")),
        "percent",
    ),
)
MEMORIES = (
    Chart(
        "Memories",
        "Pairs of a wrong and a right solution that were analysed, and verified analyses that were learned.",
        (("mel/pairs", "analysed"), ("mel/kept", "learned")),
    ),
    Chart(
        "What memories are worth",
        "Of the problems with one: solved without it, and with it in the prompt.",
        (("mel/base_rate", "without"), ("mel/replay_rate", "with")),
        "percent",
    ),
    Chart(
        "Verified",
        "Share of the well-formed analyses; of those that contain the answer and of those that do not.",
        (
            ("mel/retention", "all"),
            ("mel/retention_leaking", "with the answer"),
            ("mel/retention_clean", "without it"),
        ),
        "percent",
    ),
    Chart(
        "Lost analyses",
        "Share of the pairs.",
        (
            ("mel/malformed", "malformed"),
            ("mel/cut", "cut"),
            ("mel/too_long", "too long"),
            ("mel/rejected_leaks", "gives the answer away"),
        ),
        "percent",
    ),
    Chart(
        "Mixed problems",
        "Share that is neither always nor never solved.",
        (("mel/mixed", "mixed"),),
        "percent",
    ),
    Chart("Surprise of the analyses", "Mean −log-prob of a token, in nats.", (("mel/nll", "nats"),)),
    Chart(
        "Tokens",
        "Sampled for analyses and replays, and learned from, in a step.",
        (
            ("mel/tokens/analysis", "analyses"),
            ("mel/tokens/replay", "replays"),
            ("mel/tokens/trained", "learned"),
        ),
        "tokens",
    ),
)
FAMILIES = (
    ("hdpo/tool_use/", "Use of tools by kind of problem", "Share of the completions with a call."),
    ("hdpo/correct/", "Right solutions by kind of problem", "Share of the completions."),
)
"""Metrics that end with a kind of problem, as the dataset's column `family` has it."""


def method_groups(stage: Stage) -> tuple[tuple[str, tuple[Chart, ...]], ...]:
    """The panels of all methods, by title; those of methods that did not run have nothing to draw."""
    families = tuple(
        Chart(title, about, lines, "percent")
        for prefix, title, about in FAMILIES
        if (
            lines := tuple(
                (name, name.removeprefix(prefix)) for name in stage.metrics if name.startswith(prefix)
            )
        )
    )
    return (
        ("Self-predictions", SELF_PREDICTIONS),
        ("Tool use", (*TOOL_USE, *families)),
        ("Thinking on", THINKING_ON),
        ("Imitation and reinforcement", MIXTURE),
        ("Memories of errors", MEMORIES),
        ("Teacher and students", TEACHING),
    )
