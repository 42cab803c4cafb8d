"""Flowcharts of Mermaid as SVG, for the site. The forge draws Mermaid by itself; a page without the network cannot.

The part of the language that docs/ uses: `flowchart TB`, nodes `id["text"]` with `:::class`, edges `-->` and
`-- "label" -->`, chains of them, one level of subgraphs, and `classDef NAME …` for nodes with a thick border.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from dataclasses import dataclass, field

_NODE = re.compile(r"(\w+)(?:\[\"([^\"]*)\"\])?(?::::(\w+))?")
_SPLIT = re.compile(r"\s*--(?:\s*\"([^\"]*)\"\s*--)?>\s*")
_SUBGRAPH = re.compile(r"subgraph (\w+)(?: \[\"([^\"]*)\"\])?")
_FONT, _LINE, _PAD, _GAP_X, _GAP_Y = 13, 17, 12, 28, 34


@dataclass
class Node:
    """A box: its lines of text, its place (centre x, top y) and its size in pixels."""

    lines: list[str]
    thick: bool = False
    group: str | None = None
    level: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        return max(len(line) for line in self.lines) * _FONT * 0.56 + 2 * _PAD

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + _PAD


@dataclass
class Flowchart:
    """The content of a block of Mermaid. edges: (from, to, label). groups: subgraph → its title."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[tuple[str, str, str]] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)


def parse(source: str) -> Flowchart:
    """Return the chart of a block. Raises ValueError for a line outside the part of the language."""
    chart, group, thick = Flowchart(), None, set[str]()
    first, *lines = [line.strip() for line in source.strip().splitlines()]
    if first != "flowchart TB":
        raise ValueError(f"{first!r} is not `flowchart TB`")
    for line in lines:
        if line.startswith("classDef "):
            thick.add(line.split()[1])
        elif match := _SUBGRAPH.fullmatch(line):
            group = match[1]
            chart.groups[group] = match[2] or match[1]
        elif line == "end":
            group = None
        elif not line.startswith("direction "):
            _add_chain(chart, line, group, thick)
    return chart


def _add_chain(chart: Flowchart, line: str, group: str | None, thick: set[str]) -> None:
    parts = _SPLIT.split(line)
    names = [_add_node(chart, part, group, thick) for part in parts[::2]]
    chart.edges += zip(names, names[1:], (label or "" for label in parts[1::2]), strict=False)


def _add_node(chart: Flowchart, text: str, group: str | None, thick: set[str]) -> str:
    match = _NODE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no node")
    name, label, kind = match[1], match[2], match[3]
    node = chart.nodes.setdefault(name, Node([name], group=group))
    if label is not None:
        node.lines, node.group = re.split(r"<br\s*/?>", label), group
    node.thick = node.thick or kind in thick
    return name


def _place(chart: Flowchart) -> tuple[float, float]:
    """Set level, x and y of every node; return the width and height of the drawing."""
    for _ in chart.nodes:  # the longest path from a node that nothing leads to
        for start, end, _label in chart.edges:
            chart.nodes[end].level = max(chart.nodes[end].level, chart.nodes[start].level + 1)
    levels: dict[int, list[Node]] = defaultdict(list)
    for node in chart.nodes.values():
        levels[node.level].append(node)
    beside: dict[int, list[Node]] = defaultdict(list)
    for start, end, _label in chart.edges:
        beside[id(chart.nodes[start])].append(chart.nodes[end])
        beside[id(chart.nodes[end])].append(chart.nodes[start])
    width = max(sum(node.width + _GAP_X for node in row) for row in levels.values())
    for _ in range(8):  # each row in the order of what its nodes are joined to
        for level in sorted(levels):
            row = levels[level]
            row.sort(key=lambda node: sum(other.x for other in beside[id(node)]) / max(len(beside[id(node)]), 1))
            gap = (width - sum(node.width for node in row)) / (len(row) + 1)
            left = gap
            for node in row:
                node.x = left + node.width / 2
                left += node.width + gap
    top = float(_GAP_Y)
    for level in sorted(levels):
        for node in levels[level]:
            node.y = top
        top += max(node.height for node in levels[level]) + _GAP_Y
    return width, top


def to_svg(source: str) -> str:
    """Return a block of Mermaid as one line of SVG that follows the colours of the page."""
    chart = parse(source)
    width, height = _place(chart)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width:.0f}px;width:100%" font-size="{_FONT}" font-family="sans-serif">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>',
    ]
    for name, title in chart.groups.items():
        parts.append(_frame([node for node in chart.nodes.values() if node.group == name], title))
    parts += [_edge(chart.nodes[start], chart.nodes[end], label) for start, end, label in chart.edges]
    parts += [_box(node) for node in chart.nodes.values()]
    return "".join([*parts, "</svg>"])


def _frame(nodes: list[Node], title: str) -> str:
    left, right = min(n.x - n.width / 2 for n in nodes) - 14, max(n.x + n.width / 2 for n in nodes) + 14
    top, bottom = min(n.y for n in nodes) - 18, max(n.y + n.height for n in nodes) + 8
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{right - left:.0f}" height="{bottom - top:.0f}" rx="6" fill="none" '
        f'stroke="currentColor" stroke-dasharray="4 4" opacity="0.5"/>'
        f'<text x="{left + 6:.0f}" y="{top + 13:.0f}" fill="currentColor" opacity="0.7">{html.escape(title)}</text>'
    )


def _edge(start: Node, end: Node, label: str) -> str:
    x1, y1, x2, y2 = start.x, start.y + start.height, end.x, end.y
    middle = (y1 + y2) / 2
    line = (
        f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}" fill="none" '
        'stroke="currentColor" opacity="0.7" marker-end="url(#arrow)"/>'
    )
    if not label:
        return line
    at = f'x="{(x1 + x2) / 2:.0f}" y="{middle + 4:.0f}" text-anchor="middle" fill="currentColor" font-size="11"'
    return f"{line}<text {at}>{html.escape(label)}</text>"


def _box(node: Node) -> str:
    left = node.x - node.width / 2
    parts = [
        f'<rect x="{left:.0f}" y="{node.y:.0f}" width="{node.width:.0f}" height="{node.height:.0f}" rx="4" '
        f'style="fill:var(--md-code-bg-color,#fff)" stroke="currentColor" stroke-width="{3 if node.thick else 1}"/>'
    ]
    for number, line in enumerate(node.lines):
        y = node.y + _PAD / 2 + (number + 0.78) * _LINE
        parts.append(
            f'<text x="{node.x:.0f}" y="{y:.0f}" text-anchor="middle" fill="currentColor">{html.escape(line)}</text>'
        )
    return "".join(parts)
