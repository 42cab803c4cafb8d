"""`lowrank-dist evaluate`: a model's completions against references."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lowrank_dist.cli.generate import (
    AdapterOption,
    Batch,
    Device,
    Dtype,
    MaxNewTokens,
    ModelOption,
    Seed,
    Stop,
    Temperature,
    Tensor,
    TokenizerOption,
    TopK,
    TopP,
    known_dtype,
    loading,
    progress_bar,
    record,
    refuse_existing,
    say_limited,
    write_jsonl,
)


def evaluate_command(
    model: ModelOption,
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL file of prompt and completion (a text, or a list of which any is right), or of messages whose "
            "last assistant turn is the reference.",
            metavar="FILE",
        ),
    ],
    metric: Annotated[list[str], typer.Option(help="exact_match, bleu or rouge_l; may be repeated.", metavar="METRIC")],
    adapter: AdapterOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for a JSON line a sample with what was generated; must not exist.", metavar="FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    batch: Batch = 8,
    tensor: Tensor = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokenizer: TokenizerOption = None,
) -> None:
    """Generate for every sample and score it. Sharded as `generate` is."""
    with loading():
        from lowrank_dist.generate.decode import EvaluationRules, generate, summary
        from lowrank_dist.generate.prompts import read_prompts, stop_tokens
        from lowrank_dist.generate.sampling import DecodingRules
        from lowrank_dist.generate.session import load, session

    with session(tensor, device) as job:
        decoding = DecodingRules(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()), batch)
        rules = EvaluationRules(tuple(metric), decoding)
        refuse_existing(out)
        loaded = load(model, adapter, job.topology, job.backend.device, dtype=known_dtype(dtype), tokenizer=tokenizer)
        stops, vocab = stop_tokens(model, loaded.tokenizer), loaded.model.architecture.vocab
        samples = read_prompts(data, loaded.tokenizer, stops, vocab=vocab, references=True)
        with progress_bar(len(samples), job) as advance:
            found = generate(loaded.model, loaded.tokenizer, samples, decoding, job.topology, advance)
        if not job.speaks:
            return
        result = summary(found, samples, rules.metrics)
        if out is not None:
            lines = [
                {**record(sample, generation), "references": list(sample.references)}
                for sample, generation in zip(samples, found, strict=True)
            ]
            write_jsonl(out, lines)
        typer.echo(json.dumps(result, indent=2) if as_json else table(result))
        say_limited(int(result["met_length_limit"]), len(samples))


def table(result: Mapping[str, float]) -> str:
    """A line for each value."""
    width = max(map(len, result))
    return "\n".join(f"{name:<{width}}  {value:.4f}".removesuffix(".0000") for name, value in result.items())
