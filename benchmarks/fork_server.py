"""Programs of one tree, forked from a process that has imported what a rank imports: 0.1 s a start instead of 4.

    PYTHONPATH=TREE python -P benchmarks/fork_server.py

The first output line is the folder of the package that was imported. After that, each input line is a job and each
output line its answer, in JSON. A job is {"folder", "seconds", "programs"}: its programs run at the same time in
`folder`, and are killed after `seconds`. A program is {"words", "environment", "output", "masks"}: a script (or -m and
a module) with its arguments, variables on top of the server's own, the path to which ".out" and ".err" are added, and
the file for the dropout masks that the program draws, or null. The answer is {"codes": [...]}, negative where a signal
ended a program.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import random
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

PACKAGE = "lowrank_dist"
# Our modules import these late, and they are slow: otherwise every program would load its own.
LATE = ("deepspeed", "megatron.core", "transformers.models.auto.modeling_auto", "safetensors.torch")
# Recorded features of each mask: more than a block of eight draws, fewer than any linear has.
FEATURES = 32
_PR_SET_PDEATHSIG = 1


class Program(TypedDict):
    """One process of a job, as the module docstring describes."""

    words: list[str]
    environment: dict[str, str]
    output: str
    masks: str | None


def preload() -> Path:
    """Import every module of the tree's package; return the folder of the package."""
    package = importlib.import_module(PACKAGE)
    for name in LATE:
        importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        # The extension is loaded by its caller, and a __main__ would run.
        if module.name.rpartition(".")[2] not in ("_C", "__main__"):
            importlib.import_module(module.name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    assert package.__file__ is not None
    return Path(package.__file__).parent


def watch_masks(file: str) -> None:
    """Write to `file` a line for each distinct mask that this process draws: its counters, and a digest of its bits."""
    try:
        mask_class = importlib.import_module(f"{PACKAGE}.ops.mask").Mask
    except (ImportError, AttributeError) as error:
        Path(file).write_text(f"not watched: {error}\n")
        return
    construct = mask_class.__init__
    seen: set[str] = set()
    out = open(file, "w", buffering=1)  # open as long as the process lives, which may end without notice

    @functools.wraps(construct)
    def watched(mask: Any, *values: Any, **named: Any) -> None:
        construct(mask, *values, **named)
        bits = hashlib.sha256(mask.keep(FEATURES).numpy().tobytes()).hexdigest()
        seed, step = mask.key.tolist()
        rows = hashlib.sha256(mask.rows.numpy().tobytes()).hexdigest()
        line = (
            f"seed {seed} step {step} stream {mask.stream} threshold {mask.threshold} feature {mask.feature_offset} "
            f"rows {mask.rows.numel()} {rows[:16]} bits {bits}"
        )
        if line not in seen:
            seen.add(line)
            out.write(line + "\n")

    mask_class.__init__ = watched


def seed_globals() -> None:
    """Seed the generators that a run does not seed itself with one state: a checkpoint saves their states."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def run(program: Program, folder: str) -> int:
    """Run a forked program from start to exit; return its exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for descriptor, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, program["output"] + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, program["output"] + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(name, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(program["environment"])
    os.chdir(folder)
    seed_globals()
    try:
        if program["masks"] is not None:
            watch_masks(program["masks"])
        words = program["words"]
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(program: Program, folder: str) -> int:
    """Start a program; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run(program, folder)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(children: Sequence[int], seconds: float) -> list[int]:
    """Return the exit codes of the children; those that still run after `seconds` are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)
    return [codes[child] for child in children]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries during import is no answer
    print(json.dumps(str(preload())), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        children = [fork(program, job["folder"]) for program in job["programs"]]
        print(json.dumps({"codes": wait(children, job["seconds"])}), file=answers)


if __name__ == "__main__":
    main()
