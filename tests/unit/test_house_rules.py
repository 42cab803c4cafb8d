"""The rules of docs/DESIGN.md beyond forbidden imports: cycles, methods' names, sizes of files, citations.

Everything is read from the syntax or the text of the files, and each rule must find violations planted for it.
"""

from __future__ import annotations

import ast
import graphlib
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from docs.flowchart import parse
from tests.unit.test_architecture_rules import PACKAGE, ROOT, modules, names_in, under

# --- import cycles ---------------------------------------------------------------------------------------------------

Graph = dict[str, set[str]]


def imports(sources: Mapping[str, str], packages: Iterable[str]) -> Graph:
    """Return module → our modules that it imports, late imports included. sources: module → its source."""
    is_package = set(packages)
    graph: Graph = {}
    for module, source in sources.items():
        found = set()
        for name in names_in(source, module, module in is_package).found:
            while name and name not in sources:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {"", module, PACKAGE}
    return graph


def graph_of_children(graph: Graph, folder: str) -> Graph:
    """Return the import graph of a folder's direct children; a child folder stands for all modules below it."""

    def child(module: str) -> str:
        rest = module.removeprefix(f"{folder}.")
        return f"{folder}.{rest.partition('.')[0]}"

    inside = [module for module in graph if module != folder and under(module, folder)]
    found: Graph = {child(module): set() for module in inside}
    for module in inside:
        targets = {child(name) for name in graph[module] if name != folder and under(name, folder)}
        found[child(module)] |= targets - {child(module)}
    return found


def circle(graph: Graph) -> list[str]:
    """Return a cycle of imports, its first member repeated at the end; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        members: list[str] = error.args[1]
        return members
    return []


def circles(sources: Mapping[str, str], packages: Iterable[str]) -> dict[str, list[str]]:
    """Return a cycle between modules, and one in each folder that has any."""
    graph = imports(sources, packages)
    found = {"modules": circle(graph)}
    found |= {package: circle(graph_of_children(graph, package)) for package in packages}
    return {where: members for where, members in found.items() if members}


def test_nothing_imports_in_a_circle() -> None:
    ours = dict(modules(PACKAGE))
    packages = [name for name, path in ours.items() if path.name == "__init__.py"]
    assert {f"{PACKAGE}.arch", f"{PACKAGE}.methods.lora"} <= set(packages)
    assert circles({name: path.read_text() for name, path in ours.items()}, packages) == {}


@pytest.mark.parametrize(
    ("where", "planted"),
    [
        ("modules", {"data.batch": "from lowrank_dist.data import loader", "data.loader": "from . import batch"}),
        ("modules", {"data.batch": "def f():\n    from lowrank_dist.data.loader import x", "data.loader": ""}),
        (
            "",
            {"planner.job": "from lowrank_dist.arch.rows import x", "arch.names": "import lowrank_dist.planner.memory"},
        ),
        (
            "",
            {
                "planner.job": "from lowrank_dist.errors import UserError",
                "errors": "from lowrank_dist.planner import zero",
            },
        ),
        ("", {"a.x": "import lowrank_dist.b.x", "b.y": "import lowrank_dist.c.x", "c.y": "import lowrank_dist.a.y"}),
        ("methods", {"methods.lora.files": "from ..full import files", "methods.full.method": "from ..lora import x"}),
    ],
)
def test_a_planted_circle_is_found(where: str, planted: dict[str, str]) -> None:
    present = {*planted, "data.loader", "arch.rows", "planner.memory", "planner.zero", "a.y", "b.x", "c.x"}
    present |= {"methods.full.files", "methods.lora.x"}
    sources = {f"{PACKAGE}.{name}": planted.get(name, "") for name in present}
    if planted.get("data.loader") == "":
        sources[f"{PACKAGE}.data.loader"] = "if TYPE_CHECKING:\n    from lowrank_dist.data.batch import y"
    packages = {PACKAGE} | {name.rpartition(".")[0] for name in sources}
    packages |= {name.rpartition(".")[0] for name in packages} - {""}
    sources |= dict.fromkeys(packages, "")
    found = circles(sources, packages)
    assert (where if where == "modules" else f"{PACKAGE}.{where}".rstrip(".")) in found


def test_a_package_may_import_what_is_in_it() -> None:
    sources = {"lowrank_dist": "", "lowrank_dist.config": "from lowrank_dist.config.load import load_config"}
    sources |= {
        "lowrank_dist.config.load": "from lowrank_dist.config.schema import C",
        "lowrank_dist.config.schema": "",
    }
    assert circles(sources, ["lowrank_dist", "lowrank_dist.config"]) == {}


# --- the picture of the rooms ----------------------------------------------------------------------------------------

DESIGN = (ROOT / "docs" / "DESIGN.md").read_text()


def reachable(edges: Iterable[tuple[str, str, str]], start: str) -> set[str]:
    """Return all rooms that can be reached from `start` along the arrows."""
    found, left = set[str](), [start]
    while left:
        at = left.pop()
        new = {target for source, target, _ in edges if source == at} - found
        found |= new
        left += new
    return found


def picture_mismatches(chart: str, rooms: Graph) -> Iterator[str]:
    """Yield imports between rooms without a path in the picture, and arrows without an import."""
    edges = [edge for edge in parse(chart).edges if edge[0] != "launch"]
    for room, imported in sorted(rooms.items()):
        yield from (f"{room} imports {other}" for other in sorted(imported - reachable(edges, room)))
    yield from (f"{room} does not import {other}" for room, other, _ in edges if other not in rooms.get(room, set()))


@pytest.fixture(scope="module")
def rooms() -> Graph:
    """Return room → the rooms that it imports."""
    found = dict(modules(PACKAGE))
    packages = [module for module, path in found.items() if path.name == "__init__.py"]
    inside = graph_of_children(imports({module: path.read_text() for module, path in found.items()}, packages), PACKAGE)
    folders = {package for package in packages if package.count(".") == 1}
    return {
        room.removeprefix(f"{PACKAGE}."): {other.removeprefix(f"{PACKAGE}.") for other in inside[room] & folders}
        for room in folders
    }


def test_the_design_shows_the_rooms(rooms: Graph) -> None:
    assert set(re.findall(r"^\| `(\w+)/` \|", DESIGN, re.MULTILINE)) == set(rooms)
    (chart,) = (each for each in re.findall(r"```mermaid\n(.*?)```", DESIGN, re.DOTALL) if "launch/train.py" in each)
    assert list(picture_mismatches(chart, rooms)) == []


def test_an_arrow_too_many_or_too_few_is_found() -> None:
    rooms = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
    assert list(picture_mismatches("flowchart TB\na --> b --> c", rooms)) == []
    assert list(picture_mismatches("flowchart TB\na --> b", rooms)) == ["a imports c", "b imports c"]
    assert list(picture_mismatches("flowchart TB\na --> b --> c --> d", rooms)) == ["c does not import d"]


# --- methods' names --------------------------------------------------------------------------------------------------

METHODS_ROOM = f"{PACKAGE}.methods"
# These name a method wherever they are compared or used as a key. The others are ordinary words as well: a sample's
# prompt, a name's prefix, full recomputation.
UNAMBIGUOUS = {"lora", "adapter_h", "adapter_l"}
METHOD_NAMES = UNAMBIGUOUS | {"full", "prefix", "prompt"}
# A name of a variable that holds a method's name: any comparison with text is a branch by method.
HOLDS_METHOD = re.compile(r"(?:^|_)method(?:_name)?$")
# A name that may hold one: only a comparison with a method's name counts.
MAY_HOLD = re.compile(r"(?:^|_)kind$")


class Branches(ast.NodeVisitor):
    """Finds branches of a module on the name of a method, as (line, description).

    Outside of methods/ these count:
    - a comparison (==, !=, is, in), a case, startswith or endswith, of which one side is a text and the other is
      called `method` (a name, an attribute, a key or the argument of `.get("method")`), or is called `kind` and the
      text is a method's name;
    - a comparison or a case with an unambiguous name, or with two or more of the names in one of its operands;
    - a dict, set, list or tuple with an unambiguous name as a key or element, or with two or more of the names.

    A constant of the module counts as its text. Not counted: docstrings, help, arguments of calls, values of a dict
    (`{"method": "lora"}` describes a file), and `Literal[...]`, which lists the values and decides nothing.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[tuple[int, str]] = []
        self._constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        self.visit(tree)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        self._decide(node, [self._texts(operand) for operand in operands], operands)
        self.generic_visit(node)

    def visit_Match(self, node: ast.Match) -> None:
        for case in node.cases:
            texts = [self._text(x.value) for x in ast.walk(case.pattern) if isinstance(x, ast.MatchValue)]
            self._decide(case.pattern, [[text for text in texts if text is not None]], [node.subject])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ("startswith", "endswith") and node.args:
            self._decide(node, [self._texts(node.args[0])], [function.value])
        if isinstance(function, ast.Name) and function.id == "dict":
            self._display(node, [keyword.arg for keyword in node.keywords])
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        if name == "Literal":
            return
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        self._display(node, [self._text(key) for key in node.keys if key is not None])
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple | ast.List | ast.Set) -> None:
        self._display(node, [self._text(element) for element in node.elts])
        self.generic_visit(node)

    visit_List = visit_Set = visit_Tuple

    def _decide(self, node: ast.AST, texts: list[list[str]], operands: list[ast.expr]) -> None:
        every = [text for group in texts for text in group]
        names = [text for text in every if text in METHOD_NAMES]
        called = [self._called(operand) for operand in operands]
        by_method = any(HOLDS_METHOD.search(name) for name in called) and every
        by_kind = any(MAY_HOLD.search(name) for name in called) and names
        if (
            by_method
            or by_kind
            or UNAMBIGUOUS & set(names)
            or any(len(METHOD_NAMES & set(group)) > 1 for group in texts)
        ):
            self._note(node)

    def _display(self, node: ast.AST, texts: Iterable[str | None]) -> None:
        names = {text for text in texts if text in METHOD_NAMES}
        if len(names) > 1 or names & UNAMBIGUOUS:
            self._note(node)

    def _note(self, node: ast.AST) -> None:
        what = (node.lineno, ast.unparse(node)[:80])  # type: ignore[attr-defined]
        if what not in self.found:
            self.found.append(what)

    def _text(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self._constants.get(node.id)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    def _texts(self, node: ast.AST) -> list[str]:
        """Return the texts of an operand: itself, the elements of a list, set or tuple, or the keys of a dict."""
        inner: list[ast.AST] = [node]
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            inner = list(node.elts)
        elif isinstance(node, ast.Dict):
            inner = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("set", "frozenset", "tuple", "list"):
            return [text for argument in node.args for text in self._texts(argument)]
        return [text for text in map(self._text, inner) if text is not None]

    @staticmethod
    def _called(node: ast.AST) -> str:
        """Return the last word of an operand's name: `method` for job.method, facts["method"], method.lower()."""
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "get" and node.args and isinstance(node.args[0], ast.Constant):
                return str(node.args[0].value)
            node = node.func.value
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return str(node.slice.value)
        return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def branches(source: str) -> list[tuple[int, str]]:
    return Branches(ast.parse(source)).found


def test_nothing_outside_methods_goes_by_a_methods_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for name, path in modules(PACKAGE, "launch")
        if not under(name, METHODS_ROOM)
        for line, what in branches(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "if config.method == 'lora': pass",
        "if job.tuning.method != 'full': pass",
        "x = 'prompt' == method",
        "x = method in ('full', 'prompt')",
        "x = method not in {'prefix'}",
        "x = facts['method'] == 'full'",
        "x = state.config.get('method') == 'full'",
        "x = facts.get('config', {}).get('method') == 'full'",
        "x = config.method.lower() == 'anything'",
        "x = method is 'full'",
        "x = method.startswith('adapter')",
        "x = config.method.endswith(('_h', '_l'))",
        "x = kind in ('lora', None)",
        "x = kind == 'prefix'",
        "x = anything == 'adapter_h'",
        "x = anything in frozenset(('full', 'prompt'))",
        "FULL = 'full'\nx = tuning.method == FULL",
        "LORA: str = 'lora'\nTABLE = {LORA: 1}",
        "match config.method:\n    case 'full': pass",
        "match word:\n    case 'prefix' | 'prompt': pass",
        "match word:\n    case 'lora' if x: pass",
        "SECTION_OF = {'lora': 'lora', 'prefix': 'prefix'}",
        "placement = {'prefix': 'heads', 'prompt': 'replicated'}.get(tuning.method, '')",
        "TABLE = dict(adapter_h=2)",
        "METHODS = ('lora', 'full')",
        "for method in ['prefix', 'prompt']: pass",
        "KNOWN = {'full', 'prompt', 'other'}",
        "def f():\n    return [x for x in y if x.method == 'full']",
    ],
)
def test_a_planted_branch_by_method_is_found(source: str) -> None:
    assert branches(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "'''lora == full, in {prefix, prompt}'''",
        "x = engine.recompute == 'full'",
        "recompute: Literal['none', 'full'] = 'none'",
        "method: Literal['lora', 'full', 'prefix'] = Field('lora', description='lora, full or prefix')",
        "x = {'prompt', 'completion', 'messages'} - value.keys()",
        "row = {'prompt': text, 'completion': other}",
        "x = architecture.prefix == 'model.'",
        "x = value.get('prompt') == 'full'",
        "x = tuning.method == own.method",
        "x = FOOTPRINTS[config.method]",
        "facts = {'method': 'lora', 'kind': 'full'}",
        "x = kind in ('column', 'row')",
        "x = name.startswith('prefix')",
        "parser.add('--prompt', help='prefix, prompt or full')",
        "raise UserError(f'{method} is no method: lora, full')",
    ],
)
def test_ordinary_words_are_no_methods(source: str) -> None:
    assert branches(source) == []


# --- sizes of files --------------------------------------------------------------------------------------------------

SHORT_LINES, MOST_SHORT, MEDIAN = 60, 25, (120, 250)
_SECTION = "a section of the configuration, which may import nothing but sections"
_REFERENCE = "a method once more in a few lines of plain PyTorch, apart from the code that it checks"
# Files of fewer than SHORT_LINES lines, with the reason for each.
SHORT = {
    "errors.py": "the errors that every room raises; imports nothing of ours",
    "cli/__main__.py": "the form that launchers of modules run",
    "engine/run_method.py": "shared by a run, its plan, doctor and data, of which two must not import DeepSpeed",
    "engine/inspection.py": "where the inspection meets the config, which checkpoint/ may not import",
    "config/__init__.py": "the two names that the room offers",
    **{f"{owner}/config.py": _SECTION for owner in ("data", "model", "parallel")},
    **{f"methods/{name}/config.py": _SECTION for name in ("bottleneck", "prefix", "prompt")},
    **{f"methods/{name}/reference.py": _REFERENCE for name in ("bottleneck", "full", "prefix", "prompt")},
    "backend/node.py": "the one place that identifies a node, for rooms that load no torch as well",
    "doctor/network.py": "rows on what backend/interfaces.py finds, which a run asks too",
    "backend/megatron.py": "every patch of Megatron in one place",
    "parallel/masks.py": "which mask is drawn, apart from the operator that draws it",
}


def is_description(source: str) -> bool:
    """Return whether a file has nothing but a docstring: it then describes its folder and does not count as a file."""
    body = ast.parse(source).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def file_size_violations(lines: Mapping[str, int], reasons: Mapping[str, str]) -> Iterator[str]:
    """Yield violations of the rules on file sizes. lines: file → its lines. reasons: short file → its reason."""
    median = statistics.median(lines.values())
    if not MEDIAN[0] <= median <= MEDIAN[1]:
        yield f"the median file has {median:.0f} lines, not {MEDIAN[0]} to {MEDIAN[1]}"
    short = {name for name, count in lines.items() if count < SHORT_LINES}
    if len(short) > MOST_SHORT:
        yield f"{len(short)} files have fewer than {SHORT_LINES} lines; at most {MOST_SHORT} may"
    for name in sorted(short - reasons.keys()):
        yield f"{name}: {lines[name]} lines and no reason in SHORT"
    for name in sorted(reasons.keys() - short):
        yield f"{name}: in SHORT, but {'not short' if name in lines else 'not there'}"


def test_a_file_is_a_subject() -> None:
    files = {path.relative_to(ROOT / PACKAGE).as_posix(): path.read_text() for _, path in modules(PACKAGE)}
    counted = {
        name: len(source.splitlines())
        for name, source in files.items()
        if not (name.endswith("__init__.py") and is_description(source))
    }
    assert list(file_size_violations(counted, SHORT)) == []


def test_planted_sizes_are_found() -> None:
    usual = {f"{number}.py": 150 for number in range(99)}
    assert list(file_size_violations(usual, {})) == []
    assert list(file_size_violations({**usual, "short.py": 59}, {"short.py": "why"})) == []
    assert list(file_size_violations({**usual, "short.py": 59}, {})) == ["short.py: 59 lines and no reason in SHORT"]
    assert list(file_size_violations({**usual, "long.py": 60}, {"long.py": "why"})) == [
        "long.py: in SHORT, but not short"
    ]
    assert list(file_size_violations(usual, {"gone.py": "why"})) == ["gone.py: in SHORT, but not there"]
    many = {f"short{number}.py": 59 for number in range(26)}
    assert list(file_size_violations({**usual, **many}, dict.fromkeys(many, "why"))) == [
        "26 files have fewer than 60 lines; at most 25 may"
    ]
    for size in (119, 251):
        assert list(file_size_violations(dict.fromkeys(usual, size), {})) == [
            f"the median file has {size} lines, not 120 to 250"
        ]


def test_a_description_is_no_file() -> None:
    assert is_description('"""What lies here."""\n') and is_description("")
    assert not is_description('"""x"""\nfrom a import b') and not is_description("x = 1")


# --- parsers of untrusted input --------------------------------------------------------------------------------------

UNTRUSTED = f"{PACKAGE}.untrusted"
# All other calls of parsers, with the reason why their input is ours.
TRUSTED = {
    "backend.launchers: json.loads": "the command line of the launcher above this process",
    "backend.sharing: json.loads": "what the ranks have sent",
    "checkpoint.training_state: model_validate_json": "what the reader of JSON has passed, or rank 0 has sent",
    "config.load: yaml.compose": "by the Loader with bounds, of a text within the bound of a file",
    "data.render_child: json.loads": "what the process that has started it sends",
    "data.rendering: json.loads": "what the child has answered",
    "doctor.board: json.loads": "what a rank has put on the job's store",
    "engine.resume: json.loads": "what rank 0 has sent",
    "verify.job: json.loads": "what the ranks have sent",
    "formats.model_folder: re.fullmatch": "the names in a family's table",
    "generate.decode: json.loads": "what the ranks have sent",
    "generate.metrics: regex.compile": "scripts by their names in Unicode",
    "launch.quickstart.evaluate: json.loads": "what the quickstart has written",
    "launch.quickstart.report: json.loads": "what the quickstart has written",
    "methods.lora.serving: re.fullmatch": "the names in a family's table",
    "parallel.collectives: json.loads": "what the ranks have sent",
    "slurm.script: re.match": "the options of our own job scripts",
    "supervision.watchdog: json.loads": "the arguments that the rank gives its watchdog",
    "supervision.watchdog: re.search": "the place in a list of stacks",
}
PARSERS = {
    "json": ("load", "loads", "JSONDecoder"),
    "yaml": ("load", "load_all", "safe_load", "unsafe_load", "compose"),
}
ENGINES = ("re", "regex")
EXPRESSIONS = ("compile", "match", "fullmatch", "search", "findall", "finditer", "sub", "subn", "split")


def parsers(source: str) -> set[str]:
    """Return the calls of a module that parse JSON or YAML, or that take a regular expression that is no literal."""
    found, calls = set(), [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for node in calls:
        function = node.func
        if not isinstance(function, ast.Attribute):
            continue
        module = function.value.id if isinstance(function.value, ast.Name) else ""
        name = f"{module}.{function.attr}"
        if function.attr == "model_validate_json":
            found.add(function.attr)
        elif function.attr in PARSERS.get(module, ()):
            found.add(name)
        elif module in ENGINES and function.attr in EXPRESSIONS and not is_written(node.args[0]):
            found.add(name)
    return found


def is_written(expression: ast.expr) -> bool:
    """Return whether an expression is a literal, possibly with the module's constants or escaped text in it."""
    if isinstance(expression, ast.JoinedStr):
        return all(is_written(part) for part in expression.values)
    if isinstance(expression, ast.FormattedValue):
        inner = expression.value
        constants = [each.id for each in ast.walk(inner) if isinstance(each, ast.Name)]
        escaped = isinstance(inner, ast.Call) and ast.unparse(inner.func) == "re.escape"
        return escaped or bool(constants) and all(name.lstrip("_").isupper() for name in constants)
    return isinstance(expression, ast.Constant)


def test_what_anyone_may_have_written_is_read_in_one_room() -> None:
    found = {
        f"{name.removeprefix(f'{PACKAGE}.')}: {call}"
        for name, path in modules(PACKAGE, "launch")
        if not under(name, UNTRUSTED)
        for call in parsers(path.read_text())
    }
    assert sorted(found - TRUSTED.keys()) == [], "read it by lowrank_dist/untrusted"
    assert sorted(TRUSTED.keys() - found) == [], "in TRUSTED, but not there"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("json.loads(path.read_text())", "json.loads"),
        ("with path.open() as file:\n    x = json.load(file)", "json.load"),
        ("json.JSONDecoder().decode(text)", "json.JSONDecoder"),
        ("yaml.safe_load(text)", "yaml.safe_load"),
        ("State.model_validate_json(text)", "model_validate_json"),
        ("re.compile(pattern)", "re.compile"),
        ("re.fullmatch(targets, module)", "re.fullmatch"),
        ("re.match(rf'(.*\\.)?({key})$', module)", "re.match"),
        ("regex.search(a + b, text)", "regex.search"),
        ("any(re.search(p, x) for p in patterns)", "re.search"),
    ],
)
def test_a_planted_parser_is_found(source: str, found: str) -> None:
    assert parsers(source) == {found}


@pytest.mark.parametrize(
    "source",
    [
        "x = json.dumps(value)",
        "read_object(path, remedy)",
        "re.compile(r'\\d+')",
        "re.sub(r'a', b, text)",
        "re.match(rf'{re.escape(name)}=', line)",
        "re.compile(rf'([0-9]+)({_UNITS})')",
        "yaml.dump(value, sort_keys=False)",
        "match.group(pattern)",
    ],
)
def test_what_is_written_in_the_code_is_no_parser(source: str) -> None:
    assert parsers(source) == set()


# --- citations -------------------------------------------------------------------------------------------------------

# Documents that are not in the repository, paths outside it, and requests of people given as a reason.
OUTSIDE = re.compile(
    r"\bFACTS\b|\b(?:STYLE|MOVES|GPU)\.md\b|(?<!docs/)\bDESIGN\b(?!\.md)|\bDESIGN\.md section|\.\./shared\b|/work/"
    r"|\bthe issue(?:'s|’s)? (?:asks?|says?|wants?|word)\b|\bas (?:the issue|asked for by)\b|(?<![\w/])(?:issues?) #\d+"
)
# A document that is cited must exist.
DOCUMENT = re.compile(r"\bdocs/[\w./-]+\.(?:md|png|svg)\b")
SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".yaml", ".toml", ".cpp", ".h", ".cu", ".cuh", ".c", ".txt"}
FOLDERS = (PACKAGE, "launch", "tests", "benchmarks", "csrc", "docs", "configs", ".ci")
ALONE = ("README.md", "Makefile", "setup.py", "pyproject.toml")


def citations(text: str) -> list[str]:
    """Return the citations in a text that do not exist in the repository."""
    missing = [path for path in DOCUMENT.findall(text) if not (ROOT / path).is_file()]
    return [match.group() for match in OUTSIDE.finditer(text)] + missing


def test_nothing_outside_the_repository_is_cited() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    files += [ROOT / name for name in ALONE]
    assert len(files) > 200, "the tree was not found"
    found = {path.relative_to(ROOT).as_posix(): citations(path.read_text()) for path in files if path != Path(__file__)}
    assert {name: cited for name, cited in found.items() if cited} == {}


@pytest.mark.parametrize(
    "text",
    [
        "# lost (FACTS).",
        "see DESIGN section 1",
        "DESIGN's 5 to 7 %",
        "docs/DESIGN.md section 2",
        "../shared/rigs has them",
        "open('/work/shared/x')",
        "in two stages, as the issue asks",
        "by the issue's word",
        "STYLE.md says so",
        "see issue #12",
        "docs/NOT_THERE.md has it",
    ],
)
def test_a_planted_citation_is_found(text: str) -> None:
    assert citations(text) != []


@pytest.mark.parametrize(
    "text",
    [
        'docs/DESIGN.md, "Mathematics"',
        "[Design](DESIGN.md)",
        "DeepSpeed issue 8248",
        "deepspeed/issues/8248",
        "the issue here is",
    ],
)
def test_a_citation_of_ours_or_of_published_work_is_not_found(text: str) -> None:
    assert citations(text) == []


# --- printing --------------------------------------------------------------------------------------------------------

PRINTER = f"{PACKAGE}.terminal"
# Constructors of objects that print, or that format lines for a terminal.
_PRINTING = {"Console", "Formatter"}


def printing(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, call) of each call outside `terminal.py` that prints or makes a printer."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        if called in ("print", "pprint") or name in {"echo", "secho", *_PRINTING}:
            yield node.lineno, called
        elif called in ("sys.stdout.write", "sys.stderr.write"):
            yield node.lineno, called


def test_only_the_terminal_prints() -> None:
    sources = {name: path.read_text() for name, path in (*modules(PACKAGE), *modules("launch")) if name != PRINTER}
    found = [f"{name}:{line}: {what}" for name, source in sources.items() for line, what in printing(source)]
    assert found == []
    assert list(printing((ROOT / PACKAGE / "terminal.py").read_text())), "the rule finds the printer itself"


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "typer.echo('x', err=True)",
        "click.secho('x')",
        "def f():\n    from rich.console import Console\n    Console(stderr=True).print('x')",
        "rich.console.Console()",
        "handler.setFormatter(logging.Formatter('%(message)s'))",
        "sys.stderr.write('x')",
    ],
)
def test_planted_printing_is_found(source: str) -> None:
    assert list(printing(source))


@pytest.mark.parametrize("source", ["fingerprint(x)", "console.print(x)", "self.file.write(x)", "say(x)", "put(x)"])
def test_what_does_not_print_by_itself_is_not_found(source: str) -> None:
    assert list(printing(source)) == []


# --- modes of files --------------------------------------------------------------------------------------------------

# Calls that give a file a mode other than the umask's. A scratch folder (TemporaryDirectory) keeps no file.
_OWN_MODE = {"save_file", "save_model", "mkstemp", "mkdtemp", "NamedTemporaryFile", "chmod", "fchmod", "umask"}
_FILE_MODE, _FOLDER_MODE = 0o666, 0o777


def modes(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, call) of each call that creates a file or a folder with an explicit mode."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        given = [a for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        numbers = [a.value for a in given if isinstance(a.value, int) and not isinstance(a.value, bool)]
        by_mode = called == "os.open" and any(number != _FILE_MODE for number in numbers)
        by_mode |= name in ("mkdir", "makedirs") and any(number != _FOLDER_MODE for number in numbers)
        if name in _OWN_MODE or by_mode:
            yield node.lineno, called


def test_files_have_the_modes_that_the_umask_says() -> None:
    sources = {name: path.read_text() for name, path in (*modules(PACKAGE), *modules("launch"))}
    assert [f"{name}:{line}: {call}" for name, source in sources.items() for line, call in modes(source)] == []


@pytest.mark.parametrize(
    "source",
    [
        "save_file(tensors, path)",
        "safetensors.torch.save_file(tensors, path)",
        "tempfile.mkstemp(dir=folder)",
        "with NamedTemporaryFile(delete=False) as file: pass",
        "os.open(path, flags, 0o600)",
        "path.mkdir(mode=0o700)",
        "path.chmod(0o644)",
    ],
)
def test_a_planted_mode_is_found(source: str) -> None:
    assert list(modes(source))


@pytest.mark.parametrize("source", ["os.open(path, flags | os.O_NOFOLLOW, 0o666)", "path.mkdir(parents=True)"])
def test_a_mode_by_the_umask_is_not_found(source: str) -> None:
    assert not list(modes(source))
