"""Every kernel of one layer's linears, forward and backward, by torch.profiler: frozen, ours, and torch's and PEFT's.

    python benchmarks/kernel_table.py [--device cuda] [--shape llama-3-8b] [--tokens 8192] [--out DIR]

The layer and its sides are those of benchmarks/overhead.py: the seven projections of a Llama layer in bf16 at adapter
rank 16, whole (`shard 1`) and as one rank's share of 8 with sequence parallelism, at dropout 0 and 0.1. `eager` is
plain torch with fused weights and hand-written autograd, which there is whole only; `peft_same_dtype` is PEFT with
adapters in the base's dtype. Of each side: GPU milliseconds and milliseconds to issue the work without the profiler
(overhead.py's clock, medians of --rounds), then one step under it: launches and microseconds by group and by kernel
name. results: kernel_table_cuda.json under --out, after every cell.

On a CPU operators stand for kernels, and both milliseconds are the same: a rehearsal.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from overhead import clock
from record import machine, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from sides import DTYPES, SHAPES, WORLD, Layer, Side, join_fake_world
from timeline import by_name, record, start_profiler

from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.backend.select import select_backend
from lowrank_dist.parallel.topology import Topology

RANK, DROPOUTS, SHARDS = 16, (0.0, 0.1), (1, WORLD)
SIDES = ("frozen", "ours", "ours_lanes", "eager", "peft_same_dtype")
WARM_UP = 2


def measure(side: Side, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time without the profiler, then record the launches of one step."""
    run = clock(device)
    for _ in range(WARM_UP):
        run(side)
    times = [run(side) for _ in range(rounds)]
    trace = record(side.step, device, shapes=True)
    return {
        "side": side.name,
        "device_ms": 1e3 * statistics.median(seconds for seconds, _ in times),
        "issue_ms": 1e3 * statistics.median(launched for _, launched in times),
        "traced": trace.figures(),
        "kernels": by_name(trace.kernels),
    }


def cell(layer: Layer, dropout: float, rounds: int) -> list[dict[str, Any]]:
    """Measure every side of one shard and dropout."""
    sides = [side for side in layer.sides(RANK, dropout) if side.name in SIDES]
    where = {"shard": layer.n, "dropout": dropout}
    return [where | measure(side, rounds, layer.device) for side in sides]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print one row a side, with the microseconds of each group."""
    groups = list(dict.fromkeys(name for row in rows for name in row["traced"]["groups"]))
    table = Table(box=box.MARKDOWN, title="launches / µs of a step")
    for name in ("side", "GPU ms", "issue ms", "launches", *groups):
        table.add_column(name, justify="left" if name == "side" else "right")
    for row in rows:
        found = row["traced"]["groups"]
        cells = (f"{found[name]['launches']} / {found[name]['us']:.0f}" if name in found else "" for name in groups)
        times = (f"{row[key]:.2f}" for key in ("device_ms", "issue_ms"))
        table.add_row(row["side"], *times, str(row["traced"]["kernels"]), *cells)
    console.print(f"\nshard {rows[0]['shard']}, dropout {rows[0]['dropout']:g}")
    console.print(table)


def show_names(row: dict[str, Any], console: Console, most: int = 25) -> None:
    """Print one side's kernels by name, the most expensive first, up to a fixed number."""
    table = Table("µs", "launches", "group", "kernel", box=box.MARKDOWN)
    for kernel in row["kernels"][:most]:
        table.add_row(f"{kernel['us']:.1f}", str(kernel["launches"]), kernel["group"], kernel["name"][:90])
    console.print(f"\n{row['side']}, shard {row['shard']}, dropout {row['dropout']:g}")
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON there")
    args = parser.parse_args()
    if args.tokens % WORLD or args.rounds < 1:
        parser.error(f"--tokens must be a multiple of {WORLD}, --rounds at least 1")
    return args


def main() -> None:
    args, console = parse(), Console(width=200)
    started_on = machine(args.device)
    quiet_libraries()
    device = select_backend(args.device).device
    join_fake_world()
    start_profiler(device)
    rows: list[dict[str, Any]] = []
    cells = list(product(SHARDS, DROPOUTS))
    for shard, dropout in cells:
        layer = Layer(args.shape, args.tokens, DTYPES["bf16"], device, Topology.build(shard, None, shard > 1, 60))
        found = cell(layer, dropout, args.rounds)
        rows += found
        show(found, console)
        if args.out is not None:  # after every cell: a time limit may cut the others off
            sizes = {"device": args.device, "shape": args.shape, "tokens": args.tokens, "r": RANK}
            last = (shard, dropout) == cells[-1]
            figures = {**sizes, "sides": rows}
            write_result(f"kernel_table_{args.device}", started_on, figures, args.out, complete=last)
        del layer, found
        gc.collect()
    for row in rows:
        if row["side"] == "ours" and row["dropout"] == DROPOUTS[-1]:
            show_names(row, console)
    ours, frozen = (next(r for r in rows if (r["side"], r["dropout"]) == (side, 0.1)) for side in ("ours", "frozen"))
    launches = f"{frozen['traced']['kernels']} -> {ours['traced']['kernels']}"
    print(f"shard 1, dropout 0.1: {ours['device_ms'] / frozen['device_ms'] - 1:+.1%} over frozen, launches {launches}")


if __name__ == "__main__":
    main()
