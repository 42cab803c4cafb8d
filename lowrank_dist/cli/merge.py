"""`lowrank-dist merge`: base + adapters → a plain Hugging Face folder."""

from pathlib import Path
from typing import Annotated

import typer

from lowrank_dist.errors import UserError


def merge_command(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base model.", metavar="DIR")],
    adapter: Annotated[
        list[str],
        typer.Option(
            help="PEFT adapter folder, with a weight if other than 1; repeat it to add several. What follows the last "
            "'=' is the weight, unless a folder has the whole as its name.",
            metavar="DIR[=WEIGHT]",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.", metavar="DIR")],
    force_mismatch: Annotated[
        bool,
        typer.Option("--force-mismatch", help="Merge although the base is not the one the adapter was trained on."),
    ] = False,
    shard_size: Annotated[
        str | None,
        typer.Option(help="Largest file of weights, such as 5GB or 2GiB; as in the base if not given.", metavar="SIZE"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (each tensor's own), fp32, bf16 or fp16.", metavar="TYPE")] = "auto",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare the result's logits with base + adapter in PEFT before it gets its name. Loads the model "
            "whole, in fp32.",
        ),
    ] = False,
    verify_text: Annotated[
        Path | None,
        typer.Option(help="Text for --verify: the first 8 lines, 128 tokens of each.", metavar="FILE"),
    ] = None,
) -> None:
    """Fold adapters into their base model, tensor by tensor, without a GPU."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from lowrank_dist.merge.merge import merge
    from lowrank_dist.merge.options import parse_adapter, parse_dtype, parse_shard_size
    from lowrank_dist.methods.registry import reader_of

    adapters = [parse_adapter(text) for text in adapter]
    for given in adapters:
        reader_of(given.path).files.refuse_merge(given.path)
    limit = None if shard_size is None else parse_shard_size(shard_size)
    stored = parse_dtype(dtype)
    if verify_text is not None and not verify:
        raise UserError("--verify-text says what --verify reads: add --verify")
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # The bar goes to stderr, so that stdout holds the result alone.
    console = Console(stderr=True)
    verified: list[object] = []
    check = None
    if verify:
        from transformers.utils.logging import disable_progress_bar

        from lowrank_dist.merge.verify import Verifier

        disable_progress_bar()
        verifier = Verifier(base, adapters, verify_text)

        def check(folder: Path) -> None:
            console.print("verifying: loading base, adapters and merged model whole, in fp32", soft_wrap=True)
            verified.append(verifier(folder))

    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("merge", total=None)
        report = merge(
            base,
            adapters,
            out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            force_mismatch=force_mismatch,
            shard_size=limit,
            dtype=stored,
            verify=check,
        )
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"{out}: {report.tensors} tensors, {report.changed} changed, {report.nbytes / 1e9:.2f} GB")
    for part in report.adapters:
        typer.echo(f"  {part.adapter}: {part.changed} of {part.adapted} tensors changed")
    for result in verified:
        typer.echo(str(result))
