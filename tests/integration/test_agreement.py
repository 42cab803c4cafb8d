"""Ranks that were given different inputs end with one message before anything is trained or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tests.dist import ranks
from tests.integration.launching import Outcome, _main, samples, write_jsonl
from tests.integration.resuming import Layout, curve, make_job, train
from tests.tiny_adapters import random_adapter, save_adapter

PAIR = Layout(1, 2, 1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


def differing(arguments: list[str], own: list[list[str]], code: bool) -> Outcome:
    """Inside a rank: run with this rank's own arguments. code: rank 1 has another version of the package."""
    from unittest import mock

    import torch.distributed as dist

    from lowrank_dist.engine import agreement

    rank = dist.get_rank()
    sources = agreement._sources()
    with mock.patch.object(agreement, "_sources", lambda: sources[: -1 if code and rank else None]):
        return _main([*arguments, *own[rank]], True)


def run_apart(job: Path, run: Path, *own: list[object], layout: Layout = PAIR, code: bool = False) -> list[Outcome]:
    """Run with each rank's own arguments."""
    arguments = [str(job), f"output.dir={run}", *layout.overrides, "train.steps=2", "eval.every=null"]
    each = [[str(word) for word in words] for words in own]
    return ranks.run_ranks(layout.tensor * layout.data, differing, arguments, each, code)


def refused(outcomes: list[Outcome], run: Path) -> str:
    """Return the one message of a run that no rank begins."""
    assert [outcome.code for outcome in outcomes] == [2] * len(outcomes), outcomes
    (said,) = (outcome.stderr for outcome in outcomes if outcome.stderr)
    assert "the ranks of this run differ: " in said and "Traceback" not in said
    assert not run.exists()
    return said


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("train.lr", "0.01", "0.02"),
        ("train.seed", "42", "7"),
        ("parallel.tensor", "1", "2"),
        ("train.resume", '"auto"', '"never"'),
        ("lora.rank", "4", "2"),
    ],
)
def test_another_configuration(job: Path, tmp_path: Path, key: str, one: str, other: str) -> None:
    value = other.strip('"')
    layout = [f"parallel.data={2 // int(other)}"] if key == "parallel.tensor" else []
    said = refused(run_apart(job, tmp_path / "run", [], [f"{key}={value}", *layout]), tmp_path / "run")
    assert f"{key} is {one} on rank 0 (" in said and f"), {other} on rank 1 (" in said
    assert "Start all ranks with one configuration" in said


def test_another_version_of_the_code(job: Path, tmp_path: Path) -> None:
    said = refused(run_apart(job, tmp_path / "run", [], [], code=True), tmp_path / "run")
    assert "lowrank_dist's code is " in said and "nodes with one installation" in said


def _another_row(place: Path, job: Path) -> list[object]:
    return [f"data.train={write_jsonl(place / 'train.jsonl', samples(21))}"]


def _another_eval_row(place: Path, job: Path) -> list[object]:
    return [f"data.eval={write_jsonl(place / 'eval.jsonl', samples(8))}"]


def _another_weight(place: Path, job: Path) -> list[object]:
    base = shutil.copytree(job.parent / "base", place / "base")
    (path,) = base.glob("*.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, path, metadata={"format": "pt"})
    return [f"model.path={base}"]


def _another_tokenizer(place: Path, job: Path) -> list[object]:
    words = shutil.copytree(job.parent / "base", place / "words")
    settings = json.loads((words / "tokenizer_config.json").read_text())
    (words / "tokenizer_config.json").write_text(json.dumps({**settings, "clean_up_tokenization_spaces": True}))
    return [f"data.tokenizer={words}"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_another_row, ["data.train is 22 samples, tokens of SHA-256 ", "21 samples"]),
        (_another_eval_row, ["data.eval is 9 samples", "8 samples"]),
        (_another_weight, ["model.path is "]),
        (_another_tokenizer, ["data.tokenizer is "]),
    ],
)
@pytest.mark.parametrize("layout", [PAIR, Layout(2, 1, 1)], ids=["DP", "TP"])
def test_other_files(
    job: Path, tmp_path: Path, change: Callable[[Path, Path], Any], named: list[str], layout: Layout
) -> None:
    said = refused(run_apart(job, tmp_path / "run", [], change(tmp_path, job), layout=layout), tmp_path / "run")
    assert [words for words in named if words not in said] == [] and said.count(" on rank ") == 2


def test_another_adapter_to_start_from(job: Path, tmp_path: Path) -> None:
    base = job.parent / "base"
    folders = []
    for seed in range(2):
        adapter = random_adapter(base, lambda module: None if module == "lm_head" else (4, 8.0), seed=seed)
        folders.append(save_adapter(tmp_path / str(seed), base, adapter))
    own = ([f"lora.init_from={folder}"] for folder in folders)
    said = refused(run_apart(job, tmp_path / "run", *own), tmp_path / "run")
    assert "lora.init_from is " in said and "but not their contents" in said


def test_copies_of_the_same_files_are_the_same_run(job: Path, tmp_path: Path) -> None:
    """The control: every node may have its own copies of all files that are read."""
    shutil.copytree(job.parent, tmp_path / "node")
    node = tmp_path / "node"
    copies = [f"model.path={node / 'base'}", f"data.tokenizer={node / 'base'}", f"data.train={node / 'train.jsonl'}"]
    copies += [f"data.eval={node / 'eval.jsonl'}"]
    outcomes = run_apart(job, tmp_path / "run", [], copies)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    same = train(job, tmp_path / "same", PAIR, "train.steps=2", "eval.every=null")
    assert [outcome.code for outcome in same] == [0, 0] and curve(tmp_path / "run") == curve(tmp_path / "same")
