"""Which of a model's own traces are worth imitating: pure functions.

The filters of STaR (Zelikman et al. 2022) and of MRT's supervised form (Qu et al. 2025, arXiv:2503.07572,
figure 4), whose text leaves two readings; both are here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain.training.progress import progress


def best_prefix(values: Sequence[float], allow_empty: bool = False) -> int | None:
    """After how many episodes a forced answer is most often right; the fewest where several are.

    `values` are J after 0, 1, … episodes, NaN where unknown. By telescoping that is also the prefix with the
    most progress. None where thinking gains nothing over answering at once; with `allow_empty`, 0 where
    answering at once is always right.
    """
    known = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=-1.0)
    best = int(known.argmax())
    if known[best] > max(known[0], 0.0):
        return best
    return 0 if allow_empty and known[0] >= 1.0 else None


def best_trace(traces: Sequence[Sequence[float]], lengths: Sequence[int]) -> int | None:
    """The trace with the most progress; of equals that with the fewest steps back, then the shortest.

    `traces` are the J of each; None where none makes progress.
    """
    steps = [progress(values) for values in traces]
    order = sorted(
        range(len(traces)),
        key=lambda i: (-round(float(steps[i].sum()), 9), int((steps[i] < 0).sum()), lengths[i]),
    )
    return order[0] if order and steps[order[0]].sum() > 0 else None
