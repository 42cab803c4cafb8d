"""The first steps of `make gpu-check` and `make gpu-bench`: missing packages and the compiled operators."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.environment import NEEDED, absent
from tests.gpu.stages import Runner, Stage, select

ROOT = Path(__file__).parents[2]
USUAL_SECONDS = 330
SITE = ROOT / "build" / "gpu-site"
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
# Both libraries: without the one for this device no later result would mean anything.
_BUILT = """
import sys
from lowrank_dist.ops.extension import describe, require_compiled
require_compiled(sys.argv[1])
print(describe(sys.argv[1]))
"""


def runner(name: str) -> Runner:
    """Return the runner of `name`: results in $OUT, or in build/NAME where that is not set."""
    logs = ROOT / "build" / name
    seconds = float(os.environ.get("GPU_CHECK_SECONDS", USUAL_SECONDS))
    return Runner(f"make {name} on {DEVICE}", name, Path(os.environ.get("OUT") or logs), logs, seconds, USUAL_SECONDS)


def python(*words: str) -> list[str]:
    """Return a command of this Python interpreter."""
    return [sys.executable, *words]


def execute(run: Runner, beside: Sequence[Stage], after: Sequence[Stage], *, without_operators: bool) -> int:
    """Run a whole check or benchmark and return its exit code; GPU_CHECK_ONLY names stages to run alone.

    beside: the stages that need no compiled operators and run during the build. without_operators: continue even if the
    build failed.
    """
    only = {name.strip() for name in os.environ.get("GPU_CHECK_ONLY", "").split(",") if name.strip()}
    chosen = select([*beside, *after], only)
    early, late = ([stage for stage in stages if stage in chosen] for stages in (beside, after))
    with run:
        run.forget(chosen)
        install_wheels(run)
        if not late:
            for stage in early:
                run.run(stage)
        elif build(run, early) or without_operators:
            for stage in late:
                run.run(stage)
    return run.close()


def install_wheels(run: Runner) -> None:
    """Install the wheels of .whl/ into build/gpu-site where this interpreter lacks a needed package."""
    wheels = sorted(str(wheel) for wheel in (ROOT / ".whl").glob("*.whl"))
    if not wheels or not any(absent(module) for module in NEEDED.values()):
        return
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(SITE)]
    run.run(Stage("carried wheels", 40, python("-m", "pip", "install", *options, *wheels)))
    importlib.invalidate_caches()


def environment() -> Stage:
    """Return the stage that reports the machine and its missing packages."""
    return Stage("environment", 30, python("-m", "tests.gpu.environment", "--device", DEVICE))


def build(run: Runner, beside: Sequence[Stage] = ()) -> bool:
    """Build the extension, and meanwhile run the stages that do not need it.

    Returns whether the operators are there.
    """
    command = ["sh", "-c", '"$0" setup.py build_ext --inplace && "$0" -c "$1" "$2"', sys.executable, _BUILT, DEVICE]
    # The build took 31 s on an H200's 16 cores. A shorter limit would gain nothing: all later stages need it.
    building = run.start(Stage("build the extension", 90, command))
    for stage in beside:
        run.run(stage)
    return run.finish(building)
