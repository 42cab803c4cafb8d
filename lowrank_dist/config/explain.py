"""Errors in a config as people read them: the place, what is wrong, and the key or the word that was meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lowrank_dist.config.schema import Config, UnreadKeys
from lowrank_dist.sections.section import MethodName, Section
from lowrank_dist.sections.synonyms import of_config, of_method

Key = tuple[str, ...]

# Options of deepspeed and torchrun, which newcomers write after the script.
_LAUNCHER_OPTIONS = frozenset(
    ("num_gpus", "num_nodes", "hostfile", "include", "exclude", "master_addr", "master_port")
    + ("nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "standalone")
)


def explain(details: Iterable[ErrorDetails], where: Callable[[Key], str]) -> list[str]:
    """Return a line for each of pydantic's errors: "place: section.key: what is wrong; the remedy".

    where: returns the place of a key, as file:line or "command line". The keys of a section are listed once.
    """
    listed: set[Key] = set()
    return [_explain(detail, where, listed) for detail in details]


def _explain(detail: ErrorDetails, where: Callable[[Key], str], listed: set[Key]) -> str:
    """Return the line of an error. listed: sections whose keys are listed so far; a section listed here is added."""
    key = tuple(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where(key)}: {'.'.join(key)}: unknown key; {_meant(key, listed).rstrip('; ')}"
    field, key = _field_of(key)
    dotted = ".".join(key) + "".join(f"[{part}]" for part in detail["loc"] if isinstance(part, int))
    section = _section_in(field)
    if section is not None and detail["type"] == "value_error":
        error = detail["ctx"]["error"]  # it concerns several keys and has its remedy
        if isinstance(error, UnreadKeys):
            return "\n".join(f"{where((*key, name))}: {dotted}.{name}: {error}" for name in error.keys)
        return f"{where(key)}: {error}"
    if section is not None:
        # Axolotl has `adapter: lora` for our `method: lora`.
        method = f"did you mean method: {detail['input']}? " if detail["input"] in get_args(MethodName) else ""
        return f"{where(key)}: {dotted}: not a mapping; {method}its keys are {_names(section.model_fields)}"
    if detail["type"] == "missing":
        return f"{where(key)}: {dotted}: required; expected: {field.description}"
    message = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
    what = f"{reprlib.repr(detail['input'])} is not valid"
    choices = [word for word in get_args(field.annotation) if isinstance(word, str)]
    if detail["type"] != "literal_error" or not choices or not all(word in str(field.description) for word in choices):
        what += f", {message[0].lower()}{message[1:]}"  # otherwise the description has the choices
    meant = ""
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        theirs = of_method(detail["input"]) if key == ("method",) else None
        meant = f"{theirs}; " if theirs else _closest(detail["input"], choices)
    return f"{where(key)}: {dotted}: {what}; {meant}expected: {field.description}"


def _section_in(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, optional or not; None where it holds none."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _field_of(key: Key) -> tuple[FieldInfo, Key]:
    """Return the field in which an error lies, and its key.

    Deeper parts of the key are the name of a mapping's item, a list index, or pydantic's name of a branch.
    """
    field, depth = Config.model_fields[key[0]], 1
    while depth < len(key) and (section := _section_in(field)) is not None:
        field, depth = section.model_fields[key[depth]], depth + 1
    return field, key[: depth + 1 if get_origin(field.annotation) is dict else depth]


def _meant(key: Key, listed: set[Key]) -> str:
    """Return a hint with the key that was probably meant, and all valid keys unless it is another trainer's key.

    listed: as in `_explain`.
    """
    if of_config(key[-1]) is not None:
        return suggestion(key[-1], ())
    within = key[:-1]
    section = _section_in(_field_of(within)[0]) if within else Config
    assert section is not None, "only a section has unknown keys"
    holder, known = ".".join(within), section.model_fields
    keys = f"the keys of {holder}" if within else "the keys at the top level"
    hint = suggestion(key[-1], known, f"{holder}." if within else "")
    if within in listed:
        return hint or f"{keys} are listed above"
    listed.add(within)
    return f"{hint}{keys} are {_names(known)}"


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint on an unknown key, such as "did you mean train.lr? "; empty if no key resembles it.

    The first match counts: an option of the launcher, our key for another trainer's key, a key of this name in another
    section, or a key in `known` with a similar name. prefix: what stands before a key in `known`, such as "lora.".
    """
    if name.replace("-", "_") in _LAUNCHER_OPTIONS:
        return "it is an option of the launcher, which goes before launch/train.py; "
    synonym = of_config(name)
    if synonym is not None:
        return synonym.hint
    elsewhere = [".".join(other) for other in _keys(Config) if len(other) > 1 and other[-1] == name]
    return f"did you mean {' or '.join(elsewhere)}? " if elsewhere else _closest(name, known, prefix)


def _keys(section: type[Section]) -> Iterator[Key]:
    """Yield every key of a section and of the sections in it."""
    for name, field in section.model_fields.items():
        yield (name,)
        inner = _section_in(field)
        if inner is not None:
            yield from ((name, *rest) for rest in _keys(inner))


def _closest(name: str, known: Iterable[str], prefix: str = "") -> str:
    match = difflib.get_close_matches(name.replace("-", "_").lower(), list(known), n=1)
    return f"did you mean {prefix}{match[0]}? " if match else ""


def _names(known: Iterable[str]) -> str:
    return ", ".join(known)
