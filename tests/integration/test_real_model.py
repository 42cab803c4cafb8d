"""A real pretrained model, glassllm, at TP 2: transformers' logits and loss, and training that lowers the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.integration.launching import in_ranks, metrics, write_config, write_jsonl
from tests.real_models import glassllm_folder

TOLERANCE = 1e-4  # of the largest |logit|, in fp32
TEXT = "“You are quite right, Watson,” said he. “The door was shut, and I could see nothing in the room.”"
STEPS = 30
NAMES = ("Anna", "Brown", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivan", "John", "Kate", "Louis")
PLACES = ("London", "Paris", "Rome", "the sea", "the hills", "the river", "the town", "the forest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glassllm_folder(tmp_path_factory.mktemp("models"))


def sentences() -> list[dict[str, str]]:
    """Return sentences of who went where: every name with every place."""
    return [
        {"prompt": f"{name} came from {place}.", "completion": f" So {name} knows {place} well, and so does the dog."}
        for place in PLACES
        for name in NAMES
    ]


def sharded_logits(folder: str, ids: np.ndarray, sequence: bool) -> np.ndarray:
    """On one rank: return the logits [b, s, V] of a model loaded by the production loader."""
    from lowrank_dist.model.load import check_model, load_model

    input_ids = torch.from_numpy(ids)
    model: Any = load_model(
        Path(folder),
        check_model(Path(folder), 2, input_ids.size(1)),
        ranks.topology(2, sequence),
        device=torch.device("cpu"),
        dtype="auto",
        vocab_multiple=128,
        broadcast=False,
    )
    return model.logits(input_ids, torch.arange(input_ids.size(1)).expand_as(input_ids)).numpy()


@torch.inference_mode()
def test_logits_are_transformers(folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(TEXT, return_tensors="pt")["input_ids"]
    shuffled = ids[:, torch.randperm(ids.size(1), generator=torch.Generator().manual_seed(0))]
    ids = torch.cat((ids, shuffled))[:, : ids.size(1) // 2 * 2]
    expected = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)(ids).logits
    prose, noise = (torch.nn.functional.cross_entropy(expected[row, :-1], ids[row, 1:]) for row in (0, 1))
    assert prose < noise - 1, "these are no pretrained weights"
    for found in run_ranks(2, sharded_logits, str(folder), ids.numpy(), True):
        assert np.abs(found - expected.numpy()).max() <= TOLERANCE * expected.abs().max()


@torch.inference_mode()
def plain_loss(folder: Path, rows: list[dict[str, str]], adapter: Path | None = None) -> float:
    """Return the mean negative log-likelihood of completion and EOS [nats], in transformers and PEFT.

    One sample at a time.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    losses = []
    for row in rows:
        prompt, completion = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        logits = model(ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[len(prompt) - 1 :])
    return torch.cat(losses).mean().item()


def test_training_lowers_the_eval_loss(folder: Path, tmp_path: Path) -> None:
    rows = sentences()
    held_out = rows[::6]
    config = write_config(
        tmp_path / "config.yaml",
        {
            "model": {"path": folder, "device": "cpu"},
            "lora": {"rank": 4, "alpha": 8},
            "parallel": {"tensor": 2},
            "data": {
                "train": write_jsonl(tmp_path / "train.jsonl", [row for row in rows if row not in held_out]),
                "eval": write_jsonl(tmp_path / "eval.jsonl", held_out),
                "max_length": 64,
            },
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 8, "lr": 5e-3, "warmup_steps": 3},
            "eval": {"micro_batch": 8},
            "output": {"dir": tmp_path / "run", "tensorboard": False},
        },
    )
    for outcome in in_ranks(2, config):
        assert outcome.code == 0, outcome.stderr
    before, after = metrics(tmp_path / "run", "eval_loss")
    assert abs(before - plain_loss(folder, held_out)) < 1e-4
    assert abs(after - plain_loss(folder, held_out, tmp_path / "run" / "adapter")) < 1e-4
    assert after < 0.4 * before
