"""Peak memory of that step, against TRL's GRPOTrainer, and against full logits at a vocabulary of 150k.

Every measurement is a fresh process: it builds the model, takes a step on a group of a few tokens, so that
whatever is loaded late is loaded, and measures by how much the step itself raises the peak of its memory (on
a GPU, of what PyTorch has allocated). Gradients are part of that on both sides.
"""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from benchmarks.harness import Comparison, Sample, Settings, alternate, in_fresh_process, one_thread, require
from benchmarks.models import QWEN_HALF_BILLION, Group, ModelShape
from benchmarks.steps import full_logits_step, our_step, trl_step
from benchmarks.train_step import LONG, RAGGED, TRL_NOTE

LARGE_VOCABULARY = ModelShape(
    hidden=128, layers=2, heads=2, key_value_heads=1, intermediate=512, vocab=151_936
)
STEPS = {"ours": our_step, "trl": trl_step, "full": full_logits_step}
MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    """What a step computed."""

    loss: float
    gradient_norm: float


def compare(settings: Settings) -> list[Comparison]:
    cuda = settings.device == "cuda"
    shape, large = (QWEN_HALF_BILLION,) * 2 if cuda else (ModelShape(), LARGE_VOCABULARY)
    lengths = LONG if cuda else RAGGED
    return [
        _compare("against TRL", "trl", 0.50, shape, lengths, settings),
        _compare("vocabulary of 150k, against full logits", "full", 0.20, large, lengths, settings),
    ]


def _compare(
    name: str, baseline: str, limit: float, shape: ModelShape, lengths: tuple[int, ...], settings: Settings
) -> Comparison:
    group = Group.random(settings.seed, 128, lengths, shape.vocab)
    tolerance = 0.05 if settings.device == "cuda" else 1e-3

    def run(side: str) -> Sample[Outcome]:
        return in_fresh_process(measure, side, shape, group, settings.seed, settings.device)

    def check(a: Outcome, b: Outcome) -> None:
        require(abs(a.loss - b.loss) <= tolerance * abs(b.loss), f"losses {a.loss} and {b.loss}")
        norms = a.gradient_norm, b.gradient_norm
        require(abs(norms[0] - norms[1]) <= tolerance * norms[1], "gradient norms {} and {}".format(*norms))

    ours, theirs = alternate(
        partial(run, "ours"), partial(run, baseline), settings.pairs(), check, warm_up=False
    )
    return Comparison(
        name=name,
        theirs_is={
            "trl": "GRPOTrainer._compute_loss and backward",
            "full": "padded rows, log_softmax of all logits of the completions",
        }[baseline],
        unit="MiB",
        limit=limit,
        ours=ours,
        theirs=theirs,
        shapes={"model": shape.describe(), **group.describe()},
        note=TRL_NOTE if baseline == "trl" else "",
    )


def measure(side: str, shape: ModelShape, group: Group, seed: int, device: str) -> Sample[Outcome]:
    """The MiB by which one step raises the peak memory of this process or of the GPU."""
    small = Group.random(seed, 4, (2, 1), shape.vocab)
    with one_thread():
        model = shape.build(seed, device)
        warm_up, step = STEPS[side](model, small), STEPS[side](model, group)
        warm_up()
        model.zero_grad(set_to_none=True)
        gc.collect()
        before = start(device)
        loss = step()
        growth = (peak(device) - before) / MIB
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    return Sample(growth, Outcome(float(loss), float(norm)))


def start(device: str) -> int:
    """Forget the peak so far; the memory in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return _status("VmRSS")


def peak(device: str) -> int:
    """The most memory in use since then."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
