"""The only parser of untrusted JSON, with a bound on each thing that can grow.

Refused besides malformed JSON: too large a file, too deep nesting, an integer beyond every float, an unpaired
surrogate, text that is not UTF-8. On request also a key that is given twice (other parsers take the last) and NaN or
infinity (published configurations have them: `"time_step_limit": [0.0, Infinity]`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lowrank_dist.errors import UserError
from lowrank_dist.terminal import escape_all
from lowrank_dist.untrusted.files import MIB, read_bytes, short_path

T = TypeVar("T")
# The largest published files are indices of some thousand shards, below 16 MiB. Parsed JSON takes up to 30 times the
# size of its file.
LARGEST = 32 * MIB
DEEPEST = 100
# The largest float has 309 digits, and Python converts at most 4300; a tokenizer's model_max_length has 31.
_MOST_DIGITS = 308
# A text, an integer that is too long, or another number. Possessive, so that none is tried again in parts.
_LONG_INTEGERS = re.compile(
    rf'"[^"\\]*+(?:\\.[^"\\]*+)*+"|(?P<long>-?\d{{{_MOST_DIGITS + 1},}}+)(?!\.\d|[eE][-+]?\d)|-?\d[\d.eE+-]*+',
    re.DOTALL | re.ASCII,
)
_HALF_PAIR_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_NAMES: Mapping[type, str] = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class JsonError(ValueError):
    """A fault in a JSON text. line: its number from 1; None where the message names a key, or no line is known."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


def parse_json(content: bytes | str, *, unique: bool = False, finite: bool = False) -> Any:
    """Return the value of a JSON text. Raises JsonError.

    unique: refuse a key that an object has twice. finite: refuse NaN and infinity.
    """
    text = _decoded(content)
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_finite if finite else None,
            parse_constant=_refuse_constant if finite else None,
            object_pairs_hook=_unique if unique else None,
        )
    except json.JSONDecodeError as error:
        raise JsonError(f"malformed JSON at column {error.colno}: {error.msg}", error.lineno) from error
    except RecursionError as error:
        raise JsonError(_TOO_DEEP) from error
    except _LongInteger as error:
        line, column = _place_of_digits(text)
        raise JsonError(
            f"{_key_of_digits(text)}an integer of {error.count} digits at column {column}; the limit is {_MOST_DIGITS}",
            line,
        ) from error
    _refuse_depth(value)
    if _HALF_PAIR_ESCAPED.search(text):
        _refuse_half_pairs(value)
    return value


def read_json(path: Path, remedy: str, *, largest: int = LARGEST, unique: bool = False, finite: bool = False) -> Any:
    """Return the value in a file, as `parse_json` does. Raises UserError with the place of the fault and the remedy."""
    content = read_bytes(path, remedy, largest=largest)
    try:
        return parse_json(content, unique=unique, finite=finite)
    except JsonError as fault:
        line = "" if fault.line is None else f":{fault.line}"
        raise UserError(f"{short_path(path)}{line}: {fault}; {remedy}") from fault


def read_object(
    path: Path, remedy: str, *, largest: int = LARGEST, unique: bool = False, finite: bool = False
) -> dict[str, Any]:
    """Return the object in a file; raise UserError as `read_json` does, and for a value that is no object."""
    value = read_json(path, remedy, largest=largest, unique=unique, finite=finite)
    if not isinstance(value, dict):
        raise UserError(f"{short_path(path)}: expected a JSON object, found {type(value).__name__}; {remedy}")
    return value


def typed_value(
    values: Mapping[str, Any], key: str, kind: type[T], where: Path | str, remedy: str = "correct it"
) -> T | None:
    """Return the value of a key, None where it is absent or null; raise UserError where it is of another type.

    kind: str, int, float (any number), bool, list or dict.
    """
    value = values.get(key)
    if value is None:
        return None
    kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool) and kind is not bool:
        raise UserError(f"{short_path(where)}: {key} must be {_NAMES[kind]}, not {brief(value)}; {remedy}")
    return value  # type: ignore[return-value]


def brief(value: object) -> str:
    """Return the beginning of a value on one line, for a message."""
    text = repr(value)
    # Cut before `escape_all`, which takes a step for each character.
    text = escape_all(text[:101])
    return text if len(text) <= 100 else f"{text[:100]}…"


_TOO_DEEP = f"JSON nested more than {DEEPEST} levels deep"


class _LongInteger(Exception):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class _Digits:
    """Placeholder for an integer with too many digits."""


def _decoded(content: bytes | str) -> str:
    if isinstance(content, str):
        return content
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise JsonError(f"not UTF-8 at byte {column} of the line; save the file as UTF-8", line) from error


def _integer(digits: str) -> int:
    # A minus sign is no digit.
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise _LongInteger(len(digits.lstrip("-")))
    return int(digits)


def _digits(digits: str) -> object:
    return _Digits() if len(digits.lstrip("-")) > _MOST_DIGITS else 0


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"{digits[:20]} is too large for a float")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} where a finite number is expected")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise JsonError(f"key {brief(repeated[0])} is given twice; keep one")
    return result


def _place_of_digits(text: str) -> tuple[int, int]:
    """Return line and column, from 1, of the first integer that `_integer` refuses."""
    start = next(match.start() for match in _LONG_INTEGERS.finditer(text) if match["long"])
    return text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)


def _key_of_digits(text: str) -> str:
    """Return the key of the first integer that is too long (see `_at`); "" where the text is malformed elsewhere."""
    try:
        value = json.loads(text, parse_int=_digits)
        return next(_at(way) for way, found in _walk(value) if isinstance(found, _Digits))
    except (ValueError, RecursionError):
        return ""


def _refuse_depth(value: object) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return
    raise JsonError(_TOO_DEEP)


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _refuse_half_pairs(value: object) -> None:
    """Raise JsonError for an unpaired surrogate, which Python keeps as text that can't be written or printed."""
    for way, found in _walk(value):
        if isinstance(found, str) and _HALF_PAIR.search(found):
            raise JsonError(f"{_at(way)}an unpaired surrogate escape (\\udXXX)")


def _walk(value: object, way: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], object]]:
    """Yield every key, and every value that is no container, each with the keys and indices that lead to it.

    They are yielded one at a time and the path is not joined to text: there may be very many values and very long keys.
    """
    if not isinstance(value, dict | list):
        yield way, value
        return
    for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(step, str):
            yield (*way, step), step
        if isinstance(inner, dict | list):
            yield from _walk(inner, (*way, step))
        else:
            yield (*way, step), inner


def _at(way: tuple[str | int, ...]) -> str:
    """Return the key that holds a value as the beginning of a message: "key 'a[2].b' holds "."""
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in way)
    return f"key {brief(key.removeprefix('.'))} holds " if key else ""
