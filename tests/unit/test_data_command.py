"""`lowrank-dist data` shows exactly what the run trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from lowrank_dist.data.batches import BatchSplit, order
from lowrank_dist.data.dataset import load_dataset
from lowrank_dist.data.tokenizer import load_tokenizer
from tests.integration.launching import samples, write_config, write_jsonl
from tests.tiny_models import VOCAB, make_tiny

CHAT = [{"role": "user", "content": "the hen"}, {"role": "assistant", "content": "in the tin"}]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [*samples(20), {"prompt": "x" * 70, "completion": "y"}]
    sections = {
        "model": {"path": make_tiny("llama", tmp_path / "base"), "device": "cpu"},
        "lora": {"rank": 2, "targets": ["q_proj"]},
        "data": {
            "train": write_jsonl(tmp_path / "train.jsonl", rows),
            "eval": write_jsonl(tmp_path / "eval.jsonl", [{"messages": CHAT}]),
            "max_length": 48,
        },
        "train": {"global_batch": 6, "micro_batch": 2},
        "output": {"dir": tmp_path / "run"},
    }
    return write_config(tmp_path / "config.yaml", sections)


def shown(*arguments: object, **more: Any) -> str:
    done = CliRunner().invoke(app, ["data", *map(str, arguments)], **more)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_text_and_json_say_what_is_trained(config: Path, tmp_path: Path) -> None:
    text = shown(config, "--samples", 2)
    assert "20 of 21 samples kept; 1 over 48 tokens dropped (longest 72; line 21)" in text
    assert "<|im_start|>assistant\n⟦in the tin<|im_end|>⟧" in text and text.count("⟦") == 3
    assert not (tmp_path / "run").exists()
    found = json.loads(shown(config, "--samples", 1, "--json"))
    train, tokenizer = found["data.train"], load_tokenizer(tmp_path / "base")
    dataset = load_dataset(tmp_path / "train.jsonl", tokenizer, 48, VOCAB)
    (first,) = train["shown"]
    assert first["tokens"] == dataset[0].tokens.tolist() and first["targets"] == dataset[0].target.tolist()
    assert "".join(part for part, _ in first["text"]) == tokenizer.decode(first["tokens"])
    assert train["lengths"]["max"] == dataset.lengths.max() and train["lengths"]["min"] == dataset.lengths.min()
    assert train["target_share"] == pytest.approx(dataset.targets.sum() / dataset.lengths.sum())
    assert (train["samples"], train["kept"], train["too_long"], train["without_target"]) == (21, 20, 1, 0)
    assert found["data.eval"]["samples"] == 1
    assert "data.eval" not in shown(config, "data.eval=null", "--samples", 0)


def test_targets_are_coloured_on_a_terminal(config: Path) -> None:
    text = shown(config, "--samples", 1, env={"FORCE_COLOR": "1", "TERM": "xterm"})
    assert "⟦" not in text and "\x1b[1;32min the tin<|im_end|>\x1b[0m" in text


@pytest.mark.parametrize("plain", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}], ids=str)
def test_targets_are_bracketed_on_a_terminal_without_colours(config: Path, plain: dict[str, str]) -> None:
    text = shown(config, "--samples", 1, env={"FORCE_COLOR": "1", **plain})
    assert "⟦in the tin<|im_end|>⟧" in text and "\x1b" not in text


def test_virtual_tokens_are_not_shown(config: Path) -> None:
    text = config.read_text().replace("lora:\n  rank: 2\n  targets:\n  - q_proj\n", "")
    config.write_text(text)
    found = json.loads(shown(config, "method=prompt", "prompt.length=5", "--json"))["data.train"]
    plain = json.loads(shown(config, "method=prompt", "prompt.length=1", "--json"))["data.train"]
    assert found["shown"] == plain["shown"] and found["lengths"] == plain["lengths"]
    assert max(max(sample["tokens"]) for sample in found["shown"]) < VOCAB


def test_a_file_that_the_run_refuses(config: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"conversations": []}])
    done = CliRunner().invoke(app, ["data", str(config)])
    assert done.exit_code == 2 and "train.jsonl:1: no key 'prompt'" in done.stderr


@pytest.mark.parametrize(("packing", "dp_size", "pad"), [(False, 1, 1), (True, 1, 1), (False, 2, 4), (True, 3, 2)])
def test_positions_are_those_of_the_microbatches(
    config: Path, tmp_path: Path, packing: bool, dp_size: int, pad: int
) -> None:
    dataset = load_dataset(tmp_path / "train.jsonl", load_tokenizer(tmp_path / "base"), 48, VOCAB)
    total = tokens = made = 0
    for start in range(0, len(dataset), 6):
        numbers = order(42, len(dataset), start, 6)
        splits = [BatchSplit(2, 48, packing, rank, dp_size, pad) for rank in range(dp_size)]
        total += splits[0].positions(dataset.lengths[numbers])
        made += sum(
            part.input_ids.numel() for split in splits for part in split.batch(dataset, numbers, 0).microbatches
        )
        tokens += int(dataset.lengths[numbers].sum())
    assert total == made
    if (dp_size, pad) == (1, 1):
        found = json.loads(shown(config, f"data.packing={packing}".lower(), "--json"))["data.train"]
        assert found["fill"] == pytest.approx(tokens / total)
        assert np.isclose(found["fill"], found["fill_packed"]) == packing


def test_packing_that_pads_more_says_why(config: Path) -> None:
    """With few samples in a step, packed rows do not fill its microbatches."""
    why = "packing pads more: the train.global_batch=6 samples make too few packed rows"
    assert why in shown(config, "train.global_batch=6", "train.micro_batch=6")
    assert why not in shown(config, "train.global_batch=6", "train.micro_batch=1")


def test_a_missing_file_is_named_with_its_key(config: Path) -> None:
    done = CliRunner().invoke(app, ["data", str(config), "data.eval=/no/eval.jsonl"])
    assert done.exit_code == 2
    assert "command line: data.eval: /no/eval.jsonl: no such file; set data.eval=FILE" in done.stderr
