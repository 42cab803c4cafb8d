"""Time of forward + backward of one layer's adapted linears over that of the frozen ones' forward + dX.

    python benchmarks/overhead.py [--device cpu] [--shape tinyllama] [--rounds 40] [--settings bf16:16:0.1 ...]
    python benchmarks/overhead.py --model h200        # no GPU: a roofline, marked as modelled (benchmarks/roofline.py)

Only the linears run: qkv, proj, fc1 (gate and up) and fc2 of a Llama layer on fixed inputs and fixed output gradients;
no attention, norm or activation. On a CPU TinyLlama's (H 2048, ffn 5632, 32 heads, 4 KV heads) at T = 1024; on CUDA
Llama-3-8B's and 70B's at T = 8192, whole (`--shard 1`) and as one rank's share of 8 with sequence parallelism
(`--shard 8`), where the real parallel linears run on a process group that copies in place of communicating.

Sides, all in one process: `ours`; `ours_lanes` (shard 8: parallel/frozen.py); `peft`, its layers on nn.Linear q, k, v,
o, gate, up, down, with fp32 adapters under a bf16 base as users get them by default; `peft_same_dtype`, adapters in the
base's dtype; on CUDA `eager`, plain torch with fused weights and hand-written autograd. Shard 8 gives PEFT the rank's
weights and all tokens, without collectives: that is what it would do there if it could.

Each side is measured against its own frozen twin: ours and eager against the fused weights through ops/linear.py
(oneDNN for fp32 on a CPU), PEFT's against the bare nn.Linear (torch's choice, MKL). So a faster GEMM hides nothing;
ours over PEFT's twin is reported beside it. A round is one step of every side, in rotating order and every other time
backwards. A figure is the median over rounds of (side − twin), over the twin's median, with a bootstrap 95 % interval
of that median difference. Gradients are dropped outside the clock. On CUDA the clock is the GPU's, events around a step
that was launched whole behind a kernel that waits; the seconds that launching took are reported too.

Before timing, ours and PEFT must agree at dropout 0 (B is not zero): outputs, dX, every factor gradient that one rank
computes whole. Counted besides: the bytes that forward leaves for backward, which must be the distinct inputs + U.
The last line is `overhead_ours=… overhead_peft=…` for bf16, r = 16, dropout 0.1 (on CUDA of Llama-3-8B whole).
"""

import argparse
import gc
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import roofline
import torch
from checks import count_saved, require_same
from record import machine, write_result
from rich.console import Console
from rich.table import Table
from sides import DTYPES, SHAPES, WORLD, Layer, Side, join_fake_world

from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.backend.select import select_backend
from lowrank_dist.parallel.topology import Topology

RANKS, DROPOUTS = (8, 16, 64), (0.0, 0.1)
HEADLINE = ("bf16", 16, 0.1)
DEFAULTS = {
    "cpu": {"shape": ["tinyllama"], "shard": [1], "tokens": 1024, "dtypes": ["fp32", "bf16"]},
    "cuda": {"shape": ["llama-3-8b", "llama-3-70b"], "shard": [1, 8], "tokens": 8192, "dtypes": ["bf16"]},
}
OF_PEFT, SAVED_OF_PEFT = 0.6, 0.4
CUDA_LIMITS = {(1, 0.0): 0.06, (1, 0.1): 0.08, (8, 0.0): 0.10, (8, 0.1): 0.10}
PEERS = ("unsloth", "liger_kernel", "lorafusion")
WARM_UP, RESAMPLES = 2, 10_000
# About 10 ms at 2 GHz; a step that takes longer to launch than this is reported as such.
WAIT_CYCLES, WAIT_SECONDS = 20_000_000, 0.010

Row = dict[str, Any]


def paired(side: Sequence[float], twin: Sequence[float]) -> dict[str, float]:
    """Return the median of (side − twin) over the twin's median, and its bootstrap 95 % interval over the pairs."""
    differences, base = np.asarray(side) - np.asarray(twin), statistics.median(twin)
    drawn = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(np.median(differences[drawn], axis=1), (2.5, 97.5))
    return {"median": float(np.median(differences)) / base, "low": float(low) / base, "high": float(high) / base}


def order(count: int, number: int) -> list[int]:
    """Return the order of the sides in round `number`: rotated by one each round and backwards every other one."""
    rotated = [(number + i) % count for i in range(count)]
    return rotated[::-1] if number % 2 else rotated


def clock(device: torch.device) -> Callable[[Side], tuple[float, float]]:
    """Return a function that runs a step and returns (seconds on the device, seconds until all was launched)."""

    def on_cpu(side: Side) -> tuple[float, float]:
        started = time.perf_counter()
        gradients = side.step()
        seconds = time.perf_counter() - started
        del gradients
        return seconds, seconds

    def on_cuda(side: Side) -> tuple[float, float]:
        # The GPU waits until the whole step is queued, so that its clock sees no gaps between kernels.
        torch.cuda._sleep(WAIT_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        started = time.perf_counter()
        gradients = side.step()
        launched = time.perf_counter() - started
        end.record()
        end.synchronize()
        del gradients
        return begin.elapsed_time(end) / 1e3, launched

    return on_cuda if device.type == "cuda" else on_cpu


def measure(
    sides: Sequence[Side], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of every side in every round, and the median seconds of launching."""
    run = clock(device)
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    launched: dict[str, list[float]] = {side.name: [] for side in sides}
    gc.collect()
    gc.disable()
    for number in range(-WARM_UP, rounds):
        for index in order(len(sides), number):
            spent, queued = run(sides[index])
            if number >= 0:
                seconds[sides[index].name].append(spent)
                launched[sides[index].name].append(queued)
    gc.enable()
    return seconds, {name: statistics.median(values) for name, values in launched.items()}


def cell(layer: Layer, setting: tuple[str, int, float], args: argparse.Namespace, copies: bool) -> Row:
    """Check, count and measure one setting."""
    dtype, r, p = setting
    sides = layer.sides(r, p)
    agreement = require_same(layer, sides, dtype, copies)
    saved = count_saved(layer, sides, r)
    seconds, launched = measure(sides, args.rounds, layer.device)
    same = saved.get("peft_same_dtype", saved["peft"])
    row: Row = {
        "dtype": dtype,
        "r": r,
        "dropout": p,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "overhead": {s.name: paired(seconds[s.name], seconds[s.twin]) for s in sides if s.parameters},
        "ours_over_frozen_peft": paired(seconds["ours"], seconds["frozen_peft"]),
        "difference_from_peft": agreement,
        "saved_bytes_per_token": saved,
        "saved_over_peft_same_dtype": saved["ours"] / same,
    }
    if layer.device.type == "cuda":
        row["launch_seconds"] = launched
        row["launches_hidden"] = max(launched.values()) < WAIT_SECONDS
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def run(args: argparse.Namespace, device: torch.device, copies: bool) -> Iterator[Row]:
    """Yield every setting of every shape and shard as it is measured, one layer in memory at a time."""
    for shape, shard in product(args.shape, args.shard):
        topology = Topology.build(shard, None, shard > 1, timeout_seconds=60)
        for dtype in dict.fromkeys(dtype for dtype, _, _ in args.settings):
            layer = Layer(shape, args.tokens, DTYPES[dtype], device, topology)
            for setting in (setting for setting in args.settings if setting[0] == dtype):
                where = {"shape": shape, "shard": shard, "tokens": args.tokens}
                yield {**where, **cell(layer, setting, args, copies)}
            del layer
            gc.collect()


def describe(row: Row) -> str:
    figures = ", ".join(f"{name} {figure['median']:.1%}" for name, figure in row["overhead"].items())
    gaps = "" if row.get("launches_hidden", True) else "; launching took longer than the wait, gaps are counted"
    return f"{label(row)}: {figures}{gaps}"


def label(row: Row) -> str:
    return f"{row['shape']} / {row['shard']}, {row['dtype']}, r {row['r']}, dropout {row['dropout']:g}"


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table("layer / shard, setting", "side", "frozen twin, ms", "ms", "overhead", "95 %", "saved, B/token")
    for row in rows:
        for name, figure in row["overhead"].items():
            twin = row["seconds"]["frozen_peft" if name.startswith("peft") else "frozen"]
            times = (f"{1e3 * seconds:.2f}" for seconds in (twin, row["seconds"][name]))
            interval = f"{figure['low']:.1%} to {figure['high']:.1%}"
            saved = f"{row['saved_bytes_per_token'][name]:,.0f}"
            table.add_row(label(row), name, *times, f"{figure['median']:.1%}", interval, saved)
        figure = row["ours_over_frozen_peft"]
        interval = f"{figure['low']:.1%} to {figure['high']:.1%}"
        twin, ours = (f"{1e3 * row['seconds'][name]:.2f}" for name in ("frozen_peft", "ours"))
        table.add_row(
            "", "ours over PEFT's twin", twin, ours, f"{figure['median']:.1%}", interval, "", end_section=True
        )
    console.print(table)


def verdicts(rows: Sequence[Row], device: str) -> list[dict[str, Any]]:
    """Return the limits for the figures at r = 16, and whether they hold."""
    found = []

    def add(what: str, row: Row, value: float, limit: float) -> None:
        found.append({"limit": limit, "what": what, "setting": label(row), "value": value, "holds": value <= limit})

    for row in rows:
        ours, peft = row["overhead"]["ours"], row["overhead"]["peft"]
        if row["shard"] == 1 and row["dropout"] == HEADLINE[2]:
            add("saved bytes, ours/PEFT of the same dtype", row, row["saved_over_peft_same_dtype"], SAVED_OF_PEFT)
        if row["r"] != HEADLINE[1]:
            continue
        if device == "cpu" and row["dropout"] == HEADLINE[2]:
            add("upper/peft", row, ours["high"] / peft["median"], OF_PEFT)
        if device == "cuda" and (row["shard"], row["dropout"]) in CUDA_LIMITS:
            add("overhead", row, ours["median"], CUDA_LIMITS[row["shard"], row["dropout"]])
    return found


def parse_setting(text: str) -> tuple[str, int, float]:
    dtype, r, p = text.split(":")
    if dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"{dtype} is none of {', '.join(DTYPES)}")
    return dtype, int(r), float(p)


def parse() -> tuple[argparse.Namespace, bool]:
    """Return the arguments with the device's defaults filled in, and whether they are all defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument("--shard", nargs="+", type=int, choices=(1, WORLD))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--settings", nargs="+", type=parse_setting, metavar="DTYPE:r:DROPOUT")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON there, even of a partial run")
    parser.add_argument("--model", choices=roofline.MACHINES, help="model this GPU by its roofline; measure nothing")
    args = parser.parse_args()
    defaults = DEFAULTS[args.device]
    whole = {**defaults, "settings": list(product(defaults["dtypes"], RANKS, DROPOUTS))}
    changed = [name for name in ("shape", "shard", "tokens", "settings") if getattr(args, name) is not None]
    for name in {"shape", "shard", "tokens", "settings"} - set(changed):
        setattr(args, name, whole[name])
    if args.tokens % WORLD:
        parser.error(f"--tokens must be a multiple of {WORLD}")
    return args, not changed and args.rounds >= 40


def leave(
    name: str,
    started_on: dict[str, object],
    figures: dict[str, object],
    whole: bool,
    out: Path | None,
    *,
    complete: bool = True,
) -> None:
    """Write the JSON into results/ where it is the whole table, and into --out."""
    if whole:
        write_result(name, started_on, figures)
    if out is not None:
        write_result(name, started_on, figures, out, complete=complete)


def prepare(args: argparse.Namespace, console: Console) -> torch.device:
    """Set threads and the device; print the missing peers."""
    torch.set_num_threads(args.threads)
    quiet_libraries()
    device = select_backend(args.device).device
    there = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    absent = [name for name in PEERS if name not in there]
    console.print(f"peers absent: {', '.join(absent) or 'none'}; there, but not measured: {', '.join(there) or 'none'}")
    return device


def main() -> None:
    args, whole = parse()
    console, started_on = Console(width=150), machine(args.device)
    if args.model:
        leave(f"overhead_modelled_{args.model}", started_on, roofline.report(args.model, console), True, args.out)
        return
    device = prepare(args, console)
    name = "overhead_cuda" if device.type == "cuda" else "overhead"
    copying = join_fake_world()
    facts = {"device": device.type, "threads": args.threads, "rounds": args.rounds, "fake_group": copying}
    rows: list[Row] = []
    for row in run(args, device, all(copying.values())):
        rows.append(row)
        console.print(describe(row))
        # A time limit may cut the others off.
        leave(name, started_on, {**facts, "settings": rows}, False, args.out, complete=False)
    show(rows, console)
    judged = verdicts(rows, device.type)
    for verdict in judged:
        says = "holds" if verdict["holds"] else "MISSED"
        print(f"limit {verdict['limit']}: {verdict['what']} = {verdict['value']:.3f} ({verdict['setting']}) {says}")
    headline = [row["overhead"] for row in rows if (row["dtype"], row["r"], row["dropout"]) == HEADLINE]
    last = {f"overhead_{side}": headline[0][side]["median"] for side in ("ours", "peft")} if headline else {}
    leave(name, started_on, {**facts, "settings": rows, "limits": judged, **last}, whole, args.out)
    if last:
        print(" ".join(f"{key}={value:.3f}" for key, value in last.items()))


if __name__ == "__main__":
    main()
