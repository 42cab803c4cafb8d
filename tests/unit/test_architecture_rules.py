"""Imports that the design forbids, read from the syntax of every file; late imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

import lowrank_dist
from lowrank_dist.methods.registry import METHOD_PACKAGES
from lowrank_dist.sections.section import MethodName

ROOT = Path(__file__).parents[2]
PACKAGE = "lowrank_dist"


@dataclass(frozen=True)
class Arrow:
    """Modules under `source` (but not under `exempt`) must not name anything under `target` (but not under `but`).

    What the package itself (`lowrank_dist/__init__.py`) imports for type checkers alone does not count.
    """

    source: str
    target: str
    exempt: tuple[str, ...] = ()
    but: tuple[str, ...] = ()


def rooms(*names: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{name}" for name in names)


# The modules that define a config section's model, beside the package that owns it.
SECTIONS = (
    *rooms("model.config", "parallel.config", "data.config", "generate.config"),
    *(f"{PACKAGE}.methods.{package.folder}.config" for package in METHOD_PACKAGES if package.section is not None),
)
PUBLIC = tuple(name for name in lowrank_dist.__all__ if name != "__version__")
ARROWS = [
    Arrow(f"{PACKAGE}.config", "torch"),
    Arrow(f"{PACKAGE}.arch", PACKAGE, but=rooms("arch", "errors", "untrusted")),
    *(Arrow(f"{PACKAGE}.arch", out) for out in ("torch", "transformers", "megatron", "deepspeed", "safetensors")),
    Arrow(f"{PACKAGE}.sections", PACKAGE, but=rooms("sections", "untrusted")),
    Arrow(f"{PACKAGE}.untrusted", PACKAGE, but=rooms("untrusted", "errors", "terminal")),
    *(Arrow(room, "torch") for room in rooms("sections", "untrusted")),
    *(Arrow(section, PACKAGE, but=(f"{PACKAGE}.sections",)) for section in SECTIONS),
    *(Arrow(section, "torch") for section in SECTIONS),
    Arrow(PACKAGE, f"{PACKAGE}.config", exempt=rooms("config", "cli", "engine", "doctor", "verify")),
    Arrow("", "deepspeed", exempt=rooms("engine")),
    Arrow("", "megatron", exempt=rooms("parallel", "model", "backend")),
    Arrow("", "torch.cuda", exempt=rooms("backend")),
    Arrow("", "torch.ops.lowrank_dist", exempt=rooms("ops")),
    Arrow("", "torch.ops.load_library", exempt=rooms("ops")),
    Arrow("", f"{PACKAGE}.ops._C", exempt=rooms("ops")),
    *(Arrow(f"{PACKAGE}.model", room) for room in rooms("methods", "data", "engine", "checkpoint")),
    *(Arrow(f"{PACKAGE}.methods", room) for room in rooms("checkpoint", "engine", "data")),
    *(Arrow(f"{PACKAGE}.planner", room) for room in (*rooms("engine", "parallel", "model", "methods"), "torch")),
    *(
        Arrow(room, out)
        for room in rooms("merging", "formats")
        for out in ("deepspeed", "megatron", "torch.distributed")
    ),
    Arrow(f"{PACKAGE}.data", "torch.distributed"),
    Arrow("", "launch", exempt=("launch",)),
    # The public names are for users' programs: our modules import from the package that defines the name.
    *(Arrow(PACKAGE, name) for name in rooms(*PUBLIC)),
]
# Packages that must answer at once load none of these, not even indirectly.
LIGHT = ("arch", "planner")
HEAVY = ("torch", "transformers", "megatron", "deepspeed", "safetensors")
# Merging must not reach these, not even indirectly through our modules: it runs without a process group.
MERGE = f"{PACKAGE}.merging.merge"
OUT_OF_MERGE = ("deepspeed", "megatron", "torch.distributed")
# Files are untrusted: nothing may run code from a file.
RUNS_CODE = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "torch.load", "torch.save")
MUST_BE = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}
MOST_ARGUMENTS = 8
# A dataclass without its own __init__ is plain data and may have many fields. Two other kinds of signature are
# dictated: typer reads a command's options from its function, and torch passes every operand to forward.
ARGUMENTS_GIVEN = {f"{PACKAGE}.cli": "_command", f"{PACKAGE}.parallel.autograd": "forward"}


def under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


class Names(ast.NodeVisitor):
    """The dotted names that a module imports anywhere in it, or reaches through its imports."""

    def __init__(self, module: str, is_package: bool, at_run_time: bool) -> None:
        self._at_run_time = at_run_time
        self.found: set[str] = set()
        self.arguments: list[tuple[str, object]] = []
        self._parents = module.split(".") if is_package else module.split(".")[:-1]
        self._aliases: dict[str, str] = {}

    def visit_If(self, node: ast.If) -> None:
        if self._at_run_time and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.found.add(alias.name)
            bound = alias.asname or alias.name.partition(".")[0]
            self._aliases[bound] = alias.name if alias.asname else bound

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parents = self._parents[: len(self._parents) - node.level + 1] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        self.found.add(base)
        for alias in node.names:
            self.found.add(f"{base}.{alias.name}")
            self._aliases[alias.asname or alias.name] = f"{base}.{alias.name}"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts = [node.attr]
        value = node.value
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in self._aliases:
            self.found.add(".".join([self._aliases[value.id], *reversed(parts)]))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
            self.found.add(first.value)
        for keyword in node.keywords:
            if keyword.arg in MUST_BE:
                self.arguments.append((keyword.arg, getattr(keyword.value, "value", None)))
        self.generic_visit(node)


def names_in(source: str, module: str, is_package: bool = False, *, at_run_time: bool = False) -> Names:
    """Return the names in a module. at_run_time: leave out imports made for type checkers only."""
    tree = ast.parse(source)
    names = Names(module, is_package, at_run_time)
    # Twice: an attribute may stand above the import that binds its first name.
    names.visit(tree)
    names.visit(tree)
    return names


def broken_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    names = names_in(source, module, is_package, at_run_time=module == PACKAGE).found
    return [
        f"{module} → {name}"
        for arrow in ARROWS
        if under(module, arrow.source) and not any(under(module, room) for room in arrow.exempt)
        for name in sorted(names)
        if under(name, arrow.target) and not any(under(name, room) for room in arrow.but)
    ]


def code_from_files(source: str) -> list[str]:
    names = names_in(source, "module")
    bad = [name for name in sorted(names.found) if any(under(name, root) for root in RUNS_CODE)]
    return bad + [f"{key}={value}" for key, value in names.arguments if value is not MUST_BE[key]]


def long_signatures(source: str, module: str) -> list[str]:
    """Return the constructors and functions of a module with too many arguments; self and cls do not count."""
    given = [name for room, name in ARGUMENTS_GIVEN.items() if under(module, room)]
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        count = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
        if count > MOST_ARGUMENTS and not any(node.name.endswith(name) for name in given):
            found.append(f"{module}: {node.name} takes {count} arguments")
    return found


def modules(*folders: str) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the path of every Python file below the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).with_suffix("")
            parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
            yield ".".join(parts), path


def reachable(module: str, ours: dict[str, Path]) -> dict[str, set[str]]:
    """Return our modules that importing `module` loads, parent packages included, each with all names in it."""
    reached: dict[str, set[str]] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in reached or current not in ours:
            continue
        source, is_package = ours[current].read_text(), ours[current].name == "__init__.py"
        reached[current] = names_in(source, current, is_package, at_run_time=True).found
        waiting += [current.rpartition(".")[0], *reached[current]]
    return reached


def test_no_forbidden_arrow() -> None:
    found = list(modules(PACKAGE, "launch"))
    assert len(found) > 30, "the tree was not found"
    broken = [line for name, path in found for line in broken_arrows(path.read_text(), name, path.stem == "__init__")]
    assert broken == []


def test_constructors_and_functions_take_few_things() -> None:
    found = [line for name, path in modules(PACKAGE, "launch") for line in long_signatures(path.read_text(), name)]
    assert found == []


# The modules that read and write a method's folders. The registry imports them by name; merge, inspect and export
# depend on them.
FILES = tuple(f"{PACKAGE}.methods.{package.files_object.partition(':')[0]}" for package in METHOD_PACKAGES)


@pytest.mark.parametrize("start", [MERGE, f"{PACKAGE}.checkpoint.folder", f"{PACKAGE}.checkpoint.inspection", *FILES])
def test_files_are_read_without_a_process_group(start: str) -> None:
    reached = reachable(start, dict(modules(PACKAGE)))
    assert start in reached and f"{PACKAGE}.formats.model_folder" in reached
    bad = [f"{name}: {x}" for name, found in reached.items() for x in found if any(under(x, o) for o in OUT_OF_MERGE)]
    assert bad == []


@pytest.mark.parametrize("room", LIGHT)
def test_importing_a_light_room_loads_nothing_heavy(room: str) -> None:
    """Import every module of the package in a new process; check late imports from the syntax."""
    names = [name for name, _ in modules(f"{PACKAGE}/{room}")]
    assert len(names) > 5
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"sys.exit(', '.join(sorted(set({HEAVY}) & sys.modules.keys())) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    ours = dict(modules(PACKAGE))
    reached = {name: found for start in names for name, found in reachable(start, ours).items()}
    bad = [f"{name}: {x}" for name, found in reached.items() for x in found if any(under(x, out) for out in HEAVY)]
    assert bad == []


def loaded_by(code: str, *names: str) -> list[str]:
    """Return those of the modules `names` that a new process has loaded after it ran the code."""
    show = f"import sys\n{code}\nprint(*({set(names)} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(done.stdout.split())


TORCHLESS = (
    *(
        f"{PACKAGE}.{name}"
        for name in (
            "config",
            "sections.section",
            "sections.scalars",
            "methods.registry",
            "engine.planning",
            "engine.job_layout",
            "engine.plan",
        )
    ),
    *SECTIONS,
)


def test_configuration_and_footprints_load_no_torch() -> None:
    imports = "".join(f"import {module}\nassert 'torch' not in sys.modules, {module!r}\n" for module in TORCHLESS)
    footprints = f"[package.footprint for package in {PACKAGE}.methods.registry.METHOD_PACKAGES]"
    assert loaded_by(imports + footprints, "torch") == []
    assert loaded_by(f"import {PACKAGE}.ops.extension", "torch") == ["torch"], "the control"


def test_the_files_of_methods_load_no_megatron() -> None:
    code = f"import {PACKAGE}.checkpoint.folder, {PACKAGE}.checkpoint.inspection, {PACKAGE}.merging.merge\n"
    code += f"from {PACKAGE}.methods.registry import METHOD_PACKAGES\n"
    code += "[package.files for package in METHOD_PACKAGES]"
    assert loaded_by(code, "megatron", "deepspeed", "torch") == ["torch"]
    assert loaded_by("import megatron", "megatron") == ["megatron"], "the control"


def test_every_method_has_a_home() -> None:
    assert sorted(name for package in METHOD_PACKAGES for name in package.names) == sorted(get_args(MethodName))


def test_nothing_runs_code_from_a_file() -> None:
    files = [path for _, path in modules(PACKAGE, "launch", "benchmarks", "tests")] + [ROOT / "setup.py"]
    found = {path.relative_to(ROOT): code_from_files(path.read_text()) for path in files}
    # A test may write a file that the code under test must refuse.
    writes = {"pickle", "pickle.dump", "pickle.dumps", "torch.save"}
    found = {path: [x for x in bad if path.parts[0] != "tests" or x not in writes] for path, bad in found.items()}
    assert {str(path): bad for path, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowrank_dist.config.schema", "def f():\n    import torch"),
        ("lowrank_dist.sections.section", "from lowrank_dist.errors import UserError"),
        ("lowrank_dist.sections.section", "from ..errors import UserError"),
        ("lowrank_dist.untrusted.json", "from lowrank_dist.sections.section import Section"),
        ("lowrank_dist.untrusted.files", "import torch"),
        ("lowrank_dist.methods.lora.config", "from lowrank_dist.arch.placement import place"),
        ("lowrank_dist.generate.config", "from lowrank_dist.model.config import ModelConfig"),
        ("lowrank_dist.data.config", "import torch"),
        ("lowrank_dist.slurm", "from lowrank_dist.config.schema import Config"),
        ("lowrank_dist.supervision.rank", "def f():\n    from lowrank_dist.config import load_config"),
        ("lowrank_dist.methods.lora.adopt", "from lowrank_dist.config import Config"),
        ("lowrank_dist.checkpoint.inspection", "if TYPE_CHECKING:\n    from lowrank_dist.config import Config"),
        ("lowrank_dist.methods.lora.factors", "def f():\n    from deepspeed.runtime import zero"),
        ("launch.train", "import deepspeed"),
        ("lowrank_dist.data.batches", "import importlib\nimportlib.import_module('megatron.core')"),
        ("lowrank_dist.methods.lora.files", "from megatron.core import parallel_state"),
        ("lowrank_dist.engine.loop", "import torch\ndef f():\n    torch.cuda.synchronize()"),
        ("lowrank_dist.engine.loop", "def f():\n    t.cuda.synchronize()\nimport torch as t"),
        ("lowrank_dist.engine.loop", "from torch import cuda"),
        ("lowrank_dist.parallel.masks", "import torch\ntorch.ops.lowrank_dist.dropout(1)"),
        ("lowrank_dist.parallel.masks", "from torch import ops\nops.load_library('x')"),
        ("lowrank_dist.parallel.masks", "from lowrank_dist.ops import _C"),
        ("lowrank_dist.model.load", "if True:\n    from lowrank_dist import methods"),
        ("lowrank_dist.model.load", "import lowrank_dist.checkpoint.folder as m"),
        ("lowrank_dist.methods.lora.files", "from lowrank_dist.checkpoint.folder import x"),
        ("lowrank_dist.arch.rows", "import torch"),
        ("lowrank_dist.arch.rows", "def f():\n    from transformers import AutoConfig"),
        ("lowrank_dist.arch.rows", "from megatron.core import mpu"),
        ("lowrank_dist.arch.rows", "from lowrank_dist.formats.manifest import is_checkpoint"),
        ("lowrank_dist.arch.rows", "from lowrank_dist import config"),
        ("lowrank_dist.planner.job", "from lowrank_dist.methods.lora.footprint import LowRank"),
        ("lowrank_dist.planner.layouts", "from lowrank_dist.config import Config"),
        ("lowrank_dist.planner.job", "def f():\n    import torch"),
        ("lowrank_dist.formats.atomic", "import torch.distributed"),
        ("lowrank_dist.merging.update", "import megatron.core"),
        ("lowrank_dist.data.batches", "import torch.distributed as dist"),
        ("lowrank_dist.data.batches", "import torch\nr = torch.distributed.get_rank()"),
        ("lowrank_dist.cli.main", "from launch.train import main"),
        ("lowrank_dist.cli.data", "from lowrank_dist import load_config"),
        ("lowrank_dist.cli.data", "import lowrank_dist\nlowrank_dist.load_config('x')"),
        ("lowrank_dist", "from lowrank_dist.config import Config"),
    ],
)
def test_a_planted_arrow_is_found(module: str, source: str) -> None:
    assert broken_arrows(source, module) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowrank_dist.config.load", "from lowrank_dist.config.schema import Config\nfrom ..errors import ConfigError"),
        ("lowrank_dist.arch.rows", "from lowrank_dist.errors import UserError\nfrom lowrank_dist.arch.keys import Key"),
        ("lowrank_dist.arch.model_files", "from lowrank_dist.untrusted.json import read_object"),
        ("lowrank_dist.sections.section", "from lowrank_dist.untrusted.patterns import require_expression"),
        ("lowrank_dist.engine.assemble", "from lowrank_dist.config import Config"),
        ("lowrank_dist.methods.lora.config", "from lowrank_dist.sections.section import MethodSection"),
        ("lowrank_dist.engine.zero", "import deepspeed"),
        ("lowrank_dist.model.causal_lm", "from megatron.core.transformer.transformer_block import TransformerBlock"),
        ("lowrank_dist.backend.select", "import torch\ntorch.cuda.is_available()"),
        ("lowrank_dist.data.batches", "import torch\nx = torch.arange(3)\nx.cuda()"),
        ("lowrank_dist.engine.loop", "def f(backend):\n    return backend.torch.cuda"),
        ("lowrank_dist", "if TYPE_CHECKING:\n    from lowrank_dist.config import Config"),
        ("lowrank_dist.cli.main", "from lowrank_dist import __version__"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert broken_arrows(source, module) == []


EIGHT = ", ".join("abcdefgh")


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("engine.loop", f"class Loop:\n    def __init__(self, {EIGHT}, i): ...", 1),
        ("engine.loop", f"class Loop:\n    def __init__(self, a, /, *, {EIGHT[3:]}, i, j=1): ...", 1),
        ("engine.loop", f"def f():\n    async def g({EIGHT}, i): ...", 1),
        ("cli.merge", f"def work({EIGHT}, i): ...", 1),
        ("engine.loop", f"class Loop:\n    def __init__(self, {EIGHT}): ...", 0),
        ("engine.loop", "@dataclass\nclass Facts:\n" + "".join(f"    {name}: int\n" for name in "abcdefghij"), 0),
        ("cli.merge", f"def merge_command({EIGHT}, i): ...", 0),
        ("parallel.autograd", f"class Linear:\n    def forward(ctx, {EIGHT}, i): ...", 0),
    ],
)
def test_a_planted_long_signature_is_found(module: str, source: str, found: int) -> None:
    assert len(long_signatures(source, f"{PACKAGE}.{module}")) == found


def test_a_planted_import_below_merging_is_found(tmp_path: Path) -> None:
    ours = {MERGE: "from lowrank_dist.formats.model_folder import x", f"{PACKAGE}.formats.model_folder": ""}
    ours[f"{PACKAGE}.formats"] = "import megatron.core"
    for name, source in ours.items():
        (tmp_path / name).write_text(source)
    reached = reachable(MERGE, {name: tmp_path / name for name in ours})
    assert "megatron.core" in reached[f"{PACKAGE}.formats"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "f(weights_only=False)",
    ],
)
def test_planted_code_from_a_file_is_found(source: str) -> None:
    assert code_from_files(source) != []
    assert code_from_files("import torch\ntorch.loads = f(trust_remote_code=False, weights_only=True)") == []


def test_importing_starts_nothing() -> None:
    """Importing our modules creates no CUDA context, thread, process group or logging handler."""
    names = [name for name, _ in modules(PACKAGE)]
    code = f"""
import importlib, logging, threading, torch
before = set(threading.enumerate()), list(logging.getLogger().handlers), logging.getLogger().level
for name in {names}:
    importlib.import_module(name)
assert (set(threading.enumerate()), logging.getLogger().handlers, logging.getLogger().level) == before
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert not [n for n in logging.root.manager.loggerDict if n.startswith("{PACKAGE}") and logging.getLogger(n).handlers]
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
