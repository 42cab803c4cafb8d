"""The folder of one run: config.yaml, metrics.jsonl, logs/, checkpoints/, adapter/, loss.png."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lowrank_dist.errors import UserError

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

    def open(self, rank: int, config_yaml: str) -> None:
        """Make the folder, keep the resolved configuration in it (rank 0), and log to logs/rank-N.log from now on."""
        try:
            logs = self.path / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            if rank == 0:
                self.config.write_text(config_yaml)
            handler = logging.FileHandler(logs / f"rank-{rank}.log")
        except OSError as error:
            raise UserError(
                f"output.dir: cannot write {self.path}: {error.strerror}; choose a writable folder"
            ) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        root.setLevel(logging.INFO)

    def point(self, name: str, target: Path) -> None:
        """Move the link checkpoints/<name> to `target`, atomically."""
        link, temporary = self.checkpoints / name, self.checkpoints / f".{name}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(link)
