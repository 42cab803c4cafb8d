"""What the thread of a save leaves for training to find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_dist.engine import saving
from lowrank_dist.engine.run import Progress
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.errors import DiskError

LOST = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:11425"


class FullDisk:
    """A writer that the disk refuses at once."""

    facts = None

    def write(self, stream: Iterator[object], state: object, *, final: bool) -> None:
        raise DiskError("no space left")


class Gathered:
    """Of three tensors the second comes from a rank that is gone, if there is one."""

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


def test_a_refused_checkpoint_and_a_lost_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ends the run is the peer: the disk it would have borne."""
    saver = saver_of(Gathered(lost=True), monkeypatch, tmp_path)
    saver.save(Progress(step=4))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        saver.finish()
