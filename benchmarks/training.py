"""Training steps through launch/train.py on one device: speed, how busy the device is, and memory beside the plan.

    python benchmarks/training.py [--device cuda] [--shapes tinyllama …] [--methods lora …] [--steps 15] [--out DIR]

Shapes, with random weights in bf16 and no recomputation:
  tinyllama    H 2048, ffn 5632, 22 layers, 4 × 2,048 tokens a step, half of each sample a prompt
  llama-3-8b   NeMo Automodel's published LoRA benchmark (`llama3_1_8b_peft_benchmark.yaml`): sequences of 4,096, all of
               them targets, microbatches of 2, rank 16 on all projections, alpha 32, dropout 0.1, AdamW; but 2
               microbatches a step, where theirs has 16, so that a few steps take half a minute: the update weighs
               more here
Low-rank factors have rank 16 on all linears and dropout 0.1; full fine-tuning trains every weight.

Every run is launch/train.py (benchmarks/training_run.py), ended when its steps are recorded: what it would save at its
end is not measured here. Tokens/s, MFU and `step s` are medians over --steps after five that warm up; the step after
them runs under the profiler. `busy` is the time in which the GPU ran at least one kernel, over `step s`, and over
`traced s`, the traced step's own time, which is longer; `host s` is the time of the traced step in which the host did
not wait for the GPU, i.e. issued its work. Memory is the peak that the device's allocator handed out, beside what
`lowrank-dist plan` says of the same config.

results/training_cuda.json is written where all methods ran whole on a GPU; --out writes training_DEVICE.json there
after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from methods import FIRST_STEPS, PAPER, ratio, records, speed
from record import machine, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from spawn import free_port

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.model_files import built_in_config
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.formats.model_folder import SINGLE_FILE
from lowrank_dist.planner.hardware import GPUS

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "training"


@dataclass(frozen=True)
class Recipe:
    """A model's config.json and the content of a step. prompt: tokens of a sample that are no targets."""

    config: Mapping[str, Any]
    length: int
    micro_batch: int
    global_batch: int
    prompt: int


TINYLLAMA = dict(built_in_config("llama-3-8b")) | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
RECIPES = {
    "tinyllama": Recipe(TINYLLAMA, 2048, 4, 4, 1024),
    "llama-3-8b": Recipe(built_in_config("llama-3-8b"), 4096, 2, 4, 1),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 16, "alpha": 32, "dropout": 0.1}},
    "full": {},
    "adapter_h": {"adapter": {"bottleneck": 64}},
    "adapter_l": {"adapter": {"bottleneck": 128}},
    "prefix": {"prefix": {"length": 64}},
    "prompt": {"prompt": {"length": 64}},
}
# NeMo Automodel's performance summary: LoRA on one H100, tokens/s and MFU as they count them.
PUBLISHED = {("llama-3-8b", "lora"): {"gpu": "h100", "tokens_per_second": 12473, "mfu_percent": 41}}
PLANNED = re.compile(r"planned memory ([\d.]+) GiB")


def make_base(name: str, recipe: Recipe) -> Path:
    """Make a Hugging Face folder of the shape.

    Its weights file is a header and a hole, which takes no space and no time.

    training_run.py draws the weights. The tokenizer knows one token for each digit.
    """
    folder = PLACE / f"base-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(recipe.config), indent=2), encoding="utf-8")
    header, end = {}, 0
    for tensor, shape in hf_shapes(read_architecture(folder)).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    sys.path.append(str(ROOT))
    from tests.tiny_models import make_tiny

    tiny = make_tiny("llama", PLACE / "tiny")
    for file_name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(tiny / file_name, folder / file_name)
    return folder


def write_config(args: argparse.Namespace, recipe: Recipe, base: Path, method: str, run: Path) -> Path:
    """Write the run's data and configuration, with more steps than are waited for."""
    answer = recipe.length - recipe.prompt - 1  # and the token that ends it
    digits = random.Random(0)
    rows = [
        {
            "prompt": "".join(digits.choices("0123456789", k=recipe.prompt)),
            "completion": "".join(digits.choices("0123456789", k=answer)),
        }
        for _ in range(4 * recipe.global_batch)
    ]
    PLACE.mkdir(parents=True, exist_ok=True)
    data = PLACE / "train.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    sections = {
        "method": method,
        "model": {"path": str(base), "dtype": "bf16", "device": args.device},
        **METHODS[method],
        "parallel": {"tensor": 1},
        # Virtual positions come on top of the sample, so that all methods see the same tokens.
        "data": {"train": str(data), "max_length": recipe.length + virtual_positions(method)},
        "train": {
            "steps": 10 * (FIRST_STEPS + args.steps),
            "global_batch": recipe.global_batch,
            "micro_batch": recipe.micro_batch,
            "lr": 1e-5,
        },
        "output": {"dir": str(run), "tensorboard": False, "plot": False},
    }
    path = PLACE / f"{method}.json"  # JSON is YAML
    path.write_text(json.dumps(sections, indent=2), encoding="utf-8")
    return path


def virtual_positions(method: str) -> int:
    """Return the number of positions that the method takes from the sequence."""
    return METHODS[method].get(method, {}).get("length", 0)


def train(args: argparse.Namespace, name: str, method: str) -> dict[str, Any]:
    """Run until the steps are recorded. Raises SystemExit with the end of the log where the run ends earlier."""
    recipe = cut(RECIPES[name], args)
    run, log, traced = PLACE / method, PLACE / f"{method}.log", PLACE / "trace.json"
    shutil.rmtree(run, ignore_errors=True)
    traced.unlink(missing_ok=True)
    config, steps = write_config(args, recipe, make_base(name, recipe), method, run), FIRST_STEPS + args.steps
    command = [sys.executable, "benchmarks/training_run.py", str(config), str(steps + 1), str(traced)]
    settings = os.environ | {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": args.device},
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not traced.exists():
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    said, recorded = log.read_text(encoding="utf-8", errors="replace"), steps_of(run)
    if len(recorded) < steps or not traced.exists():
        sys.exit(f"{method} ended after {len(recorded)} steps:\n" + "\n".join(said.splitlines()[-25:]))
    counted = recorded[:steps]
    # A prompt's own positions are counted with the sample's.
    of_sample = recipe.length / (recipe.length + (virtual_positions(method) if method == "prompt" else 0))
    tokens, flops = (speed([step[key] for step in counted]) for key in ("tokens_per_second", "tflops_per_rank"))
    found: dict[str, Any] = {
        "shape": name,
        "method": method,
        "layers": recipe.config["num_hidden_layers"],
        "length": recipe.length,
        "micro_batch": recipe.micro_batch,
        "global_batch": recipe.global_batch,
        "tokens_per_second": of_sample * tokens,
        "tflops": flops,
        "model_flops_per_token": 1e12 * flops / tokens,
        "step_seconds": recipe.global_batch * recipe.length / (of_sample * tokens),
        "peak_gib": max(step["memory_gib"] for step in counted),
        "planned_gib": float(PLANNED.search(said)[1]),
        "traced_step": json.loads(traced.read_text(encoding="utf-8")),
    }
    found["busy_share"] = found["traced_step"]["busy_seconds"] / found["step_seconds"]
    if "mfu_percent" in counted[-1]:
        found["mfu_percent"] = speed([step["mfu_percent"] for step in counted])
    published = PUBLISHED.get((name, method))
    if published is not None and recipe.config == RECIPES[name].config and recipe.length == RECIPES[name].length:
        found["published"] = {**published, "mfu_percent_by_our_count": our_mfu(published, found)}
    return found


def our_mfu(published: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Convert published tokens/s to % of the GPU's data sheet, by our count of FLOPs a token."""
    return 100 * published["tokens_per_second"] * row["model_flops_per_token"] / GPUS[published["gpu"]].flops


def cut(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """Return the recipe with the sizes that --layers, --hidden and --length ask for."""
    config, length = dict(recipe.config), args.length or recipe.length
    if args.layers:
        config["num_hidden_layers"] = args.layers
    if args.hidden:
        # The number of heads stays; their width and the MLP shrink with the model.
        config |= {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "vocab_size": 1024}
    return replace(recipe, config=config, length=length, prompt=max(1, recipe.prompt * length // recipe.length))


def steps_of(run: Path) -> list[dict[str, float]]:
    return [record for record in records(run / "metrics.jsonl") if "tokens_per_second" in record]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=box.MARKDOWN)
    names = ("shape, method", "tokens/s", "TFLOP/s", "MFU %", "step s", "busy %", "traced s", "busy % ", "host s")
    for name in (*names, "kernels", "peak GiB", "planned GiB"):
        table.add_column(name, justify="left" if name == names[0] else "right")
    for row in rows:
        trace = row["traced_step"]
        table.add_row(
            f"{row['shape']}, {row['method']}",
            *(f"{row[key]:,.{digits}f}" for key, digits in (("tokens_per_second", 0), ("tflops", 1))),
            f"{row['mfu_percent']:.1f}" if "mfu_percent" in row else "–",
            f"{row['step_seconds']:.3f}",
            f"{100 * row['busy_share']:.0f}",
            f"{trace['seconds']:.3f}",
            f"{100 * trace['busy_share']:.0f}",
            f"{trace['host_seconds']:.3f}",
            str(trace["kernels"]),
            *(f"{row[key]:.2f}" for key in ("peak_gib", "planned_gib")),
        )
        if "published" in row:
            theirs = row["published"]
            mfu = f"{theirs['mfu_percent']} ({theirs['mfu_percent_by_our_count']:.1f} by our count)"
            table.add_row("published: NeMo Automodel, H100", f"{theirs['tokens_per_second']:,}", "", mfu)
    console.print(table)
    for row in rows:
        groups = ", ".join(f"{name} {found['us'] / 1e3:.1f}" for name, found in row["traced_step"]["groups"].items())
        console.print(f"{row['shape']}, {row['method']}, ms of the traced step by group: {groups}")
    if any("published" in row for row in rows):
        console.print("An H200 has an H100's bf16 peak and 1.4 times its memory bandwidth.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=RECIPES, default=["tinyllama"], metavar="SHAPE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=15, help="measured steps, after the warm-up")
    parser.add_argument("--layers", type=int, help="fewer layers, for a rehearsal")
    parser.add_argument("--hidden", type=int, help="a narrower model, for a rehearsal")
    parser.add_argument("--length", type=int, help="shorter samples, for a rehearsal")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON there, even of a partial run")
    args = parser.parse_args()
    if min(args.steps, args.layers or 1) < 1 or (args.length or 16) < 16 or (args.hidden or 64) % 64:
        parser.error("--steps and --layers must be at least 1, --length at least 16, --hidden a multiple of 64")
    return args


def main() -> None:
    args, console = parse(), Console(width=190)
    started_on = machine(args.device)
    rows: list[dict[str, Any]] = []
    runs = [(name, method) for name in args.shapes for method in args.methods]
    for name, method in runs:
        rows.append(train(args, name, method))
        figures = {"device": args.device, "steps": args.steps, "runs": rows, **over_full(rows)}
        if args.out is not None:  # after every run: a time limit may cut the others off
            complete = len(rows) == len(runs)
            write_result(f"training_{args.device}", started_on, figures, args.out, complete=complete)
        show(rows[-1:], console)
    whole = args.device == "cuda" and args.methods == list(METHODS) and not (args.layers or args.hidden or args.length)
    if whole and args.shapes == ["tinyllama"]:
        write_result("training_cuda", started_on, figures)
    if over_full(rows):
        print(f"low_rank_over_full={ratio(rows):.2f} (published {PAPER[0] / PAPER[1]:.2f} on 175B)")
    print("; ".join(f"{row['shape']}, {row['method']}: {row['tokens_per_second']:,.0f} tokens/s" for row in rows))


def over_full(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return low-rank over full fine-tuning in tokens/s, where both ran on one shape (Hu et al. 2021, section 4.2)."""
    one_shape = len({row["shape"] for row in rows}) == 1
    found = ratio(rows) if one_shape else None
    return {} if found is None else {"low_rank_over_full_tokens_per_second": found}


if __name__ == "__main__":
    main()
