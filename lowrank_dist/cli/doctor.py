"""`lowrank-dist doctor`: whether training can run here, which kernels it would use, and why not the others.

Nothing that is looked at has to be there or intact: what fails is a row of the answer. Packages are read from their
metadata, only torch and a usable apex are imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from lowrank_dist import __version__

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# Not needed to train: what the exported adapter is read and checked with.
OPTIONAL = ("peft",)
INSTALL = "pip install --no-build-isolation -e ."
# What each does for a run.
LAUNCHERS = {
    "deepspeed": "starts the ranks of one node or several",
    "torchrun": "starts the ranks of a node in place of deepspeed",
    "srun": "starts ranks under Slurm",
    "pdsh": "carries deepspeed --hostfile to other nodes",
}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at. state: ok; off (training runs without it); else why it cannot run."""

    what: str
    state: Literal["ok", "off", "missing", "unsupported", "broken"]
    detail: str


@dataclass(frozen=True)
class Declared:
    """What the project asks for: `required` and `optional` are requirements as in pyproject.toml."""

    python: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, for a ticket.")] = False,
) -> None:
    """Say which kernels run here and why not the others; exit code 1 where training cannot run."""
    rows = diagnose()
    failing = [row.what for row in rows if row.state not in ("ok", "off")]
    if as_json:
        report = {"version": __version__, "can_train": not failing, "rows": [asdict(row) for row in rows]}
        typer.echo(json.dumps(report, indent=2))
    else:
        width = max(len(row.what) for row in rows)
        for row in rows:
            typer.echo(f"{row.what:<{width}}  {row.state:<11}  {row.detail}")
        typer.echo(f"training cannot run here: {', '.join(failing)}" if failing else "training can run here")
    if failing:
        raise typer.Exit(1)


def diagnose() -> list[Row]:
    """Every row, from what training stands on to what it does without."""
    rows = [*guarded("packages", packages), *guarded("PyTorch", pytorch)]
    if not any(row.what == "PyTorch" and row.state != "ok" for row in rows):
        for what, concern in (("GPUs", devices), ("compiled operators", operators), ("GEMM", products)):
            rows += guarded(what, concern)
    for what, concern in (("apex", apex), ("build tools", build_tools), ("launchers", launchers)):
        rows += guarded(what, concern, needed=False)
    return rows


def guarded(what: str, concern: Callable[[], Iterable[Row]], needed: bool = True) -> list[Row]:
    """The rows of a concern, or one that says what stopped it."""
    try:
        return list(concern())
    except Exception as error:  # whatever a broken installation makes of it: the reason is kept
        return [Row(what, "broken" if needed else "off", f"{type(error).__name__}: {_one_line(str(error))}")]


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
    yield Row("Python", "ok" if fits else "unsupported", f"{python} ({sys.executable}){remedy}")
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
    if fits(found):
        return [Row(name, "ok", f"{found} (supported: {text.removeprefix(name)})")]
    return [Row(name, "unsupported" if needed else "off", f"{found} is not {text.removeprefix(name)}; {remedy}")]


def pytorch(load: Callable[[str], object] = importlib.import_module) -> list[Row]:
    """Whether torch can be imported, and which build it is."""
    try:
        torch = load("torch")
    except ImportError as error:
        remedy = f"install torch for this Python (https://pytorch.org), then `{INSTALL}`"
        return [Row("PyTorch", "missing", f"{_one_line(str(error))}; {remedy}")]
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return [Row("PyTorch", "ok", f"{torch.__version__}, {build}")]


def devices() -> list[Row]:
    """The GPUs and NCCL."""
    from lowrank_dist.backend.devices import gpus, nccl

    rows = []
    try:
        rows += [Row(f"GPU {index}", "ok", facts) for index, facts in enumerate(gpus())]
    except RuntimeError as error:
        remedy = "GPUs want a CUDA build of torch and a driver that fits it; CUDA_VISIBLE_DEVICES hides them"
        rows.append(Row("GPUs", "off", f"{_one_line(str(error))}, so training runs on the CPU; {remedy}"))
    version = nccl()
    rows.append(
        Row("NCCL", "ok", version) if version else Row("NCCL", "off", "this torch has none; ranks meet over gloo")
    )
    return rows


def operators() -> list[Row]:
    """The compiled operators of both devices, and the instruction set that those of the CPU use."""
    from lowrank_dist.ops.extension import CUDA_LIBRARY, LIBRARY, cpu_capability, why_not, why_not_cuda

    rows = []
    for device, reason, library in (("CPU", why_not(), LIBRARY), ("CUDA", why_not_cuda(), CUDA_LIBRARY)):
        what = f"compiled {device} operators"
        rows.append(Row(what, "ok", str(library)) if reason is None else Row(what, "off", reason))
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    asked = f", as ATEN_CPU_CAPABILITY={limit} asks" if limit else ""
    rows.append(Row("CPU instruction set", "ok", (cpu_capability() or "PyTorch's own choice") + asked))
    return rows


def products() -> list[Row]:
    """What multiplies with a frozen fp32 weight on a CPU (ops/gemm.py)."""
    import torch

    what = "frozen fp32 GEMM on CPU"
    if torch.backends.mkldnn.is_available():
        return [Row(what, "ok", "oneDNN")]
    return [Row(what, "off", "torch.mm: this build of torch has no oneDNN")]


def apex() -> list[Row]:
    """Which apex is there, if any."""
    from lowrank_dist.backend.apex import find_apex

    found = find_apex()
    return [Row("apex", "ok" if found.usable else "off", found.reason)]


def build_tools(which: Callable[[str], str | None] = shutil.which) -> list[Row]:
    """What builds the operators; where these are built already none of it is needed."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (which(f"{home}/bin/nvcc") if home else None) or which("nvcc") or which("/usr/local/cuda/bin/nvcc")
    return [
        _program("C++ compiler", which(compiler), f"{compiler} not found: it builds the CPU operators"),
        _program("nvcc", nvcc, "not on PATH or in CUDA_HOME: it builds the CUDA operators"),
        _program("ninja", which("ninja"), "not on PATH: builds go without it, more slowly; `pip install ninja`"),
    ]


def launchers(which: Callable[[str], str | None] | None = None) -> list[Row]:
    """What can start a run."""
    found = {name: (which or _which)(name) for name in LAUNCHERS}
    return [
        Row(f"launcher {name}", "ok" if path else "off", path or f"not found: it {LAUNCHERS[name]}")
        for name, path in found.items()
    ]


def _program(what: str, path: str | None, absent: str) -> Row:
    if path is None:
        return Row(what, "off", absent)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Row(what, "off", f"{path} does not run: {_one_line(str(error))}")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # nvcc says who made it first, and in the fourth line of what release it is.
    said = next((line for line in lines if "release" in line), lines[0] if lines else "says nothing")
    return Row(what, "ok", f"{path}: {said.strip()}")


def _which(program: str) -> str | None:
    """Also beside the interpreter, where a virtual environment that is not activated has its programs."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def _one_line(text: str) -> str:
    return " ".join(text.split())
