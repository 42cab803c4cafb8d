"""The folder of one run: config.yaml, metrics.jsonl, logs/, checkpoints/, adapter/, loss.png."""

from __future__ import annotations

import fcntl
import logging
import shutil
from pathlib import Path
from typing import Literal

from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import is_temporary, sync, temporary_name

logger = logging.getLogger(__name__)

ENTRIES = ("config.yaml", "metrics.jsonl", "checkpoints", "adapter")


class RunFolder:
    """Paths of a run. Rank 0 creates the folder; every rank keeps a log of its own in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.plot = path / "loss.png"
        self.probe = path / "probe.safetensors"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def prepare(cls, path: Path, resume: Literal["never", "auto"] | Path) -> RunFolder:
        """Return the folder of a run that starts, or goes on as `resume` (train.resume) says. Makes nothing yet.

        Raises UserError where it holds a run that this one does not go on with.
        """
        folder = cls(path)
        if resume == "never" or (isinstance(resume, Path) and not folder.holds(resume)):
            folder.refuse_existing()
        return folder

    def refuse_existing(self) -> None:
        """Raise UserError where a run lies here already: nothing is ever overwritten."""
        held = [name for name in ENTRIES if (self.path / name).exists()]
        if held:
            raise UserError(
                f"output.dir: {self.path} already holds a run ({', '.join(held)}); "
                "choose another output.dir or move it away"
            )
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output.dir: {self.path} is a file; choose a folder")

    def holds(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint lies in this run."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def open(self, rank: int) -> None:
        """Make the folder and log to logs/rank-N.log from now on; nothing else of an earlier run is touched yet.

        Raises UserError where the folder cannot be written, or another process trains in it.
        """
        try:
            logs = self.path / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            handler = logging.FileHandler(logs / f"rank-{rank}.log")
            if rank == 0:
                assert handler.stream is not None, "opened by its constructor"
                self._lock(handler.stream.fileno())
                self._clear()
        except OSError as error:
            raise UserError(
                f"output.dir: cannot write {self.path}: {error.strerror}; choose a writable folder"
            ) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        root.setLevel(logging.INFO)

    def begin(self, config_yaml: str) -> None:
        """Keep the resolved configuration of a run that is known to train, in place of that of the start before it.

        Raises UserError where it cannot be written.
        """
        temporary = temporary_name(self.config)
        try:
            temporary.write_text(config_yaml)
            temporary.replace(self.config)
        except OSError as error:
            raise UserError(f"output.dir: cannot write {self.config}: {error.strerror}; is the disk full?") from error

    def _lock(self, descriptor: int) -> None:
        """Held until this process ends, however it ends: two that write checkpoints here would retire each other's."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"output.dir: another process trains in {self.path}: end it first (it may have outlived its launcher), "
                "or choose another output.dir"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): never start two runs in it", self.path, error.strerror)

    def _clear(self) -> None:
        """Remove what a killed writer left behind."""
        for folder in (self.path, self.checkpoints):
            for child in folder.iterdir():
                if is_temporary(child):
                    logger.warning("removing %s, left behind unfinished", child)
                    shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    def point(self, name: str, target: Path) -> None:
        """Move the link checkpoints/<name> to `target`, atomically."""
        link = self.checkpoints / name
        temporary = temporary_name(link)
        temporary.symlink_to(target.name)
        temporary.replace(link)
        sync(self.checkpoints)
