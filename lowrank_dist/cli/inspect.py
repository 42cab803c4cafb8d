"""`lowrank-dist inspect`: what a folder is, and whether it verifies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dist.errors import printable

if TYPE_CHECKING:
    from lowrank_dist.formats.report import Report


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Adapter, checkpoint, run or model folder.", metavar="DIR")],
    base: Annotated[
        Path | None, typer.Option(help="Base model to check against, in place of the one named.", metavar="DIR")
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="The update's norm in every module.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Show what an adapter, checkpoint, run or model folder holds; exit code 1 where something in it is broken."""
    from lowrank_dist.checkpoint.inspection import inspect_folder
    from lowrank_dist.config import load_config
    from lowrank_dist.methods.lora.inspection import MODULES, SUMMARY

    report = inspect_folder(folder, base, read_config=lambda path: load_config([str(path)]).read_keys())
    report.tables.pop(SUMMARY if modules else MODULES, None)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        _show(report)
    if not report.verifies:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = list(_lines({"folder": str(report.path), "is": report.kind, **report.facts}))
    tables = {title: [list(map(_text, row.values())) for row in rows] for title, rows in report.tables.items()}
    heads = {title: [key.replace("_", " ") for key in rows[0]] for title, rows in report.tables.items()}
    notes = [("warning", text, "yellow") for text in report.warnings]
    notes += [("broken", text, "red") for text in report.problems]
    verdict = "it verifies" if report.verifies else f"it does not verify: {len(report.problems)} broken"
    console = Console()
    if not console.is_terminal:
        width = max(len(label) for label, _ in facts)
        lines = [f"{label:<{width}}  {value}" for label, value in facts]
        for title, rows in tables.items():
            lines += ["", title.replace("_", " "), *_columns([heads[title], *rows])]
        lines += ["", *(f"{kind}: {printable(text)}" for kind, text, _ in notes), verdict]
        typer.echo("\n".join(lines))
        return
    # Text, not str: names come from files, and rich would take [brackets] in them for its markup.
    grid = Table.grid(padding=(0, 2))
    for label, value in facts:
        grid.add_row(Text(label, style="bold"), Text(value))
    console.print(grid)
    for title, rows in tables.items():
        table = Table(title=title.replace("_", " "), title_justify="left")
        for index, head in enumerate(heads[title]):
            table.add_column(head, justify="right" if index and head != "note" else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for kind, text, style in notes:
        console.print(Text.assemble((f"{kind}: ", style), printable(text)))
    console.print(Text(verdict, style="green" if report.verifies else "red"))


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, value) of every fact; sections of a config have a line each."""
    for label, value in facts.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            yield from ((f"{label} {printable(str(name))}", _text(inner)) for name, inner in value.items())
        else:
            yield label.replace("_", " "), _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{printable(str(key))}={_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
