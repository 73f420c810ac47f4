"""Lets accelerate use FSDP2 on CPU processes, in tests alone.

Accelerate 1.15 turns `ACCELERATE_USE_FSDP` into FSDP for the process groups of a list of accelerators, and
MULTI_CPU is not on it: two CPU processes silently train with DDP. PyTorch itself shards over gloo.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable() -> None:
    """Count a group of CPU processes among those that FSDP may use."""
    plain = AcceleratorState.__init__

    def promoted(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if self.distributed_type == DistributedType.MULTI_CPU and asked:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = promoted
