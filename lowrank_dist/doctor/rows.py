"""What was looked at and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "off", "warning", "missing", "unsupported", "differs", "broken"]
# With these a run can be trained.
PASSING: tuple[State, ...] = ("ok", "off", "warning")


@dataclass(frozen=True)
class Row:
    """One thing that was looked at, on one node or between nodes.

    state: ok; off (training runs without it); warning (it runs, but look at it); else why it cannot run. detail: what
    was found and, where that is not ok, the remedy. alike: what has to be the same on all nodes, and `if_unlike` what
    it is where it is not. figures: the numbers in `detail`, with their units in their names.
    """

    what: str
    state: State
    detail: str
    alike: str | None = None
    if_unlike: Literal["differs", "warning"] = "differs"
    figures: Mapping[str, float] = field(default_factory=dict)


def guarded(what: str, concern: Callable[[], Iterable[Row]], needed: bool = True) -> list[Row]:
    """The rows of a concern, or one that says what stopped it."""
    from lowrank_dist.errors import UserError

    state: State = "broken" if needed else "off"
    try:
        return list(concern())
    except UserError as error:  # a message with its remedy
        return [Row(what, state, one_line(str(error)))]
    except Exception as error:  # whatever a broken installation makes of it: the reason is kept
        return [Row(what, state, f"{type(error).__name__}: {one_line(str(error))}")]


def one_line(text: str) -> str:
    return " ".join(text.split())


def size_of(number: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
