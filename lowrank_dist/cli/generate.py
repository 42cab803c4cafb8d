"""`lowrank-dist generate`: completions of a prompt, of a file of prompts, or of what is typed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_dist.cli.decode import (
    Decoder,
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

if TYPE_CHECKING:
    from lowrank_dist.generate.decode import Generation
    from lowrank_dist.generate.prompts import Prompt

EXIT, QUIT, CLEAR = "/exit", "/quit", "/clear"


@decoding_command
def generate_command(
    options: DecodingOptions,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Print the completion of this text. Repeat it for several texts; the output is then JSON lines, as "
            "for --prompts.",
            metavar="TEXT",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL file, one prompt per line: {"prompt": TEXT} or {"messages": [...]}.', metavar="FILE"),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Answer each line that is typed. With --chat, earlier lines and answers are remembered until "
            f"{CLEAR}; otherwise each line stands alone. {EXIT}, {QUIT} or end of input ends the session.",
        ),
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put a prompt into the chat template as the user's turn, or continue its text as it is. Default: "
            "--chat where the adapter (or model) records that it was trained on chats.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New file to write, with one JSON line per prompt.", metavar="FILE")
    ] = None,
) -> None:
    """Generate completions of prompts.

    Sharded over N ranks: torchrun --nproc-per-node N -m lowrank_dist.cli generate ... --tensor N.
    """
    with ranks(options) as job:
        if bool(prompt) + (prompts is not None) + interactive != 1:
            raise UserError("give exactly one of --prompt TEXT, --prompts FILE and --interactive")
        if interactive and out is not None:
            raise UserError("--out cannot be used with --interactive: leave one of them out")
        if prompts is not None:
            require_file("--prompts", prompts)
        ready = load_decoder(options, job, out)
        chats = ready.loaded.trained_on_chats if chat is None else chat
        if chats and chat is None and job.should_print:
            say("trained on chats: prompts go through the chat template (--no-chat: as they are)", err=True)
        if interactive:
            _converse(ready, chats)
            return
        asked = _asked(ready, prompt or [], prompts, chats)
        found = ready.decode(asked)
        if not job.should_print:
            return
        if out is None and prompts is None and len(found) == 1:
            put(found[0].text)
        else:
            write_jsonl(out, [record(ask, generation) for ask, generation in zip(asked, found, strict=True)])
        say_limited(sum(generation.finish_reason == "length" for generation in found), len(found))
        _say_empty(ready, asked, found, chats)


def _asked(ready: Decoder, texts: Sequence[str], prompts: Path | None, chats: bool) -> list[Prompt]:
    """Return the prompts of --prompts, or of every --prompt (`texts`)."""
    from lowrank_dist.generate.prompts import read_prompts

    loaded = ready.loaded
    if prompts is not None:
        return read_prompts(
            prompts, loaded.tokenizer, loaded.stop_ids, vocab=loaded.vocab, references=False, chat=chats
        )
    return [_prompt(ready, text, chats) for text in texts]


def _prompt(ready: Decoder, text: str, chats: bool, before: Sequence[dict[str, str]] = ()) -> Prompt:
    """Return the prompt of a text: the user's turn after the messages `before` of a chat, else the text as it is."""
    from lowrank_dist.generate.prompts import chat_prompt, prompt_of

    loaded = ready.loaded
    if chats:
        turn = {"role": "user", "content": text}
        return chat_prompt([*before, turn], loaded.tokenizer, loaded.stop_ids, loaded.vocab)
    return prompt_of(text, loaded.tokenizer, loaded.stop_ids, loaded.vocab)


def _say_empty(ready: Decoder, asked: Sequence[Prompt], found: Sequence[Generation], chats: bool) -> None:
    """Say on stderr why completions are empty, with the first as the example."""
    from lowrank_dist.generate.texts import reason_empty

    empty = [pair for pair in zip(asked, found, strict=True) if not pair[1].text.strip()]
    if not empty:
        return
    prompt, generation = empty[0]
    reason = reason_empty(
        ready.loaded.tokenizer, generation.tokens, prompt.stop_ids, generation.finish_reason == "stop"
    )
    hint = "; --chat gives the prompt to the chat template" if ready.has_template and not chats else ""
    count = "the completion is empty" if len(found) == 1 else f"{len(empty)} of {len(found)} completions are empty"
    where = "" if len(found) == 1 else f"{prompt.where}: "
    say(f"{count}: {where}{reason}{hint}", err=True)


@dataclass
class _Conversation:
    """The messages of a chat so far. turns: number of completions."""

    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0


def _converse(ready: Decoder, chats: bool) -> None:
    """Complete lines of stdin until it ends or says /exit or /quit. Rank 0 reads; every rank decodes. Collective."""
    said = _Conversation()
    if ready.job.should_print and sys.stdin.isatty():
        say(f"{EXIT} or end of input ends it" + (f"; {CLEAR} forgets what was said" if chats else ""), err=True)
    while (line := _next_line(ready)) is not None and line.strip() not in (EXIT, QUIT):
        if line.strip() == CLEAR:
            said.messages.clear()
        if not line.strip() or line.strip() == CLEAR:
            continue
        try:
            asked = _prompt(ready, line, chats, said.messages)
            # Each turn draws anew: what is drawn depends on the seed and the prompt's number, which is always 0 here.
            params = replace(ready.params, seed=ready.params.seed + said.turns)
            (found,) = replace(ready, params=params).decode([asked])
        except UserError as error:  # the same on every rank: it is the line that cannot be completed
            if ready.job.should_print:
                say(f"error: {error}" + (f" ({CLEAR} forgets what was said)" if said.messages else ""), err=True)
            continue
        said.turns += 1
        if chats:
            said.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": found.text}]
        if ready.job.should_print:
            put(found.text)
            say_limited(int(found.finish_reason == "length"), 1)
            _say_empty(ready, [asked], [found], chats)


def _next_line(ready: Decoder) -> str | None:
    """Return the next line that rank 0 reads, on every rank; None where its input has ended. Collective."""
    from lowrank_dist.parallel.collectives import gather_texts

    line = ""
    if ready.job.should_print:
        if sys.stdin.isatty():
            put("> ", err=True, end="")
        line = sys.stdin.readline()
    told = gather_texts(line, ready.job.topology.world_group, ready.job.backend.device)[0]
    return told.rstrip("\n") if told else None
