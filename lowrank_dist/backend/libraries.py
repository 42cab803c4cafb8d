"""Settings for the libraries that a rank loads (messages, caches, garbage collection), and stale build locks.

Importing this module imports none of them.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Longer than any build of an extension takes.
STALE_SECONDS = 600
# Log messages that need no action from the user: logger → first words.
NOISE = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # a CUDA build of torch on a machine without a GPU
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",  # our form of spec, which 0.16 accepts too
}
# oneDNN and torch's layer above it (ideep) each cache the compiled code of the last 1024 GEMM shapes on the CPU, about
# 0.5 MiB per shape. Where no two batches have the same shape, these caches outgrew the rank's model. Both libraries
# read their bound at their first computation. A bound as large as the number of shapes in a layer costs no time; a new
# shape costs at most 1 ms (docs/LOG.md).
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
CACHED_SHAPES = "16"
# The folder of TorchInductor's cache.
_COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# An existing folder in which nobody, root included, can create a file.
_NOWHERE = "/proc"


def quiet_libraries() -> None:
    """Silence messages meant for library developers, skip loading an unused compiler, and bound the caches.

    Also let the libraries be imported where no temporary folder can be written (`allow_no_temporary_folder`).

    Call it before Megatron is imported and before anything is computed.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    for name in NOISE:
        logging.getLogger(name).addFilter(_no_noise)
    # At import Megatron wraps functions that we never call in torch.compile, which would load all of TorchInductor: a
    # sixth of a rank's start time and 40 MiB of its memory.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in CACHES:
        os.environ.setdefault(name, CACHED_SHAPES)
    allow_no_temporary_folder()


def allow_no_temporary_folder() -> None:
    """Let libraries be imported where no temporary folder can be written.

    At import some ask for its name (portalocker, for BLEU), and torch._dynamo, which Megatron and transformers load,
    creates TorchInductor's cache folder in it (torch/_inductor/runtime/cache_dir_utils.py). Neither is used afterwards:
    nothing is compiled or locked there.
    """
    if temporary_folder() is None:
        tempfile.tempdir = _NOWHERE
        os.environ.setdefault(_COMPILER_CACHE, _NOWHERE)
    if (chosen := os.environ.get(_COMPILER_CACHE)) is not None:
        try:
            os.makedirs(chosen, exist_ok=True)
        except OSError:
            os.environ[_COMPILER_CACHE] = _NOWHERE


def temporary_folder() -> str | None:
    """Return the folder for temporary files; None where no folder can be written.

    Python takes the first that it can write of TMPDIR, TEMP, TMP, /tmp, /var/tmp, /usr/tmp and the working folder.
    """
    try:
        found = tempfile.gettempdir()
    except FileNotFoundError:
        return None
    return None if found == _NOWHERE else found


def _no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE[record.name])


@contextmanager
def exempt_from_gc() -> Iterator[None]:
    """Exclude the objects created in the block from garbage collection, now and later. For imports.

    Megatron, DeepSpeed and transformers create half a million objects. The collector would scan them again and again
    while they load and during training.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def silence_megatron() -> Iterator[None]:
    """Import Megatron and transformers in the block without their messages, exempt from garbage collection."""
    quiet_libraries()
    with exempt_from_gc():
        yield


def stale_build_locks(now: float | None = None) -> list[Path]:
    """Return the locks of torch's extension builds that are older than STALE_SECONDS, hence left behind, sorted.

    torch.utils.cpp_extension creates a file `lock` in the build folder of an extension and removes it afterwards. A
    build that was killed leaves it, and every later build waits for it forever without a message
    (torch/utils/file_baton.py). now: seconds since the epoch, by default the present.
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
    """Return the folders where this Python's torch builds extensions: TORCH_EXTENSIONS_DIR, or those of its cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen is not None:
        return [Path(chosen)]
    # As torch finds it: a user without a home folder (a container's unknown user id) has "~" in the working folder.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    version = sys.version_info
    return list((cache / "torch_extensions").glob(f"py{version.major}{version.minor}{sys.abiflags}_*"))
