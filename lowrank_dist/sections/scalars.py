"""Plain YAML scalars as in YAML 1.2. PyYAML follows 1.1, where 2e-4 is text, `no` is false and 1:30 is 90."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

# A section and a mapping in it take two levels; the rest is room to say which key is wrong.
DEEPEST = 20
# Digits of the largest unsigned 64-bit number.
_MOST_DIGITS = 20
_PREFIX = "tag:yaml.org,2002:"
# Tag, pattern of its plain scalars, and their possible first characters (PyYAML's index).
_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    # No infinity and no NaN: no key takes one, and as text they are refused with the value in the message.
    (
        "float",
        re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
        list("-+.0123456789"),
    ),
)
_PATTERNS = {tag: pattern for tag, pattern, _ in _RESOLVERS}


def _index_by_first_character() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    index: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in _RESOLVERS:
        for character in first_characters:
            index.setdefault(character, []).append((_PREFIX + tag, pattern))
    return index


class Loader(yaml.SafeLoader):
    """Composes nodes with 1.2 scalars. Aliases are refused: a config needs none, and they can nest without end.

    Nesting over `DEEPEST` levels is refused, and so is an unpaired surrogate, which cannot be written.
    """

    yaml_implicit_resolvers = _index_by_first_character()

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            self._refuse(f"alias *{event.anchor} is not supported; write the value out", event.start_mark)
        if self._depth == DEEPEST:
            self._refuse(f"nested more than {DEEPEST} levels deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
            self._refuse("an unpaired surrogate escape (\\uDXXX); correct the text", node.start_mark)
        return node

    def _refuse(self, problem: str, mark: yaml.Mark) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, problem, mark)


class Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `Loader` would not read back as text."""

    yaml_implicit_resolvers = _index_by_first_character()

    def ignore_aliases(self, data: object) -> bool:
        return True


def scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """Return the value of a scalar node.

    Raises ValueError for an explicit tag (`!!binary`, `!!bool maybe`) that does not fit it, and for an integer of more
    than `_MOST_DIGITS` digits, which no key takes.
    """
    tag = node.tag.removeprefix(_PREFIX)
    if tag == "str":
        return node.value
    if tag not in _PATTERNS or not _PATTERNS[tag].match(node.value):
        raise ValueError(f"tag {node.tag} does not fit {node.value!r}; write the value without a tag")
    if tag == "int" and len(node.value.lstrip("+-0")) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(node.value.lstrip('+-'))} digits; the limit is {_MOST_DIGITS}")
    if tag == "bool":
        return node.value.lower() == "true"
    return {"int": int, "float": float}[tag](node.value) if tag != "null" else None
