"""Models of images and text from end to end: train on text, resume at another layout, merge, decode, inspect, plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from tests.dist.ranks import run_ranks
from tests.dist.test_methods import read_and_score
from tests.integration.launching import assert_codes, in_ranks, samples, write_config, write_jsonl
from tests.tiny_models import make_tiny_with_images


def command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (words[0], result.output, result.exception)
    return result.output


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_text_is_trained_and_images_are_left_alone(tmp_path: Path, name: str) -> None:
    base, run, merged = make_tiny_with_images(name, tmp_path / "base"), tmp_path / "run", tmp_path / "merged"
    sections = {
        "model": {"path": base, "device": "cpu"},
        "lora": {"rank": 4},
        "parallel": {"tensor": 2},
        "data": {"train": write_jsonl(tmp_path / "train.jsonl", samples(12)), "max_length": 64},
        "train": {"steps": 4, "global_batch": 4, "lr": 1e-2, "schedule": "constant"},
        "output": {"dir": run, "save_every": 2},
    }
    config = write_config(tmp_path / "run.yaml", sections)
    assert_codes(in_ranks(2, config, "train.steps=2"), 0)
    more = ("train.resume=auto", "train.resume_changes=[train.steps,parallel.tensor]", "parallel.tensor=1")
    assert_codes(in_ranks(2, config, *more), 0)
    adapter = run / "adapter"

    # Our model with the adapter, at two sizes, and PEFT on transformers' whole model.
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(whole, adapter).eval()
    ids = torch.randint(5, 100, (2, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = peft(input_ids=ids).logits.numpy()
    for world in (1, 2):
        found = run_ranks(world, read_and_score, str(base), str(adapter), world)[0]
        assert abs(found - expected).max() < 5e-5 * abs(expected).max()

    assert "verified on" in command("merge", "--base", base, "--adapter", adapter, "--out", merged, "--verify")
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert before.keys() == after.keys() and len(changed) == 14
    assert all(".layers." in key and "vision" not in key for key in changed)
    options = ("--prompt", "cat :", "--max-new-tokens", 4, "--device", "cpu")
    with_adapter = command("generate", "--model", base, "--adapter", adapter, *options)
    assert command("generate", "--model", merged, *options) == with_adapter
    assert "verifies" in command("inspect", adapter, "--base", base)
    command("plan", config)
    command("export", adapter, "--out", tmp_path / "exported", "--for", "vllm")
