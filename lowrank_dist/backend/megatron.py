"""All patches of megatron-core, each with its reason. No other module of the project patches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from lowrank_dist.backend.devices import WAIT_TIMER


class _StatelessRngTracker:
    """Stands in for Megatron's CUDA RNG tracker.

    The frozen base draws no random numbers (its dropouts are 0) and low-rank masks come from a counter, so there is no
    state to fork. Megatron's tracker would ask CUDA for its state, even on a machine without CUDA.
    """

    def is_initialized(self) -> bool:
        return True

    @contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield


def _waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its time counts as waiting for other ranks."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with WAIT_TIMER.measure():
            return function(*args, **kwargs)

    return wrapped


def prepare(device: torch.device) -> None:
    """Make megatron-core run on `device`. Idempotent."""
    from megatron.core.tensor_parallel import mappings, random

    random._CUDA_RNG_STATE_TRACKER = _StatelessRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    # The collectives that Megatron's embedding, its row-parallel linears without sequence parallelism and its frozen
    # linears wait for.
    for name in ("_reduce", "_gather_along_first_dim", "_reduce_scatter_along_first_dim"):
        function = getattr(mappings, name)
        if not hasattr(function, "__wrapped__"):
            setattr(mappings, name, _waiting(function))
    if device.type == "cpu":
        # Megatron asks for "the current CUDA device" when it allocates and when it builds masks, even on a CPU.
        cuda: Any = torch.cuda
        cuda.current_device = lambda: torch.device("cpu")
