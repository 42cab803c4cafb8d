"""Locks of torch's extension builds that nobody holds any more.

torch.utils.cpp_extension makes a file `lock` in the build folder of an extension and removes it afterwards; a build
that was killed leaves it, and every later one waits for it for ever, without a word (torch/utils/file_baton.py).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STALE_SECONDS = 600


def stale_build_locks(now: float | None = None) -> list[Path]:
    """The lock files, sorted, that are older than STALE_SECONDS, which no build of an extension takes.

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
    """Where this Python's torch builds extensions, a folder each: TORCH_EXTENSIONS_DIR, or its cache (one a CUDA)."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen is not None:
        return [Path(chosen)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = sys.version_info
    return list((cache / "torch_extensions").glob(f"py{version.major}{version.minor}{sys.abiflags}_*"))
