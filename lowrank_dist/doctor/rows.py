"""The rows that checks return, and the table that merges the rows of all nodes.

A result that is the same on all nodes is listed once; results that differ are listed with the nodes' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from lowrank_dist.errors import UserError, some_of

State = Literal["ok", "off", "warning", "missing", "unsupported", "differs", "broken"]
Unlike = Literal["differs", "warning"]
Value = TypeVar("Value")
# States with which a run can be trained.
PASSING: tuple[State, ...] = ("ok", "off", "warning")
# The most different "ok" results per check that the table shows. A report in JSON has all.
SHOWN = 3


@dataclass(frozen=True)
class Row:
    """The result of one check, on one node or between nodes.

    state: ok; off (training runs without it); warning (training runs, but look at it); any other state prevents
    training. detail: the finding and, where the state is not ok, the remedy. alike: a value that must be the same on
    all nodes. if_unlike: the state if it is not. figures: the numbers in `detail`, with their units in their names.
    """

    what: str
    state: State
    detail: str
    alike: str | None = None
    if_unlike: Unlike = "differs"
    figures: Mapping[str, float] = field(default_factory=dict)


def run_check(what: str, check: Callable[[], Iterable[Row]], needed: bool = True) -> list[Row]:
    """Return the rows of a check, or one row with the error that stopped it."""
    state: State = "broken" if needed else "off"
    try:
        return list(check())
    except UserError as error:  # a message with its remedy
        return [Row(what, state, one_line(str(error)))]
    except Exception as error:  # any error of a broken installation: kept as the reason
        return [Row(what, state, f"{type(error).__name__}: {one_line(str(error))}")]


def one_line(text: str) -> str:
    return " ".join(text.split())


def format_size(number: float) -> str:
    """Return bytes as text, in bytes, KiB, MiB or GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass
class Results:
    """All results of a job.

    size: ranks of the job. ranks, rows: node → its ranks and its rows, for each node that arrived. between: rows that
    do not belong to one node.
    """

    size: int
    ranks: dict[str, list[int]]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    between: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class TableLine:
    """A line of the table. nodes: those concerned, in the order of their ranks; empty for a check between nodes."""

    what: str
    state: State
    detail: str
    nodes: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        return self.state in PASSING


def table_lines(found: Results) -> list[TableLine]:
    """Return the lines of the table, in the order of the checks."""
    table: list[TableLine] = []
    for what in dict.fromkeys(row.what for rows in found.rows.values() for row in rows):
        table += _merged(what, [(node, row) for node, rows in found.rows.items() for row in rows if row.what == what])
    return table + [TableLine(row.what, row.state, row.detail) for row in found.between]


def _merged(what: str, found: Sequence[tuple[str, Row]]) -> list[TableLine]:
    values = _groups((node, row.alike) for node, row in found if row.alike is not None)
    lines: list[TableLine] = []
    if len(values) > 1:
        states = {row.if_unlike for _, row in found if row.alike is not None}
        said = "; ".join(f"{value} on {some_of(nodes)}" for value, nodes in values.items())
        everyone = tuple(node for nodes in values.values() for node in nodes)
        state: State = "differs" if "differs" in states else "warning"
        lines.append(TableLine(what, state, f"{said}; make it the same on every node", everyone))
        # This line covers the rows that were ok on their own.
        found = [(node, row) for node, row in found if row.state != "ok"]
    groups = _groups((node, (row.state, row.detail)) for node, row in found)
    fine = [key for key in groups if key[0] == "ok"]
    hidden = set(fine[SHOWN:])
    for (state, detail), nodes in groups.items():
        if (state, detail) not in hidden:
            lines.append(TableLine(what, state, detail, tuple(nodes)))
    if hidden:
        rest = tuple(node for key in fine[SHOWN:] for node in groups[key])
        lines.append(TableLine(what, "ok", f"also on {len(rest)} more nodes, with other figures", rest))
    return lines


def _groups(pairs: Iterable[tuple[str, Value]]) -> dict[Value, list[str]]:
    """Return value → the nodes that have it; the most frequent first."""
    groups: dict[Value, list[str]] = {}
    for node, value in pairs:
        groups.setdefault(value, []).append(node)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))
