"""Python, this project and the packages that it needs, read from their metadata; only torch is imported."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lowrank_dist import __version__
from lowrank_dist.doctor.rows import Row, guarded, one_line

PACKAGE = Path(__file__).parents[1]
PROJECT = PACKAGE.parent / "pyproject.toml"
# Not needed to train: what the exported adapter is read and checked with.
OPTIONAL = ("peft",)
INSTALL = "pip install --no-build-isolation -e ."


@dataclass(frozen=True)
class Declared:
    """What the project asks for: `required` and `optional` are requirements as in pyproject.toml."""

    python: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


def declared(project: Path = PROJECT) -> Declared:
    """The requirements, from pyproject.toml beside the package or, where only the package is, from its metadata."""
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, required = table["requires-python"], table["dependencies"]
        extras = [one for extra in table["optional-dependencies"].values() for one in extra]
    else:
        metadata = importlib.metadata.metadata("lowrank-dist")
        python, everything = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
        required = [one for one in everything if "extra ==" not in one]
        extras = [one.partition(";")[0] for one in everything if "extra ==" in one]
    # An extra may be named by several: once is enough.
    optional = {name: one for one in extras for name in OPTIONAL if one.startswith(name)}
    return Declared(python, tuple(required), tuple(optional.values()))


def own_sources(package: Path = PACKAGE) -> list[Row]:
    """This project: its version, where it lies, and a digest of its Python files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    version = f"{__version__}, sources {digest.hexdigest()[:12]}"
    return [Row("lowrank_dist", "ok", f"{version} ({package})", alike=version)]


def packages(
    wanted: Declared | None = None, version: Callable[[str], str | None] = importlib.metadata.version
) -> Iterator[Row]:
    """Python and the installed packages against the ranges of pyproject.toml."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted = wanted or declared()
    python = platform.python_version()
    fits = SpecifierSet(wanted.python).contains(python, prereleases=True)
    remedy = "" if fits else f"; make an environment with a Python {wanted.python}"
    yield Row("Python", "ok" if fits else "unsupported", f"{python} ({sys.executable}){remedy}", alike=python)
    for needed, texts in ((True, wanted.required), (False, wanted.optional)):
        for text in texts:
            requirement = Requirement(text)
            # Pre-releases count: NVIDIA's containers ship such builds of torch.
            fits = partial(requirement.specifier.contains, prereleases=True)
            row = partial(_package, requirement.name, fits, text, version, needed)
            yield from guarded(requirement.name, row, needed)


def _package(
    name: str, fits: Callable[[str], bool], text: str, version: Callable[[str], str | None], needed: bool
) -> list[Row]:
    remedy = f"`pip install '{text}'`"
    try:
        found = version(name)
    except importlib.metadata.PackageNotFoundError:
        return [Row(name, "missing" if needed else "off", f"not installed; {remedy}")]
    if found is None:
        return [Row(name, "broken" if needed else "off", f"its metadata has no version; {remedy} mends it")]
    unlike = "differs" if needed else "warning"
    if fits(found):
        return [Row(name, "ok", f"{found} (supported: {text.removeprefix(name)})", found, unlike)]
    state = "unsupported" if needed else "off"
    return [Row(name, state, f"{found} is not {text.removeprefix(name)}; {remedy}", found, unlike)]


def pytorch(load: Callable[[str], object] = importlib.import_module) -> list[Row]:
    """Whether torch can be imported, and which build it is."""
    try:
        torch = load("torch")
    except ImportError as error:
        remedy = f"install torch for this Python (https://pytorch.org), then `{INSTALL}`"
        return [Row("PyTorch", "missing", f"{one_line(str(error))}; {remedy}")]
    build = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build")
    return [Row("PyTorch", "ok", build, alike=build)]
