"""The results that the saving thread leaves for the training thread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.checkpoint.folder import read_checkpoint
from lowrank_dist.checkpoint.inspect_trained import inspect_trained
from lowrank_dist.checkpoint.training_state import parse_state
from lowrank_dist.engine import saving
from lowrank_dist.engine.checkpoint_writer import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.run import Progress
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.errors import DiskError, UserError
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.methods.files import CONFIG_FILE, WEIGHTS_FILE
from tests.unit.test_checkpoint_folder import SHAPES, lora_files, state_of, tensors_of

LOST = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:11425"


class FullDisk:
    """A writer that fails at once with a full disk."""

    facts = None

    def write(self, stream: Iterator[object], state: object, *, final: bool) -> None:
        raise DiskError("no space left")


class Gathered:
    """Streams three tensors; if `lost`, the second fails since its rank is gone."""

    def __init__(self, lost: bool) -> None:
        self.lost, self.sent = lost, 0

    def stream(self, snapshot: object) -> Iterator[int]:
        for index in range(3):
            if self.lost and index == 1:
                raise RuntimeError(LOST)
            self.sent += 1
            yield index


def saver_of(gathered: Gathered, monkeypatch: pytest.MonkeyPatch, place: Path) -> CheckpointSaver:
    monkeypatch.setattr(saving, "Gathering", lambda *_: gathered)
    monkeypatch.setattr(CheckpointSaver, "_state", lambda *_: None)
    run: Any = SimpleNamespace(folder=RunFolder(place), topology=None, backend=SimpleNamespace(device=None))
    engine: Any = SimpleNamespace(theta=None, optimiser=SimpleNamespace(snapshot=lambda: torch.zeros(1)))
    return CheckpointSaver(run, engine, FullDisk(), None, lambda _: None)


def test_a_refused_checkpoint_lets_the_others_send_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gathered = Gathered(lost=False)
    saver = saver_of(gathered, monkeypatch, tmp_path)
    saver.save(Progress(step=4))
    saver.close()
    assert gathered.sent == 3
    assert saver._current.outcome == saving._REFUSED and isinstance(saver._current.error, DiskError)


def test_a_run_whose_steps_were_skipped_is_saved_and_hands_out_nothing(tmp_path: Path) -> None:
    """B is zero while no step has changed it; that is an error only after training."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    first = state_of(2).model_copy(update={"loss": None})
    facts = Facts(Provenance("cd" * 32, "base", {}), first.data, None)
    method: Any = SimpleNamespace(published=(CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE), files=lora_files)
    writer = CheckpointWriter(folder, method, SHAPES, facts, Retention(None, 1, "loss"), None)
    untrained = {name: tensor * ("lora_A" in name) for name, tensor in tensors_of(2).items()}
    writer.write([untrained], first, final=False)
    assert read_checkpoint(folder.checkpoints / "step-2") == first
    assert json.loads((folder.checkpoints / "step-2" / PROVENANCE_FILE).read_text())["training"]["loss"] is None
    with pytest.raises(UserError, match=r"all steps were skipped \(train.nonfinite=skip\)"):
        writer.write([tensors_of(2)], first, final=True)
    assert not folder.adapter.exists()
    # Controls: training without effect gives an error and no checkpoint; a trained adapter is published.
    with pytest.raises(UserError, match="B is zero in every module"):
        writer.write([untrained], state_of(4), final=False)
    writer.write([tensors_of(4)], state_of(4), final=True)
    assert folder.adapter.is_dir()


PUBLISHED = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)


def _remove(best: Path) -> None:
    shutil.rmtree(best)


def _lose_a_file(best: Path) -> None:
    (best / WEIGHTS_FILE).unlink()


def _damage(best: Path) -> None:
    data = bytearray((best / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (best / WEIGHTS_FILE).write_bytes(data)


@pytest.mark.parametrize(
    ("losses", "publish", "spoil", "published", "said"),
    [
        (
            {2: 1.0, 4: 2.0},
            "best",
            None,
            2,
            "the best by eval loss; output.publish=last takes step 4; checkpoints/last",
        ),
        (
            {2: 1.0, 4: 2.0},
            "last",
            None,
            4,
            "(checkpoints/step-4), the last; checkpoints/last: step 4; checkpoints/best",
        ),
        (
            {2: 3.0, 4: 2.0},
            "best",
            None,
            4,
            "the last and the best by eval loss; checkpoints/last: step 4",
        ),
        (
            {0: 1.0, 4: 2.0},
            "best",
            None,
            4,
            "the last and the best by eval loss; step 0, before training, was better: eval loss 1.0000; "
            "checkpoints/last: step 4",
        ),
        ({3: 1.0, 4: 2.0}, "best", None, 4, "; step 3, not a checkpoint of this run, was better: eval loss 1.0000;"),
        ({}, "best", None, 4, "(checkpoints/step-4), the last; checkpoints/last: step 4"),
        ({2: 1.0, 4: 2.0}, "best", _remove, 4, "the last; step 2 is better and could not be published: "),
        ({2: 1.0, 4: 2.0}, "best", _lose_a_file, 4, f"{WEIGHTS_FILE}: missing; take another checkpoint"),
        ({2: 1.0, 4: 2.0}, "best", _damage, 4, f"{WEIGHTS_FILE}: changed after it was written"),
    ],
)
def test_adapter_is_the_step_that_publish_says(
    losses: dict[int, float], publish: Any, spoil: Any, published: int, said: str, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    method: Any = SimpleNamespace(published=PUBLISHED, files=lora_files)
    facts = Facts(Provenance("cd" * 32, "base", {}), state_of(2).data, None)
    # Keep the fewest checkpoints allowed, so that as many as possible are retired.
    writer = CheckpointWriter(folder, method, SHAPES, facts, Retention(1, 0, "loss", publish), None)
    for step in (2, 4):
        until = {at: value for at, value in losses.items() if at <= step}
        writer.write([tensors_of(step)], state_of(step).model_copy(update={"eval_losses": until}), final=False)
        if step == 2 and spoil is not None:
            spoil(folder.checkpoints / "step-2")
    assert not folder.adapter.exists()
    writer.write([tensors_of(4)], state_of(4).model_copy(update={"eval_losses": losses}), final=True)
    source = folder.checkpoints / f"step-{published}"
    assert {path.name for path in folder.adapter.iterdir()} == set(PUBLISHED)
    assert all((folder.adapter / name).read_bytes() == (source / name).read_bytes() for name in PUBLISHED)
    assert writer.summary.startswith(f"{folder.adapter} is step {published} (checkpoints/step-{published}), ")
    assert said in writer.summary
    assert writer.published_before_last() == (None if published == 4 else source)
    assert inspect_trained(folder.adapter).facts["step"] == published
    # After a kill between the last checkpoint and adapter/, the run resumes at its end and publishes the same.
    before = {name: (folder.adapter / name).read_bytes() for name in PUBLISHED}
    shutil.rmtree(folder.adapter)
    last = read_checkpoint(folder.checkpoints / "step-4")
    resumed = CheckpointWriter(folder, method, SHAPES, facts, Retention(1, 0, "loss", publish), last)
    resumed.write([tensors_of(4)], last, final=True)
    assert {name: (folder.adapter / name).read_bytes() for name in PUBLISHED} == before


def test_a_best_step_in_which_nothing_was_trained_is_not_published(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    method: Any = SimpleNamespace(published=PUBLISHED, files=lora_files)
    facts = Facts(Provenance("cd" * 32, "base", {}), state_of(2).data, None)
    writer = CheckpointWriter(folder, method, SHAPES, facts, Retention(None, 1, "loss"), None)
    untrained = state_of(2).model_copy(update={"loss": None, "eval_losses": {2: 1.0}})
    writer.write([tensors_of(2)], untrained, final=False)
    last = state_of(4).model_copy(update={"eval_losses": {2: 1.0, 4: 2.0}})
    writer.write([tensors_of(4)], last, final=True)
    assert f"{folder.adapter} is step 4" in writer.summary and "step-2 has the initial values" in writer.summary


@given(
    step=st.integers(1, 10**6),
    counts=st.tuples(*[st.integers(0, 10**12)] * 4),
    epoch=st.floats(0, 1e6),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
def test_every_state_reads_back(step: int, counts: tuple[int, ...], epoch: float, loss: float | None) -> None:
    names = ("samples", "position", "tokens", "updates")
    progress = Progress(step=step, epoch=epoch, loss=loss, **dict(zip(names, counts, strict=True)))
    facts = {name: getattr(progress, name) for name in Progress.__dataclass_fields__}
    state = state_of(1).model_copy(update=facts)
    assert parse_state(state.to_json().encode()) == state


def test_a_refused_checkpoint_and_a_lost_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lost peer ends the run; the full disk alone would not."""
    saver = saver_of(Gathered(lost=True), monkeypatch, tmp_path)
    saver.save(Progress(step=4))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        saver.finish()
