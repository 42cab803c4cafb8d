"""Python's garbage collector, kept from what stays for as long as the process lives."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """For imports: what is made in here is not collected, nor looked at by any later collection.

    Megatron, DeepSpeed and transformers make half a million objects, through which the collector would go again and
    again while they load, and in the steps of a training.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
