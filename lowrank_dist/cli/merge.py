"""`lowrank-dist merge`: base + adapter → a plain Hugging Face folder."""

from pathlib import Path
from typing import Annotated

import typer


def merge_command(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base model.", metavar="DIR")],
    adapter: Annotated[Path, typer.Option(help="PEFT adapter folder.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.", metavar="DIR")],
    force_mismatch: Annotated[
        bool,
        typer.Option("--force-mismatch", help="Merge although the base is not the one the adapter was trained on."),
    ] = False,
) -> None:
    """Fold an adapter into its base model, tensor by tensor, without a GPU."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lowrank_dist.checkpoint.merge import merge

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # The bar goes to stderr, so that stdout holds the result alone.
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("merge", total=None)
        report = merge(
            base,
            adapter,
            out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            force_mismatch=force_mismatch,
        )
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{out}: {report.tensors} tensors, {report.changed} changed, {report.nbytes / 1e9:.2f} GB")
