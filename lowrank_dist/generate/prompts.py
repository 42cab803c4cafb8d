"""Prompts and references: texts, or a JSONL file, → token ids as training would have put them before a completion."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dist.data.formats import MAX_PROBLEMS, ROLES, Conversation
from lowrank_dist.data.masking import mask_conversations
from lowrank_dist.data.tokenizer import Tokenizer
from lowrank_dist.errors import UserError

FORMATS = (
    '{"prompt": "...", "completion": "..." or ["...", ...]} or {"messages": [{"role": "user", "content": "..."}, ...]}'
)


@dataclass(frozen=True)
class Prompt:
    """where: for messages. shown: the text, or the messages, as given. stop_ids: tokens that end its completion.

    references: what the completion should be, any of them; empty where the file has none.
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
        row = _completion({"prompt": text}, wanted=False)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from error
    return _checked(_plain([("--prompt", *row)], tokenizer, stop_ids), tokenizer, vocab)[0]


def read_prompts(
    path: Path, tokenizer: Tokenizer, stop_ids: Collection[int], *, vocab: int, references: bool
) -> list[Prompt]:
    """The prompts of a JSONL file of `FORMATS`, in its order.

    Of messages the assistant's last turn is what is to be written, and the prompt is what precedes it; without
    references, messages that end with another role ask for the turn that follows. The end of turn that the template
    puts, which training trains, stops a completion as well. references: every line must have one.

    Raises UserError, with every line that is wrong, for a file that cannot be read so, an empty prompt, and ids that
    the model (of `vocab` tokens) does not have.
    """
    rows = _rows(path)
    problems: list[str] = []
    plain: list[tuple[str, str, tuple[str, ...]]] = []
    chats: list[tuple[Conversation, tuple[str, ...]]] = []
    for line, row in rows:
        try:
            if "messages" in row:
                chats.append(_chat(line, row["messages"], references))
            else:
                plain.append((f"{path}:{line}", *_completion(row, references)))
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
    if plain and chats:
        problems.append(f"{path}: lines with 'prompt' and lines with 'messages'; use one format a file")
    _refuse(problems)
    prompts = _plain(plain, tokenizer, stop_ids) if plain else _chats(chats, path, tokenizer, stop_ids)
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


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError("\n".join([*problems[:MAX_PROBLEMS], *more]))


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """(line from 1, JSON object) of every line that is not blank."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: give a JSONL file, a line {FORMATS}")
    rows, problems = [], []
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                problems.append(f"{path}:{line}: not JSON in UTF-8 ({error}); write one object a line")
                continue
            if isinstance(row, dict):
                rows.append((line, row))
            else:
                problems.append(f"{path}:{line}: not a JSON object; a line is {FORMATS}")
    _refuse(problems)
    if not rows:
        raise UserError(f"{path}: the file holds no line; write {FORMATS}")
    return rows


def _completion(row: Mapping[str, Any], wanted: bool) -> tuple[str, tuple[str, ...]]:
    """Prompt and references of a line; ValueError says what is wrong with it."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"the prompt must be a text that is not empty, found {prompt!r}")
    prompt.encode()  # a surrogate without its other half is a ValueError too
    given = row.get("completion", [])
    references = [given] if isinstance(given, str) else given
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise ValueError("'completion' must be a text, or a list of texts of which any is right")
    if wanted and not references:
        raise ValueError("no 'completion' to hold the model's against: add one, or a list of several")
    return prompt, tuple(references)


def _chat(line: int, messages: Any, wanted: bool) -> tuple[Conversation, tuple[str, ...]]:
    """The messages up to and with the assistant's last, and its text; one is made up where there is none."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            "'messages' must be a list of {'role', 'content'} with texts in both and a role of " + ", ".join(ROLES)
        )
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not wanted and messages[-1]["role"] != "assistant":
        # Its text is never fed: it shows where the template puts what the assistant writes, and how a turn ends.
        return Conversation(line, [*messages, {"role": "assistant", "content": "answer"}]), ()
    if not turns:
        raise ValueError("no message of the assistant to hold the model's against: add it")
    kept = messages[: turns[-1] + 1]
    if not kept[-1]["content"].strip():
        raise ValueError("the assistant's last message is empty: nothing to hold the model's against")
    return Conversation(line, kept), (kept[-1]["content"],)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )


def _plain(
    lines: Sequence[tuple[str, str, tuple[str, ...]]], tokenizer: Tokenizer, stop_ids: Collection[int]
) -> list[Prompt]:
    encoded = tokenizer.encode([text for _, text, _ in lines])
    return [
        Prompt(where, text, (*tokenizer.prefix_ids, *ids), frozenset(stop_ids), references)
        for (where, text, references), ids in zip(lines, encoded, strict=True)
    ]


def _chats(
    chats: Sequence[tuple[Conversation, tuple[str, ...]]], path: Path, tokenizer: Tokenizer, stop_ids: Collection[int]
) -> list[Prompt]:
    """The tokens before the assistant's last turn, cut where training cuts them."""
    samples = mask_conversations(tokenizer, [conversation for conversation, _ in chats], path)
    prompts = []
    for (conversation, references), sample in zip(chats, samples, strict=True):
        # The last run of targets; the sample ends with it.
        before = int(np.flatnonzero(~sample.target)[-1]) + 1
        prompts.append(
            Prompt(
                where=f"{path}:{conversation.line}",
                shown=conversation.messages[:-1],
                ids=tuple(sample.tokens[:before].tolist()),
                stop_ids=frozenset({*stop_ids, int(sample.tokens[-1])}),
                references=references,
            )
        )
    return prompts
