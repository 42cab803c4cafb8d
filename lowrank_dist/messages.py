"""Pieces of messages: long lists cut, and other people's text made safe to show. Imports nothing."""

from collections.abc import Sequence


def some_of(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def printable(text: str) -> str:
    """What a terminal would obey, or cannot show, is spelled out: the text may come from anyone's file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
