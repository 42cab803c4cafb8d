"""The modelled cost of the adapted linears on a GPU: GEMMs at the measured rate, the rest at memory bandwidth.

For machines without a GPU, and always marked as modelled. Counted is the path of parallel/autograd.py without fused
factors, product by product (`passes`): what each reads and writes of T×K, T×O and T×R beyond the frozen linear. Left
out are launches, caches, the factors themselves (R×K, R×O), the wire, where messages grow by R/K, and what a frozen
GEMM reads of an output that it adds to (beta = 1): it is bound by its arithmetic. Dropout is free here: its mask comes
from a counter and is not in memory.

Legend: N ranks, T tokens, T_j = T / N the token shard, K inputs and O outputs of the rank's weight, R = Σ r.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table
from sides import architecture

from lowrank_dist.arch.rows import LinearLayout


@dataclass(frozen=True)
class Gpu:
    """bf16 GEMMs in FLOP/s and memory in B/s, both as measured."""

    name: str
    flops: float
    bandwidth: float


MACHINES = {"h200": Gpu("H200", 790e12, 4.3e12), "h100": Gpu("H100", 798e12, 3.0e12)}
MODEL_SHAPES, SHARDS, DROPOUTS, TOKENS, RANK = ("llama-3-8b", "llama-3-70b"), (1, 8), (0.0, 0.1), 8192, 16
ITEMSIZE = 2


def passes(layout: LinearLayout, n: int, tokens: int, r: int) -> dict[str, int]:
    """Return the elements that each product of the low-rank path reads and writes, on one of n ranks.

    A thin product is written for the frozen one to add to (ops/linear.py). Where n > 1 (sequence parallelism), the side
    with the replicated factor has T_j tokens and is added to the message that arrives, so it reads and writes. The
    content of a message is copied into it: X before a gather forward, dY before one backward. U is copied out of it.
    """
    out_features, in_features = layout.local_shape(n)
    total = r * len(layout.parts)
    shard = tokens // n
    at_k, at_o = (shard, tokens) if layout.kind == "column" else (tokens, shard)
    x, y = at_k * in_features, at_o * out_features
    u_k, u_o = at_k * total, at_o * total
    counted = {
        "down": x + u_k,
        "up": (2 if n > 1 and layout.kind == "row" else 1) * y + u_o,
        "dU": y + u_o,
        "expand": (2 if n > 1 and layout.kind == "column" else 1) * x + u_k,
        "grad_a": x + u_k,
        "dB": y + u_o,
    }
    if n > 1:
        counted["message"] = 2 * (x if layout.kind == "column" else y) + 2 * u_o
    return counted


def modelled(shape: str, shard: int, gpu: Gpu, tokens: int, r: int) -> dict[str, Any]:
    """Return seconds of the frozen forward + dX and of each product, and the overhead: their ratio."""
    flops, elements = 0, Counter()
    for layout in architecture(shape).layers[0].linears.values():
        out_features, in_features = layout.local_shape(shard)
        flops += 2 * 2 * tokens * in_features * out_features
        elements.update(passes(layout, shard, tokens, r))
    frozen = flops / gpu.flops
    seconds = {name: count * ITEMSIZE / gpu.bandwidth for name, count in elements.items()}
    return {
        "modelled": True,
        "modelled_frozen_seconds": frozen,
        "modelled_seconds": seconds,
        "modelled_overhead": sum(seconds.values()) / frozen,
    }


def report(machine: str, console: Console) -> dict[str, Any]:
    """Print the table; return the values for the JSON."""
    gpu = MACHINES[machine]
    rows = [
        {"shape": shape, "shard": shard, "dropout": p, "dtype": "bf16", "r": RANK, "tokens": TOKENS}
        | modelled(shape, shard, gpu, TOKENS, RANK)
        for shape, shard, p in product(MODEL_SHAPES, SHARDS, DROPOUTS)
    ]
    rates = f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.1f} TB/s"
    title = f"modelled, {gpu.name}: {rates}, bf16, r {RANK}, T {TOKENS}; ms"
    names = list(dict.fromkeys(name for row in rows for name in row["modelled_seconds"]))
    table = Table("modelled", "dropout", "frozen", *names, "overhead", title=title)
    for row in rows:
        times = (f"{1e3 * row['modelled_seconds'].get(name, 0.0):.3f}" for name in names)
        where = f"modelled {row['shape']} / {row['shard']}"
        frozen, overhead = f"{1e3 * row['modelled_frozen_seconds']:.2f}", f"{row['modelled_overhead']:.1%}"
        table.add_row(where, f"{row['dropout']:g}", frozen, *times, overhead)
    console.print(table)
    headline = next(row["modelled_overhead"] for row in rows if row["dropout"] == DROPOUTS[-1])
    print(f"modelled_overhead_ours={headline:.3f}")
    return {"modelled": True, "modelled_machine": vars(gpu), "settings": rows, "modelled_overhead_ours": headline}
