"""What one process does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather

from posttrain.errors import PosttrainError

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 while the others wait, and give every rank its (picklable) result.

    Raises:
        PosttrainError: on rank 0, where `action` raised it; the other ranks exit without a word.
    """
    if not torch.distributed.is_initialized():
        return action()
    answer: list[Any] = [None, None]
    failure: PosttrainError | None = None
    if PartialState().is_main_process:
        try:
            answer[0] = action()
        except PosttrainError as error:
            failure, answer[1] = error, error.exit_code
    broadcast_object_list(answer)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise SystemExit(answer[1])
    return answer[0]


def highest(number: int) -> int:
    """The largest of all ranks' numbers."""
    if not torch.distributed.is_initialized():
        return number
    return int(gather(torch.tensor([number], device=PartialState().device)).max())
