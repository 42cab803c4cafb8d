"""The folder of one run: config.yaml, metrics.jsonl, logs/, checkpoints/, SAVED, adapter/, loss.png."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lowrank_dist.checkpoint.folder import is_step_folder, step_folders, step_links
from lowrank_dist.config import load_config
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.formats.atomic import final_path, is_temporary, sync, temporary_name
from lowrank_dist.formats.paths import lies_in, point_to, refuse_links
from lowrank_dist.supervision.failure import NAME as FAILED
from lowrank_dist.supervision.failure import retire
from lowrank_dist.terminal import LogFormatter, say
from lowrank_dist.untrusted.files import LINKS

logger = logging.getLogger(__name__)

# Errors of locking a file that another process has locked; EACCES on SMB.
_HELD = (errno.EAGAIN, errno.EACCES)
ENTRIES = ("config.yaml", "metrics.jsonl", "checkpoints", "adapter")


class RankLog(logging.FileHandler):
    """The log of one rank. A disk error does not end the run; it is reported once, on stderr."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Handle the exception that `emit` caught: report an OSError once, leave others to logging."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            with contextlib.suppress(OSError):
                say(f"lowrank_dist: {self.baseFilename} could not be written: {error}. The run continues", err=True)


class RunFolder:
    """The run folder and the paths in it. Rank 0 creates the folder; every rank keeps its own log in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.plot = path / "loss.png"
        self.probe = path / "probe.safetensors"
        self.tensorboard = path / "tensorboard"
        # Created with the first checkpoint: it shows that the run has saved even if its checkpoints and logs are gone.
        self.saved = path / "SAVED"
        self._found: dict[str, int] = {}
        self._has_links = True

    @classmethod
    def prepare(
        cls,
        path: Path,
        resume: Literal["never", "auto"] | Path,
        inputs: Mapping[str, Path],
        *,
        overwrite: bool,
        shaping: Mapping[str, object] | None = None,
    ) -> RunFolder:
        """Return the folder of a run that starts, or resumes as `resume` (train.resume) says. Creates nothing yet.

        inputs: config key → path that the run reads (`Config.inputs`). overwrite: output.overwrite. shaping:
        `Config.shaping`. Raises UserError if an input lies in a path that the run writes, if the folder lies in an
        input, if a link would redirect what is written, and if the folder holds a run that this one neither resumes nor
        may remove. With `resume` "auto" that last check has to wait until the checkpoints are read (`saved_run`).
        """
        folder = cls(path)
        folder.refuse_inputs(inputs)
        refuse_links(folder.written(), "output.dir")
        if not overwrite and (resume == "never" or (isinstance(resume, Path) and not folder.holds(resume))):
            folder.refuse_existing(shaping or {})
        if path.exists() and not path.is_dir():
            raise UserError(f"output.dir: {path} is a file; choose a folder")
        folder._found = folder._entries()
        return folder

    def written(self) -> list[Path]:
        """Return all paths that a run writes directly in its folder, and the existing logs."""
        logs = [] if self.logs.is_symlink() else sorted(self.logs.glob("*"))
        files = [self.config, self.metrics, self.plot, self.probe, self.saved, self.path / FAILED]
        return [*files, self.checkpoints, self.adapter, self.tensorboard, self.logs, *logs]

    def refuse_inputs(self, inputs: Mapping[str, Path]) -> None:
        """Raise UserError if the folder is or lies in an input, or if an input lies in a path that the run writes."""
        for key, source in inputs.items():
            if lies_in(self.path, source):
                raise UserError(f"output.dir: {self.path} is or lies in {key} ({source}); choose a folder outside it")
            within = next((path for path in self.written() if lies_in(source, path)), None)
            if within is not None:
                raise UserError(
                    f"{key}: {source} is or lies in {within}, which the run writes; choose another output.dir"
                )

    def refuse_existing(self, shaping: Mapping[str, object]) -> None:
        """Raise UserError where the folder already holds a run: nothing is overwritten without output.overwrite."""
        held = [name for name in ENTRIES if (self.path / name).exists()]
        if held:
            changed = self._changed(shaping)
            first = f", which these settings cannot resume ({'; '.join(changed)})" if changed else ""
            remedy = "" if changed else "resume it with train.resume=auto, "
            raise UserError(
                f"output.dir: {self.path} already has a run ({', '.join(held)}){first}; {remedy}choose another "
                "output.dir, or remove it with output.overwrite=true"
            )

    def _changed(self, shaping: Mapping[str, object]) -> list[str]:
        """Return a text on each key of `shaping` that had another value in the run that the folder holds."""
        try:
            before = load_config(self.config, note=lambda line: None).shaping
        except UserError:  # a config.yaml that is missing, edited or of another version: resuming says more
            return []
        return [
            f"{key} was {before[key]} and is now {now}"
            for key, now in shaping.items()
            if key in before and before[key] != now
        ]

    def saved_run(self) -> list[str]:
        """Return the names of entries that only a run with a checkpoint leaves, and that starting afresh would destroy.

        These are adapter/, which is copied from a checkpoint at the end, and metrics.jsonl where SAVED exists or the
        folder of checkpoints is missing. A run that was stopped before its first checkpoint, or whose disk took none,
        leaves none of them and may start again without output.overwrite.
        """
        held = [self.adapter] if self.adapter.exists() else []
        if self.metrics.exists() and (not self.checkpoints.is_dir() or self.saved.exists()):
            held.append(self.metrics)
        return [path.name for path in held]

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def holds(self, checkpoint: Path) -> bool:
        """Return True where a checkpoint lies in this run's folder of checkpoints."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def lock(self) -> None:
        """Create the folder, lock it and log to logs/rank-0.log from now on. Nothing else in it is changed yet.

        Raises UserError if the folder cannot be written, and if another process trains in it or has trained in it since
        `prepare` was called.
        """
        handler = self._open_log(0)
        try:
            unlocked = self._lock(handler)
            now = self._entries()
            newer = sorted(name for name in now if now[name] != self._found.get(name))
            if newer:
                raise UserError(
                    f"output.dir: another process wrote to {self.path} after this one started ({some_of(newer)}); "
                    "start again"
                )
        except UserError:
            handler.close()
            raise
        self._log_to(handler)
        if unlocked:
            logger.warning("%s", unlocked)
            say(f"lowrank_dist: {unlocked}", err=True)

    def log(self, rank: int) -> None:
        """Log to logs/rank-N.log from now on. Raises UserError where the folder cannot be written."""
        self._log_to(self._open_log(rank))

    def _open_log(self, rank: int) -> logging.FileHandler:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            return RankLog(self._log(rank))
        except OSError as error:
            raise UserError(
                f"output.dir: cannot write {self.path} ({error.strerror}); choose a writable folder"
            ) from error

    def _log_to(self, handler: logging.Handler) -> None:
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        root.setLevel(logging.INFO)

    def begin(self, config_yaml: str, *, anew: bool) -> None:
        """Write config.yaml, remove unfinished files that an earlier start left, and rename a FAILED that it left.

        Called once the run is known to train, after `lock`. anew: first remove the run that lies here, except its logs
        (output.overwrite). Raises UserError where the folder cannot be written.
        """
        temporary = temporary_name(self.config)
        try:
            self._clear()
            retire(self.path)
            if anew:
                self._remove_run()
            temporary.write_text(config_yaml)
            temporary.replace(self.config)
        except OSError as error:
            raise UserError(f"output.dir: cannot write {self.config} ({error.strerror}); is the disk full?") from error

    def _remove_run(self) -> None:
        checkpoints = [*step_folders(self.checkpoints).values(), *step_links(self.checkpoints)]
        links = [self.checkpoints / name for name in LINKS]
        for path in (
            *checkpoints,
            *links,
            self.adapter,
            self.metrics,
            self.plot,
            self.probe,
            self.tensorboard,
            self.saved,
        ):
            if path.exists() or path.is_symlink():
                logger.warning("removing %s of an earlier run (output.overwrite)", path)
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _lock(self, log: logging.FileHandler) -> str:
        """Lock the folder until this process ends in any way: two runs here would delete each other's checkpoints.

        Returns a line for the user where the file system has no locks, else "". Raises UserError where another process
        holds the lock.
        """
        assert log.stream is not None, "opened by its constructor"
        try:
            fcntl.flock(log.stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise UserError(
                    f"output.dir: another process trains in {self.path}; end it first (it may have outlived its "
                    "launcher), or choose another output.dir"
                ) from error
            return (
                f"{self.path} cannot be locked ({error.strerror}), so two runs in it would not be noticed; start only "
                "one"
            )
        return ""

    def _clear(self) -> None:
        """Remove a killed run's unfinished files, and no others: other programs may write here too (merge --out)."""
        own = (self.config, self.metrics, self.adapter, self.plot, self.probe, self.path / FAILED)
        names = {self.path: {path.name for path in own}, self.checkpoints: set(LINKS)}
        for folder, known in names.items():
            for child in folder.iterdir():
                target = final_path(child)
                ours = target.name in known or (folder == self.checkpoints and is_step_folder(target))
                if is_temporary(child) and ours:
                    logger.warning("removing %s, which was left unfinished", child)
                    shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    def _entries(self) -> dict[str, int]:
        """Return name → time of last change [ns] of the entries that a run in this folder creates or changes."""
        paths = (self.config, self.metrics, self.adapter, *step_folders(self.checkpoints).values())
        return {path.name: path.lstat().st_mtime_ns for path in paths if path.exists()}

    def point(self, name: str, target: Path | None) -> str:
        """Move the link checkpoints/<name> to `target`, atomically; None removes it.

        A link is a convenience, so an error is returned as a line for the user. The line is empty where there is
        nothing to report; that the file system has no links is reported once.
        """
        link = self.checkpoints / name
        try:
            if target is None:
                link.unlink(missing_ok=True)
                return ""
            had_links = self._has_links
            self._has_links = point_to(link, target)
            sync(self.checkpoints)
        except OSError as error:
            what = "removed" if target is None else f"moved to {target.name}, which is complete"
            return f"{link} could not be {what} ({error.strerror}); remove it if it is in the way"
        if self._has_links or not had_links:
            return ""
        return (
            f"{self.checkpoints}: this file system has no symbolic links, so {' and '.join(LINKS)} are files with the "
            "name of a checkpoint; lowrank-dist follows them like links, other programs need the checkpoint's own path"
        )
