"""Each product of one layer's linears by itself: time, TB/s and TFLOP/s beside what the GPU can do.

    python benchmarks/microbench.py [--device cuda] [--shape llama-3-8b] [--tokens 8192] [--only NAME …] [--out DIR]

The four fused linears of a Llama layer, whole, in bf16 at adapter rank 16 (R = 16 for every projection that a linear
fuses). `gemm` and `gemm dX` are cuBLAS's frozen products, with beta 0 (written) and 1 (added to what is there); `up`,
`dU` and `dB` its thin ones; `down`, `expand` and `grad_a` our kernels, without a mask and with one at dropout 0.1.
`copy` (device to device) and `square` (a product of 8192 × 8192 × 8192) are this GPU's own ceilings.

A product runs on a pool of operand sets in turn, random and together several times larger than L2, so that none is
found in the cache. One pass over the pool is a captured CUDA graph; its replays are timed by events, so the host leaves
no gaps. Medians of --repeats. Bytes are the fewest possible: every operand once, and with beta 1 the output twice.
results: microbench_cuda.json under --out, after every product.

On a CPU a plain loop takes the graph's place: a rehearsal. --once NAME … runs those products once each between
cudaProfilerStart and cudaProfilerStop and times nothing: what benchmarks/counters.py gives to Nsight Compute.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from products import RANK, Operands, Product, products
from record import machine, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from sides import SHAPES, architecture

from lowrank_dist.backend.devices import synchronize
from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.backend.select import select_backend
from lowrank_dist.ops.extension import require_compiled
from lowrank_dist.planner.hardware import gpu_called

# The pool's size over L2's (taken as 64 MiB on a CPU), and the least and most operand sets.
POOL_OVER_L2, FEWEST_SETS, MOST_SETS = 3.0, 2, 32
SECONDS = 0.04  # of one repeat


def pool_of(product: Product, l2: int) -> list[Callable[[], object]]:
    """Return calls on operand sets that together are `POOL_OVER_L2` times the cache, or `MOST_SETS` sets."""
    count = math.ceil(POOL_OVER_L2 * l2 / product.bytes)
    return [product.make() for _ in range(min(max(FEWEST_SETS, count), MOST_SETS))]


def replayed(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """Return one pass over the calls, as a captured CUDA graph where there is CUDA."""

    def plain() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        plain()
        return plain
    # Once beforehand, on another stream, as capture requires: libraries allocate and choose on their first call.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        plain()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain()
    return graph.replay


def seconds_of(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the seconds of `count` runs of `work`, on the device's clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(product: Product, repeats: int, l2: int, device: torch.device) -> dict[str, object]:
    """Return the median time of one call, and the rates it reaches."""
    calls = pool_of(product, l2)
    work = replayed(calls, device)
    once = seconds_of(work, 1, device)
    count = max(1, round(SECONDS / max(once, 1e-6)))
    each = [seconds_of(work, count, device) / count / len(calls) for _ in range(repeats)]
    seconds = statistics.median(each)
    return {
        "product": product.name,
        "linear": product.linear,
        "variant": product.variant,
        "us": 1e6 * seconds,
        "spread": (max(each) - min(each)) / seconds,
        "sets": len(calls),
        "bytes": product.bytes,
        "flops": product.flops,
        "terabytes_per_second": product.bytes / seconds / 1e12,
        "teraflops": product.flops / seconds / 1e12,
    }


def show(rows: Sequence[dict[str, object]], flops: float | None, bandwidth: float | None, console: Console) -> None:
    """Print one row a product, with shares of the GPU's data sheet where that is known."""

    def share(rate: object, peak: float | None) -> str:
        return "" if peak is None else f"{100e12 * float(rate) / peak:.0f}"

    table = Table(box=box.MARKDOWN)
    for name in ("product", "µs", "± %", "TB/s", "% of peak", "TFLOP/s", "% of peak "):
        table.add_column(name, justify="left" if name == "product" else "right")
    for row in rows:
        rates = row["terabytes_per_second"], row["teraflops"]
        table.add_row(
            " ".join(filter(None, (row["product"], row["linear"], row["variant"]))),
            f"{row['us']:.1f}",
            f"{50 * row['spread']:.0f}",
            f"{rates[0]:.2f}",
            share(rates[0], bandwidth),
            f"{rates[1]:.0f}",
            share(rates[1], flops),
        )
    console.print(table)


def run_once(chosen: Sequence[Product], names: Sequence[str], device: torch.device) -> None:
    """Run the last product of each name (masked, fc2) once, as the only work that a profiler sees."""
    last = {product.name: product for product in chosen if product.name in names}
    for product in last.values():
        call = product.make()
        call()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
        call()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()
        print(f"ran once: {product.label}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only these products")
    parser.add_argument("--once", nargs="+", metavar="NAME", help="run these once for a profiler, without timing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON there")
    args = parser.parse_args()
    if min(args.tokens, args.repeats) < 1:
        parser.error("--tokens and --repeats must be at least 1")
    return args


def main() -> None:
    args, console = parse(), Console(width=150)
    started_on = machine(args.device)
    quiet_libraries()
    device = select_backend(args.device).device
    require_compiled(args.device)
    torch.manual_seed(0)
    chosen = list(products(architecture(args.shape).layers[0].linears, Operands(args.tokens, device)))
    unknown = {*(args.only or ()), *(args.once or ())} - {product.name for product in chosen}
    if unknown:
        known = ", ".join(dict.fromkeys(product.name for product in chosen))
        raise SystemExit(f"no product is called {', '.join(sorted(unknown))}: there are {known}")
    if args.once:
        return run_once(chosen, args.once, device)
    cuda = device.type == "cuda"
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 64 * 2**20
    card = gpu_called(torch.cuda.get_device_name(device)) if cuda else None
    flops, bandwidth = (None, None) if card is None else (card.flops, card.bandwidth)
    replay = "CUDA graph" if cuda else "plain loop"
    console.print(f"replay: {replay}; operands: {POOL_OVER_L2:g} times L2's {l2 / 2**20:.0f} MiB")
    rows: list[dict[str, object]] = []
    measured = [product for product in chosen if not args.only or product.name in args.only]
    for product in measured:
        rows.append(measure(product, args.repeats, l2, device))
        if args.out is not None:  # after every product: a time limit may cut the others off
            facts = {"device": args.device, "shape": args.shape, "tokens": args.tokens, "r": RANK, "replay": replay}
            peaks = {"data_sheet_flops": flops, "data_sheet_bytes_per_second": bandwidth, "l2_bytes": l2}
            figures, complete = {**facts, **peaks, "products": rows}, len(rows) == len(measured)
            write_result(f"microbench_{args.device}", started_on, figures, args.out, complete=complete)
    show(rows, flops, bandwidth, console)
    print(f"{len(rows)} products measured ({replay})")


if __name__ == "__main__":
    main()
