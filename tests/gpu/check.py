"""`make gpu-check`: tests that only a GPU can pass or fail, the most valuable first (README.md beside this file).

python -m tests.gpu.check        # through tests/gpu/check.sh, which sets the environment
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

from lowrank_dist.backend.limits import cpu_bound
from tests.gpu.environment import absent
from tests.gpu.prepare import DEVICE, ROOT, environment, execute, python, runner
from tests.gpu.stages import Stage

METHODS = "tests/dist/test_methods.py"
OF_THE_PLAN = f"{METHODS}::test_added_collectives_are_those_of_the_plan[True-False]"
# Collectives need no compiled operators, so these run while the extension is built.
COLLECTIVES = ("tests/gpu/test_device.py", "-k", "test_collectives")
PRIMITIVES = ("tests/gpu/test_device.py", "-k", "not test_collectives")
# Six of these exceeded a tolerance calibrated on CPUs (docs/LOG.md, "The first GPU"): bf16 through cuBLAS.
ACCURACY = (
    *("tests/unit/test_ops_up.py", "tests/unit/test_linear_autograd.py"),
    *("-k", "test_error_at_most_twice_pytorchs"),
)


def workers() -> list[str]:
    """Return pytest's options for several workers.

    Each worker has ranks of its own, which share the GPU by time slices, so more workers are slower.
    """
    jobs = int(os.environ.get("GPU_CHECK_JOBS") or cpu_bound().count // 8)
    return ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 and not absent("xdist") else []


def tests(seconds: float, name: str, *words: str, parallel: Sequence[str] = (), if_time: bool = False) -> Stage:
    """Return a stage of tests on the device. Each test is printed as it ends, in case the time runs out."""
    options = ("-v", "-rfEs", "--tb=short", "--durations=5", "-p", "no:cacheprovider", "-m", "nightly or not nightly")
    return Stage(name, seconds, python("-m", "pytest", *options, *parallel, *words), if_time, tests=True)


def short_run(name: str, launcher: str, ranks: int, dtype: str, collective: str, *, if_time: bool = False) -> Stage:
    """Return a short training run of a tiny model, up to PEFT's logits and the merged folder's.

    gloo: on one GPU only.
    """
    options = {"launcher": launcher, "ranks": ranks, "dtype": dtype, "collective": collective, "device": DEVICE}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    out = ROOT / "build" / "gpu-check" / f"run-{launcher}-{ranks}-{dtype}"
    command = python("-m", "tests.gpu.short_run", *words, "--out", str(out))
    if collective == "gloo":
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        command = ["env", f"CUDA_VISIBLE_DEVICES={first}", *command]
    return Stage(name, 70, command, if_time, when=several_gpus if ranks > 1 and collective == "nccl" else None)


def several_gpus() -> bool:
    """Return whether there is more than one GPU; False in a rehearsal, and with a note where torch does not say."""
    if DEVICE != "cuda":
        return False
    command = python("-c", "import torch; print(torch.cuda.device_count())")
    try:
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=20)
        return int(said.stdout.strip().splitlines()[-1]) > 1  # libraries may print before the answer
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"one GPU is assumed: torch does not say how many there are: {error}", flush=True)
        return False


def stages() -> Iterator[Stage]:
    """Return the stages after the build, the least tested first: never run, failed once, passed once."""
    several = workers()
    yield tests(30, "products and masks", *PRIMITIVES)
    yield tests(30, "masks of every operator", "tests/unit/test_ops_mask.py", parallel=several)
    yield tests(40, "accuracy", *ACCURACY, parallel=several)
    yield tests(40, "collectives of the plan", OF_THE_PLAN)
    yield tests(110, "methods' twins", METHODS, "--deselect", OF_THE_PLAN, parallel=several)
    yield tests(50, "batches", "tests/dist/test_batches.py", parallel=several)
    yield tests(60, "logits against transformers", "tests/dist/test_logits.py", parallel=several)
    yield tests(75, "twins", "tests/dist/test_twins.py", parallel=several)
    yield short_run("train at TP 2 over nccl", "deepspeed", 2, "bf16", "nccl")
    nccl = "nccl" if DEVICE == "cuda" else "gloo"
    yield short_run(f"train at N = 1 over {nccl}", "deepspeed", 1, "fp32", nccl, if_time=True)
    yield short_run("train at TP 2 over gloo", "torchrun", 2, "bf16", "gloo", if_time=True)
    operators = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "unit").glob("test_ops_*.py"))]
    more = ("tests/unit/test_linear_autograd.py", "tests/unit/test_extension.py")
    yield tests(120, "operators", *operators, *more, parallel=several, if_time=True)
    yield tests(60, "linears in float64", "tests/dist/test_linears.py", parallel=several, if_time=True)
    yield tests(60, "generation", "tests/dist/test_generate_ranks.py", parallel=several, if_time=True)
    yield tests(60, "PEFT's loss curve", "tests/integration/test_peft_curve.py", parallel=several, if_time=True)


def main() -> int:
    beside = [environment(), tests(45, "collectives", *COLLECTIVES)]
    return execute(runner("gpu-check"), beside, list(stages()), without_operators=True)


if __name__ == "__main__":
    sys.exit(main())
