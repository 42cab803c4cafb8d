"""The errors whose message is for the user, who sees it without a traceback, and pieces of such messages.

Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what the user gave; the message says what, where, and the remedy."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, a line each: where: section.key: what is wrong — the remedy."""


class DiskError(UserError):
    """A refusal of the disk (no space, no permission, …): nothing new was written, and what was there still is."""


class ElsewhereError(UserError):
    """The failure of another rank, whose own message says why."""


class StrangerError(UserError):
    """The mistake of one rank that the others do not share: it is no rank of the run that it met, is there twice, or
    has no place in its job by its launcher's variables."""


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first `most`, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
