"""The reference of a run's configuration, read from the models of its sections: every key with what it takes and means.

`lowrank-dist config` prints it, and the reference page of the documentation is made from it. Imports no torch.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lowrank_dist.config.explain import suggestion
from lowrank_dist.config.schema import Config
from lowrank_dist.errors import UserError
from lowrank_dist.sections.section import Section

REQUIRED = "required"
_TYPES: dict[object, str] = {bool: "boolean", int: "integer", float: "number", str: "text", Path: "path"}
_PLURALS = {"integer": "integers", "number": "numbers", "text": "texts", "path": "paths"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


@dataclass(frozen=True)
class KeyReference:
    """One key of the configuration.

    name: dotted, as on the command line. type: in YAML's terms. allowed: the values or bounds, empty for any value of
    the type. default: as in YAML, or `REQUIRED`.
    """

    name: str
    type: str
    allowed: str
    default: str
    meaning: str


@dataclass(frozen=True)
class SectionReference:
    """One section of the configuration, with its keys in the order of its model. name: empty for the top level."""

    name: str
    meaning: str
    keys: tuple[KeyReference, ...]

    @property
    def title(self) -> str:
        return self.name or "Top level"


def reference(name: str | None = None) -> list[SectionReference]:
    """Return every section, or the section called `name`, or the key called `name` in its section.

    Raises UserError for a name of neither.
    """
    sections = list(_sections("", Config))
    if name is None:
        return sections
    found = [section for section in sections if section.name == name]
    for section in sections:
        keys = tuple(key for key in section.keys if key.name == name)
        if keys and not found:
            found = [SectionReference(section.name, section.meaning, keys)]
    if not found:
        raise UserError(f"{name}: not a section or key of the configuration; {_meant(name, sections)}")
    return found


def to_markdown(sections: Sequence[SectionReference]) -> str:
    """Return the sections as Markdown: a heading, a sentence and a table each."""
    lines: list[str] = []
    for section in sections:
        lines += [f"## {section.title}", "", section.meaning, ""]
        lines += ["| key | type | allowed | default | meaning |", "|---|---|---|---|---|"]
        for key in section.keys:
            default = key.default if key.default == REQUIRED else f"`{key.default}`"
            cells = (f"`{key.name}`", key.type, key.allowed, default, key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _sections(name: str, model: type[Section]) -> Iterator[SectionReference]:
    """Yield a section and then the sections in it."""
    inner: list[tuple[str, type[Section]]] = []
    keys: list[KeyReference] = []
    for field_name, field in model.model_fields.items():
        dotted = f"{name}.{field_name}" if name else field_name
        section = next((each for each in (field.annotation, *get_args(field.annotation)) if _is_section(each)), None)
        if section is not None:
            inner.append((dotted, section))
        if section is None or name:
            keys.append(_key(dotted, field))
    yield SectionReference(name, " ".join((getdoc(model) or "").partition("\n\n")[0].split()), tuple(keys))
    for dotted, section in inner:
        yield from _sections(dotted, section)


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _key(name: str, field: FieldInfo) -> KeyReference:
    type_, allowed = _type_of(field.annotation)
    bounds = _bounds(field.metadata)
    default = REQUIRED if field.is_required() else _yaml(field.default)
    assert field.description, f"{name} has no description"
    return KeyReference(name, type_, ", ".join(filter(None, (bounds, allowed))), default, field.description)


def _type_of(annotation: Any) -> tuple[str, str]:
    """Return the type of a value in YAML's terms, and the values and bounds that its annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        type_, allowed = _type_of(arguments[0])
        return type_, ", ".join(filter(None, (_bounds(arguments[1:]), allowed)))
    if origin in (Union, types.UnionType):
        parts = [("null", "") if each is type(None) else _type_of(each) for each in arguments]
        names = dict.fromkeys(name for name, _ in parts)
        return " or ".join(names), ", ".join(allowed for _, allowed in parts if allowed)
    if origin is Literal:
        return _TYPES[type(arguments[0])], ", ".join(f"`{_yaml(each)}`" for each in arguments)
    if origin is list:
        type_, allowed = _type_of(arguments[0])
        return f"list of {_PLURALS[type_]}", allowed
    if origin is dict:
        (key, _), (type_, allowed) = map(_type_of, arguments)
        return f"mapping of {_PLURALS[key]} to {_PLURALS[type_]}", allowed
    if annotation is bool:
        return "boolean", "`true`, `false`"
    return ("mapping", "") if _is_section(annotation) else (_TYPES[annotation], "")


def _bounds(metadata: Sequence[Any]) -> str:
    """Return the bounds of a number. metadata: of an annotation or a field; a named type has its own inside it."""
    found: list[str] = []
    for each in metadata:
        if isinstance(each, FieldInfo):
            found += filter(None, [_bounds(each.metadata)])
        found += [f"{sign} {getattr(each, name)}" for name, sign in _BOUNDS if hasattr(each, name)]
    return ", ".join(found)


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _meant(name: str, sections: Sequence[SectionReference]) -> str:
    """Return a hint with the section or key that was probably meant, and the names of all sections."""
    known = [section.name for section in sections if section.name]
    keys = [key.name for section in sections for key in section.keys]
    return f"{suggestion(name.replace('-', '_').lower(), [*known, *keys])}the sections are {', '.join(known)}"
