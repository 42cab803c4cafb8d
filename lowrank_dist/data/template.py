"""Chat templates: the rendered text of a conversation and which of its characters the assistant writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from lowrank_dist.errors import UserError

# transformers' own test for the marker (chat_template_utils.render_jinja_template).
_MARKER = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
_MARK_REMEDY = (
    "put {% generation %} ... {% endgeneration %} around the assistant's text and its end-of-turn token in the template"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """Characters [start, end) of the text are the assistant's; its message ends at `content_end` (or start:
    unknown)."""

    start: int
    end: int
    content_end: int


@dataclass(frozen=True, slots=True)
class RenderedChat:
    text: str
    turns: tuple[Turn, ...]


class ChatTemplate:
    """A tokenizer's chat template.

    With `{% generation %}` markers the template says itself what the assistant writes. Without them turn i is the
    text that message i adds to its context: render(messages[:i+1]) less render(messages[:i],
    add_generation_prompt=True), and both must be prefixes of the whole. Where they are not (the template drops
    earlier thinking, or prompts with text that the history does not have) training would see other tokens than
    inference, so that is an error.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, folder: Path) -> None:
        self._hf = hf
        self.name = f"the chat template of {folder}"
        try:
            self._source = hf.get_chat_template()
        except ValueError as error:  # several named templates, none of them the default
            raise UserError(f"{self.name}: {error}") from error
        self.marked = bool(_MARKER.search(self._source))

    def render(self, messages: list[dict[str, str]], where: str) -> RenderedChat:
        """Text and assistant turns of one conversation; `where` (file:line) goes into errors.

        Raises UserError where the template refuses the messages or the turns can't be told.
        """
        try:
            return self._by_markers(messages) if self.marked else self._by_prefixes(messages, where)
        except (TemplateError, TypeError, KeyError) as error:
            raise UserError(f"{where}: {self.name} refuses these messages: {error}") from error

    def _by_markers(self, messages: list[dict[str, str]]) -> RenderedChat:
        # What apply_chat_template(return_assistant_tokens_mask=True) calls, for the characters in place of the tokens:
        # its char_to_token marks a token that begins before the turn and one too many where an offset is missing.
        special: dict[str, Any] = self._hf.special_tokens_map
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **special,
        )
        texts, spans = rendered  # as it is with return_assistant_tokens_mask
        text, merged = texts[0], list[tuple[int, int]]()
        for start, end in spans[0]:
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            if end > start:
                merged.append((start, end))
        contents = [m["content"] for m in messages if m["role"] == "assistant"]
        if len(contents) != len(merged):
            contents = [""] * len(merged)  # a marker a part, or only the last turn: no message to hold a span against
        return RenderedChat(text, tuple(_turn(text, s, e, c) for (s, e), c in zip(merged, contents, strict=True)))

    def _text(self, messages: list[dict[str, str]], prompt: bool) -> str:
        text = self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str), "one conversation that is not tokenised is one text"
        return text

    def _by_prefixes(self, messages: list[dict[str, str]], where: str) -> RenderedChat:
        text = self._text(messages, prompt=False)
        turns: list[Turn] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise UserError(
                    f"{where}: messages[0] is the assistant's, and {self.name} has no generation markers to tell its "
                    f"turn; begin with a user or system message, or {_MARK_REMEDY}"
                )
            before = self._text(messages[:i], prompt=True)
            after = text if i + 1 == len(messages) else self._text(messages[: i + 1], prompt=False)
            if not after.startswith(before):
                raise UserError(
                    f"{where}: {self.name}: the generation prompt is not a prefix of the assistant's turn "
                    f"messages[{i}] ({_difference(before, after)}), so training would see other text than inference; "
                    f"{_MARK_REMEDY}"
                )
            if not text.startswith(after) or (turns and len(before) < turns[-1].end):
                raise UserError(
                    f"{where}: {self.name} renders messages[{i}] or what precedes it differently once more messages "
                    f"follow ({_difference(after, text)}); keep one assistant turn a line, or {_MARK_REMEDY}"
                )
            turns.append(_turn(text, len(before), len(after), message["content"]))
        return RenderedChat(text, tuple(turns))


def _turn(text: str, start: int, end: int, content: str) -> Turn:
    # Templates strip or wrap the content; where it can't be found at all the last token's kind is the only check.
    stripped = content.strip()
    at = text.find(stripped, start, end)
    return Turn(start, end, start if at < 0 else at + len(stripped))


def _difference(left: str, right: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return f"at character {same}: {left[same : same + 20]!r} against {right[same : same + 20]!r}"
