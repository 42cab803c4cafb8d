"""Everything of megatron-core that has to be patched, with the reason. Nothing else in the project patches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _StatelessRngTracker:
    """Stands in for Megatron's CUDA RNG tracker.

    The frozen base draws no random numbers (its dropouts are 0) and low-rank masks come from a counter, so there is no
    state to fork; Megatron's tracker would ask CUDA for one, also where there is none.
    """

    def is_initialized(self) -> bool:
        return True

    @contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield


def prepare(device: torch.device) -> None:
    """Make megatron-core run on `device`. Idempotent."""
    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = _StatelessRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    if device.type == "cpu":
        # Megatron asks for "the current CUDA device" when it allocates and when it builds masks, also on a CPU.
        torch.cuda.current_device = lambda: torch.device("cpu")
