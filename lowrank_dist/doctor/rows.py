"""The rows of what was looked at, and the table of all nodes' rows.

What is the same on all nodes is said once, what differs with the nodes' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from lowrank_dist.errors import UserError, some_of

State = Literal["ok", "off", "warning", "missing", "unsupported", "differs", "broken"]
Unlike = Literal["differs", "warning"]
Value = TypeVar("Value")
# With these a run can be trained.
PASSING: tuple[State, ...] = ("ok", "off", "warning")
# Of what is in order as many different answers are shown as fit a glance; a report in JSON has all.
SHOWN = 3


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
    if_unlike: Unlike = "differs"
    figures: Mapping[str, float] = field(default_factory=dict)


def guarded(what: str, concern: Callable[[], Iterable[Row]], needed: bool = True) -> list[Row]:
    """Return the rows of a concern, or one that says what stopped it."""
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
    """Return bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass
class Examination:
    """Everything that was found.

    size: ranks of the job. ranks, rows: of each node that came, under its name. between: rows of no one node.
    """

    size: int
    ranks: dict[str, list[int]]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    between: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """A line of the table. nodes: those it is about, in the order of their ranks; empty where it is between nodes."""

    what: str
    state: State
    detail: str
    nodes: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        return self.state in PASSING


def findings(found: Examination) -> list[Finding]:
    """Return the table, in the order in which things were looked at."""
    table: list[Finding] = []
    for what in dict.fromkeys(row.what for rows in found.rows.values() for row in rows):
        table += _merged(what, [(node, row) for node, rows in found.rows.items() for row in rows if row.what == what])
    return table + [Finding(row.what, row.state, row.detail) for row in found.between]


def _merged(what: str, found: Sequence[tuple[str, Row]]) -> list[Finding]:
    values = _groups((node, row.alike) for node, row in found if row.alike is not None)
    lines: list[Finding] = []
    if len(values) > 1:
        states = {row.if_unlike for _, row in found if row.alike is not None}
        said = "; ".join(f"{value} on {some_of(nodes)}" for value, nodes in values.items())
        everyone = tuple(node for nodes in values.values() for node in nodes)
        state: State = "differs" if "differs" in states else "warning"
        lines.append(Finding(what, state, f"{said}: make it the same on every node", everyone))
        # What was in order on its own is said by this line.
        found = [(node, row) for node, row in found if row.state != "ok"]
    groups = _groups((node, (row.state, row.detail)) for node, row in found)
    fine = [key for key in groups if key[0] == "ok"]
    hidden = set(fine[SHOWN:])
    for (state, detail), nodes in groups.items():
        if (state, detail) not in hidden:
            lines.append(Finding(what, state, detail, tuple(nodes)))
    if hidden:
        rest = tuple(node for key in fine[SHOWN:] for node in groups[key])
        lines.append(Finding(what, "ok", f"on {len(rest)} more nodes as well, with other figures", rest))
    return lines


def _groups(pairs: Iterable[tuple[str, Value]]) -> dict[Value, list[str]]:
    """Return value → the nodes that have it; the most frequent first."""
    groups: dict[Value, list[str]] = {}
    for node, value in pairs:
        groups.setdefault(value, []).append(node)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))
