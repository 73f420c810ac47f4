"""Log-probs, loss and backward pass of a group, against TRL's GRPOTrainer and against padded full logits.

On a GPU the model has the shape of Qwen2.5-0.5B and computes in bfloat16; the limits are those of the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.harness import Comparison, Sample, Settings, Stopwatch, alternate, one_thread, require
from benchmarks.models import QWEN_HALF_BILLION, Group, ModelShape
from benchmarks.steps import Step, full_logits_step, our_step, trl_step

RAGGED = (141, 39, 10, 71, 22, 18, 63, 86)
SHORT = (94, 26, 8, 47, 15, 12, 42, 56)
LONG = tuple(8 * length for length in RAGGED)
TRL_NOTE = (
    "On a CPU TRL's fused head scores every position of every row, prompts and padding included; "
    "on a GPU it scores the completions' tokens only."
)


@dataclass(frozen=True)
class Outcome:
    """What a step computed; `gradient` holds every weight's."""

    loss: float
    gradient: torch.Tensor


def compare(settings: Settings) -> list[Comparison]:
    cuda = settings.device == "cuda"
    shape = QWEN_HALF_BILLION if cuda else ModelShape()
    lengths, short = (LONG, tuple(8 * length for length in SHORT)) if cuda else (RAGGED, SHORT)
    with one_thread():
        return [
            _compare("prompt 128, against TRL", "trl", 0.30, shape, 128, lengths, settings),
            _compare("prompt 512, against TRL", "trl", 0.30, shape, 512, short, settings),
            _compare("prompt 128, against full logits", "full", 0.45, shape, 128, lengths, settings),
        ]


def _compare(
    name: str,
    baseline: str,
    limit: float,
    shape: ModelShape,
    prompt: int,
    lengths: tuple[int, ...],
    settings: Settings,
) -> Comparison:
    group = Group.random(settings.seed, prompt, lengths, shape.vocab)
    model, their_model = (shape.build(settings.seed, settings.device) for _ in range(2))
    theirs = {"trl": trl_step, "full": full_logits_step}[baseline](their_model, group)
    ours = our_step(model, group)
    watch = Stopwatch(settings.device)
    tolerance = 0.05 if settings.device == "cuda" else 1e-3  # bfloat16 has 8 bits

    def check(a: Outcome, b: Outcome) -> None:
        difference = float((a.gradient - b.gradient).norm() / b.gradient.norm())
        require(abs(a.loss - b.loss) <= tolerance * abs(b.loss), f"losses {a.loss} and {b.loss}")
        require(difference <= tolerance, f"gradients differ by {difference} of their norm")

    values = alternate(
        lambda: measure(model, ours, watch),
        lambda: measure(their_model, theirs, watch),
        settings.pairs(),
        check,
    )
    return Comparison(
        name=name,
        theirs_is={
            "trl": "GRPOTrainer._compute_loss and backward",
            "full": "padded rows, log_softmax of all logits of the completions",
        }[baseline],
        unit=watch.unit,
        limit=limit,
        ours=values[0],
        theirs=values[1],
        shapes={"model": shape.describe(), **group.describe()},
        note=TRL_NOTE if baseline == "trl" else "",
    )


def measure(model: Any, step: Step, watch: Stopwatch) -> Sample[Outcome]:
    """Time one step and take its gradients out of the model."""
    model.zero_grad(set_to_none=True)
    with watch:
        loss = step()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return Sample(watch.seconds, Outcome(float(loss), gradient))
