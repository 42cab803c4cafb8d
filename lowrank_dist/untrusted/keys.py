"""The one rule for the keys of a JSON object that others write: none that changes numbers is passed over in silence.

A key is applied; or known to be without effect; or refused, because it changes numbers and is not applied; or, where
published files commonly have it and it would be wrong to refuse them, said in a line; and one that is not known is
said in a line as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_dist.errors import some_of
from lowrank_dist.terminal import printable

# What a column holds where a row of a table says nothing.
EMPTY: tuple[Any, ...] = (None, "", [], {})
_LONGEST, _MOST_NAMED = 40, 20


@dataclass(frozen=True)
class KeyRule:
    """The keys of one kind of object. applied: read for what they mean. without_effect: of no number here.

    refused: key → what it would change. unapplied: key → what is said of it. Neither holds for a value that is among
    `nothing`, nor for those in `neutral`, at which the key changes nothing either.
    """

    applied: frozenset[str]
    without_effect: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)
    unapplied: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    nothing: tuple[Any, ...] = (None,)

    def refusals(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return key → what it would change, of those that have to be refused."""
        return {key: self.refused[key] for key in values if key in self.refused and self._counts(key, values[key])}

    def unknown(self, values: Mapping[str, Any]) -> list[str]:
        """Return the keys of which nothing is known, sorted; a null says nothing."""
        known = (self.applied, self.without_effect, self.refused, self.unapplied)
        return sorted(
            key
            for key, value in values.items()
            if value is not None and not any(key in keys for keys in known) and not self._is_neutral(key, value)
        )

    def notes(self, values: Mapping[str, Any], where: str) -> list[str]:
        """Return the lines for what is not applied, a line for each reason, and one for all keys that are not known.

        where: names the file.
        """
        said: dict[str, list[str]] = {}
        for key, value in values.items():
            if key in self.unapplied and self._counts(key, value):
                said.setdefault(self.unapplied[key], []).append(f"{key}={_short(value)}")
        lines = [f"{where}: {reason}: {', '.join(keys)}" for reason, keys in said.items()]
        if unknown := self.unknown(values):
            named = some_of([_short(key) for key in unknown], _MOST_NAMED)
            lines.append(f"{where}: keys that are not known here and change nothing: {named}")
        return lines

    def _counts(self, key: str, value: Any) -> bool:
        return not any(_same(value, nothing) for nothing in self.nothing) and not self._is_neutral(key, value)

    def _is_neutral(self, key: str, value: Any) -> bool:
        return any(_same(value, neutral) for neutral in self.neutral.get(key, ()))


def _same(value: Any, other: Any) -> bool:
    """Return whether the values are equal, and both or neither true or false: True is not 1 here."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
