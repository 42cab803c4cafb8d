"""Which implementation an operator runs: the compiled one of its device, or the plain PyTorch that defines it."""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from lowrank_dist.ops.extension import why_not_on

_plain = False


def use_plain(plain: bool) -> None:
    """Run every operator as plain PyTorch from now on, or the compiled ones again (engine.kernels)."""
    global _plain
    _plain = plain


def compiled(tensor: Tensor) -> bool:
    """Whether the compiled operators take this tensor. A device that they are missing on is named once in the log."""
    return not _plain and _available(tensor.device.type)


@cache
def _available(device: str) -> bool:
    if device not in ("cpu", "cuda"):
        return False
    reason = why_not_on(device)
    if reason is not None:
        logging.getLogger(__name__).warning("plain PyTorch runs in place of the compiled operators: %s", reason)
    return reason is None
