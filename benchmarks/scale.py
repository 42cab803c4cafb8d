"""Writes docs/SCALE.md: plans for 7B to 405B on 1 to 64 nodes, and the modelled cost of peers' added collectives.

    python benchmarks/scale.py [--out docs/SCALE.md]

Closed formulas alone (lowrank_dist/planner): no GPU, no weights, some seconds. Every time is modelled. The peers' calls
a layer are published counts; what each of them carries is not, so both ends are given: R columns, or an activation's H.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_dist.engine.planning import job_of, read_request
from lowrank_dist.planner.choice import Choice, choose
from lowrank_dist.planner.factors import total_rank
from lowrank_dist.planner.hardware import GPUS
from lowrank_dist.planner.job import Job, Layout
from lowrank_dist.planner.layouts import Candidate, Cluster, Fixed
from lowrank_dist.planner.report import memory_size, size
from lowrank_dist.planner.step_time import TENSOR, message_seconds
from lowrank_dist.planner.traffic import GATHER, Message, bytes_of, calls, of_step

MODELS = ("qwen2.5-7b", "llama-3-70b", "gpt3-175b", "llama-3-405b")
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS_PER_NODE, GPU = 8, GPUS["h100"]
RANK, LENGTH, GLOBAL_BATCH = 16, 2048, 512
# Collectives that the low-rank path adds to a layer, forward and backward of a microbatch, as published (README).
PEERS = {"Megatron-Bridge": (12, 21), "mcore-bridge": (4, 10)}
OUT = Path(__file__).parents[1] / "docs" / "SCALE.md"

HEAD = f"""\
# What the plan says of scale

Written by `python benchmarks/scale.py`; `lowrank-dist plan MODEL --nodes N` gives any row in full. Everything here is
**modelled**: memory, calls and bytes by formulas that are held against the executed step (`--verify`: calls and bytes
exactly, memory within 5 %); times by the GPU's data sheet and the rates in lowrank_dist/planner/hardware.py, without
overlap, compared with no measured step yet.

Low-rank updates of rank {RANK} on all linears, {GLOBAL_BATCH} samples of {LENGTH} tokens a step, all of them targets,
in bf16, on nodes of {GPUS_PER_NODE} {GPU.name} (SXM) of {memory_size(GPU.memory)}, with {GPU.node / 1e9:.0f} GB/s of
NVLink and {GPU.network / 1e9:.0f} GB/s of network for each GPU and direction. The layout is the one that the plan
recommends; memory is of a GPU, calls and bytes are of a rank in a step. *Across nodes*: the tensor-parallel group is
larger than a node, and a run refuses such a layout without `parallel.across_nodes=true`.
"""
PEERS_HEAD = f"""\
## With peers' collectives

Ours adds no call: its messages are R columns wider. Peers' low-rank paths add calls of their own to every layer and
microbatch ({"; ".join(f"{name} {low} to {high}" for name, (low, high) in PEERS.items())}: published counts). Below, the
step's time over ours if the rest were equal, at the lower and the upper count, where each added call carries R columns
(thin) and where it carries an activation (wide); one row a microbatch, with recomputation.
"""


@dataclass(frozen=True)
class Added:
    """Modelled seconds of a step without and with `calls` more collectives a layer, R and H columns wide."""

    ours: float
    thin: float
    wide: float


def job_for(model: str) -> Job:
    overrides = [
        f"lora.rank={RANK}",
        "lora.targets=all-linear",
        f"data.max_length={LENGTH}",
        f"train.global_batch={GLOBAL_BATCH}",
    ]
    return job_of(read_request(model, overrides), 1.0)


def cluster_of(nodes: int) -> Cluster:
    return Cluster(nodes, GPUS_PER_NODE, GPU, GPU.memory)


def with_added_calls(candidate: Candidate, added: int) -> Added:
    """Model a layer's added calls with R columns, the mean of its linears', or H, for all tokens of a microbatch."""
    job, cluster = candidate.job, candidate.cluster
    layer = job.placement.layers[-1]
    columns = sum(total_rank(factors) for factors in layer.factors) / sum(map(bool, layer.factors))
    unit, count = job.tokens * job.itemsize, added * len(job.architecture.layers) * job.microbatches
    seconds = [
        message_seconds(
            [Message(GATHER, "tensor", "forward", int(unit * width), count)],
            job.layout,
            cluster.gpu,
            cluster.gpus_per_node,
        )
        for width in (columns, job.architecture.hidden)
    ]
    return Added(candidate.time.seconds, *(candidate.time.seconds + more for more in seconds))


def scaling_rows(model: str) -> Iterator[str]:
    job = job_for(model)
    for nodes in NODES:
        choice = choose(job, Fixed(), cluster_of(nodes))
        yield f"| {nodes} | {_scaling(choice)} |"


def _scaling(choice: Choice) -> str:
    best = choice.best
    if not choice.fits:
        return (
            f"{best.job.layout} | {memory_size(best.memory.total)}, {memory_size(best.missing_bytes)} too much | | | | "
        )
    messages = of_step(best.job, best.tp_rank)
    found, sent = calls(messages).total(), bytes_of(messages).total()
    time = best.time
    across = ", **across nodes**" if best.crosses_nodes else ""
    return (
        f"{best.job.layout}{across} | {memory_size(best.memory.total)} | {found:,} | {size(sent)} | "
        f"{time.seconds:.2f} s ({time.bound}) | {time.tokens_per_second:,.0f}, {100 * time.mfu:.0f} %"
    )


def peer_rows(model: str) -> Iterator[str]:
    """Return rows of the same job, tensor parallel in a node and across two, with and without the peers' calls."""
    job = job_for(model)
    for nodes, tensor in ((1, 4 if model == MODELS[0] else 8), (2, 16)):
        if job.architecture.heads % tensor:
            continue
        layout = Layout(tensor, nodes * GPUS_PER_NODE // tensor, True, 1, True)
        candidate = Candidate(replace(job, layout=layout), cluster_of(nodes))
        where = "NVLink" if tensor <= GPUS_PER_NODE else "across nodes"
        cells = [
            f"{candidate.time.seconds:.1f} s",
            f"{100 * candidate.time.terms[TENSOR] / candidate.time.seconds:.0f} %",
        ]
        for low, high in PEERS.values():
            few, many = with_added_calls(candidate, low), with_added_calls(candidate, high)
            cells.append(f"{few.thin / few.ours:.2f} to {many.thin / many.ours:.2f}")
            cells.append(f"{few.wide / few.ours:.2f} to {many.wide / many.ours:.2f}")
        yield f"| {model} | {tensor}, {where} | {' | '.join(cells)} |"


def document() -> str:
    """Return the whole text of docs/SCALE.md."""
    lines = [HEAD]
    for model in MODELS:
        elements = job_for(model).placement.elements
        lines += [
            f"## {model}",
            "",
            f"|Θ| is {elements:,}: {size(4 * elements)} in fp32.",
            "",
            "| nodes | layout | memory | calls | bytes | step (bound by) | tokens/s, MFU |",
            "|---|---|---|---|---|---|---|",
            *scaling_rows(model),
            "",
        ]
    widths = " | ".join(f"{name}, {width}" for name in PEERS for width in ("thin", "wide"))
    lines += [
        PEERS_HEAD,
        f"| model | tensor parallel | ours | of it messages | {widths} |",
        "|---|---|---|---|" + "---|" * (2 * len(PEERS)),
        *(row for model in MODELS for row in peer_rows(model)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    out = parser.parse_args().out
    out.write_text(document(), encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
