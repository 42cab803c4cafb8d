"""Stall and size of a checkpoint: SmolLM2-135M at tensor parallel 3, on a CPU.

    python benchmarks/checkpoint.py [--base build/quickstart/base] [--saves 20] [--interval 10]

Trains with the production loop, saves every `interval` steps, and takes on every rank the time that its training thread
spends inside the saver: the copy out, waiting for a save before it, and asking whether one has ended. Of a save that is
all of this from its start to the next one's. The stall is the longest of any rank, the median over the saves after the
first, over the median step without a save under way. Bytes are those of the files of one checkpoint over 4·3·|Θ|.

Last line: stall=… bytes_ratio=… (limits 0.05 and 1.6).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from record import machine, write_result
from spawn import start_ranks

TP = 3
STALL, RATIO = 0.05, 1.6


def job(base: Path, place: Path, saves: int, interval: int) -> list[str]:
    """Return the arguments of launch/train.py: the quickstart's run, longer, without evaluation."""
    data = base.parent / "data"
    return [
        *("configs/quickstart.yaml", f"model.path={base}", f"data.train={data / 'train.jsonl'}", "data.eval=null"),
        *(f"train.steps={(saves + 1) * interval}", "train.log_every=1000000", f"output.save_every={interval}"),
        *(f"output.dir={place / 'run'}", "output.probe=0", "output.tensorboard=false", "output.plot=false"),
        *("output.keep_last=2", "train.resume=never"),
    ]


def rank_main(rank: int, size: int, port: int, arguments: list[str], pipe: Connection) -> None:
    """Run one rank; send the seconds of every step and of every call of its saver."""
    import os
    import runpy

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    from lowrank_dist.engine.saving import CheckpointSaver
    from lowrank_dist.engine.trainer import Trainer

    events: list[tuple[str, int, float]] = []
    step_number = [0]

    def timed(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def wrapper(self: Any, *values: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(self, *values, **options)
            finally:
                events.append((name, step_number[0], time.perf_counter() - started))
                step_number[0] += name == "_step"

        setattr(owner, name, wrapper)

    for owner, name in ((Trainer, "_step"), (CheckpointSaver, "save"), (CheckpointSaver, "poll")):
        timed(owner, name)
    sys.argv = ["launch/train.py", *arguments]
    try:
        runpy.run_path("launch/train.py", run_name="__main__")
    except SystemExit as end:
        pipe.send((int(end.code or 0), events))


def stalls(events: list[tuple[str, int, float]], interval: int, saves: int) -> list[float]:
    """Return the seconds in the saver of each save, from its start to the next one's.

    The last is left out: the run waits for it.
    """
    found = [0.0] * (saves + 1)
    for name, step, seconds in events:
        # A poll before the next step and a save belong to the save that was started last.
        if name != "_step" and step >= interval:
            found[step // interval - 1] += seconds
    return found[:saves]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/quickstart/base"), help="SmolLM2 folder")
    parser.add_argument("--saves", type=int, default=20, help="measured saves")
    parser.add_argument("--interval", type=int, default=10, help="steps between saves")
    options = parser.parse_args()
    if not options.base.is_dir():
        sys.exit(f"{options.base} is missing: python -m launch.quickstart.prepare makes it")
    started_on = machine()
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        arguments = job(options.base, Path(scratch), options.saves, options.interval)
        processes, pipes = start_ranks(rank_main, TP, arguments)
        results = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
        if any(code for code, _ in results):
            sys.exit(f"the run failed: exit codes {[code for code, _ in results]}")
        last = Path(scratch) / "run" / "checkpoints" / "last"
        sizes = {path.name: path.stat().st_size for path in sorted(last.iterdir())}
        from lowrank_dist.formats.safetensors_file import read_header

        theta = sum(entry.nbytes for entry in read_header(last / "optimizer.safetensors").entries) // 12
    every = [events for _, events in results]
    step = statistics.median(seconds for name, _, seconds in every[0] if name == "_step")
    longest = [
        max(of_rank) for of_rank in zip(*(stalls(e, options.interval, options.saves) for e in every), strict=True)
    ]
    stall, ratio = statistics.median(longest) / step, sum(sizes.values()) / (12 * theta)
    figures = {
        **{"stall": stall, "stall_seconds": longest, "step_seconds": step, "saves": options.saves},
        **{"interval": options.interval, "bytes_ratio": ratio, "bytes": sizes, "theta": theta},
        "limits": {"stall": STALL, "bytes_ratio": RATIO},
    }
    print(
        f"median step {step:.3f} s; longest stall of a save: median {statistics.median(longest) * 1e3:.1f} ms, "
        f"largest {max(longest) * 1e3:.1f} ms; a checkpoint has {sum(sizes.values()) / 1e6:.1f} MB"
    )
    print(f"results: {write_result('checkpoint', started_on, figures)}")
    print(f"stall={stall:.4f} bytes_ratio={ratio:.3f}")
    if stall > STALL or ratio > RATIO:
        sys.exit(1)


if __name__ == "__main__":
    main()
