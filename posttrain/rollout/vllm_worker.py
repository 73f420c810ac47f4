"""What runs inside a vLLM replica: `--worker-extension-cls posttrain.rollout.vllm_worker.WeightLoader`.

The trainer calls its methods through the replica's `/collective_rpc`. vLLM mixes the class into its worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from posttrain.rollout.weight_files import WEIGHTS_PATTERN, checksum


class WeightLoader:
    """Loads weights from files that the trainer has written, once their checksum is the one it announced."""

    reload_weights: Any
    """vLLM's worker method. On a CPU its layers hold packed weights, which plain loading cannot write to."""

    def load_weight_files(self, folder: str, expected: str) -> dict[str, str]:
        """Take over the weights in `folder`. Returns the checksum of what was loaded.

        Raises:
            ValueError: the files' contents are not what the trainer wrote; nothing has been loaded then.
        """
        found = self.check_files(folder, expected)
        self.reload_weights(weights_iterator=_tensors(Path(folder)))
        return found

    def check_files(self, folder: str, expected: str) -> dict[str, str]:
        """Compare the files in `folder` with the checksum that the trainer announced.

        Raises:
            ValueError: they differ.
        """
        found = checksum(Path(folder))
        if found != expected:
            raise ValueError(f"the files have the checksum {found}, not {expected}")
        return {"checksum": found}


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob(WEIGHTS_PATTERN)):
        yield from load_file(path).items()
