"""Prompts and references: texts, or a JSONL file, → token ids as training would have put them before a completion."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowrank_dist.data.formats import Completion, Conversation, Problem, Use, read_jsonl
from lowrank_dist.data.masking import mask_conversations
from lowrank_dist.data.tokenizer import Tokenizer, with_prefix
from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """where: for messages. shown: the text, or the messages, as given. stop_ids: tokens that end its completion.

    references: what the completion should be, any of them; empty where none were asked for.
    """

    where: str
    shown: str | list[dict[str, str]]
    ids: tuple[int, ...]
    stop_ids: frozenset[int]
    references: tuple[str, ...] = ()


def stop_tokens(model: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text: the tokenizer's EOS, and eos_token_id of generation_config.json or else config.json."""
    found = {tokenizer.eos_id}
    for name in ("generation_config.json", "config.json"):
        path = model / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: malformed JSON ({error}); mend it") from error
        eos = settings.get("eos_token_id") if isinstance(settings, dict) else None
        if eos is not None:
            found.update(eos if isinstance(eos, list) else [eos])
            break
    return frozenset(token for token in found if isinstance(token, int))


def prompt_of(text: str, tokenizer: Tokenizer, stop_ids: Collection[int], vocab: int) -> Prompt:
    """A text to go on from, as it is. Raises UserError where it is empty or not the model's (see `read_prompts`)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt: holds bytes that are not UTF-8; write the text into a file for --prompts") from error
    if not text:
        raise UserError("--prompt: is empty: nothing to go on from")
    (ids,) = tokenizer.encode([text])
    prompt = Prompt("--prompt", text, tuple(with_prefix(tokenizer, ids)), frozenset(stop_ids))
    return _checked([prompt], tokenizer, vocab)[0]


def read_prompts(
    path: Path, tokenizer: Tokenizer, stop_ids: Collection[int], *, vocab: int, references: bool
) -> list[Prompt]:
    """The prompts of a JSONL file (`read_jsonl`), in its order.

    Of messages the assistant's last turn is what is to be written, and the prompt is what precedes it; without
    references, messages that end with another role ask for the turn that follows. The end of turn that the template
    puts, which training trains, stops a completion as well. references: every line must have one, and the prompts hold
    them.

    Raises UserError, with every line that is wrong, for a file that cannot be read so, an empty prompt, and ids that
    the model (of `vocab` tokens) does not have.
    """

    def check(record: Completion | Conversation) -> None:
        if isinstance(record, Completion):
            if not record.prompt:
                raise Problem("key 'prompt' is empty: nothing to go on from; fill it or remove the line")
        elif references and not _turns(record):
            raise Problem("'messages' has none of the assistant to hold the model's against: add it")

    records = read_jsonl(path, Use.JUDGING if references else Use.PROMPTING, check)
    if records.kind == "completion":
        prompts = _plain(records.completions, path, tokenizer, stop_ids, references)
    else:
        prompts = _chats(records.conversations, path, tokenizer, stop_ids, references)
    return _checked(prompts, tokenizer, vocab)


def _checked(prompts: list[Prompt], tokenizer: Tokenizer, vocab: int) -> list[Prompt]:
    for prompt in prompts:
        if not prompt.ids:
            raise UserError(f"{prompt.where}: the tokenizer in {tokenizer.path} makes no token of this prompt")
        if max(prompt.ids) >= vocab:
            raise UserError(
                f"{prompt.where}: token {max(prompt.ids)} is not among the model's {vocab}: the tokenizer in "
                f"{tokenizer.path} does not belong to this model"
            )
    return prompts


def _plain(
    records: Sequence[Completion], path: Path, tokenizer: Tokenizer, stop_ids: Collection[int], references: bool
) -> list[Prompt]:
    encoded = tokenizer.encode([record.prompt for record in records])
    return [
        Prompt(
            where=f"{path}:{record.line}",
            shown=record.prompt,
            ids=tuple(with_prefix(tokenizer, ids)),
            stop_ids=frozenset(stop_ids),
            references=(record.completion, *record.others) if references else (),
        )
        for record, ids in zip(records, encoded, strict=True)
    ]


def _chats(
    records: Sequence[Conversation], path: Path, tokenizer: Tokenizer, stop_ids: Collection[int], references: bool
) -> list[Prompt]:
    """The tokens before the turn that is asked for, cut where training cuts them."""
    asked = [_asked(record, references) for record in records]
    prompts = []
    for record, sample in zip(asked, mask_conversations(tokenizer, asked, path), strict=True):
        # The last run of targets; the sample ends with it.
        before = int(np.flatnonzero(~sample.target)[-1]) + 1
        prompts.append(
            Prompt(
                where=f"{path}:{record.line}",
                shown=record.messages[:-1],
                ids=tuple(sample.tokens[:before].tolist()),
                stop_ids=frozenset({*stop_ids, int(sample.tokens[-1])}),
                references=(record.messages[-1]["content"],) if references else (),
            )
        )
    return prompts


def _asked(record: Conversation, references: bool) -> Conversation:
    """The messages up to and with the turn that is asked for, which is made up where there is none."""
    if not references and record.messages[-1]["role"] != "assistant":
        # Its text is never fed: it shows where the template puts what the assistant writes, and how a turn ends.
        return Conversation(record.line, [*record.messages, {"role": "assistant", "content": "answer"}])
    return Conversation(record.line, record.messages[: _turns(record)[-1] + 1])


def _turns(record: Conversation) -> list[int]:
    """Places of the assistant's messages."""
    return [place for place, message in enumerate(record.messages) if message["role"] == "assistant"]
