"""Loading of a run's config: defaults ← YAML ← command line, checked as a whole, every mistake reported at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from lowrank_dist.config.explain import Key, explain, suggestion
from lowrank_dist.config.schema import Config
from lowrank_dist.errors import ConfigError, UserError
from lowrank_dist.methods.registry import SECTIONS, method_package
from lowrank_dist.sections.scalars import Loader, scalar
from lowrank_dist.sections.section import MethodName, Section
from lowrank_dist.terminal import say
from lowrank_dist.untrusted.files import read_text

USAGE = "give one YAML file, then overrides without spaces: CONFIG.yaml section.key=value or --section.key value"
HELP = """usage: deepspeed [--num_gpus N | --hostfile HOSTS] launch/train.py CONFIG.yaml [OVERRIDE ...]

Train low-rank factors, or the parameters of another method, on a base model that tensor parallelism shards.

CONFIG.yaml  sections with their keys; configs/ holds examples
OVERRIDE     section.key=value, --section.key=value or --section.key value. Overrides win over the file, and a later one
             over an earlier one. A value is YAML: 2e-4, true, null, [q_proj, v_proj], {q_proj: 4}; quote it for the
             shell. The method has no section: method=prefix

`lowrank-dist config` lists every key with its type, default and meaning; `lowrank-dist config SECTION` those of one
section. `lowrank-dist plan CONFIG.yaml` says whether a run fits into memory, `lowrank-dist doctor CONFIG.yaml` whether
these machines can train it, `lowrank-dist slurm CONFIG.yaml` writes a job script.

examples:
  deepspeed --num_gpus 8 launch/train.py configs/llama-3.1-8b.yaml model.path=/models/Llama-3.1-8B-Instruct \\
      data.train=/data/train.jsonl output.dir=/runs/first
  deepspeed --num_gpus 8 launch/train.py CONFIG.yaml train.lr=1e-4 'lora.targets=[q_proj, v_proj]'
  deepspeed --num_gpus 8 launch/train.py CONFIG.yaml train.resume=auto
  torchrun --nproc_per_node 8 launch/train.py CONFIG.yaml method=prefix prefix.length=64
  DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.py CONFIG.yaml model.device=cpu

exit code: 0 success; 2 an error in the input; 85 told to stop by a signal, saved and resumable; 1 anything else"""
COMMAND_LINE = "command line"
# Largest config in bytes: five times what an adapter rank and an alpha for each module of the deepest models take.
# PyYAML reads some 100 KiB a second.
LARGEST = 256 << 10
MOST_PROBLEMS = 50
# The other fields, such as `method`, are values at the top level.
_SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


@cache
def _say_once(line: str) -> None:
    """Print a line on stderr. It is cached, since a command may load one config several times."""
    say(line, err=True)


def load_config(path: str | Path, overrides: Sequence[str] = (), note: Callable[[str], None] = _say_once) -> Config:
    """Return the config of a run: the YAML file at `path`, the overrides applied to it, and defaults for the rest.

    overrides: `section.key=value`, with values as in YAML ("train.lr=1e-4", "lora.targets=[q_proj, v_proj]",
    "method=prefix"); a later one wins over an earlier one. Relative paths are relative to the current directory. If an
    override sets the method, the file's keys of other methods are ignored. note: called with a line that names them; by
    default it goes to stderr. Raises ConfigError with all mistakes, each with file, line and key.
    """
    raw = _Raw()
    changes = _only_overrides(overrides, raw)
    return _loaded(Path(path), changes, raw, note)


def read_arguments(
    argv: Sequence[str], note: Callable[[str], None] = _say_once, *, require_data: bool = False
) -> Config:
    """Return the config that the arguments of a run's command line describe; `note` as in `load_config`.

    `argv` is CONFIG.yaml and, in any order, overrides: `section.key=value`, `--section.key value` or
    `--section.key=value`. `--local_rank=N`, which launchers add, is accepted and ignored. require_data: a data file
    that does not exist is a mistake as well.
    """
    raw = _Raw()
    path, overrides = _split_arguments(argv, raw)
    config = _loaded(path, overrides, raw, note)
    if require_data:
        _require_data(config, raw)
    return config


def _require_data(config: Config, raw: _Raw) -> None:
    """Raise ConfigError for data files that do not exist, with the place that names them."""
    remedies = {"train": "set data.train=FILE", "eval": "set data.eval=FILE, or data.eval=null for no evaluation"}
    for key, remedy in remedies.items():
        path = config.inputs.get(f"data.{key}")
        if path is not None and not path.exists():
            raw.problem(raw.where(("data", key)), f"data.{key}: {path}: no such file", remedy)
    if raw.problems:
        raise _refusal(raw.problems, len(raw.problems))


def _loaded(path: Path | None, overrides: Sequence[tuple[str, str]], raw: _Raw, note: Callable[[str], None]) -> Config:
    if path is None:
        raw.problem(COMMAND_LINE, "no config file", USAGE, fatal=True)
    else:
        raw.read(path)
    config = _checked(raw, overrides)
    for line in raw.notes:
        note(line)
    return config


def config_of(values: Mapping[str, Mapping[str, object]], overrides: Sequence[str]) -> Config:
    """Return the config of `values` (section → key → value, as in a YAML file) and the overrides.

    Raises ConfigError with all mistakes.
    """
    raw = _Raw()
    raw.values = {section: dict(keys) for section, keys in values.items()}
    return _checked(raw, _only_overrides(overrides, raw))


def _only_overrides(arguments: Sequence[str], raw: _Raw) -> list[tuple[str, str]]:
    """Return the (dotted key, text) of each override; an argument that is none is a problem."""
    if isinstance(arguments, str):  # a sequence of characters
        raise ConfigError(f"overrides: the text {arguments!r} is no list; give ['train.lr=1e-4'], for example")
    path, overrides = _split_arguments(arguments, raw)
    if path is not None:
        raw.problem(COMMAND_LINE, f"{path} is not section.key=value", "give overrides alone")
    return overrides


def _checked(raw: _Raw, overrides: Sequence[tuple[str, str]]) -> Config:
    """Return the config of the values with the overrides, checked as a whole."""
    for key, text in overrides:
        raw.override(key, text)
    raw.pass_over_other_methods()
    if raw.fatal:
        raise _refusal(raw.problems, len(raw.problems))
    for section in _SECTIONS:
        raw.values.setdefault(section, {})
    try:
        config = Config.model_validate(raw.values)
    except ValidationError as error:
        details = [detail for detail in error.errors(include_url=False) if not raw.has_refused(detail["loc"])]
        lines = explain(details[:MOST_PROBLEMS], raw.where)
        raise _refusal([*raw.problems, *lines], len(raw.problems) + len(details)) from None
    if raw.problems:
        raise _refusal(raw.problems, len(raw.problems))
    return config


def _refusal(lines: Sequence[str], count: int) -> ConfigError:
    """Return the error with the first of its lines. count: number of all problems."""
    shown = list(lines[:MOST_PROBLEMS])
    return ConfigError("\n".join(shown + [f"and {count - len(shown)} more"] * (count > len(shown))))


class _Raw:
    """Values before they are checked, the place that each came from, and the problems and notes found so far.

    refused: keys whose value is among the problems already.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.refused: set[Key] = set()
        self.fatal = False
        self.file = COMMAND_LINE
        self._origin: dict[Key, str] = {}

    def where(self, key: Key) -> str:
        """Return file:line of the key or of the key that encloses it, or "command line"."""
        for end in range(len(key), 0, -1):
            if key[:end] in self._origin:
                return self._origin[key[:end]]
        return self.file

    def has_refused(self, key: tuple[int | str, ...]) -> bool:
        """Return whether the key, or one that encloses it, is among the problems already."""
        return any(key[:end] in self.refused for end in range(1, len(key) + 1))

    def problem(self, where: str, what: str, remedy: str, *, fatal: bool = False) -> None:
        self.problems.append(f"{where}: {what}; {remedy}")
        self.fatal = self.fatal or fatal

    def read(self, path: Path) -> None:
        """Read the values of a YAML file."""
        self.file = str(path)
        if path.suffix == ".jsonl":
            remedy = f"name it in one: CONFIG data.train={path}, as in `lowrank-dist data CONFIG data.train={path}`"
            return self.problem(self.file, "a data file, not a config", remedy, fatal=True)
        try:
            text = read_text(path, USAGE, largest=LARGEST)
        except UserError as error:
            self.problems.append(str(error))
            self.fatal = True
            return
        try:
            root = yaml.compose(text, Loader)
        except yaml.YAMLError as error:
            return self.problem(*_explain_yaml(error, str(path)), "correct the YAML", fatal=True)
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            return self.problem(
                f"{path}:{root.start_mark.line + 1}", "is not a mapping", "write sections with their keys", fatal=True
            )
        for section, values in self._construct(root, (), lambda node: f"{path}:{node.start_mark.line + 1}").items():
            # YAML gives null for a section whose keys are all commented out.
            self.values[section] = {} if values is None and section in _SECTIONS else values

    def override(self, dotted: str, text: str) -> None:
        """Apply one override of the command line."""
        key = tuple(dotted.split("."))
        alone = key[0] in Config.model_fields and key[0] not in _SECTIONS
        if alone and len(key) > 1:
            return self.problem(COMMAND_LINE, f"{dotted}: {key[0]} has no keys", f"write {key[0]}=VALUE")
        if not alone and len(key) != 2:
            hint = suggestion(key[-1], Config.model_fields)
            if f"mean {dotted}?" in hint or not hint:  # a key of a section in a section, as eval.generate.batch
                hint = "for a mapping use section.key={name: value}"
            return self.problem(COMMAND_LINE, f"{dotted or '='}: keys are written section.key", hint.rstrip("; "))
        try:
            node = yaml.compose(text, Loader)
        except yaml.YAMLError as error:
            _, what = _explain_yaml(error, COMMAND_LINE)
            return self.problem(COMMAND_LINE, f"{dotted}: {what}", "quote the value, as YAML does")
        if alone:
            self._origin[key] = COMMAND_LINE
            self.values[key[0]] = None if node is None else self._construct(node, key, lambda node: COMMAND_LINE)
            return
        section = self.values.setdefault(key[0], {})
        if isinstance(section, dict):
            self._origin = {known: at for known, at in self._origin.items() if known[:2] != key}
            self._origin[key] = COMMAND_LINE
            if key[0] not in Config.model_fields:  # pydantic reports an unknown section, which YAML may not have
                self._origin.setdefault(key[:1], COMMAND_LINE)
            section[key[1]] = None if node is None else self._construct(node, key, lambda node: COMMAND_LINE)

    def pass_over_other_methods(self) -> None:
        """Remove the file's keys of other methods' sections where the command line names the method."""
        method = next((name for name in get_args(MethodName) if name == self.values.get("method")), None)
        if method is None or self._origin.get(("method",)) != COMMAND_LINE:
            return
        passed_over = []
        for name in SECTIONS:
            section = self.values.get(name)
            if name != method_package(method).section and isinstance(section, dict):
                keys = [key for key in section if self._origin.get((name, key)) != COMMAND_LINE]
                self.values[name] = {key: value for key, value in section.items() if key not in keys}
                passed_over += [f"{name} ({', '.join(keys)})"] if keys else []
        if passed_over:
            self.notes.append(
                f"{self.file}: passed over, since method={method} does not read it: {'; '.join(passed_over)}"
            )

    def _construct(self, node: yaml.Node, key: Key, place: Callable[[yaml.Node], str]) -> Any:
        """Return the node's value, and record the place of every key below it."""
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for name_node, value_node in node.value:
                self._insert(values, name_node, value_node, key, place)
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(item, key, place) for item in node.value]
        assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of nodes"
        try:
            return scalar(node)
        except ValueError as error:
            self.problem(place(node), f"{'.'.join(key)}: {error}", "see configs/ for examples")
            self.refused.add(key)
            return node.value

    def _insert(
        self,
        values: dict[str, Any],
        name_node: yaml.Node,
        value_node: yaml.Node,
        key: Key,
        place: Callable[[yaml.Node], str],
    ) -> None:
        at = place(name_node)
        if not isinstance(name_node, yaml.ScalarNode):
            return self.problem(at, f"{'.'.join(key) or 'top level'}: a key is not text", "write key: value")
        inner = (*key, name_node.value)
        if name_node.value in values:
            first = self.where(inner)
            return self.problem(at, f"{'.'.join(inner)}: given twice, first at {first}", "keep one of the two")
        self._origin[inner] = at
        values[name_node.value] = self._construct(value_node, inner, place)


def _split_arguments(argv: Sequence[str], raw: _Raw) -> tuple[Path | None, list[tuple[str, str]]]:
    """Return the config file and the (dotted key, text) of each override."""
    path: Path | None = None
    overrides: list[tuple[str, str]] = []
    rest = deque(argv)
    while rest:
        argument = rest.popleft()
        if _is_key_alone(argument):
            apart = bool(rest) and not ("=" in rest[0] or rest[0].startswith("--") or _names_file(rest[0]))
            value = rest.popleft() if apart else "VALUE"
            raw.problem(COMMAND_LINE, f"{argument} has no value", f"write {argument}={value}")
            continue
        name, has_value, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not has_value:
            if not rest:
                raw.problem(COMMAND_LINE, f"{argument} has no value", f"write {argument} VALUE")
                continue
            text = rest.popleft()
        if name in ("local_rank", "local-rank") and argument.startswith("--"):
            continue
        if has_value or argument.startswith("--"):
            overrides.append((name, text))
        elif path is None:
            path = Path(argument)
        else:
            raw.problem(COMMAND_LINE, f"{argument} is a second config file beside {path}", USAGE)
    return path, overrides


def _is_key_alone(argument: str) -> bool:
    """Return whether an argument is a key without its value, such as train.lr, and not the name of a file."""
    section, _, key = argument.partition(".")
    return (argument == "method" or section in _SECTIONS and bool(key)) and not ("=" in key or _names_file(argument))


def _names_file(argument: str) -> bool:
    path = Path(argument)
    return path.suffix in (".yaml", ".yml", ".json", ".jsonl") or path.exists()


def _explain_yaml(error: yaml.YAMLError, file: str) -> tuple[str, str]:
    """Return the place (file:line) and the reason of a YAML error."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return file, str(error).replace("\n", " ")
    mark = error.problem_mark or error.context_mark
    at = file if mark is None or file == COMMAND_LINE else f"{file}:{mark.line + 1}"
    if mark is not None and mark.buffer is not None and mark.buffer[mark.pointer : mark.pointer + 1] == "\t":
        return at, "a tab: YAML is indented with spaces only"
    return at, ", ".join(part for part in (error.context, error.problem) if part)
