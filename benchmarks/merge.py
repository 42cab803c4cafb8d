"""Time and memory of `lowrank-dist merge`, against copying the base with `cp -r` and reading the copy with sha256sum.

    python benchmarks/merge.py [--size-gb 8] [--rounds 2] [--keep DIR]

A Llama-shaped bf16 checkpoint whose linears are --size-gb in 16 shards, and a rank-16 adapter on all of its linears,
are written under build/. Each round times both sides in fresh processes, in alternating order: the peer's
`cp -r BASE COPY`, then `sha256sum` of all files of the copy; and the installed console script's merge. Before each side
the base is read once, so that it lies in the page cache where memory allows, and `sync` empties the queue to the disk.
The merged folder is on disk when the command returns, the copy is not: how long a `sync -f` after sha256sum takes is
reported, and not counted. After each merge, and before a ratio is formed, tensors of the merged folder are compared,
bit for bit, with fp32 W + s·B·A rounded once. How fast sha256sum is depends on how it was built, so the merge over
`cp -r` alone is reported as well.

Peak memory is the kernel's own ru_maxrss of the merge, which counts resident pages of mapped files; its share that is
anonymous is sampled. The last line is `vs_copy=… peak_mb=…` (ratio of median times, the largest peak; MB = 10⁶ bytes).
Exit code 1 when the time is over 2 × the peer's, or the peak over 1 GB + 2 × the largest tensor.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from record import machine, write_result
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import LlamaConfig

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.formats.safetensors_file import SafetensorsWriter, TensorEntry, tensor_bytes
from lowrank_dist.methods.lora.files import AdapterFactors, LowRankFactor, module_paths, write_adapter

BUILD = Path(__file__).parents[1] / "build"
COMMAND = Path(sys.executable).with_name("lowrank-dist")
INDEX = "model.safetensors.index.json"
SHARDS = 16
RANK, ALPHA = 16, 32.0
CHECKED = 6
INTERVAL = 0.01
TIME_LIMIT = 2.0
MEMORY_LIMIT, MEMORY_TENSORS = 1_000_000_000, 2
# Hidden size, MLP, KV width and vocabulary of a Llama with 7 to 8 billion parameters.
HIDDEN, MLP, KV_HEADS, HEADS, VOCAB = 4096, 14336, 8, 32, 32000
HEAD_BYTES = 2 * VOCAB * HIDDEN
LAYER_BYTES = 2 * HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * MLP)

# A process of its own, for ru_maxrss: a child starts with its parent's peak, and this one's includes torch. Prints the
# command's process id, then its exit code, ru_maxrss [KiB] and seconds.
_LAUNCHER = """
import os, sys, time
started = time.perf_counter()
pid = os.fork()
if pid == 0:
    os.dup2(2, 1)
    os.execv(sys.argv[1], sys.argv[1:])
print(pid, flush=True)
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss, time.perf_counter() - started)
"""


@dataclass(frozen=True)
class Copied:
    """Seconds of `cp -r`, of sha256sum, and of the `sync -f` that would make the copy as durable as a merge."""

    cp: float
    sha256sum: float
    sync: float

    @property
    def seconds(self) -> float:
        """Seconds that a merge is compared with: the copy, not yet durable, and its checksums."""
        return self.cp + self.sha256sum


@dataclass(frozen=True)
class Merged:
    """Seconds of the merge from fork to exit; peaks of resident and, sampled, of anonymous resident memory [bytes]."""

    seconds: float
    peak: int
    peak_anonymous: int


def write_checkpoint(folder: Path, linear_bytes: int) -> None:
    """Write a Llama whose linears (lm_head included) are about `linear_bytes`, in bf16 and 16 files."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=max(1, round((linear_bytes - HEAD_BYTES) / LAYER_BYTES)),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = hf_shapes(read_architecture(folder))
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    # One block of noise; every tensor is a window of it at another place. No page of the files is a hole.
    noise = torch.empty(max(sizes.values()) // 2 + len(shapes), dtype=torch.bfloat16).normal_(std=0.02)
    total, begun = sum(sizes.values()), 0
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    for name, size in sizes.items():
        shards[begun * SHARDS // total].append(name)
        begun += size
    shards = [shard for shard in shards if shard]
    weight_map, window = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries = [TensorEntry(name, "BF16", shapes[name], 0, sizes[name]) for name in shard]
        with SafetensorsWriter(folder / file, entries, {"format": "pt"}) as writer:
            for name in shard:
                writer.write(tensor_bytes(noise[window : window + sizes[name] // 2]))
                weight_map[name], window = file, window + 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def write_random_adapter(folder: Path, base: Path) -> None:
    """Write factors of r = 16 on every linear of `base`, lm_head included, with an update large enough for bf16."""
    architecture = read_architecture(base)
    factors = {}
    for module in sorted(architecture.linear_modules() | {"lm_head"}):
        rows, columns = hf_shapes(architecture)[f"{module}.weight"]
        a = torch.randn(RANK, columns) / columns**0.5
        factors[module] = LowRankFactor(a, 0.01 * torch.randn(rows, RANK), ALPHA)
    adapter = AdapterFactors(factors, 0.0, False, architecture.conv1d, str(base))
    provenance = Provenance(fingerprint(base), str(base), {})
    write_adapter(folder, adapter, provenance, module_paths(architecture), trained=True)


def timed(*command: str | Path) -> float:
    """Return the seconds of a command that must succeed; its output is discarded."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def copy_side(base: Path, copy: Path) -> Copied:
    """Run the peer: copy the base, and compute a checksum of each file of the copy."""
    cp = timed("cp", "-r", base, copy)
    sha256sum = timed("sha256sum", *sorted(copy.iterdir()))
    return Copied(cp, sha256sum, timed("sync", "-f", copy))


def rss_anon(pid: int) -> int:
    """Return the anonymous resident bytes of a process; 0 when it has ended or is about to."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def merge_side(base: Path, adapter: Path, out: Path) -> Merged:
    """Run ours: the console script in a fresh process. Ends the benchmark when it fails."""
    command = [str(COMMAND), "merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out)]
    launcher = subprocess.Popen([sys.executable, "-SEc", _LAUNCHER, *command], stdout=subprocess.PIPE, text=True)
    pid, anonymous = int(launcher.stdout.readline()), 0
    while launcher.poll() is None:
        anonymous = max(anonymous, rss_anon(pid))
        time.sleep(INTERVAL)
    code, maxrss, seconds = launcher.stdout.read().split()
    if int(code):
        sys.exit(f"{' '.join(command)} ended with {code}")
    return Merged(float(seconds), int(maxrss) * 1024, anonymous)


def check_merged(base: Path, adapter: Path, out: Path) -> None:
    """Compare tensors of `out`, one without an update and random others, with the formula; exit on any other bit."""
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as factors:
        linears = [key.split(".", 2)[2].replace(".lora_A", "") for key in factors.keys() if ".lora_A." in key]
        chosen = torch.randperm(len(linears))[:CHECKED].tolist()
        for name in ["model.embed_tokens.weight", *(linears[index] for index in chosen)]:
            tensors = []
            for folder in (base, out):
                with safe_open(folder / weight_map[name], framework="pt") as file:
                    tensors.append(file.get_tensor(name))
            expected = tensors[0]
            if name in linears:
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                a, b = (factors.get_tensor(f"{key}{side}.weight") for side in "AB")
                expected = (tensors[0].float() + ALPHA / RANK * (b @ a)).to(torch.bfloat16)
                if torch.equal(expected, tensors[0]):
                    sys.exit(f"{name}: the update does not show in bf16: a wrong measurement")
            if not torch.equal(tensors[1], expected):
                sys.exit(f"{name} of the merged model is not W + s·B·A")


def settle(base: Path) -> None:
    """Make the start the same for both sides: the base in the page cache, no pending writes to the disk."""
    for path in sorted(base.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    os.sync()


def measure(base: Path, adapter: Path, scratch: Path, rounds: int) -> tuple[list[Copied], list[Merged]]:
    """Run both sides `rounds` times, each first in every other round; outputs are deleted before the next."""
    copies, merges = [], []

    def copied() -> None:
        copies.append(copy_side(base, scratch / "copy"))
        shutil.rmtree(scratch / "copy")

    def merged() -> None:
        merges.append(merge_side(base, adapter, scratch / "merged"))
        check_merged(base, adapter, scratch / "merged")
        shutil.rmtree(scratch / "merged")

    sides: list[Callable[[], None]] = [copied, merged]
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            settle(base)
            side()
        print(f"round {number + 1}: {copies[-1]}, {merges[-1]}", flush=True)
    return copies, merges


def check_space(scratch: Path, linear_bytes: int, there: bool) -> None:
    """Require room for base, copy and merged model, with a tenth to spare."""
    needed = int(1.1 * (linear_bytes + HEAD_BYTES) * (2 if there else 3))
    free = shutil.disk_usage(scratch).free
    if free < needed:
        sys.exit(
            f"{scratch} has {free / 1e9:.1f} GB free, this needs {needed / 1e9:.1f} GB: make room or lower --size-gb"
        )


def report(base: Path, started_on: dict[str, object], copies: list[Copied], merges: list[Merged]) -> bool:
    """Print and record everything; return whether both limits hold."""
    tensors = [torch.Size(shape).numel() * 2 for shape in hf_shapes(read_architecture(base)).values()]
    total, largest = sum(tensors), max(tensors)
    limit = MEMORY_LIMIT + MEMORY_TENSORS * largest
    ours = statistics.median(merge.seconds for merge in merges)
    ratio = ours / statistics.median(copy.seconds for copy in copies)
    durable = ours / statistics.median(copy.seconds + copy.sync for copy in copies)
    alone = ours / statistics.median(copy.cp for copy in copies)
    peak = max(merge.peak for merge in merges)
    table = Table("round", "cp -r", "sha256sum", "(sync)", "merge", "peak", "anonymous", title=f"{total / 1e9:.2f} GB")
    for number, (copy, merge) in enumerate(zip(copies, merges, strict=True), start=1):
        seconds = (f"{value:.1f} s" for value in (copy.cp, copy.sha256sum, copy.sync, merge.seconds))
        sizes = (f"{value / 1e6:.0f} MB" for value in (merge.peak, merge.peak_anonymous))
        table.add_row(str(number), *seconds, *sizes)
    Console().print(table)
    print(f"limits: {TIME_LIMIT} x, {limit / 1e6:.0f} MB; over cp -r alone: {alone:.2f}; with sync: {durable:.2f}")
    figures = {
        "checkpoint_bytes": total,
        "largest_tensor_bytes": largest,
        "adapter_rank": RANK,
        "limits": {"vs_copy": TIME_LIMIT, "peak_bytes": limit},
        "copy": [asdict(copy) for copy in copies],
        "merge": [asdict(merge) for merge in merges],
        "vs_copy": ratio,
        "vs_copy_and_sync": durable,
        "vs_cp_alone": alone,
        "peak_bytes": peak,
    }
    write_result("merge", started_on, figures)
    print(f"vs_copy={ratio:.2f} peak_mb={peak / 1e6:.0f}")
    return ratio <= TIME_LIMIT and peak <= limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=8.0, help="size of all linears, lm_head included [10⁹ bytes]")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each side")
    parser.add_argument("--keep", type=Path, help="keep base and adapter here, and reuse existing ones")
    args = parser.parse_args()
    started_on = machine()
    torch.manual_seed(0)
    BUILD.mkdir(exist_ok=True)
    scratch = args.keep or Path(tempfile.mkdtemp(prefix="merge-benchmark.", dir=BUILD))
    base, adapter = scratch / "base", scratch / "adapter"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        check_space(scratch, int(args.size_gb * 1e9), adapter.exists())
        if not adapter.exists():
            write_checkpoint(base, int(args.size_gb * 1e9))
            write_random_adapter(adapter, base)
        copies, merges = measure(base, adapter, scratch, args.rounds)
        held = report(base, started_on, copies, merges)
    finally:
        for left in ("copy", "merged"):
            shutil.rmtree(scratch / left, ignore_errors=True)
        if args.keep is None:
            shutil.rmtree(scratch)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
