"""Checks of a node's software: Python, this project and the packages it needs, build tools and launchers.

Packages are read from their metadata; only torch is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from lowrank_dist import __version__
from lowrank_dist.doctor.rows import Row, State, Unlike, one_line, run_check

PACKAGE = Path(__file__).parents[1]
PROJECT = PACKAGE.parent / "pyproject.toml"
# Not needed to train: packages that read and check the exported adapter.
OPTIONAL = ("peft",)
INSTALL = "pip install --no-build-isolation -e ."
# The launchers and what each does for a run.
LAUNCHERS = {
    "deepspeed": "starts the ranks of one node or several",
    "torchrun": "starts the ranks of a node in place of deepspeed",
    "srun": "starts ranks under Slurm",
    "pdsh": "lets deepspeed --hostfile start ranks on other nodes",
}
NINJA = "`pip install ninja`"


@dataclass(frozen=True)
class Declared:
    """The requirements of the project, in the format of pyproject.toml."""

    python: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


def declared(project: Path = PROJECT) -> Declared:
    """Return the requirements, from pyproject.toml beside the package or, without one, from the metadata."""
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, required = table["requires-python"], table["dependencies"]
        extras = [one for extra in table["optional-dependencies"].values() for one in extra]
    else:
        metadata = importlib.metadata.metadata("lowrank-dist")
        python, everything = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
        required = [one for one in everything if "extra ==" not in one]
        extras = [one.partition(";")[0] for one in everything if "extra ==" in one]
    # A package may be listed by several extras: it is kept once.
    optional = {name: one for one in extras for name in OPTIONAL if one.startswith(name)}
    return Declared(python, tuple(required), tuple(optional.values()))


def own_sources(package: Path = PACKAGE) -> list[Row]:
    """Return a row on this project: its version, its location, and a digest of its Python files."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    version = f"{__version__}, sources {digest.hexdigest()[:12]}"
    return [Row("lowrank_dist", "ok", f"{version} ({package})", alike=version)]


def packages(
    wanted: Declared | None = None, version: Callable[[str], str | None] = importlib.metadata.version
) -> Iterator[Row]:
    """Yield rows that compare Python and the installed packages with the ranges of pyproject.toml."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted = wanted or declared()
    python = platform.python_version()
    supported = SpecifierSet(wanted.python).contains(python, prereleases=True)
    remedy = "" if supported else f"; create an environment with Python {wanted.python}"
    yield Row("Python", "ok" if supported else "unsupported", f"{python} ({sys.executable}){remedy}", alike=python)
    for needed, texts in ((True, wanted.required), (False, wanted.optional)):
        for text in texts:
            requirement = Requirement(text)
            # Pre-releases count: NVIDIA's containers ship such builds of torch.
            fits = partial(requirement.specifier.contains, prereleases=True)
            row = partial(_package, requirement.name, fits, text, version, needed)
            yield from run_check(requirement.name, row, needed)


def _package(
    name: str, fits: Callable[[str], bool], text: str, version: Callable[[str], str | None], needed: bool
) -> list[Row]:
    remedy = f"`pip install '{text}'`"
    try:
        found = version(name)
    except importlib.metadata.PackageNotFoundError:
        return [Row(name, "missing" if needed else "off", f"not installed; {remedy}")]
    if found is None:
        return [Row(name, "broken" if needed else "off", f"its metadata has no version; {remedy} installs it again")]
    unlike: Unlike = "differs" if needed else "warning"
    if fits(found):
        return [Row(name, "ok", f"{found} (supported: {text.removeprefix(name)})", found, unlike)]
    state: State = "unsupported" if needed else "off"
    return [Row(name, state, f"{found} is not {text.removeprefix(name)}; {remedy}", found, unlike)]


def pytorch(load: Callable[[str], ModuleType] = importlib.import_module) -> list[Row]:
    """Return a row on torch: whether it can be imported, and which build it is."""
    try:
        torch = load("torch")
    except ImportError as error:
        remedy = f"install torch for this Python (https://pytorch.org), then `{INSTALL}`"
        return [Row("PyTorch", "missing", f"{one_line(str(error))}; {remedy}")]
    build = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build")
    return [Row("PyTorch", "ok", build, alike=build)]


def build_tools(which: Callable[[str], str | None] = shutil.which) -> list[Row]:
    """Return rows on the tools that build the operators. None is needed where the operators are built already."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (which(f"{home}/bin/nvcc") if home else None) or which("nvcc") or which("/usr/local/cuda/bin/nvcc")
    return [
        _program("C++ compiler", which(compiler), f"{compiler} not found, but the CPU operators need it; install g++"),
        _program("nvcc", nvcc, "not on PATH or in CUDA_HOME, but the CUDA operators need it; install the CUDA toolkit"),
        ninja(which("ninja")),
    ]


def ninja(path: str | None, beside: Path = Path(sys.executable).parent) -> Row:
    """Return a row on the ninja on PATH, which torch's builds use, compared with one beside the interpreter."""
    own = shutil.which("ninja", path=str(beside))
    remedy = NINJA if own is None else f"{own} exists; put {beside} on PATH on every node"
    absent = f"not on PATH, so builds are slower and DeepSpeed's fail; {remedy}"
    row = _program("ninja", path, absent)
    if path is None or row.state != "ok":
        return row
    version = row.detail.removeprefix(f"{path}: ")
    if own is not None and (other := _program("ninja", own, "")).state == "ok":
        other_version = other.detail.removeprefix(f"{own}: ")
        if other_version != version:
            detail = (
                f"PATH has {path}, {version}, but the interpreter has {own}, {other_version}, and each builds again "
                f"what the other has built; put {beside} first on PATH on every node"
            )
            return Row("ninja", "warning", detail, version, "warning")
    return replace(row, alike=version, if_unlike="warning")


def build_locks() -> list[Row]:
    """Return a row on stale locks, left behind when a build of a torch extension was killed."""
    from lowrank_dist.backend.libraries import STALE_SECONDS, stale_build_locks

    stale = stale_build_locks()
    if not stale:
        return [Row("build locks", "ok", "no old ones")]
    rows = "; ".join(f"`rm {shlex.quote(str(path))}`" for path in stale)
    detail = (
        f"held for more than {STALE_SECONDS // 60} minutes, and every build of the same extension waits for them; if "
        f"no build is running, {rows}"
    )
    return [Row("build locks", "warning", detail)]


def launchers(which: Callable[[str], str | None] | None = None) -> list[Row]:
    """Return rows on the launchers."""
    found = {name: (which or _which)(name) for name in LAUNCHERS}
    return [
        Row(
            f"launcher {name}",
            "ok" if path else "off",
            path or f"not found ({LAUNCHERS[name]}); install it to use it",
        )
        for name, path in found.items()
    ]


def _program(what: str, path: str | None, absent: str) -> Row:
    if path is None:
        return Row(what, "off", absent)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Row(what, "off", f"{path} cannot be run ({one_line(str(error))}); install it again")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # nvcc prints its vendor first and its release in the fourth line.
    said = next((line for line in lines if "release" in line), lines[0] if lines else "prints nothing")
    return Row(what, "ok", f"{path}: {said.strip()}")


def _which(program: str) -> str | None:
    """Return the path of a program on PATH or beside the interpreter.

    A virtual environment that is not activated has its programs beside the interpreter.
    """
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
