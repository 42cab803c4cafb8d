"""`lowrank-dist data`: the data sets of a run as it will train on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_dist.backend.libraries import silence_megatron
from lowrank_dist.cli.arguments import keys_as_options
from lowrank_dist.terminal import escape_all, open_console, put, say

if TYPE_CHECKING:
    from lowrank_dist.config import Config
    from lowrank_dist.engine.data_report import DataSetReport, ShownSample

# Characters shown of a run of context and of a run of targets; the middle of a longer one is left out.
_CONTEXT, _TARGET = 600, 1200


def data_command(
    config: Annotated[str, typer.Argument(help="YAML file of the run.", metavar="CONFIG", callback=keys_as_options)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to CONFIG.", metavar="section.key=value ...", callback=keys_as_options),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of each file to show.", metavar="N", min=0)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the ids of the shown samples.")] = False,
) -> None:
    """Show how a run reads its data: samples with their targets marked, lengths, dropped samples, padding.

    Only targets are trained on. They are green on a terminal with colours and between ⟦ and ⟧ elsewhere.
    """
    from lowrank_dist.config import read_arguments

    run = read_arguments([config, *(overrides or [])], require_data=True)
    with silence_megatron():
        from lowrank_dist.engine.data_report import report_on_data

    found = report_on_data(run, samples)
    if as_json:
        put(json.dumps({key: asdict(report) for key, report in found.items()}, indent=2, ensure_ascii=False))
        return
    for number, (key, report) in enumerate(found.items()):
        say("\n" * (number > 0) + "\n".join(_lines(key, report, run)))
        for sample in report.shown:
            _show(sample)


def _lines(key: str, report: DataSetReport, run: Config) -> Iterator[str]:
    """Yield the lines on a data set as a whole."""
    packing = run.data.packing
    yield f"{key}: {escape_all(report.summary)}"
    yield "  tokens of a sample: " + ", ".join(f"{name} {value:,}" for name, value in report.lengths.items())
    yield f"  targets: {report.target_share:.1%} of the tokens"
    packed = "data.packing=true" if packing else f"with data.packing=true {report.fill_packed:.1%}"
    yield f"  not padding: {report.fill:.1%} of the positions in a batch ({packed})"
    if report.fill_packed < report.fill:
        size = f"train.global_batch={run.train.global_batch} samples" if key == "data.train" else "samples of a batch"
        rows = "train.micro_batch" if key == "data.train" else "eval.micro_batch"
        yield (
            f"  packing pads more: the {size} make too few packed rows for whole microbatches, which empty rows fill; "
            f"a smaller {rows} pads less"
        )


def _show(sample: ShownSample) -> None:
    from rich.text import Text

    say(f"\nline {sample.line}: {len(sample.tokens):,} tokens, {sum(sample.targets):,} of them targets")
    pieces = [(_shortened(text, _TARGET if target else _CONTEXT), target) for text, target in sample.text]
    console = open_console()
    if console.is_terminal and console.color_system is not None and not console.no_color:
        styled = Text.assemble(*((text, "bold green" if target else "") for text, target in pieces))
        console.print(styled, soft_wrap=True)
    else:
        say("".join(f"⟦{text}⟧" if target else text for text, target in pieces))


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
