"""The output of a program as named values, which are equal exactly when the bits are.

A file becomes one value a tensor, a JSON or YAML key, or a line of text, so a difference names its place. Values from a
clock or the machine's memory are left out. The folders of the two trees must differ, and are replaced by a word.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Values = dict[str, str]

# Keys of records that depend on a clock, or on the load of the machine.
CLOCK = ("time", "tokens_per_second", "tokens_per_second_per_rank", "tflops_per_rank", "mfu", "memory_gib", "*_seconds")
# Files of a run that are left out: timestamps a line, and drawings of numbers that are compared as numbers.
LEFT_OUT = ("logs/*", "loss.png", "tensorboard/*")


@dataclass(frozen=True)
class Difference:
    """One value that differs; `name` is CASE/VALUE. None: the value is missing."""

    name: str
    ours: str | None
    theirs: str | None
    reason: str = ""  # why the difference is allowed; empty where it is not


def compare(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], allowed: Mapping[str, str]
) -> tuple[int, list[Difference]]:
    """Return the number of compared values, and those that differ.

    ours, theirs: case → its values. allowed: pattern of CASE/VALUE → the reason why it may differ.
    """
    count, found = 0, []
    for case in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(case, {}), theirs.get(case, {})
        for value in sorted(mine.keys() | other.keys()):
            count += 1
            if mine.get(value) != other.get(value):
                name = f"{case}/{value}"
                reason = next((why for pattern, why in allowed.items() if fnmatch.fnmatchcase(name, pattern)), "")
                found.append(Difference(name, mine.get(value), other.get(value), reason))
    return count, found


def folder_values(folder: Path, places: Mapping[str, str]) -> Values:
    """Return the values of every file below a folder. places: text → the word that replaces it."""
    values: Values = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT):
            continue
        if path.is_symlink():
            values[name] = f"-> {path.readlink()}"
        elif path.is_file():
            values |= {f"{name}{inner}": value for inner, value in file_values(path, places)}
    return values


def file_values(path: Path, places: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the values of one file; their names follow the file's name."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        yield from _tensors(content)
        return
    try:
        text = replaced(content.decode(), places)
    except UnicodeDecodeError:
        yield "", _digest(content)
        return
    if path.suffix == ".json":
        yield from flat(json.loads(text))
    elif path.suffix in (".yaml", ".yml"):
        yield from flat(yaml.safe_load(text))
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines()):
            yield from flat(json.loads(line), f"[{number}]")
    else:
        yield from text_values(text)


def text_values(text: str) -> Iterator[tuple[str, str]]:
    """Yield each line of a text under its number, counted from 1."""
    for number, line in enumerate(text.splitlines(), 1):
        yield f":{number}", line


def replaced(text: str, places: Mapping[str, str]) -> str:
    """Return the text with each place, longest first, replaced by its word; also where Markdown escapes it."""
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place]).replace(place.replace("_", "\\_"), places[place])
    return text


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf of a JSON value by its path, without the values of a clock. A float's text is exact."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if not any(fnmatch.fnmatchcase(str(key), pattern) for pattern in CLOCK):
                yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from flat(inner, f"{name}[{number}]")
    else:
        yield name, json.dumps(value, default=str)


def _tensors(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield the tensors of a safetensors file, its metadata, and the file as a whole (order and padding too)."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name, described in header.items():
        if name == "__metadata__":
            yield from flat(described, ":metadata")
        else:
            start, end = described["data_offsets"]
            yield f":{name}", f"{described['dtype']} {described['shape']} {_digest(data[start:end])}"
    yield ":file", _digest(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def mask_values(files: Sequence[Path]) -> Values:
    """Return the masks that ranks have drawn, each by its counters. files: one a rank, in the order of ranks."""
    values: Values = {}
    for rank, file in enumerate(files):
        for line in sorted(file.read_text().splitlines()):
            name, _, bits = line.partition(" bits ")
            values[f"masks/rank {rank}: {name}"] = bits
    return values
