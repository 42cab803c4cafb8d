"""`make gpu-bench`: the time of each part of one layer and of a training step on this GPU (README.md beside this file).

python -m tests.gpu.bench        # through tests/gpu/bench.sh, which sets the environment
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.gpu.prepare import DEVICE, environment, execute, python, runner
from tests.gpu.stages import Runner, Stage

# On a CPU every stage runs as a rehearsal, at sizes whose times mean nothing.
TINY_LAYER = () if DEVICE == "cuda" else ("--shape", "tiny", "--tokens", "128")
TINY_MODEL = () if DEVICE == "cuda" else ("--layers", "2", "--hidden", "256", "--length", "64")
SETTINGS = ("bf16:16:0", "bf16:16:0.1")


def benchmark(run: Runner, seconds: float, name: str, script: str, *words: str, writes: str = "") -> Stage:
    """Return a stage that is one benchmark, whose JSON is written beside the table."""
    where = ("--device", DEVICE, "--out", str(run.out))
    command = python(f"benchmarks/{script}.py", *where, *words)
    return Stage(name, seconds, command, writes=f"{writes or f'{script}_{DEVICE}'}.json")


def stages(run: Runner) -> Iterator[Stage]:
    """Return the stages, the most valuable first: a time limit cuts off the last."""
    yield benchmark(run, 45, "kernels of a layer", "kernel_table", *TINY_LAYER)
    model = ("--shapes", "llama-3-8b", "tinyllama", "--methods", "lora", "--steps", "3")
    yield benchmark(run, 100, "training steps", "training", *model, *TINY_MODEL)
    yield benchmark(run, 45, "each product by itself", "microbench", *TINY_LAYER)
    layer = (*(TINY_LAYER or ("--shape", "llama-3-8b")), "--shard", "1", "8", "--rounds", "10")
    writes = "overhead_cuda" if DEVICE == "cuda" else "overhead"
    yield benchmark(run, 60, "overhead of a layer", "overhead", *layer, "--settings", *SETTINGS, writes=writes)
    yield benchmark(run, 40, "hardware counters", "counters", *TINY_LAYER)


def main() -> int:
    run = runner("gpu-bench")
    return execute(run, [environment()], list(stages(run)), without_operators=False)


if __name__ == "__main__":
    sys.exit(main())
