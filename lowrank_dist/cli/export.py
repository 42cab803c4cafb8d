"""`lowrank-dist export`: a checkpoint → an adapter folder to publish or serve."""

from pathlib import Path
from typing import Annotated

import typer

from lowrank_dist.errors import UserError


def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint (RUN/checkpoints/best) or adapter folder.", metavar="CHECKPOINT")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.", metavar="DIR")],
    target: Annotated[
        str | None, typer.Option("--for", help="vllm: refuse what vLLM would not serve right.", metavar="vllm")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="With --for vllm: the --max-lora-rank that vLLM is started with.", metavar="N")
    ] = None,
) -> None:
    """Write a checkpoint's adapter with a model card: without optimizer state, for PEFT, the Hub and vLLM."""
    from lowrank_dist.checkpoint.folder import export

    if target not in (None, "vllm"):
        raise UserError(f"--for {target}: give vllm, or leave it out")
    if max_rank is not None and target is None:
        raise UserError("--max-rank says what vLLM is started with: add --for vllm")
    export(checkpoint, out, vllm=target == "vllm", max_rank=max_rank)
    typer.echo(f"{out}: adapter and model card of {checkpoint}")
