"""The CONTAINER block of a job script: ranks in a Pyxis/Enroot or an Apptainer container that sees the run's files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from lowrank_dist.errors import UserError
from lowrank_dist.slurm.script import array

Runtime: TypeAlias = Literal["pyxis", "apptainer"]
_BEGIN, _END = "# ==== CONTAINER: begin ====", "# ==== CONTAINER: end ===="
_LONGEST_CHAIN = 40  # links in a row, as in the kernel


class Mount(NamedTuple):
    """A path of the node, and the path under which a container sees it. The two differ only if links are relative."""

    there: Path
    seen: Path


@dataclass(frozen=True)
class Container:
    """The container of a job's ranks.

    image: a file, or an image of a registry: for Pyxis its name (nvcr.io/nvidia/pytorch:TAG), for Apptainer its URI
    (docker://nvcr.io/nvidia/pytorch:TAG).
    """

    image: str
    runtime: Runtime

    @property
    def digest(self) -> str:
        """Eight hex digits that tell images apart."""
        return hashlib.sha256(self.image.encode()).hexdigest()[:8]

    def fill(self, script: str, mounts: Iterable[Mount], workdir: Path, *, gpus: bool) -> str:
        """Return `script` with its ranks in this container.

        workdir: where the ranks start. gpus: whether they use any. Raises UserError for an image file that is not
        there.
        """
        head, begin, rest = script.partition(_BEGIN)
        block, end, tail = rest.partition(_END)
        assert end, "the template has no CONTAINER block"
        name, words = self._words(",".join(f"{there}:{seen}" for there, seen in mounts), str(workdir), gpus)
        empty, filled = f"\n{name}=()\n", f"\n{name}={array(words)}\n"
        assert empty in block
        return f"{head}{begin}{block.replace(empty, filled)}{end}{tail}"

    def _words(self, mounts: str, workdir: str, gpus: bool) -> tuple[str, list[str]]:
        """Return the variable of the block and its words."""
        image = self._found_image()
        if self.runtime == "pyxis":
            image = image if Path(image).is_absolute() else _in_enroot(image)
            options = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={workdir}"]
            return "SRUN_OPTIONS", options
        options = [*(["--nv"] if gpus else []), "--bind", mounts, "--pwd", workdir]
        return "INSIDE", ["apptainer", "exec", *options, image]

    def _found_image(self) -> str:
        """Return the image, a file by its absolute path."""
        file = Path(self.image)
        if not self.image:  # a shell variable that is not set; as a path it would be the current folder
            raise UserError("--container-image is empty; give a file or an image of a registry, or leave it out")
        if file.exists():
            return str(file.absolute())
        # Pyxis recognises a path by its first character; for Apptainer everything but a URI is a path.
        is_file = self.image.startswith(("/", ".")) if self.runtime == "pyxis" else "://" not in self.image
        if is_file or self.image.endswith((".sqsh", ".sif")):
            raise UserError(
                f"--container-image: {self.image} is not there; give a file that every node sees, or an image of a "
                f"registry, as in {'' if self.runtime == 'pyxis' else 'docker://'}nvcr.io/nvidia/pytorch:25.01-py3"
            )
        return self.image


def _in_enroot(image: str) -> str:
    """Return an image's name with a # after its registry, as Enroot separates the two."""
    name = image.removeprefix("docker://")
    registry, slash, path = name.partition("/")
    # As in Docker, the first part of a name is a registry if it has a dot or a port.
    return f"{registry}#{path}" if slash and "#" not in registry and set(registry) & set(".:") else name


def mounts_of(inputs: Mapping[str, Path], folders: Iterable[Path]) -> list[Mount]:
    """Return the mounts through which a container sees these paths; no mount lies inside another.

    inputs: key or option → a file or folder that the run reads. Targets of links in it are mounted too, as a folder in
    the Hub's cache needs. folders: those that the job itself creates if they are missing. Raises UserError for an input
    that is not there, and for a path that cannot be written in a list of mounts.
    """
    for key, path in inputs.items():
        if not path.exists():
            raise UserError(f"{key}: {path} is not there, so a container cannot mount it; correct the path")
    given = [Path(os.path.abspath(path)) for path in (*folders, *inputs.values())]
    found = _outermost(Mount(path, path) for path in given)
    seen_alone = {mount.seen for mount in found}
    linked: list[Mount] = []
    for path in (Path(os.path.abspath(path)) for path in inputs.values()):
        real = Path(os.path.realpath(path))
        linked += [Mount(real, real), *_linked(real, real)]
        if path != real and path in seen_alone:
            linked += _linked(real, path)
    found = _outermost([*found, *linked])
    for path in (path for mount in found for path in mount):
        if set(str(path)) & set(",:"):
            raise UserError(f"{path}: a container's list of mounts takes no path with a comma or a colon; rename it")
    return found


def _outermost(mounts: Iterable[Mount]) -> list[Mount]:
    """Return the mounts that do not lie in another one, by where the container sees them."""
    found: list[Mount] = []
    for mount in sorted(set(mounts), key=lambda mount: mount.seen):
        if not any(mount.seen.is_relative_to(outer.seen) for outer in found):
            found.append(mount)
    return found


def _linked(folder: Path, seen: Path) -> Iterator[Mount]:
    """Yield mounts of the folders that links directly in a folder lead to.

    seen: the folder's path in the container, from which relative links in it lead on.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        there, inside = entry, seen / entry.name
        for _ in range(_LONGEST_CHAIN):
            if not there.is_symlink():
                break
            target = os.readlink(there)
            there = Path(os.path.normpath(os.path.realpath(there.parent) / Path(target)))
            inside = Path(os.path.normpath(inside.parent / target))
            if there.is_dir():
                yield Mount(there, inside)
            elif there.parent.is_dir():
                yield Mount(there.parent, inside.parent)
