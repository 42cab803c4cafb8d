"""Runs that are stopped and resumed, for the tests of resume: their configuration, their copies and their numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lowrank_dist.formats.manifest import OPTIMIZER_FILE
from tests.integration.launching import Outcome, in_ranks, samples, write_config, write_jsonl
from tests.tiny_models import make_tiny

STEPS, SAVED = 6, 2
# Sums in another order differ in the last digits, and AdamW divides by √(second moment) (docs/LOG.md).
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Layout:
    """The layout of a run: tensor × data ranks, ZeRO stage, rows of a microbatch."""

    tensor: int
    data: int
    zero: int
    micro_batch: int = 2
    sequence: bool = True

    @property
    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.data={self.data}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"engine.zero_stage={self.zero}",
            f"train.micro_batch={self.micro_batch}",
        ]


# Method → the config section of a tiny run.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
    "full": {},
    "adapter_h": {"adapter": {"bottleneck": 8}},
    "adapter_l": {"adapter": {"bottleneck": 8}},
    "prefix": {"prefix": {"length": 5, "width": 12}},
    "prompt": {"prompt": {"length": 5}},
}


def make_job(place: Path, method: str = "lora", **sizes: Any) -> Path:
    """Make a model, its data and a configuration that resumes automatically; return the configuration's path.

    sizes: keys of the method's own section.
    """
    sections = {
        "model": {"path": make_tiny("qwen2", place / "base", num_key_value_heads=2), "dtype": "fp32", "device": "cpu"},
        "method": method,
        **{name: {**keys, **sizes} for name, keys in SIZES[method].items()},
        "data": {
            "train": write_jsonl(place / "train.jsonl", samples(22)),
            "eval": write_jsonl(place / "eval.jsonl", samples(9)),
            "max_length": 48,
        },
        "train": {
            **{"steps": STEPS, "global_batch": 8, "lr": 1e-2, "warmup_steps": 2, "eps": 1e-3, "weight_decay": 0.01},
            "resume": "auto",
        },
        "eval": {"every": 2, "micro_batch": 4},
        "output": {
            "dir": place / "unused",
            "save_every": SAVED,
            "keep_last": None,
            "tensorboard": False,
            "plot": False,
        },
    }
    return write_config(place / "config.yaml", sections)


def train(config: Path, folder: Path, layout: Layout, *overrides: str) -> list[Outcome]:
    """Train one run as the main program of pooled ranks."""
    return in_ranks(layout.tensor * layout.data, config, f"output.dir={folder}", *layout.overrides, *overrides)


def stopped_after(run: Path, step: int, copy: Path) -> Path:
    """Return a copy of a run as if it was killed after `step`, without later checkpoints and without the adapter."""
    shutil.copytree(run, copy, symlinks=True)
    for child in (copy / "checkpoints").iterdir():
        if not child.is_symlink() and int(child.name.removeprefix("step-")) > step:
            shutil.rmtree(child)
    for name in ("last", "best"):
        (copy / "checkpoints" / name).unlink(missing_ok=True)
        (copy / "checkpoints" / name).symlink_to(f"step-{step}")
    shutil.rmtree(copy / "adapter", ignore_errors=True)
    return copy


def tensors(run: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Return the masters and moments of a checkpoint."""
    return load_file(run / "checkpoints" / f"step-{step}" / OPTIMIZER_FILE)


def curve(run: Path) -> list[dict[str, Any]]:
    """Return the metrics records without the values that come from a clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "tokens_per_second", "tokens_per_second_per_rank", "tflops_per_rank", "memory_gib")
    return [
        {key: value for key, value in record.items() if key not in clock and not key.endswith("_seconds")}
        for record in records
    ]


def gap(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Return the largest difference, each tensor's relative to its largest element."""
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)
