"""`lowrank-dist evaluate`: a model's completions, scored against references."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lowrank_dist.backend.libraries import silence_megatron
from lowrank_dist.cli.decode import (
    DecodingOptions,
    decoding_command,
    load_decoder,
    ranks,
    record,
    require_file,
    say_limited,
    write_jsonl,
)
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import put, say


@decoding_command
def evaluate_command(
    options: DecodingOptions,
    data: Annotated[
        Path,
        typer.Option(
            help='JSONL file, one sample per line: {"prompt": TEXT, "completion": TEXT or list of accepted TEXTs}, or '
            '{"messages": [...]}, whose last assistant turn is the reference.',
            metavar="FILE",
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Required: exact_match, bleu or rouge_l; repeat it for several.", metavar="METRIC"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New file to write, with one JSON line per completion.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Generate a completion for every sample of a file and score it against the reference.

    Sharded over ranks as `lowrank-dist generate` is.
    """
    with silence_megatron():
        from lowrank_dist.generate.decode import summarize
        from lowrank_dist.generate.metrics import METRICS, check_metrics, notes_on_references, notes_on_texts
        from lowrank_dist.generate.prompts import note_on_rewritten, read_prompts

    with ranks(options) as job:
        if not metric:  # typer's own message would not name the values
            raise UserError(f"--metric is missing; give one of {', '.join(METRICS)}, or several")
        check_metrics(tuple(metric))
        require_file("--data", data)
        ready = load_decoder(options, job, out)
        loaded = ready.loaded
        samples = read_prompts(
            data, loaded.tokenizer, loaded.stop_ids, vocab=loaded.vocab, references=True, stop=ready.params.stop
        )
        found = ready.decode(samples)
        if not job.should_print:
            return
        result = summarize(found, samples, tuple(metric))
        if out is not None:
            lines = [
                {**record(sample, generation), "references": list(sample.references)}
                for sample, generation in zip(samples, found, strict=True)
            ]
            write_jsonl(out, lines)
        notes = note_on_rewritten(samples)
        references = [sample.references for sample in samples]
        notes += notes_on_references(metric, references)
        notes += notes_on_texts(metric, [generation.text for generation in found], references)
        noted = {**result, "notes": notes} if notes else result
        put(json.dumps(noted, indent=2) if as_json else table(result))
        for note in notes:
            say(note, err=True)
        say_limited(int(result["met_length_limit"]), len(samples))


def table(result: Mapping[str, float]) -> str:
    """Return a line for each value."""
    width = max(map(len, result))
    return "\n".join(f"{name:<{width}}  {value:.4f}".removesuffix(".0000") for name, value in result.items())
