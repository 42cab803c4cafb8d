"""The command `lowrank-dist verify` as users start it, under torchrun and alone: exit codes, temporary files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowrank_dist.arch.model_files import CONFIG_FILE
from tests.forked import Outcome
from tests.integration.launching import environment, program, samples, write_config, write_jsonl
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verify")
    base = make_tiny("llama", place / "base")
    data = write_jsonl(place / "train.jsonl", samples(12))
    sections = {
        "model": {"path": base, "device": "cpu"},
        "data": {"train": data, "max_length": 64},
        "parallel": {"tensor": 2},
        "train": {"steps": 5, "global_batch": 4},
        "output": {"dir": place / "run"},
    }
    return write_config(place / "run.yaml", sections)


def verify(size: int, *arguments: object) -> Outcome:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--module"]
    return program([sys.executable, *(launcher if size > 1 else ["-m"]), "lowrank_dist.cli", "verify", *arguments])


def test_under_a_launcher(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 and a verdict, printed once; 1 where a fault was planted. Nothing is left behind, and no run folder is made."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "TMPDIR" in environment()
    found = verify(2, config)
    assert found.code == 0, found.stderr
    assert found.stdout.count("verified: ") == 1 and found.stdout.startswith("cut to layer 0 of 2 ")
    broken = verify(2, config, "--plant", "deferred")
    assert broken.code == 1 and broken.stdout.splitlines()[-1].startswith("DIFFERS: first in gradients, step 1"), broken
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("lowrank-dist")]
    assert left == [] and not (config.parent / "run").exists()


def test_alone_and_mistakes(config: Path, tmp_path: Path) -> None:
    """A job of one rank needs no launcher. A mistake is one message and exit code 2."""
    found = verify(1, config, "parallel.tensor=1", "method=prompt")
    assert found.code == 0 and "verified: 1 trained tensors" in found.stdout, found
    refused = verify(1, config)
    assert refused.code == 2 and "Traceback" not in refused.stderr and "parallel.tensor" in refused.stderr, refused
    lost = verify(1, config, "parallel.tensor=1", f"model.path={tmp_path}")
    assert lost.code == 2 and CONFIG_FILE in lost.stderr and "Traceback" not in lost.stderr, lost
    assert lost.stderr.count("config.json") == 1, lost
