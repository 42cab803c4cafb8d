"""What builds the operators, and what starts a run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lowrank_dist.doctor.rows import Row, one_line

# What each does for a run.
LAUNCHERS = {
    "deepspeed": "starts the ranks of one node or several",
    "torchrun": "starts the ranks of a node in place of deepspeed",
    "srun": "starts ranks under Slurm",
    "pdsh": "carries deepspeed --hostfile to other nodes",
}
NINJA = "`pip install ninja`"


def build_tools(which: Callable[[str], str | None] = shutil.which) -> list[Row]:
    """What builds the operators; where these are built already none of it is needed."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (which(f"{home}/bin/nvcc") if home else None) or which("nvcc") or which("/usr/local/cuda/bin/nvcc")
    return [
        _program("C++ compiler", which(compiler), f"{compiler} not found: it builds the CPU operators; install g++"),
        _program("nvcc", nvcc, "not on PATH or in CUDA_HOME: it builds the CUDA operators; install the CUDA toolkit"),
        ninja(which("ninja")),
    ]


def ninja(path: str | None, beside: Path = Path(sys.executable).parent) -> Row:
    """The ninja on PATH, which torch's builds take, and whether the interpreter has another one beside it."""
    own = shutil.which("ninja", path=str(beside))
    remedy = NINJA if own is None else f"{own} is there: put {beside} on PATH of every node"
    absent = f"not on PATH: builds go without it, more slowly, and those of DeepSpeed not at all; {remedy}"
    row = _program("ninja", path, absent)
    if path is None or row.state != "ok":
        return row
    version = row.detail.removeprefix(f"{path}: ")
    if own is not None and (other := _program("ninja", own, "")).state == "ok":
        other_version = other.detail.removeprefix(f"{own}: ")
        if other_version != version:
            detail = (
                f"PATH has {path}, {version}, and the interpreter {own}, {other_version}: a build by the one is built "
                f"again by the other, every time; put {beside} first on PATH of every node"
            )
            return Row("ninja", "warning", detail, version, "warning")
    return replace(row, alike=version, if_unlike="warning")


def build_locks() -> list[Row]:
    """Locks that killed builds of torch extensions left behind."""
    from lowrank_dist.backend.libraries import STALE_SECONDS, stale_build_locks

    stale = stale_build_locks()
    if not stale:
        return [Row("build locks", "ok", "none older than the builds that may hold them")]
    rows = "; ".join(f"`rm {shlex.quote(str(path))}`" for path in stale)
    detail = (
        f"held for more than {STALE_SECONDS // 60} minutes: whoever builds the same extension waits for ever; where no "
        f"build runs: {rows}"
    )
    return [Row("build locks", "warning", detail)]


def launchers(which: Callable[[str], str | None] | None = None) -> list[Row]:
    """What can start a run."""
    found = {name: (which or _which)(name) for name in LAUNCHERS}
    return [
        Row(
            f"launcher {name}",
            "ok" if path else "off",
            path or f"not found: it {LAUNCHERS[name]}; install it to use it",
        )
        for name, path in found.items()
    ]


def _program(what: str, path: str | None, absent: str) -> Row:
    if path is None:
        return Row(what, "off", absent)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Row(what, "off", f"{path} does not run: {one_line(str(error))}; install it again")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # nvcc says who made it first, and in the fourth line of what release it is.
    said = next((line for line in lines if "release" in line), lines[0] if lines else "says nothing")
    return Row(what, "ok", f"{path}: {said.strip()}")


def _which(program: str) -> str | None:
    """Also beside the interpreter, where a virtual environment that is not activated has its programs."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
