"""Mutations of trees and of bytes, each from one seed: the same number always gives the same file."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any

Path_ = tuple[Any, ...]
# A placeholder in strings, replaced in the end by a JSON token that Python would not write.
_RAW = re.compile(r'"@RAW(\d+)@"')
RAW = ("9" * 5000, "-" + "1" * 400, "1e999", "NaN", "-Infinity", "0x10", "01", "1.", "[" * 2000, '{"a":' * 1500)
_DUPLICATE = "@DUPLICATE@"
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 65537, 2**31 - 1, 2**31, 2**63, 10**9, 10**30, -(10**18)),
    *(0.5, 1.5, -0.0, 1e-320, 1e308, math.inf, math.nan),
    *(
        "",
        "x",
        "0",
        "true",
        "null",
        "x" * 300,
        "y" * 70_000,
        "\x00",
        "\x1b[2J\x1b]0;x\x07",
        "\ud800",
        "../../x",
        "/etc",
    ),
    *("\u202e\u2028", "%s{}$(x)`", "(.|.)*[!Z]", "(?i)x", "((a{999}){999}){999}", "ä" * 200, "-", "1e5", "nan"),
)
_WORDS = ("", "x", "q_proj", "__class__", "a.b", "k" * 5000, "\x1b[31m", "\ud83d", "model", "0", " ", "prototype")


def places(tree: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every value in a tree except its root."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def get(tree: Any, path: Path_) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def differences(old: Any, new: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Yield the deepest paths at which two trees differ; for a key that only one tree has, the key's own path."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if key in old and key in new:
                yield from differences(old[key], new[key], (*at, key))
            else:
                yield (*at, key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, (*at, place))
    elif type(old) is not type(new) or repr(old) != repr(new):
        yield at


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """Return a copy with one to three values changed: type or size, removed, doubled, renamed, nested, swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            return rng.choice(SCALARS)
        path = rng.choice(found)
        holder, key = get(tree, path[:-1]), path[-1]
        _change(rng, holder, key, tree, found)
    return tree


def _change(rng: random.Random, holder: Any, key: Any, tree: Any, found: list[Path_]) -> None:
    value = holder[key]
    match rng.randrange(14):
        case 0 | 1 | 2 | 3:
            holder[key] = rng.choice(SCALARS)
        case 4:
            holder[key] = f"@RAW{rng.randrange(len(RAW))}@"
        case 5:
            del holder[key]
        case 6:
            holder[key] = rng.choice(
                ([], {}, [value], {"a": value}, [value] * 3, [[]] * 1000, dict.fromkeys("abc", value))
            )
        case 7:
            for _ in range(rng.choice((5, 60, 150, 400))):
                value = [value] if rng.random() < 0.5 else {"a": value}
            holder[key] = value
        case 8 if isinstance(value, int) and not isinstance(value, bool):
            holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), value * 1000))
        case 8 if isinstance(value, str):
            holder[key] = rng.choice(
                (value + " ", value.upper(), value[:-1], value * 100, [value], value + "\n", value[::-1])
            )
        case 9 if isinstance(holder, dict):
            holder[rng.choice((*_WORDS, str(key)[:-1], str(key).upper()))] = holder.pop(key)
        case 10 if isinstance(holder, dict):
            holder[rng.choice(_WORDS)] = rng.choice(SCALARS)
        case 11 if isinstance(holder, dict):
            holder[f"{_DUPLICATE}{key}"] = rng.choice((value, *SCALARS[:20]))
        case 12:
            other = rng.choice(found)
            holder[key] = copy.deepcopy(get(tree, other)) if _lives(tree, other) else None
        case _ if isinstance(value, list) and value:
            holder[key] = rng.choice((value[:-1], value[::-1], value * 1000, value + [rng.choice(SCALARS)]))
        case _:
            holder[key] = rng.choice(SCALARS)


def _lives(tree: Any, path: Path_) -> bool:
    try:
        get(tree, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def to_json(tree: Any) -> bytes:
    """Return the JSON of a mutated tree, including tokens and duplicate keys that no tree can hold."""
    text = json.dumps(tree).replace(_DUPLICATE, "")
    return _RAW.sub(lambda match: RAW[int(match[1])], text).encode()


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return the content cut, with flipped bits, grown, moved, or after bytes that no such file has."""
    at = rng.randrange(len(content) + 1)
    match rng.randrange(12):
        case 0:
            return content[:at]
        case 1 | 2 | 3:
            changed = bytearray(content)
            for _ in range(rng.choice((1, 1, 2, 8))):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 4:
            return content[:at] + rng.randbytes(rng.choice((1, 3, 50))) + content[at:]
        case 5:
            return content[:at] + content[at + rng.choice((1, 2, 20)) :]
        case 6:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"[" * 3000, b" " * 5000, b"\n")) + content
        case 7:
            return content + rng.choice((content, b"\x00", b"}", b"\xff", b" \n", b"//x"))
        case 8:
            return (
                content[:at]
                + rng.choice((b"\xed\xa0\x80", b"\xc3", b"\\ud800", b"\x1b[2J", b"9" * 5000))
                + content[at:]
            )
        case 9:
            return content.replace(b"\n", b"\r\n") if b"\n" in content else content.decode("latin1").encode("utf-16")
        case 10:
            return re.sub(rb"\d+", lambda match: match[0] * rng.choice((1, 1, 3, 1000)), content)
        case _:
            other = rng.randrange(len(content) + 1)
            first, last = sorted((at, other))
            return content[:first] + content[last:] + content[first:last]
