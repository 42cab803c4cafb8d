"""Host memory while a sharded checkpoint is loaded: peak anonymous resident memory over the bytes of a rank's shard.

    python benchmarks/load_memory.py [--tp 2] [--keep DIR]

A Llama checkpoint of 2.2 GB (bf16, sharded) is written with pseudo-random weights; --tp processes load it as
launch/train.py does. This process samples every rank's RssAnon every 5 ms: pages of mapped files, which the kernel can
drop, don't count. The baseline is the rank after all imports and process-group set-up. The last line is the worst
rank's `peak_over_shard=…`; 1 would be the shard and nothing beside it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from record import machine, write_result
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from spawn import start_ranks
from transformers import LlamaConfig

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.tensors import hf_shapes

INTERVAL = 0.005
LAYERS_PER_FILE = 6


def write_checkpoint(folder: Path) -> int:
    """Write a 1.1-billion-parameter Llama with grouped KV heads as a sharded bf16 folder; return its tensors' bytes."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = hf_shapes(read_architecture(folder))
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    # One block of noise; every tensor is a window of it at another place. No page of the files is a hole.
    noise = torch.empty(largest + len(shapes), dtype=torch.bfloat16).normal_(std=0.02)
    files: dict[int, dict[str, torch.Tensor]] = {}
    for index, (name, shape) in enumerate(shapes.items()):
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        window = noise[index : index + torch.Size(shape).numel()]
        files.setdefault((layer + LAYERS_PER_FILE) // LAYERS_PER_FILE, {})[name] = window.view(shape)
    weight_map, total = {}, 0
    for number, (_, tensors) in enumerate(sorted(files.items()), start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        # Windows overlap in memory, and safetensors refuses to write shared memory.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def rank_main(rank: int, tp: int, port: int, folder: Path, parent: Connection) -> None:
    """On one rank: report when it is ready, load when told to, and report its shard's bytes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tp), LOCAL_WORLD_SIZE=str(tp))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from lowrank_dist.backend.select import init_process_group, select_backend, shutdown
    from lowrank_dist.model.load import check_model, load_model
    from lowrank_dist.parallel.topology import Topology

    backend = select_backend("cpu")
    init_process_group(backend, timeout_seconds=600)
    topology = Topology.build(tp, None, None, timeout_seconds=600)
    parent.send("ready")
    parent.recv()
    started = time.perf_counter()
    model = load_model(
        folder,
        check_model(folder, tp, 2048),
        topology,
        device=backend.device,
        dtype="auto",
        vocab_multiple=128,
        broadcast=False,
    )
    seconds = time.perf_counter() - started
    parent.send({"shard": sum(tensor.nbytes for tensor in model.parameters()), "seconds": seconds})
    parent.recv()
    shutdown(clean=True)


def rss_anon(pid: int) -> int:
    """Return the current anonymous resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def measure(folder: Path, tp: int) -> tuple[list[dict[str, float]], float]:
    """Return, by rank, baseline, peak above it, shard [bytes] and seconds; and the longest gap between samples [s]."""
    ranks, ours = start_ranks(rank_main, tp, folder)
    assert [pipe.recv() for pipe in ours] == ["ready"] * tp
    baselines = [rss_anon(process.pid) for process in ranks]
    peaks, gap = list(baselines), 0.0
    for pipe in ours:
        pipe.send("go")
    last = time.perf_counter()
    while not all(pipe.poll() for pipe in ours):
        peaks = [max(peak, rss_anon(process.pid)) for peak, process in zip(peaks, ranks, strict=True)]
        time.sleep(max(0.0, last + INTERVAL - time.perf_counter()))
        gap, last = max(gap, time.perf_counter() - last), time.perf_counter()
    peaks = [max(peak, rss_anon(process.pid)) for peak, process in zip(peaks, ranks, strict=True)]
    reports = [pipe.recv() for pipe in ours]
    for pipe in ours:  # receive all before waiting for any: they leave together
        pipe.send("bye")
    for process in ranks:
        process.join()
    rows = zip(baselines, peaks, reports, strict=True)
    return [{"baseline": start, "peak": peak - start, **report} for start, peak, report in rows], gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks")
    parser.add_argument("--keep", type=Path, help="keep the checkpoint here, and reuse an existing one")
    args = parser.parse_args()
    started_on = machine()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="load_memory."))
    try:
        if not (folder / "model.safetensors.index.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(folder)
        total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        ranks, gap = measure(folder, args.tp)
    finally:
        if args.keep is None:
            shutil.rmtree(folder)
    for rank in ranks:
        if rank["peak"] < 0.95 * rank["shard"]:
            sys.exit(f"only {rank['peak']:,} of the shard's {rank['shard']:,} bytes were seen: a wrong measurement")
    ratio = max(rank["peak"] / rank["shard"] for rank in ranks)
    table = Table("rank", "baseline", "peak above it", "shard", "ratio", "seconds", title=f"{total / 1e9:.2f} GB")
    for number, rank in enumerate(ranks):
        sizes = (f"{rank[key] / 2**20:,.1f} MiB" for key in ("baseline", "peak", "shard"))
        table.add_row(str(number), *sizes, f"{rank['peak'] / rank['shard']:.3f}", f"{rank['seconds']:.1f}")
    Console().print(table)
    print(f"longest time between two samples: {gap * 1e3:.1f} ms")
    figures = {"checkpoint_bytes": total, "tp": args.tp, "ranks": ranks, "longest_gap_seconds": gap}
    write_result("load_memory", started_on, {**figures, "peak_over_shard": ratio})
    print(f"peak_over_shard={ratio:.3f}")


if __name__ == "__main__":
    main()
