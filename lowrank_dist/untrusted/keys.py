"""The rule for keys of an untrusted JSON object: no key that changes numbers is ignored silently.

A key is either applied, or known to have no effect, or refused because it would change numbers, or noted because it
would change numbers but is too common in published files to be refused. Unknown keys are noted as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank_dist.errors import some_of
from lowrank_dist.terminal import escape_all

# Values of empty cells in a table that was exported to JSON.
EMPTY: tuple[Any, ...] = (None, "", [], {})
_LONGEST, _MOST_NAMED = 40, 20


@dataclass(frozen=True)
class KeyRule:
    """The keys of one type of object.

    applied: keys that are used. without_effect: keys that change no number here. refused: key → what it would change.
    unapplied: key → text of its note. A key in `refused` or `unapplied` is ignored if its value changes nothing, that
    is, if the value is in `nothing` or in the key's entry of `neutral`.
    """

    applied: frozenset[str]
    without_effect: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)
    unapplied: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    nothing: tuple[Any, ...] = (None,)

    def refusals(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return key → what it would change, for the keys that must be refused."""
        return {key: self.refused[key] for key in values if key in self.refused and self._counts(key, values[key])}

    def unknown(self, values: Mapping[str, Any]) -> list[str]:
        """Return the unknown keys, sorted; those with a null or neutral value are left out."""
        known = (self.applied, self.without_effect, self.refused, self.unapplied)
        return sorted(
            key
            for key, value in values.items()
            if value is not None and not any(key in keys for keys in known) and not self._is_neutral(key, value)
        )

    def notes(self, values: Mapping[str, Any], where: str) -> list[str]:
        """Return the notes on keys that are not applied: a line for each reason, and one for all unknown keys.

        where: names the file.
        """
        said: dict[str, list[str]] = {}
        for key, value in values.items():
            if key in self.unapplied and self._counts(key, value):
                said.setdefault(self.unapplied[key], []).append(f"{key}={_short(value)}")
        lines = [f"{where}: {reason}: {', '.join(keys)}" for reason, keys in said.items()]
        if unknown := self.unknown(values):
            named = some_of([_short(key) for key in unknown], _MOST_NAMED)
            lines.append(f"{where}: unknown keys, which have no effect: {named}")
        return lines

    def _counts(self, key: str, value: Any) -> bool:
        return not any(_same(value, nothing) for nothing in self.nothing) and not self._is_neutral(key, value)

    def _is_neutral(self, key: str, value: Any) -> bool:
        return any(_same(value, neutral) for neutral in self.neutral.get(key, ()))


def _same(value: Any, other: Any) -> bool:
    """Return whether the values are equal and both or neither are booleans: True is not 1 here."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _short(value: Any) -> str:
    text = escape_all(str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
