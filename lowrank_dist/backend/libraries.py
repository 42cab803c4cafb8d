"""The libraries that a rank loads: imported quietly and kept from the garbage collector; locks of killed builds.

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


def quiet_libraries() -> None:
    """Silence what libraries say to their own developers, and spare a compiler that nobody uses.

    To be called before Megatron is imported.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    for name in NOISE:
        logging.getLogger(name).addFilter(_no_noise)
    # As it is imported Megatron wraps functions that we never call in torch.compile, which would load all of
    # TorchInductor: a sixth of what a rank takes to start, and 40 MiB of its memory.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


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
