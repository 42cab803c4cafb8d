"""Training steps of each method through launch/train.py on one device: speed, and peak memory beside the plan.

    python benchmarks/training.py [--device cuda] [--methods lora full …] [--steps 25] [--layers 22] [--out DIR]

TinyLlama's shape (H 2048, ffn 5632, 32 heads, 4 KV heads, 32000 tokens) with random weights in bf16, made under
build/training; samples of exactly --length tokens, half of each prompt, --micro-batch of them a step; AdamW, no
recomputation. Low-rank factors have rank 16 on all linears and dropout 0.1; full fine-tuning trains every weight.

Every method is a run of its own, ended when its steps are recorded: what it would save at its end is not measured here.
Tokens/s is the median over steps but the first few, memory the peak that the device's allocator handed out, beside what
`lowrank-dist plan` says of the same config. The last line is low-rank over full in tokens/s, which the paper (Hu et al.
2021, section 4.2) has as 43.1 over 32.5 tokens/s a V100 on GPT-3 175B. results/training_cuda.json is written where all
methods ran whole on a GPU; --out writes it whatever ran.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from methods import PAPER, ratio, records, speed
from record import machine, write_result
from rich import box
from rich.console import Console
from rich.table import Table
from spawn import free_port

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "training"
LAYERS, LENGTH = 22, 2048
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 16, "alpha": 32, "dropout": 0.1}},
    "full": {},
    "adapter_h": {"adapter": {"bottleneck": 64}},
    "adapter_l": {"adapter": {"bottleneck": 128}},
    "prefix": {"prefix": {"length": 64}},
    "prompt": {"prompt": {"length": 64}},
}
PLANNED = re.compile(r"planned memory ([\d.]+) GiB")


def make_base(layers: int, device: str) -> Path:
    """A Hugging Face folder of the shape, made once; its tokenizer knows one token for each digit."""
    folder = PLACE / f"base-{layers}"
    if (folder / "tokenizer.json").exists():
        return folder
    sys.path.append(str(ROOT))
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_models import make_tiny

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny = make_tiny("llama", PLACE / "tiny")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(tiny / name, folder / name)
    return folder


def write_config(args: argparse.Namespace, base: Path, method: str, run: Path) -> Path:
    """The run's data and configuration; more steps than are waited for."""
    prompt = args.length // 2
    answer = args.length - prompt - 1  # and the token that ends it
    digits = random.Random(0)
    rows = [
        {"prompt": "".join(digits.choices("0123456789", k=prompt)), "completion": str(i % 10) * answer}
        for i in range(4 * args.micro_batch)
    ]
    data = PLACE / "train.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    sections = {
        "method": method,
        "model": {"path": str(base), "dtype": "bf16", "device": args.device},
        **METHODS[method],
        "parallel": {"tensor": 1},
        # Virtual positions come on top of the sample, so that all methods see the same tokens.
        "data": {"train": str(data), "max_length": args.length + virtual(method)},
        "train": {
            "steps": 10 * args.steps,
            "global_batch": args.micro_batch,
            "micro_batch": args.micro_batch,
            "lr": 1e-5,
        },
        "output": {"dir": str(run), "tensorboard": False, "plot": False},
    }
    path = PLACE / f"{method}.json"  # JSON is YAML
    path.write_text(json.dumps(sections, indent=2), encoding="utf-8")
    return path


def virtual(method: str) -> int:
    """Positions that the method takes from the sequence."""
    return METHODS[method].get(method, {}).get("length", 0)


def train(args: argparse.Namespace, base: Path, method: str) -> dict[str, Any]:
    """One run, until its steps are recorded. SystemExit with the end of its log where it ends before."""
    run, log = PLACE / method, PLACE / f"{method}.log"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "launch/train.py", str(write_config(args, base, method, run))]
    settings = os.environ | {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": args.device},
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and len(steps_of(run)) < args.steps:
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    said, steps = log.read_text(encoding="utf-8", errors="replace"), steps_of(run)
    if len(steps) < args.steps:
        sys.exit(f"{method} ended after {len(steps)} steps:\n" + "\n".join(said.splitlines()[-25:]))
    steps = steps[: args.steps]
    # A prompt's own positions are counted with the sample's.
    of_sample = args.length / (args.length + (virtual(method) if method == "prompt" else 0))
    found = {
        "method": method,
        "tokens_per_second": of_sample * speed([step["tokens_per_second"] for step in steps]),
        "tflops": speed([step["tflops_per_rank"] for step in steps]),
        "peak_gib": max(step["memory_gib"] for step in steps),
        "planned_gib": float(PLANNED.search(said)[1]),
    }
    if "mfu_percent" in steps[-1]:
        found["mfu_percent"] = speed([step["mfu_percent"] for step in steps])
    return found


def steps_of(run: Path) -> list[dict[str, float]]:
    return [record for record in records(run / "metrics.jsonl") if "tokens_per_second" in record]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=box.MARKDOWN)
    for name in ("method", "tokens/s", "TFLOP/s", "MFU %", "peak GiB", "planned GiB", "peak over planned"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            *(f"{row[key]:,.{digits}f}" for key, digits in (("tokens_per_second", 0), ("tflops", 1))),
            f"{row['mfu_percent']:.1f}" if "mfu_percent" in row else "–",
            *(f"{row[key]:.2f}" for key in ("peak_gib", "planned_gib")),
            f"{row['peak_gib'] / row['planned_gib']:.2f}",
        )
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON there, whatever was measured")
    args = parser.parse_args()
    if min(args.steps, args.layers, args.micro_batch) < 1 or args.length < 16:
        parser.error("--steps, --layers and --micro-batch must be at least 1, --length at least 16")
    return args


def main() -> None:
    args, started_on, console = parse(), machine(), Console(width=120)
    if args.device == "cuda":
        started_on["gpu"] = torch.cuda.get_device_name()
    PLACE.mkdir(parents=True, exist_ok=True)
    base = make_base(args.layers, args.device)
    sizes = {"layers": args.layers, "length": args.length, "micro_batch": args.micro_batch, "steps": args.steps}
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        rows.append(train(args, base, method))
        console.print(f"{method}: {rows[-1]['tokens_per_second']:,.0f} tokens/s")
        figures = {"device": args.device, **sizes, "methods": rows, "low_rank_over_full_tokens_per_second": ratio(rows)}
        if args.out is not None:  # after every run: a time limit may cut the others off
            args.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": started_on, **figures}, indent=2)
            (args.out / f"training_{args.device}.json").write_text(text + "\n", encoding="utf-8")
    show(rows, console)
    every = [row["method"] for row in rows] == list(METHODS)
    if every and (args.layers, args.length, args.device) == (LAYERS, LENGTH, "cuda"):
        write_result("training_cuda", started_on, figures)
    if figures["low_rank_over_full_tokens_per_second"] is not None:
        print(f"low_rank_over_full={ratio(rows):.2f} (published {PAPER[0] / PAPER[1]:.2f} on 175B)")


if __name__ == "__main__":
    main()
