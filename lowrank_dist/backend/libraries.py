"""The libraries that a rank loads: imported quietly, bounded, kept from the garbage collector; locks of killed builds.

Importing this module imports none of them.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# No build of an extension takes so long.
STALE_SECONDS = 600
# Log messages that ask nothing of whoever trains, by logger and first words.
NOISE = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # a CUDA build of torch on a machine without a GPU
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",  # the form of spec that 0.16 knows too
}
# oneDNN and torch's layer above it (ideep) each keep what they compiled for the last 1024 shapes of a GEMM on the CPU,
# some 0.5 MiB each: where no two batches have the same shape, a rank grew by more than its model. Both read their bound
# when they first compute. As many as a layer has cost no time, and a new shape at most 1 ms (docs/LOG.md).
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
CACHED_SHAPES = "16"


def quiet_libraries() -> None:
    """Silence what libraries say to their own developers, spare a compiler that nobody uses, and bound their caches.

    To be called before Megatron is imported, and before anything is computed.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    for name in NOISE:
        logging.getLogger(name).addFilter(_no_noise)
    # As it is imported Megatron wraps functions that we never call in torch.compile, which would load all of
    # TorchInductor: a sixth of what a rank takes to start, and 40 MiB of its memory.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in CACHES:
        os.environ.setdefault(name, CACHED_SHAPES)


def _no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE[record.name])


@contextmanager
def lasting() -> Iterator[None]:
    """Keep what is made in the block from this collection of garbage and any later one: for imports.

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


def stale_build_locks(now: float | None = None) -> list[Path]:
    """Return the locks of torch's extension builds, sorted, that nobody holds any more: older than STALE_SECONDS.

    torch.utils.cpp_extension makes a file `lock` in the build folder of an extension and removes it afterwards; a build
    that was killed leaves it, and every later one waits for it for ever, without a word (torch/utils/file_baton.py).
    now: seconds since the epoch, the present if not given.
    """
    now = time.time() if now is None else now
    stale = []
    for root in _roots():
        for lock in root.glob("*/lock"):
            try:
                age = now - lock.stat().st_mtime
            except OSError:  # its build ended meanwhile
                continue
            if age > STALE_SECONDS:
                stale.append(lock)
    return sorted(stale)


def _roots() -> list[Path]:
    """Return where this Python's torch builds extensions: TORCH_EXTENSIONS_DIR, or the folders of its cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen is not None:
        return [Path(chosen)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = sys.version_info
    return list((cache / "torch_extensions").glob(f"py{version.major}{version.minor}{sys.abiflags}_*"))
