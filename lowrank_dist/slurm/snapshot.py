"""A snapshot of a job's code and configuration, unaffected by later changes of the checkout."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.errors import UserError, some_of
from lowrank_dist.formats.atomic import atomic_folder
from lowrank_dist.formats.paths import require_outside

# The code that a job runs, and the compiled operators, which git ignores.
_CODE, _COMPILED = ("launch", "lowrank_dist"), "lowrank_dist/ops/*.so"
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Snapshot:
    """The files of a snapshot, and where it lies: beside the run folder, named by its content.

    files: path in `folder` → content. commit: of the checkout, as `git describe --dirty` says it.
    """

    folder: Path
    files: Mapping[str, bytes]
    commit: str

    @classmethod
    def of(cls, project: Path, config: Path, run: Path) -> Snapshot:
        """Return a snapshot of a checkout's tracked files, as they are now, of its compiled operators and of a config.

        run: the run folder. Raises UserError for a folder that is no git checkout, and for code that git does not know.
        """
        unknown = _git(project, "ls-files", "-z", "--others", "--exclude-standard", "--", *_CODE).split("\0")[:-1]
        if unknown:
            raise UserError(
                f"--snapshot: git does not track {some_of(unknown)} in {project}, so the snapshot would lack it; "
                "`git add` it, or move it away"
            )
        tracked = [project / name for name in _git(project, "ls-files", "-z", "--", *_CODE).split("\0")[:-1]]
        paths = [path for path in tracked if path.is_file()] + sorted(project.glob(_COMPILED))
        files = {path.relative_to(project).as_posix(): path.read_bytes() for path in paths}
        files[_CONFIG] = config.read_bytes()
        folder = run.with_name(f"{run.name}.code-{_digest(files)}")
        if ":" in str(folder):
            raise UserError(f"--snapshot: {folder} contains a colon, so PYTHONPATH cannot name it; rename output.dir")
        require_outside(folder)
        return cls(folder, files, _git(project, "describe", "--always", "--dirty").strip())

    @property
    def config(self) -> Path:
        return self.folder / _CONFIG

    def write(self) -> None:
        """Write the folder, unless it is there. Raises UserError where what is there has other content."""
        if self.folder.exists():
            self._require_unchanged()
            return
        with atomic_folder(self.folder) as made:
            for name, content in self.files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_bytes(content)

    def _require_unchanged(self) -> None:
        for name, content in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.read_bytes() != content:
                raise UserError(
                    f"--snapshot: {path} has changed since it was written, and jobs that wait may use it; remove "
                    f"{self.folder} if none does"
                )


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def _git(project: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(project), *words], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--snapshot: git cannot be started: {error.strerror}; install it, or leave it out") from error
    if done.returncode:
        reason = done.stderr.strip().partition("\n")[0]
        raise UserError(
            f"--snapshot: {project} is no checkout that git reads ({reason}); leave --snapshot out, and do not change "
            "the code while the job waits"
        )
    return done.stdout
