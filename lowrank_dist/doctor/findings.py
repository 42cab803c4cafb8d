"""The rows of all nodes as one table: what is the same on all is said once, what differs with the nodes' names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lowrank_dist.doctor.rows import PASSING, Row, State
from lowrank_dist.errors import some_of

# Of what is in order as many different answers are shown as fit a glance; a report in JSON has all.
SHOWN = 3


@dataclass
class Examination:
    """Everything that was found. size: ranks of the job. ranks, rows: of each node that came, under its name; between:
    of no one node.
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
    """The table, in the order in which things were looked at."""
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


def _groups(pairs: Iterable[tuple[str, object]]) -> dict:
    """Value → the nodes that have it; the most frequent first."""
    groups: dict = {}
    for node, value in pairs:
        groups.setdefault(value, []).append(node)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))
