"""`lowrank-dist generate` and `evaluate`: a model's completions, alone or against references."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dist.backend.libraries import exempt_from_gc
from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import require_outside, resolve_link
from lowrank_dist.terminal import open_console, put, say

if TYPE_CHECKING:
    from lowrank_dist.generate.decode import Generation
    from lowrank_dist.generate.prompts import Prompt
    from lowrank_dist.generate.session import Session

# What both commands that decode are told.
ModelOption = Annotated[Path, typer.Option("--model", help="Hugging Face folder: base or merged.", metavar="DIR")]
AdapterOption = Annotated[
    Path | None, typer.Option(help="PEFT adapter folder or checkpoint to put on the model.", metavar="DIR")
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of a completion.", metavar="N")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", metavar="T")]
TopK = Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens.", metavar="K")]
TopP = Annotated[float, typer.Option(help="Sample from the fewest tokens that hold this probability.", metavar="P")]
Seed = Annotated[int, typer.Option(help="What is drawn depends on it, the prompt's number and the step.", metavar="N")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends a completion; may be repeated.", metavar="TEXT")]
Batch = Annotated[int, typer.Option(help="Prompts decoded together on a rank.", metavar="N")]
Tensor = Annotated[int, typer.Option(help="Tensor-parallel size; other ranks share out the prompts.", metavar="N")]
Dtype = Annotated[str, typer.Option(help="auto (the weights' own), fp32 or bf16.", metavar="TYPE")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="DEVICE")]
TokenizerOption = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Tokenizer folder, in place of the adapter's, or the model's.", metavar="DIR"),
]


def generate_command(
    model: ModelOption,
    adapter: AdapterOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text to go on from as it is, without the chat template; its completion is printed.", metavar="TEXT"
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file of prompts, or of messages for the chat template.", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for a JSON line a prompt; must not exist.", metavar="FILE")
    ] = None,
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
    """Generate completions. Sharded: torchrun --nproc-per-node N -m lowrank_dist.cli generate … --tensor N."""
    with silence_megatron():
        from lowrank_dist.generate.decode import generate
        from lowrank_dist.generate.prompts import prompt_of, read_prompts
        from lowrank_dist.generate.sampling import SamplingParams
        from lowrank_dist.generate.session import load_for_generation, require_same_prompts, session
        from lowrank_dist.generate.texts import stop_tokens

    with session(tensor, device) as job:
        params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()), batch)
        if (prompt is None) == (prompts is None):
            raise UserError("give one of --prompt and --prompts: what is to be gone on from")
        refuse_existing(out)
        model, adapter = resolve_link(model), adapter and resolve_link(adapter)
        loaded = load_for_generation(
            model, adapter, job.topology, job.backend.device, dtype=require_dtype(dtype), tokenizer=tokenizer
        )
        say_notes(loaded.notes, job)
        stops, vocab = stop_tokens(model, loaded.tokenizer, adapter), loaded.model.architecture.vocab
        if prompt is not None:
            asked = [prompt_of(prompt, loaded.tokenizer, stops, vocab)]
        elif prompts is not None:
            asked = read_prompts(prompts, loaded.tokenizer, stops, vocab=vocab, references=False)
        require_same_prompts(asked, params, job)
        with progress_bar(len(asked), job) as advance:
            found = generate(loaded.model, loaded.tokenizer, asked, params, job.topology, advance)
        if not job.should_print:
            return
        if out is None and prompts is None:
            put(found[0].text)
        else:
            write_jsonl(out, [record(ask, generation) for ask, generation in zip(asked, found, strict=True)])
        say_limited(sum(generation.finish_reason == "length" for generation in found), len(found))


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
    with silence_megatron():
        from lowrank_dist.generate.decode import EvaluationParams, generate, summarize
        from lowrank_dist.generate.metrics import notes_on_references, notes_on_texts
        from lowrank_dist.generate.prompts import note_on_rewritten, read_prompts
        from lowrank_dist.generate.sampling import SamplingParams
        from lowrank_dist.generate.session import load_for_generation, require_same_prompts, session
        from lowrank_dist.generate.texts import stop_tokens

    with session(tensor, device) as job:
        sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()), batch)
        params = EvaluationParams(tuple(metric), sampling)
        refuse_existing(out)
        model, adapter = resolve_link(model), adapter and resolve_link(adapter)
        loaded = load_for_generation(
            model, adapter, job.topology, job.backend.device, dtype=require_dtype(dtype), tokenizer=tokenizer
        )
        say_notes(loaded.notes, job)
        stops, vocab = stop_tokens(model, loaded.tokenizer, adapter), loaded.model.architecture.vocab
        samples = read_prompts(data, loaded.tokenizer, stops, vocab=vocab, references=True, stop=sampling.stop)
        require_same_prompts(samples, sampling, job)
        with progress_bar(len(samples), job) as advance:
            found = generate(loaded.model, loaded.tokenizer, samples, sampling, job.topology, advance)
        if not job.should_print:
            return
        result = summarize(found, samples, params.metrics)
        if out is not None:
            lines = [
                {**record(sample, generation), "references": list(sample.references)}
                for sample, generation in zip(samples, found, strict=True)
            ]
            write_jsonl(out, lines)
        notes = note_on_rewritten(samples)
        notes += notes_on_references(params.metrics, [sample.references for sample in samples])
        notes += notes_on_texts(params.metrics, [generation.text for generation in found])
        noted = {**result, "notes": notes} if notes else result
        put(json.dumps(noted, indent=2) if as_json else table(result))
        for note in notes:
            say(note, err=True)
        say_limited(int(result["met_length_limit"]), len(samples))


@contextmanager
def silence_megatron() -> Iterator[None]:
    """Silence Megatron in the block that imports it: it says at once what it would rather have found."""
    with exempt_from_gc():
        from lowrank_dist.backend.libraries import quiet_libraries

        quiet_libraries()
        yield


def record(prompt: Prompt, generation: Generation) -> dict[str, Any]:
    """Return a line of the output."""
    return {
        "prompt": prompt.source,
        "completion": generation.text,
        "finish_reason": generation.finish_reason,
        "tokens": list(generation.tokens),
    }


def require_dtype(dtype: str) -> str:
    if dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype {dtype}: give auto, fp32 or bf16")
    return dtype


def refuse_existing(out: Path | None) -> None:
    """Refuse an output that cannot be made, before the work is done and not after it."""
    if out is not None and out.exists():
        raise UserError(f"--out: {out} exists already: choose another name, or move it away")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out: {out.parent} is no folder: make it first")
    if out is not None:
        require_outside(out)


def write_jsonl(out: Path | None, records: Sequence[Mapping[str, Any]]) -> None:
    """Write to the file, or to stdout without one."""
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    if out is None:
        put(lines, end="")
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error}") from error
    say(f"{out}: {len(records)} completions", err=True)


def say_notes(notes: Sequence[str], job: Session) -> None:
    """Say on stderr, once: what the files of the model and of the adapter say and is not applied."""
    for note in notes if job.should_print else ():
        say(note, err=True)


def say_limited(limited: int, total: int) -> None:
    """Say on stderr: completions that ended for their length may lack their end."""
    if limited:
        say(
            f"{limited} of {total} completions met their length limit (--max-new-tokens, or the model's positions)",
            err=True,
        )


@contextmanager
def progress_bar(total: int, job: Session) -> Iterator[Callable[[int], None]]:
    """Show this rank's share of the prompts, on a terminal, where it is the rank that prints."""
    if not (job.should_print and sys.stderr.isatty()):
        yield lambda prompts: None
        return
    from rich.progress import Progress

    with Progress(console=open_console(err=True), transient=True) as bar:
        task = bar.add_task("decoding", total=-(-total // job.topology.dp_size))
        yield lambda prompts: bar.update(task, advance=prompts)


def table(result: Mapping[str, float]) -> str:
    """Return a line for each value."""
    width = max(map(len, result))
    return "\n".join(f"{name:<{width}}  {value:.4f}".removesuffix(".0000") for name, value in result.items())
