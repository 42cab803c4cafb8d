"""Chat templates: the rendered text of a conversation and the character ranges of the assistant's turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lowrank_dist.arch.model_files import TOKENIZER_CONFIG_FILE
from lowrank_dist.data.rendering import RENDERER, Chat, Job, RenderingError
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.terminal import escape_all
from lowrank_dist.untrusted.files import short_path
from lowrank_dist.untrusted.json import brief

# transformers' own test for the marker (chat_template_utils.render_jinja_template).
_MARKER = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
_CLOCK = "strftime_now"
# The file that transformers takes before the key of tokenizer_config.json.
TEMPLATE_FILE, _KEY = "chat_template.jinja", "chat_template"
_MARK_REMEDY = (
    "put {% generation %} ... {% endgeneration %} around the assistant's text and its end-of-turn token in the template"
)

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's turn: characters [start, end) of a text.

    content_end: where the message in the turn ends; equal to `start` if the message was not found.
    """

    start: int
    end: int
    content_end: int


@dataclass(frozen=True, slots=True)
class RenderedChat:
    text: str
    turns: tuple[Turn, ...]


class ChatTemplate:
    """A tokenizer's chat template.

    With `{% generation %}` markers the template itself marks the assistant's text. Without them turn i is the text that
    message i adds to its context: render(messages[:i+1]) less render(messages[:i], add_generation_prompt=True), and
    both must be prefixes of the whole. Where they are not (the template drops earlier thinking, or its generation
    prompt is not in the history) training would see other tokens than inference, so UserError is raised.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, folder: Path, moment: datetime) -> None:
        """moment: the time that the template's clock (`strftime_now`) always returns."""
        self.name = f"the chat template of {folder}"
        self._file = TEMPLATE_FILE if (folder / TEMPLATE_FILE).is_file() else f"{_KEY} in {TOKENIZER_CONFIG_FILE}"
        try:
            source = hf.get_chat_template()
        except ValueError as error:  # several named templates, none of them the default
            names = some_of(sorted(hf.chat_template), 10) if isinstance(hf.chat_template, dict) else "several"
            raise UserError(
                f"{self.name}: its templates are {names}, and none is the default; name the one to use 'default'"
            ) from error
        special: dict[str, Any] = hf.special_tokens_map
        self._job = Job(source, special, moment)
        self.marked = bool(_MARKER.search(source))
        self.reads_the_clock = _CLOCK in source

    def render(self, conversations: Sequence[Messages], places: Sequence[str]) -> list[RenderedChat]:
        """Return text and assistant turns of each conversation; `places` (file:line) go into errors.

        Raises UserError where the template refuses the messages, fails on them or exceeds a bound (`render_child`), or
        the turns can't be determined.
        """
        asked = [self._asked(messages, where) for messages, where in zip(conversations, places, strict=True)]
        given = zip(conversations, places, strict=True)

        def chat_of(answer: Mapping[str, Any]) -> RenderedChat:
            messages, where = next(given)
            texts = answer["texts"]
            turns = _marked(texts[0], answer["spans"], messages) if self.marked else self._cut(texts, messages, where)
            return RenderedChat(texts[0], turns)

        try:
            return RENDERER.render(self._job, asked, chat_of)
        except RenderingError as error:
            what, remedy = "refuses", "change the messages or the template"
            if not error.refused:
                what, remedy = "fails on", "correct the template"
            place = self._file if error.line is None else f"{self._file}, line {error.line}"
            raise UserError(
                f"{places[error.number]}: {self.name} {what} these messages: {escape_all(str(error))} ({place}); "
                f"{remedy}"
            ) from error

    def _asked(self, messages: Messages, where: str) -> Chat:
        """Return the texts to render of a conversation: the whole and, without markers, those around each turn."""
        cuts = [(len(messages), False)]
        if not self.marked:
            if messages[0]["role"] == "assistant":
                raise UserError(
                    f"{where}: messages[0] is the assistant's, and without generation markers in {self.name} its "
                    f"turn cannot be located; begin with a user or system message, or {_MARK_REMEDY}"
                )
            cuts += [cut for turn in _turns_of(messages) for cut in ((turn, True), (turn + 1, False))]
        return messages, cuts, self.marked

    def _cut(self, texts: Sequence[str], messages: Messages, where: str) -> tuple[Turn, ...]:
        """Return the turns, found from the texts rendered before and after each."""
        text, turns = texts[0], list[Turn]()
        for i, before, after in zip(_turns_of(messages), texts[1::2], texts[2::2], strict=True):
            if not after.startswith(before):
                raise UserError(
                    f"{where}: {self.name}: the assistant's turn messages[{i}] does not begin with the generation "
                    f"prompt ({_difference(before, after)}), so training and inference would see different texts; "
                    f"{_MARK_REMEDY}"
                )
            if not text.startswith(after) or (turns and len(before) < turns[-1].end):
                raise UserError(
                    f"{where}: {self.name} renders messages[{i}] or an earlier one differently if more messages "
                    f"follow ({_difference(after, text)}); keep one assistant turn per line, or {_MARK_REMEDY}"
                )
            turns.append(_turn(text, len(before), len(after), messages[i]["content"]))
        return tuple(turns)


def require_template(settings: Mapping[str, Any], where: Path) -> None:
    """Raise UserError where the chat_template of a tokenizer_config.json is no template and no set of named ones.

    Published files have a text, or a list of objects with a name and a template; transformers also takes an object of
    name → template. A missing or empty value means no template and raises nothing.
    """
    value = settings.get(_KEY)
    named = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        named = [(each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None) for each in value]
    elif not isinstance(value, str | dict | None):
        named = [(None, None)]
    if not all(isinstance(part, str) for pair in named for part in pair):
        raise UserError(
            f"{short_path(where)}: {_KEY} must be text, or a list of objects with a name and a template, both text, "
            f"not {brief(value)}; correct it, remove it, or put the template in {TEMPLATE_FILE} beside it"
        )


def _turns_of(messages: Messages) -> list[int]:
    """Return the indices of the assistant's messages."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _marked(text: str, spans: Sequence[Sequence[int]], messages: Messages) -> tuple[Turn, ...]:
    """Return the turns, found from the template's generation blocks.

    The blocks' characters are used and not the tokens of return_assistant_tokens_mask, because its char_to_token marks
    a token that begins before the turn, and one too many where an offset is missing.
    """
    merged = list[tuple[int, int]]()
    for start, end in spans:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        if end > start:
            merged.append((start, end))
    contents = [messages[turn]["content"] for turn in _turns_of(messages)]
    if len(contents) != len(merged):
        contents = [""] * len(merged)  # several blocks per turn, or only the last turn: spans don't match messages
    return tuple(_turn(text, s, e, c) for (s, e), c in zip(merged, contents, strict=True))


def _turn(text: str, start: int, end: int, content: str) -> Turn:
    # Templates strip or wrap the content. Where it can't be found, only the type of the turn's last token is checked.
    stripped = content.strip()
    at = text.find(stripped, start, end)
    return Turn(start, end, start if at < 0 else at + len(stripped))


def _difference(left: str, right: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return f"at character {same}: {left[same : same + 20]!r} and {right[same : same + 20]!r}"
