"""Errors whose message is shown to the user without a traceback, and a helper for such messages.

Imports nothing from this package.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in the user's input; the message says what, where, and the remedy."""


class ConfigError(UserError):
    """All mistakes in a configuration, one per line, as "where: section.key: what is wrong; the remedy"."""


class DiskError(UserError):
    """A failed write (no space, no permission, …): nothing new was written, and existing files are unchanged."""


class OtherRankError(UserError):
    """A failure of another rank, whose own message gives the reason."""


class RankIdentityError(UserError):
    """A mistake of one rank that the others do not share.

    The rank does not belong to the run that it met, exists twice, or has no place in its job by its launcher's
    variables.
    """


class LimitError(UserError):
    """A limit of the process or its node, which this rank reached. Other ranks may reach it too, or not."""


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first `most` names and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
