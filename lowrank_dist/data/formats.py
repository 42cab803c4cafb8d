"""JSONL files of {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}: reading and checking.

One JSON object a line, UTF-8, one format a file, blank lines allowed. Every problem is reported with its line and
key, up to `MAX_PROBLEMS` of them in one error, so that a file is mended in one go.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_dist.errors import UserError

MAX_PROBLEMS = 20
ROLES = ("system", "user", "assistant")
FORMATS = '{"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
# Keys that other trainers read and that would change what the model sees: training on without them would be silent.
REFUSED_KEYS = frozenset({"tools", "functions", "documents", "images", "system"})

Kind = Literal["completion", "messages"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One prompt (may be empty) and the completion that is trained; `line` counts from 1."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the chat template takes them: dicts of exactly "role" and "content"; `line` counts from 1."""

    line: int
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Records:
    """The content of one file. Exactly one of the two lists is filled, `kind` says which.

    ignored_keys: extra top-level keys (such as an id) and the number of lines that have them.
    """

    path: Path
    kind: Kind
    completions: list[Completion] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    ignored_keys: dict[str, int] = field(default_factory=dict)


class _Problem(Exception):
    """What is wrong with one line; becomes one row of the UserError."""


def read_jsonl(path: Path) -> Records:
    """Read and check a whole file.

    Raises UserError naming file, line and key: file missing or empty, not UTF-8, malformed JSON, a key given twice,
    missing or wrongly typed, an unknown role, an empty completion, two formats in one file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; data.train and data.eval name a JSONL file, one of {FORMATS} a line")
    parsers: dict[Kind, Callable[[int, dict[str, Any]], Completion | Conversation]] = {
        "completion": _completion,
        "messages": _conversation,
    }
    kind: Kind | None = None
    rows: list[Any] = []
    extra: Counter[str] = Counter()
    problems: list[str] = []
    found = 0
    for number, raw in _lines(path):
        try:
            value = _parse(raw, first=number == 1)
            line_kind = _kind_of(value)
            kind = kind or line_kind
            if line_kind != kind:
                raise _Problem(f"a {line_kind!r} line in a file that began with {kind!r} lines; use one format a file")
            rows.append(parsers[kind](number, value))
            extra.update(value.keys() - {"prompt", "completion", "messages"})
        except _Problem as problem:
            found += 1
            if found <= MAX_PROBLEMS:
                problems.append(f"{path}:{number}: {problem}")
    if found > MAX_PROBLEMS:
        problems.append(f"... and {found - MAX_PROBLEMS} more lines with errors")
    if problems:
        raise UserError("\n".join(problems))
    if kind is None:
        raise UserError(f"{path}: the file holds no sample; write one of {FORMATS} a line")
    filled = {"completions": rows} if kind == "completion" else {"conversations": rows}
    return Records(path, kind, ignored_keys=dict(sorted(extra.items())), **filled)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Binary, since text mode also splits at U+2028 or \x0c in some readers and would shift the numbers an editor shows.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise _Problem(f"key {repeated[0]!r} is given twice; keep one")
    return result


def _parse(raw: bytes, *, first: bool) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise _Problem(f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        # Not error.colno: a line that breaks off is blamed on the column after its newline.
        where = f"malformed JSON at column {error.pos + 1}"
        raise _Problem(f"{where}: {error.msg}; write one JSON object a line") from error
    except RecursionError as error:
        raise _Problem("JSON nested too deeply; write one flat object a line") from error
    if not isinstance(value, dict):
        raise _Problem(f"a JSON {_type(value)} where an object is expected: {FORMATS}")
    return value


def _kind_of(value: dict[str, Any]) -> Kind:
    flat, chat = value.keys() & {"prompt", "completion"}, "messages" in value
    if flat and chat:
        raise _Problem(f"both {sorted(flat)[0]!r} and 'messages'; a line has one format: {FORMATS}")
    if refused := sorted(value.keys() & REFUSED_KEYS):
        raise _Problem(
            f"key {refused[0]!r} would change what the model sees and is not supported; "
            "write it into the prompt or a system message, or remove it"
        )
    if not flat and not chat:
        hints = [(key, difflib.get_close_matches(key, ("prompt", "completion", "messages"), n=1)) for key in value]
        meant = "".join(f"; {key!r}: did you mean {hit[0]!r}?" for key, hit in hints if hit)
        raise _Problem(f"no key 'prompt', 'completion' or 'messages', found {sorted(value)}{meant} Expected {FORMATS}")
    return "messages" if chat else "completion"


def _type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names[type(value)]


def _text(holder: dict[str, Any], key: str, where: str) -> str:
    if key not in holder:
        near = difflib.get_close_matches(key, list(holder), n=1)
        meant = f"; is {near[0]!r} meant for it?" if near else ""
        raise _Problem(f"key '{where}' is missing{meant} Add it as a string")
    value = holder[key]
    if not isinstance(value, str):
        raise _Problem(f"key '{where}' is a JSON {_type(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Problem(f"key '{where}' holds an unpaired surrogate escape (\\udXXX); mend the text") from error
    return value


def _completion(line: int, value: dict[str, Any]) -> Completion:
    prompt, completion = _text(value, "prompt", "prompt"), _text(value, "completion", "completion")
    if not completion:
        raise _Problem("key 'completion' is empty: nothing to train on; fill it or remove the line")
    return Completion(line, prompt, completion)


def _conversation(line: int, value: dict[str, Any]) -> Conversation:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        found = "an empty array" if messages == [] else f"a JSON {_type(messages)}"
        raise _Problem(f"key 'messages' is {found}; it must be an array of {{'role', 'content'}} objects")
    return Conversation(line, [_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _Problem(f"'{where}' is a JSON {_type(message)}; it must be an object with 'role' and 'content'")
    role, content = _text(message, "role", f"{where}.role"), _text(message, "content", f"{where}.content")
    if unknown := sorted(message.keys() - {"role", "content"}):
        raise _Problem(f"'{where}' has the key {unknown[0]!r}, which is not supported; keep only 'role' and 'content'")
    if role not in ROLES:
        raise _Problem(f"'{where}.role' is {role!r}; it must be one of {', '.join(ROLES)}")
    if role == "assistant" and not content.strip():
        raise _Problem(f"'{where}.content' of the assistant is empty: nothing to train on; fill or remove it")
    return {"role": role, "content": content}
