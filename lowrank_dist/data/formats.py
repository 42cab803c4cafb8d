"""Reading and checking of JSONL files: {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}.

One JSON object per line, UTF-8, one format per file, blank lines allowed. One error lists every problem, its lines and
key, up to `MAX_PROBLEMS`, so that a file can be corrected in one pass. Training, its evaluations,
`lowrank-dist evaluate` and `lowrank-dist generate` read the same format, except for the completions that a line may
have (`Use`).
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lowrank_dist.data.keys import MESSAGE_KEYS, ROW_KEYS
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.sections.synonyms import SHAREGPT_ROLES, of_message, of_row
from lowrank_dist.untrusted.files import MIB, read_lines
from lowrank_dist.untrusted.json import JsonError, brief, parse_json
from lowrank_dist.untrusted.keys import EMPTY

MAX_PROBLEMS = 20
_MOST_LINES = 3  # lines that are named for a fault that several lines share
_PARQUET = b"PAR1"  # the first bytes of such a file
# Largest number of keys of a line that an error compares with the known keys and shows; a line may have 200,000.
_MOST_KEYS = 20
# Largest line in bytes: half a million tokens of English. Tokenising takes some 250 bytes of memory per byte.
LONGEST_LINE = 2 * MIB
ROLES = ("system", "user", "assistant")
FORMATS = '{"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'

CONVERTERS = "docs/how-to/bring-your-own-data.md has converters"
_BEGINNING = 4096  # bytes of a JSON array in which its keys are looked for
_ARRAY = re.compile(rb"\[\s*(\{|$)")  # the beginning of an array, up to its first object or the end of the line
_QUOTED = re.compile(r'"(\w{1,40})"\s*:')

Kind = Literal["completion", "messages"]


class Use(Enum):
    """The purpose that a file is read for; it decides which completions a line may have."""

    TRAINING = auto()  # one completion
    EVALUATION = auto()  # one completion, or a list of accepted ones
    GENERATION = auto()  # completions are not read


@dataclass(frozen=True, slots=True)
class Completion:
    """One prompt (may be empty) and its completion; `line` counts from 1.

    completion: the text that is trained and that the loss is computed on; empty for Use.GENERATION. others: further
    accepted completions, for Use.EVALUATION.
    """

    line: int
    prompt: str
    completion: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the chat template takes them: dicts of exactly "role" and "content"; `line` counts from 1."""

    line: int
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Records:
    """The content of one file. Exactly one of the two lists is filled; `kind` says which.

    ignored_keys: unknown top-level key → number of lines that have it. whole: False where `read_jsonl` stopped early.
    """

    path: Path
    kind: Kind
    completions: list[Completion] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    ignored_keys: dict[str, int] = field(default_factory=dict)
    whole: bool = True


class Problem(Exception):
    """A fault of one line; becomes one row of the UserError."""


def read_jsonl(
    path: Path,
    use: Use = Use.TRAINING,
    check: Callable[[Completion | Conversation], None] = lambda record: None,
    most: int | None = None,
) -> Records:
    """Return the checked records of a file.

    check: a further check, which raises `Problem` for a record that it rejects. most: number of samples after which to
    stop; None to read the whole file. Raises UserError naming file, line and key for: a file that is missing, empty or
    not UTF-8, malformed JSON, a key given twice, missing or wrongly typed, an unknown role, an empty completion, two
    formats in one file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JSONL file with one JSON object per line: {FORMATS}")
    parsers: dict[Kind, Callable[[int, dict[str, Any]], Completion | Conversation]] = {
        "completion": partial(_completion, use),
        "messages": _conversation,
    }
    kind: Kind | None = None
    rows: list[Any] = []
    extra: Counter[str] = Counter()
    faults, whole = _Faults(), True
    for number, raw in read_lines(path, "split it, or leave it out", longest=LONGEST_LINE):
        if not raw.strip():
            continue
        if faults.lines == most:
            whole = False
            break
        if not faults.lines and raw.startswith(_PARQUET):
            raise UserError(
                f"{path}: a Parquet file; convert it to JSONL with pandas, pd.read_parquet(FILE).to_json(OTHER, "
                "orient='records', lines=True, force_ascii=False)"
            )
        if not faults.lines and _ARRAY.match(raw.strip().removeprefix(codecs.BOM_UTF8)):
            raise UserError(_array(path, number))
        faults.lines += 1
        try:
            value = _parse(raw, first=number == 1)
            line_kind = _kind_of(value)
            kind = kind or line_kind
            if line_kind != kind:
                raise Problem(f"a {line_kind!r} line in a file that began with {kind!r} lines; use one format per file")
            rows.append(parsers[kind](number, value))
            check(rows[-1])
            extra.update(ROW_KEYS.unknown(value))
        except Problem as problem:
            faults.add(number, str(problem))
    if faults.found:
        raise UserError("\n".join(faults.rows(path, whole)))
    if kind is None:
        raise UserError(f"{path}: the file has no samples; write one JSON object per line: {FORMATS}")
    filled = {"completions": rows} if kind == "completion" else {"conversations": rows}
    return Records(path, kind, ignored_keys=dict(sorted(extra.items())), whole=whole, **filled)


def _array(path: Path, line: int) -> str:
    """Return the error on a file that is one JSON array. line: where it begins."""
    what = f"{path}:{line}: the file is one JSON array; write one object per line, without [ and ]"
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING).decode(errors="replace")
    found = {key: _meant(key, ()) for key in _QUOTED.findall(beginning) if of_row(key) is not None}
    hints = "".join(f" ({key!r}: {hint})" for key, hint in found.items())
    return f"{what}, each {FORMATS}{hints}; {CONVERTERS}"


class _Faults:
    """The faults of a file, a row for each kind with the lines that share it. lines: number of lines read so far."""

    def __init__(self) -> None:
        self.lines = 0
        self.found: dict[str, list[int]] = {}
        self._shared: Counter[str] = Counter()
        self._unnamed = 0

    def add(self, line: int, what: str) -> None:
        if what not in self.found and len(self.found) == MAX_PROBLEMS:
            self._unnamed += 1
            return
        self._shared[what] += 1
        named = self.found.setdefault(what, [])
        if len(named) < _MOST_LINES:
            named.append(line)

    def rows(self, path: Path, whole: bool) -> list[str]:
        """Return the rows of the error. whole: the file was read to its end."""
        rows = [f"{path}{self._place(lines, self._shared[what], whole)}: {what}" for what, lines in self.found.items()]
        return rows + [f"... and {self._unnamed} more lines with errors"] * (self._unnamed > 0)

    def _place(self, named: list[int], count: int, whole: bool) -> str:
        if count == 1:
            return f":{named[0]}"
        if count == self.lines:
            return f": all {count:,} lines" if whole else f": the first {count:,} lines"
        *first, last = [str(line) for line in named]
        more = count - len(named)
        return (
            f": lines {', '.join([*first, last])} and {more:,} more"
            if more
            else f": lines {', '.join(first)} and {last}"
        )


def _parse(raw: bytes, *, first: bool) -> dict[str, Any]:
    try:
        # Windows editors may begin a file with a byte order mark.
        value = parse_json(raw.removeprefix(codecs.BOM_UTF8) if first else raw, unique=True)
    except JsonError as fault:
        raise Problem(f"{fault}; write one JSON object per line") from fault
    if not isinstance(value, dict):
        raise Problem(f"a JSON {_type(value)} where an object is expected; write {FORMATS}")
    return value


def _kind_of(value: dict[str, Any]) -> Kind:
    flat, chat = value.keys() & {"prompt", "completion"}, "messages" in value
    if flat and chat:
        raise Problem(f"both {sorted(flat)[0]!r} and 'messages'; write one format per line, {FORMATS}")
    if not flat and not chat:
        known = ("prompt", "completion", "messages")
        hints = {key: _meant(key, known) for key in islice(value, _MOST_KEYS)}
        meant = "".join(f" ({key!r}: {hint})" for key, hint in hints.items() if hint)
        page = f"; {CONVERTERS}" if any(of_row(key) is not None for key in hints) else ""
        found = some_of([brief(key) for key in value], _MOST_KEYS)
        raise Problem(f"no key 'prompt', 'completion' or 'messages', found {found}{meant}; expected {FORMATS}{page}")
    for key, effect in ROW_KEYS.refusals(value).items():
        missing = sorted({"prompt", "completion"} - flat) if flat else []
        raise Problem(f"key {key!r} {effect}" + "".join(f"; key {each!r} is missing as well" for each in missing))
    return "messages" if chat else "completion"


def _meant(key: str, known: Sequence[str]) -> str:
    """Return a hint on the key that an unknown key of a row probably means; empty where none is similar."""
    synonym = of_row(key)
    if synonym is None:
        hit = difflib.get_close_matches(key, known, n=1)
        return f"did you mean {hit[0]!r}?" if hit else ""
    if synonym.ours is None:
        return synonym.note
    return f"did you mean {synonym.ours!r}?" + (f" {synonym.note}" if synonym.note else "")


def _type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names[type(value)]


def _text(holder: dict[str, Any], key: str, where: str) -> str:
    if key not in holder:
        given = list(islice(holder, _MOST_KEYS))
        near = of_message(key, given) or difflib.get_close_matches(key, given, n=1)
        meant = f" (rename {near[0]!r} to {key!r}?)" if near else ""
        raise Problem(f"key '{where}' is missing{meant}; add it as a string")
    return _string(holder[key], where)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise Problem(f"key '{where}' is a JSON {_type(value)}; write a string")
    return value


def _completion(use: Use, line: int, value: dict[str, Any]) -> Completion:
    prompt = _text(value, "prompt", "prompt")
    if use is Use.GENERATION:
        return Completion(line, prompt, "")
    given = value.get("completion")
    if not isinstance(given, list):
        return Completion(line, prompt, _filled(_text(value, "completion", "completion"), "completion"))
    if use is Use.TRAINING:
        raise Problem(
            "key 'completion' is a JSON array; write a string (a list of correct completions is only for "
            "evaluation, data.eval and --data)"
        )
    if not given:
        raise Problem("key 'completion' is an empty array; write a string, or an array of correct completions")
    places = [f"completion[{place}]" for place in range(len(given))]
    first, *others = (_filled(_string(text, where), where) for text, where in zip(given, places, strict=True))
    return Completion(line, prompt, first, tuple(others))


def _filled(text: str, where: str) -> str:
    if not text:
        raise Problem(
            f"key '{where}' is empty, so there is nothing to train on or to compare with; fill it or remove the line"
        )
    return text


def _conversation(line: int, value: dict[str, Any]) -> Conversation:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        found = "an empty array" if messages == [] else f"a JSON {_type(messages)}"
        raise Problem(f"key 'messages' is {found}; write an array of {{'role', 'content'}} objects")
    return Conversation(line, [_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Problem(f"'{where}' is a JSON {_type(message)}; write an object with 'role' and 'content'")
    role, content = _text(message, "role", f"{where}.role"), _text(message, "content", f"{where}.content")
    said = [key for key in MESSAGE_KEYS.unknown(message) if message[key] not in EMPTY]
    if said:
        raise Problem(f"'{where}' has the key {brief(said[0])}, which is not supported; keep only 'role' and 'content'")
    if role not in ROLES:
        ours = SHAREGPT_ROLES.get(role)
        meant = f"for {role!r} write {ours!r}" if ours else f"write one of {', '.join(ROLES)}"
        raise Problem(f"'{where}.role' is {brief(role)}; {meant}")
    if role == "assistant" and not content.strip():
        raise Problem(
            f"'{where}.content' of the assistant is empty, so there is nothing to train on; fill it or remove the "
            "message"
        )
    return {"role": role, "content": content}
