"""The options, the loaded model, the progress and the output that all commands that generate text share."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lowrank_dist.backend.libraries import silence_megatron
from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import require_outside, resolve_link
from lowrank_dist.terminal import ProgressLines, open_console, put, say

if TYPE_CHECKING:
    from lowrank_dist.generate.decode import Generation
    from lowrank_dist.generate.prompts import Prompt
    from lowrank_dist.generate.sampling import SamplingParams
    from lowrank_dist.generate.session import LoadedModel, Session


@dataclass(frozen=True)
class DecodingOptions:
    """The options of every command that generates text; each field is an option."""

    model: Annotated[Path, typer.Option(help="Hugging Face folder of the base or merged model.", metavar="DIR")]
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder or checkpoint to apply to the model.", metavar="DIR")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.", metavar="N")] = 128
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above 0 tokens are sampled.", metavar="T")
    ] = 0.0
    top_k: Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens.", metavar="K")] = None
    top_p: Annotated[
        float, typer.Option(help="Sample from the fewest tokens whose probabilities sum to P.", metavar="P")
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of sampling.", metavar="N")] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End a completion before this text; repeat it for several. $'\\n' is a line break in bash.",
            metavar="TEXT",
        ),
    ] = None
    batch: Annotated[int, typer.Option(help="Prompts decoded together on a rank.", metavar="N")] = 8
    tensor: Annotated[
        int,
        typer.Option(
            help="Tensor-parallel size. With more than N ranks, every group of N decodes its share of the prompts.",
            metavar="N",
        ),
    ] = 1
    dtype: Annotated[
        str, typer.Option(help="Type to run in: auto (that of the weights), fp32 or bf16.", metavar="TYPE")
    ] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="DEVICE")] = "auto"
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Tokenizer folder. Default: the adapter's if it has one, else the model's.", metavar="DIR"),
    ] = None


def decoding_command(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `options` of a command by the options of DecodingOptions."""
    shared = {field.name: field for field in fields(DecodingOptions)}
    hints = get_type_hints(DecodingOptions, include_extras=True)

    @wraps(command)
    def run(**given: Any) -> None:
        options = DecodingOptions(**{name: given.pop(name) for name in shared})
        command(**given, options=options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [
        inspect.Parameter(
            name,
            keyword,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[name],
        )
        for name, field in shared.items()
    ]
    parameters[2:2] = [parameter.replace(kind=keyword) for parameter in own if parameter.name != "options"]
    # typer reads both; functools.wraps has copied those of the command.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run


@dataclass(frozen=True)
class Decoder:
    """A loaded model on the ranks of a command, and the parameters that it generates with."""

    job: Session
    loaded: LoadedModel
    params: SamplingParams

    def decode(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return the completion of each prompt, on every rank. Collective. Shows the progress."""
        from lowrank_dist.generate.decode import generate
        from lowrank_dist.generate.session import require_same_prompts

        require_same_prompts(prompts, self.params, self.job)
        with progress(len(prompts), self.job) as advance:
            model, tokenizer = self.loaded.model, self.loaded.tokenizer
            return generate(model, tokenizer, prompts, self.params, self.job.topology, advance)

    @cached_property
    def has_template(self) -> bool:
        """True if the tokenizer has a chat template."""
        return getattr(self.loaded.tokenizer, "template", None) is not None


@contextmanager
def ranks(options: DecodingOptions) -> Iterator[Session]:
    """Yield the ranks of the command. An error in the block is printed by one of them."""
    with silence_megatron():
        from lowrank_dist.generate.session import session

    with session(options.tensor, options.device) as job:
        yield job


def load_decoder(options: DecodingOptions, job: Session, out: Path | None) -> Decoder:
    """Return the decoder that the options describe. Collective. out: the file that the command will write.

    Notes on settings in the model's files that are not applied go to stderr. Raises UserError for options that are
    wrong, before anything is loaded.
    """
    from lowrank_dist.generate.sampling import SamplingParams
    from lowrank_dist.generate.session import load_for_generation

    params = SamplingParams(
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        tuple(options.stop or ()),
        options.batch,
    )
    refuse_existing(out)
    if options.dtype not in ("auto", "fp32", "bf16"):
        raise UserError(f"--dtype {options.dtype}: give auto, fp32 or bf16")
    loaded = load_for_generation(
        resolve_link(options.model),
        options.adapter and resolve_link(options.adapter),
        job.topology,
        job.backend.device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
    )
    for note in loaded.notes if job.should_print else ():
        say(note, err=True)
    return Decoder(job, loaded, params)


def record(prompt: Prompt, generation: Generation) -> dict[str, Any]:
    """Return a line of the output."""
    return {
        "prompt": prompt.source,
        "completion": generation.text,
        "finish_reason": generation.finish_reason,
        "tokens": list(generation.tokens),
    }


def require_file(option: str, path: Path) -> None:
    """Raise UserError for an option that names no file, before the model is loaded."""
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file; give a JSONL file")


def refuse_existing(out: Path | None) -> None:
    """Raise UserError for an output that cannot be written, before anything is decoded."""
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


def say_limited(limited: int, total: int) -> None:
    """Say on stderr how many completions were cut off by their length limit."""
    if limited:
        say(
            f"{limited} of {total} completions reached their length limit (--max-new-tokens, or the model's positions)",
            err=True,
        )


@contextmanager
def progress(total: int, job: Session) -> Iterator[Callable[[int], None]]:
    """Show how many prompts this rank has decoded, on the rank that prints: a bar on a terminal, else lines.

    total: prompts of all ranks. Yields the function to call with the number of prompts in each finished batch.
    """
    share = -(-total // job.topology.dp_size)
    if not job.should_print:
        yield lambda prompts: None
    elif not sys.stderr.isatty():
        yield _lines(share)
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining())
        with Progress(*columns, console=open_console(err=True), transient=True) as bar:
            task = bar.add_task("decoding", total=share)
            yield lambda prompts: bar.update(task, advance=prompts)


def _lines(share: int) -> Callable[[int], None]:
    """Return a function that counts decoded prompts and says so on stderr."""
    lines, done = ProgressLines("decoding", "prompts", tell=partial(say, err=True)), 0

    def advance(prompts: int) -> None:
        nonlocal done
        done += prompts
        lines(done, share)

    return advance
