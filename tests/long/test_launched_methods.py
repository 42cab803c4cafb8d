"""Every method by launch/train.py in processes of its own, on a real model: one rank, TP 2 and DP 2.

Low-rank runs under the real deepspeed, the others on forked ranks: the launcher's start does not depend on the method.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.launching import deepspeed, forked_ranks, metrics, write_config, write_jsonl
from tests.integration.resuming import SIZES, Layout, gap, tensors
from tests.integration.test_real_model import sentences
from tests.real_models import glassllm_folder

STEPS = 6
LAYOUTS = {"TP 1": Layout(1, 1, 1, 4), "TP 2": Layout(2, 1, 2, 4), "DP 2": Layout(1, 2, 1, 2)}
RATES = {"lora": 5e-3, "full": 1e-4, "adapter_h": 1e-2, "adapter_l": 1e-2, "prefix": 3e-2, "prompt": 1e-1}
# Largest difference of a master or a moment, relative to the tensor's largest element.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glassllm_folder(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("method", RATES)
def test_a_method_trains_alike_at_every_layout(method: str, folder: Path, tmp_path: Path) -> None:
    rows = sentences()
    config = write_config(
        tmp_path / "config.yaml",
        {
            "model": {"path": folder, "dtype": "fp32", "device": "cpu"},
            "method": method,
            **SIZES[method],
            "data": {
                "train": write_jsonl(tmp_path / "train.jsonl", rows[8:]),
                "eval": write_jsonl(tmp_path / "eval.jsonl", rows[:8]),
                "max_length": 64,
            },
            "train": {"steps": STEPS, "global_batch": 8, "lr": RATES[method], "warmup_steps": 1, "eps": 1e-4},
            "output": {"dir": tmp_path / "unused", "tensorboard": False, "plot": False},
        },
    )
    launch = deepspeed if method == "lora" else forked_ranks
    found = {}
    for name, layout in LAYOUTS.items():
        run = tmp_path / name.replace(" ", "")
        done = launch(layout.tensor * layout.data, config, f"output.dir={run}", *layout.overrides)
        assert done.code == 0 and "Traceback" not in done.stderr + done.stdout, done.stderr
        found[name] = tensors(run, STEPS)
        before, after = metrics(run, "eval_loss")
        assert after < 0.97 * before, f"{name} does not learn: {before:.3f}, {after:.3f}"
    for name in ("TP 2", "DP 2"):
        assert gap(found[name], found["TP 1"]) < TOLERANCE, name
