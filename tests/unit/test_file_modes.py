"""Every kind of file that a run, an export and a merge write has the mode that the umask gives."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_dist.checkpoint.folder import export
from lowrank_dist.engine import saving
from lowrank_dist.engine.checkpoint_writer import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.formats.text_files import TextFiles
from lowrank_dist.merging.merge import merge
from lowrank_dist.merging.options import OutputFormat
from lowrank_dist.methods.files import CONFIG_FILE, LLAMA_CPP, WEIGHTS_FILE
from lowrank_dist.supervision.failure import record
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny
from tests.tiny_tokenizers import byte_level
from tests.unit.test_checkpoint_folder import SHAPES, lora_files, state_of, tensors_of
from tests.unit.test_reporter import report


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before, root = os.umask(request.param), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield request.param
    os.umask(before)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def unexpected_modes(folder: Path, umask: int) -> list[str]:
    """Return the files and folders whose mode differs from the one that the umask gives."""
    paths = [folder, *(path for path in folder.rglob("*") if not path.is_symlink())]
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in paths}
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    return [f"{path.name}: {found[path]:o}" for path in paths if found[path] != expected[path]]


def test_the_files_of_a_run(umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny("llama", tmp_path / "base")
    byte_level(base)
    run = tmp_path / "run"
    folder = RunFolder.prepare(run, "never", {}, overwrite=False)
    folder.lock()
    folder.begin("a: 1\n", anew=False)
    method: Any = SimpleNamespace(published=(CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE), files=lora_files)
    facts = Facts(Provenance("cd" * 32, "base", {}), state_of(2).data, None, TextFiles.of_run(base, base, [7]))
    writer = CheckpointWriter(folder, method, SHAPES, facts, Retention(None, 1, "loss"), None)
    writer.write([tensors_of(2)], state_of(2), final=True)
    monkeypatch.setattr(saving, "Gathering", lambda *_: None)
    shared: Any = SimpleNamespace(folder=folder, topology=None, backend=SimpleNamespace(device=None))
    engine: Any = SimpleNamespace(theta=None, optimiser=None)
    probe = {"input_ids": torch.arange(6).reshape(2, 3), "logits": torch.ones(2, 3, 5)}
    saver = CheckpointSaver(shared, engine, writer, None, print)  # type: ignore[arg-type]
    for _ in range(2):  # a resumed run replaces it
        saver.keep_probe(**probe)
    assert all(torch.equal(tensor, probe[name]) for name, tensor in load_file(folder.probe).items())
    report(run)
    record(run, "rank 0 failed first")
    kinds = {
        *("config.yaml", "rank-0.log", "metrics.jsonl", "loss.png", "probe.safetensors", "SAVED", "FAILED"),
        *("adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json"),
        "generation_config.json",
    }
    assert kinds <= {path.name for path in run.rglob("*")} and list((run / "tensorboard").iterdir())
    assert unexpected_modes(run, umask) == []
    # The control: a file that safetensors writes itself.
    save_file(probe, folder.probe)
    assert unexpected_modes(run, umask) == ([] if umask == 0o077 else ["probe.safetensors: 600"])


def test_the_files_of_an_export_and_of_a_merge(umask: int, tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    (base / "model.safetensors").chmod(0o600)  # a copied file gets the mode of a new one
    for target in (None, LLAMA_CPP):
        export(adapter, tmp_path / f"exported-{target}", target=target)
        assert unexpected_modes(tmp_path / f"exported-{target}", umask) == []
    for name, output_format in (("one", OutputFormat()), ("parts", OutputFormat(shard_size=20_000))):
        merge(base, adapter, tmp_path / name, output_format=output_format)
        assert unexpected_modes(tmp_path / name, umask) == []
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
