"""Hardware counters of our kernels, masked, at the shape of fc2, by Nsight Compute (`ncu`).

    python benchmarks/counters.py [--device cuda] [--kernels down expand grad_a] [--shape llama-3-8b] [--out DIR]

Each kernel runs once under `ncu --clock-control none` (the GPU's clocks are left alone) in a process of its own,
benchmarks/microbench.py --once. results: counters_cuda.json under --out with every metric of the sections below; the
table shows the few that tell what limits a kernel.

Where ncu is missing, or may not read the counters, the result says so and the exit code is 0. Code 1: the kernels did
not run under ncu.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from record import machine, write_result
from rich import box
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda*/bin")
SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
)
SHOWN = (
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "L2 Hit Rate",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "Achieved Occupancy",
    "Registers Per Thread",
)
# ncu's messages where it may not read the counters, and the result for each.
REFUSALS = {
    "ERR_NVGPUCTRPERM": "no permission: this user may not read the GPU's performance counters",
    "LibraryNotLoaded": "refused: ncu's profiler does not load in this machine's runtime",
    "Failed to initialize the profiler": "refused: ncu's profiler does not start on this machine",
    "No supported GPUs": "refused: ncu knows no GPU here",
}
Metric = dict[str, str]


def find_ncu(places: Iterable[str] = PLACES) -> str | None:
    """Return the newest ncu on PATH or in CUDA's package folders, or None."""
    found = shutil.which("ncu")
    if found is not None:
        return found
    there = [path for place in places for path in sorted(Path("/").glob(f"{place.lstrip('/')}/ncu")) if path.is_file()]
    return str(there[-1]) if there else None


def command(ncu: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that profiles the part of microbench.py between cudaProfilerStart and cudaProfilerStop."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details", *sections]
    return [ncu, *options, sys.executable, str(HERE / "microbench.py"), *arguments]


def parse_csv(output: str) -> list[Metric]:
    """Return kernel, launch, section, metric, unit and value of every metric line, without the host's name."""
    lines = output.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    reader = csv.DictReader(io.StringIO("\n".join(line for line in lines[first:] if line.startswith('"'))))
    return [
        {
            "launch": row["ID"],
            "kernel": row["Kernel Name"],
            "section": row["Section Name"],
            "metric": row["Metric Name"],
            "unit": row["Metric Unit"],
            "value": row["Metric Value"],
        }
        for row in reader
        if row.get("Metric Name")
    ]


def refusal(output: str) -> str | None:
    """Return why ncu read no counters, where its reason is a known one."""
    return next((words for sign, words in REFUSALS.items() if sign in output), None)


def show(metrics: Sequence[Metric], console: Console) -> None:
    table = Table(box=box.MARKDOWN)
    for name in ("kernel", *SHOWN):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for launch in dict.fromkeys(metric["launch"] for metric in metrics):
        of_launch = [metric for metric in metrics if metric["launch"] == launch]
        values = {metric["metric"]: f"{metric['value']} {metric['unit']}".strip() for metric in of_launch}
        table.add_row(of_launch[0]["kernel"][:40], *(values.get(name, "") for name in SHOWN))
    console.print(table)


def collect(args: argparse.Namespace) -> tuple[str, list[Metric], int]:
    """Return the result as a sentence, the metrics, and the exit code."""
    ncu = find_ncu()
    if ncu is None:
        return "ncu not found: no hardware counters on this machine", [], 0
    arguments = ["--device", args.device, "--shape", args.shape, "--tokens", str(args.tokens), "--once", *args.kernels]
    done = subprocess.run(
        command(ncu, arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    metrics = parse_csv(done.stdout)
    if metrics:
        launches = len({metric["launch"] for metric in metrics})
        return f"ncu: {len(metrics)} metrics of {launches} launches", metrics, 0
    print(done.stdout)
    reason = refusal(done.stdout)
    if reason is not None:
        return f"ncu {reason}", [], 0
    return f"ncu read nothing and ended with code {done.returncode}", [], 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernels", nargs="+", default=["down", "expand", "grad_a"], metavar="NAME")
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON there")
    return parser.parse_args()


def main() -> int:
    args = parse()
    started_on = machine(args.device)
    words, metrics, code = collect(args)
    if metrics:
        show(metrics, Console(width=200))
    if args.out is not None:
        sizes = {"device": args.device, "shape": args.shape, "tokens": args.tokens, "result": words}
        write_result(f"counters_{args.device}", started_on, {**sizes, "metrics": metrics}, args.out)
    print(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
