"""A short training run of a tiny model, from launcher to merged folder, and a check of its outputs.

    python -m tests.gpu.short_run --launcher deepspeed --ranks 1 --dtype fp32 --device cuda --collective nccl --out DIR

Compared are the logits of the trained, sharded model itself (the probe), of plain PEFT on base and adapter, and of
plain transformers on the merged folder; the latter two on a CPU in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowrank_dist.merging.merge import merge
from tests.tiny_models import make_tiny

ROOT = Path(__file__).parents[2]
STEPS = 20
WORDS = ("cat", "dog", "ant", "hen", "rat", "pig")
# Largest difference over the largest |logit|. bf16: the base computes in it, and the merged weights are rounded to it.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}
FAR = 0.3  # smallest distance of the untrained base, without which the tolerance would mean nothing


def write_config(options: argparse.Namespace, base: Path) -> Path:
    """Write data and configuration of the run: uneven samples of one simple rule, TP over all ranks, dropout on."""
    rows = [
        {"prompt": f"{WORDS[i % 6]} {'x' * (i % 5)}:", "completion": f"{WORDS[i % 6]} " * (i % 4 + 1)}
        for i in range(24)
    ]
    train = options.out / "train.jsonl"
    train.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    sections = {
        "model": {"path": str(base), "dtype": options.dtype, "device": options.device},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "parallel": {"tensor": options.ranks},
        "data": {"train": str(train), "eval": str(train), "max_length": 48},
        "engine": {"timeout_seconds": 60},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 4, "lr": 1e-2, "warmup_steps": 2},
        "output": {"dir": str(options.out / "run"), "probe": 3},
    }
    path = options.out / "config.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return path


def launch(options: argparse.Namespace, config: Path) -> str:
    """Run launch/train.py under the launcher; return its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if options.launcher == "deepspeed":
        words = ["deepspeed.launcher.runner", "--num_gpus", options.ranks, "--master_port", port]
    else:
        # An address, since --standalone looks up the host's name: a machine without a network may not resolve it.
        address = ["--master-addr", "127.0.0.1", "--master-port", port]
        words = ["torch.distributed.run", "--nproc-per-node", options.ranks, *address]
    words = [sys.executable, "-m", *words, "launch/train.py", config]
    # The launcher must use the same device type as its ranks, which take theirs from model.device.
    environment = {**os.environ, "DS_ACCELERATOR": options.device}
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    check(done.returncode == 0, f"launch/train.py ends with code {done.returncode}")
    return done.stdout


def check(ok: bool, what: str) -> None:
    print(f"{'ok  ' if ok else 'FAIL'}  {what}", flush=True)
    if not ok:
        sys.exit(1)


def plain(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=input_ids, use_cache=False).logits


def gap(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def prove(options: argparse.Namespace, base: Path) -> None:
    run, merged = options.out / "run", options.out / "merged"
    report = merge(base, run / "adapter", merged)
    check(0 < report.changed == report.adapted, f"merge changed {report.changed} of {report.adapted} adapted tensors")
    probe = load_file(run / "probe.safetensors")
    ids, trained = probe["input_ids"], probe["logits"]
    allowed = TOLERANCE[options.dtype]
    exact = logits(PeftModel.from_pretrained(plain(base), run / "adapter"), ids)
    for name, found in (("the trained model", trained), ("the merged folder", logits(plain(merged), ids))):
        check(gap(found, exact) <= allowed, f"{name} is {gap(found, exact):.1e} from PEFT on base and adapter")
    untrained = gap(logits(plain(base), ids), exact)
    check(untrained > FAR, f"the base is {untrained:.1e} away")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launcher", choices=("deepspeed", "torchrun"), required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--collective", choices=("nccl", "gloo"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out = options.out.resolve()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    base = make_tiny("llama", options.out / "base", dtype=stored)
    said = launch(options, write_config(options, base))
    where = f"{options.ranks} tensor × 1 data parallel"
    check(where in said and f", {options.collective}\n" in said, f"{where} over {options.collective}")
    records = [json.loads(line) for line in (options.out / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    check(len(losses) == STEPS and all(map(math.isfinite, losses)), f"{STEPS} steps with a finite loss")
    last = sum(losses[-3:]) / 3
    check(last < 0.7 * losses[0], f"the loss falls from {losses[0]:.3f} to {last:.3f}")
    prove(options, base)


if __name__ == "__main__":
    main()
