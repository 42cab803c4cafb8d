"""`lowrank-dist merge`, `export` and `inspect`: merge adapters into a base, publish an adapter, inspect a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dist.errors import UserError
from lowrank_dist.terminal import escape_all, open_console, put, say

if TYPE_CHECKING:
    from lowrank_dist.formats.report import Report

_OUT_HELP = "New folder to write, outside any checkpoint, adapter or model folder."


def merge_command(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base model.", metavar="DIR")],
    adapter: Annotated[
        list[str],
        typer.Option(
            help="PEFT adapter folder; repeat it to add several. DIR=0.5 scales the update by 0.5.",
            metavar="DIR[=WEIGHT]",
        ),
    ],
    out: Annotated[Path, typer.Option(help=_OUT_HELP, metavar="DIR")],
    force_mismatch: Annotated[
        bool,
        typer.Option("--force-mismatch", help="Merge even if the adapter was trained on another base."),
    ] = False,
    shard_size: Annotated[
        str | None,
        typer.Option(help="Largest weight file, such as 5GB or 2GiB. Default: as in the base.", metavar="SIZE"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto (that of each base tensor), fp32, bf16 or fp16.", metavar="TYPE"),
    ] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Tokenizer folder to copy. Default: the adapter's if it has one, else the base's.", metavar="DIR"
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare logits of the merged model with base + adapter in PEFT, and write the folder only if they "
            "agree. Needs memory for the whole model in fp32.",
        ),
    ] = False,
    verify_text: Annotated[
        Path | None,
        typer.Option(help="Text file for --verify: 128 tokens of each of its first 8 lines.", metavar="FILE"),
    ] = None,
) -> None:
    """Merge adapters into their base model, tensor by tensor, without a GPU."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lowrank_dist.merging.merge import merge
    from lowrank_dist.merging.options import OutputFormat, parse_adapter, parse_dtype, parse_shard_size

    adapters = [parse_adapter(text) for text in adapter]
    limit = None if shard_size is None else parse_shard_size(shard_size)
    output_format = OutputFormat(limit, parse_dtype(dtype), tokenizer)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # The bar goes to stderr, so that stdout holds the result alone.
    console = open_console(err=True)
    if verify:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("merge", total=None)
        report = merge(
            base,
            adapters,
            out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            force_mismatch=force_mismatch,
            output_format=output_format,
            verify=(lambda stage: console.print(f"verifying: {stage}", soft_wrap=True)) if verify else None,
            verify_text=verify_text,
        )
    for warning in report.warnings:
        say(f"warning: {warning}", err=True)
    for note in report.notes:
        say(note)
    say(f"{out}: {report.tensors} tensors, {report.changed} changed, {report.nbytes / 1e9:.2f} GB")
    for part in report.adapters:
        say(f"  {part.adapter}: {part.changed} of {part.adapted} tensors changed")
    if report.verification is not None:
        say(str(report.verification))


def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint (RUN/checkpoints/best) or adapter folder.", metavar="CHECKPOINT")
    ],
    out: Annotated[Path, typer.Option(help=_OUT_HELP, metavar="DIR")],
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Program that will serve the adapter. The export makes sure that it does so correctly, and gives all "
            "modules the same LoRA rank and alpha where needed. Fails where that is not possible.",
            metavar="vllm|llama.cpp",
        ),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="With --for vllm: the --max-lora-rank of your vLLM server.", metavar="N")
    ] = None,
) -> None:
    """Write the adapter of a checkpoint and a model card, for PEFT, the Hub, vLLM or llama.cpp."""
    from lowrank_dist.checkpoint.folder import export
    from lowrank_dist.methods.files import TARGETS, VLLM

    known = {name.lower(): name for name in TARGETS}
    if target is not None and target not in known:
        raise UserError(f"--for {target}: give {' or '.join(known)}, or leave it out")
    program = None if target is None else known[target]
    if max_rank is not None and program != VLLM:
        raise UserError("--max-rank applies only to vLLM: add --for vllm")
    notes = export(checkpoint, out, target=program, max_rank=max_rank)
    say(f"{out}: adapter and model card of {checkpoint}")
    for note in notes:
        say(f"  {note}")


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Adapter, checkpoint, run or model folder.", metavar="DIR")],
    base: Annotated[
        Path | None,
        typer.Option(help="Base model to check against. Default: the base named in the adapter.", metavar="DIR"),
    ] = None,
    modules: Annotated[bool, typer.Option("--modules", help="Show the norm of the update in every module.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show the content of an adapter, checkpoint, run or model folder. Exit code 1 if something in it is broken."""
    from lowrank_dist.engine.inspection import inspect
    from lowrank_dist.methods.lora.inspection import MODULES, SUMMARY

    report = inspect(folder, base)
    report.tables.pop(SUMMARY if modules else MODULES, None)
    if as_json:
        put(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        _show(report)
    if not report.verifies:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    facts = list(_lines({"folder": str(report.path), "is": report.kind, **report.facts}))
    tables = {title: [list(map(_text, row.values())) for row in rows] for title, rows in report.tables.items()}
    heads = {title: [key.replace("_", " ") for key in rows[0]] for title, rows in report.tables.items()}
    notes = [("warning", text, "yellow") for text in report.warnings]
    notes += [("broken", text, "red") for text in report.problems]
    verdict = "it verifies" if report.verifies else f"it does not verify: {len(report.problems)} broken"
    console = open_console()
    if not console.is_terminal:
        width = max(len(label) for label, _ in facts)
        lines = [f"{label:<{width}}  {value}" for label, value in facts]
        for title, rows in tables.items():
            lines += ["", title.replace("_", " "), *_columns([heads[title], *rows])]
        lines += ["", *(f"{kind}: {escape_all(text)}" for kind, text, _ in notes), verdict]
        say("\n".join(lines))
        return
    grid = Table.grid(padding=(0, 2))
    for label, value in facts:
        grid.add_row(Text(label, style="bold"), value)
    console.print(grid)
    for title, rows in tables.items():
        table = Table(title=title.replace("_", " "), title_justify="left")
        for index, head in enumerate(heads[title]):
            table.add_column(head, justify="right" if index and head != "note" else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for kind, text, style in notes:
        console.print(Text.assemble((f"{kind}: ", style), escape_all(text)))
    console.print(Text(verdict, style="green" if report.verifies else "red"))


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (label, value) of every fact; sections of a config have a line each."""
    for label, value in facts.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            yield from ((f"{label} {escape_all(str(name))}", _text(inner)) for name, inner in value.items())
        else:
            yield label.replace("_", " "), _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{escape_all(str(key))}={_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else escape_all(str(value))


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
