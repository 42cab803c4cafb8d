"""Prompts and references, from text or a JSONL file, as the token ids that training would use for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lowrank_dist.data.formats import Completion, Conversation, Problem, Use, read_jsonl
from lowrank_dist.data.masking import mask_conversations
from lowrank_dist.data.tokenizer import FastTokenizer, Tokenizer, with_prefix
from lowrank_dist.errors import UserError
from lowrank_dist.generate.texts import StopTexts, written_text

_SHOWN = 40  # characters of a text in a note


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    where: its place, for messages. source: the text or the messages as given. stop_ids: tokens that end its completion.
    references: accepted completions, as a model that learned them would write them (`texts.written_text`).
    raw_references: the same completions as the file has them. Both are empty where no references were requested.
    """

    where: str
    source: str | list[dict[str, str]]
    ids: tuple[int, ...]
    stop_ids: frozenset[int]
    references: tuple[str, ...] = ()
    raw_references: tuple[str, ...] = ()


def prompt_of(text: str, tokenizer: Tokenizer, stop_ids: Collection[int], vocab: int) -> Prompt:
    """Return the prompt of a text that is to be continued as it is.

    Raises UserError where it is empty, is not UTF-8, or has ids that the model (of `vocab` tokens) does not have.
    """
    _require_text(text)
    (ids,) = tokenizer.encode([text])
    prompt = Prompt("--prompt", text, tuple(with_prefix(tokenizer, ids)), frozenset(stop_ids))
    return _checked([prompt], tokenizer, vocab)[0]


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt: not UTF-8; write the text into a file for --prompts") from error
    if not text:
        raise UserError("--prompt is empty; pass some text, or --prompts FILE")


def chat_prompt(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, stop_ids: Collection[int], vocab: int
) -> Prompt:
    """Return the prompt for the assistant's turn after the messages, as the chat template renders it.

    Raises UserError as `prompt_of` does, and where there is no template or it refuses the messages.
    """
    if not isinstance(tokenizer, FastTokenizer) or tokenizer.template is None:
        raise UserError(
            f"--chat: {tokenizer.path} has no chat template; use --no-chat, or --tokenizer with one that has"
        )
    for message in messages:
        _require_text(message["content"])
    asked = Conversation(1, [dict(message) for message in messages])
    (prompt,) = _chats([asked], Path("--prompt"), tokenizer, stop_ids, False)
    return _checked([replace(prompt, where="--prompt")], tokenizer, vocab)[0]


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    *,
    vocab: int,
    references: bool,
    stop: Sequence[str] = (),
    most: int | None = None,
    chat: bool = False,
) -> list[Prompt]:
    """Return the prompts of a JSONL file (`read_jsonl`), in file order.

    The prompt of a conversation is everything before the assistant's last turn. Without references, a conversation that
    ends with another role is a prompt as a whole. The template's end-of-turn token is a stop token as well, because
    training trains it.

    references: every line must have a reference; references are cut at the first text of `stop`, as completions are.
    most: number of samples after which to stop reading. chat: without references, treat a "prompt" as the user's turn
    of a chat and not as text to continue.

    Raises UserError for a file with invalid lines (all are listed), an empty prompt, and ids that the model (of `vocab`
    tokens) does not have.
    """

    def check(record: Completion | Conversation) -> None:
        if isinstance(record, Completion):
            if not record.prompt:
                raise Problem("key 'prompt' is empty; fill it or remove the line")
        elif references and not _turns(record):
            raise Problem("'messages' has no message of the assistant to compare with; add one")

    records = read_jsonl(path, Use.EVALUATION if references else Use.GENERATION, check, most)
    if records.kind == "completion" and chat and not references:
        turns = [
            Conversation(record.line, [{"role": "user", "content": record.prompt}]) for record in records.completions
        ]
        prompts = _chats(turns, path, tokenizer, stop_ids, references)
    elif records.kind == "completion":
        prompts = _plain(records.completions, path, tokenizer, stop_ids, references)
    else:
        prompts = _chats(records.conversations, path, tokenizer, stop_ids, references)
    cut = StopTexts(tokenizer, stop).cut
    prompts = [replace(prompt, references=tuple(map(cut, prompt.references))) for prompt in prompts]
    return _checked(prompts, tokenizer, vocab)


def note_on_rewritten(prompts: Sequence[Prompt]) -> list[str]:
    """Return a note where references differ from the file's text by more than white space at the ends, else nothing."""
    changed = [
        (prompt.where, reference, given)
        for prompt in prompts
        for reference, given in zip(prompt.references, prompt.raw_references, strict=True)
        if reference.strip() != given.strip()
    ]
    if not changed:
        return []
    where, reference, given = changed[0]
    samples = len({where for where, _, _ in changed})
    return [
        f"the references of {samples} of {len(prompts)} samples differ from the file, because chat template, "
        f"tokenizer and stop texts apply to them as to generated texts; {where}: {_shown(reference)} for "
        f"{_shown(given)}"
    ]


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _checked(prompts: list[Prompt], tokenizer: Tokenizer, vocab: int) -> list[Prompt]:
    for prompt in prompts:
        if not prompt.ids:
            raise UserError(
                f"{prompt.where}: the tokenizer in {tokenizer.path} gives no tokens for this prompt; give another "
                "prompt"
            )
        if max(prompt.ids) >= vocab:
            raise UserError(
                f"{prompt.where}: token {max(prompt.ids)} is beyond the model's {vocab} tokens, so the tokenizer in "
                f"{tokenizer.path} does not belong to this model; give its own with --tokenizer"
            )
    return prompts


def _plain(
    records: Sequence[Completion], path: Path, tokenizer: Tokenizer, stop_ids: Collection[int], references: bool
) -> list[Prompt]:
    encoded = tokenizer.encode([record.prompt for record in records])
    given = [(record.completion, *record.others) if references else () for record in records]
    pairs = [(text, record.prompt) for record, texts in zip(records, given, strict=True) for text in texts]
    # Encoded as `mask_completions` does, without the EOS, which is a stop token.
    trained = iter(tokenizer.encode_continuations([text for text, _ in pairs], [prompt for _, prompt in pairs]))
    prompts = []
    for record, ids, texts in zip(records, encoded, given, strict=True):
        before = tuple(with_prefix(tokenizer, ids))
        prompts.append(
            Prompt(
                where=f"{path}:{record.line}",
                source=record.prompt,
                ids=before,
                stop_ids=frozenset(stop_ids),
                references=tuple(written_text(tokenizer, before, next(trained), stop_ids) for _ in texts),
                raw_references=texts,
            )
        )
    return prompts


def _chats(
    records: Sequence[Conversation], path: Path, tokenizer: Tokenizer, stop_ids: Collection[int], references: bool
) -> list[Prompt]:
    """Return the prompts of conversations: the tokens before the requested turn, cut where training cuts them."""
    asked = [_asked(record, references) for record in records]
    prompts = []
    for record, sample in zip(asked, mask_conversations(tokenizer, asked, path), strict=True):
        # Start of the last run of targets, which ends the sample.
        begins = int(np.flatnonzero(~sample.target)[-1]) + 1
        before, trained = sample.tokens[:begins].tolist(), sample.tokens[begins:].tolist()
        stops = frozenset({*stop_ids, trained[-1]})
        prompts.append(
            Prompt(
                where=f"{path}:{record.line}",
                source=record.messages[:-1],
                ids=tuple(before),
                stop_ids=stops,
                references=(written_text(tokenizer, before, trained, stops),) if references else (),
                raw_references=(record.messages[-1]["content"],) if references else (),
            )
        )
    return prompts


def _asked(record: Conversation, references: bool) -> Conversation:
    """Return the messages up to and including the requested turn, for which a placeholder is added if it is missing."""
    if not references and record.messages[-1]["role"] != "assistant":
        # The placeholder is never fed: it shows where the template puts the assistant's text, and how a turn ends.
        return Conversation(record.line, [*record.messages, {"role": "assistant", "content": "answer"}])
    return Conversation(record.line, record.messages[: _turns(record)[-1] + 1])


def _turns(record: Conversation) -> list[int]:
    """Return the indices of the assistant's messages."""
    return [place for place, message in enumerate(record.messages) if message["role"] == "assistant"]
