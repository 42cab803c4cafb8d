"""From generated ids to the text of a completion, and the texts that end one."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_dist.data.tokenizer import Tokenizer

# A tokenizer may drop a space where a text begins, so ids are decoded behind the last few of the prompt.
_CONTEXT = 8


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Text of `ids` as what follows the prompt: spaces as they were trained, no text of the prompt."""
    context = list(prompt[-_CONTEXT:])
    before = tokenizer.decode(context)
    return tokenizer.decode([*context, *ids])[len(before) :]


class StopTexts:
    """Finds the first of some texts in a completion, at a cost for each token that does not grow with its length."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        # A token stands for at least one byte, but for the special ones, which decoding may leave out.
        self._tail = 2 * max((len(text.encode()) for text in texts), default=0) + _CONTEXT

    def found_in(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """Return whether the completion holds a stop text, given that it held none before its last token."""
        if not self._texts:
            return False
        tail = completion_text(self._tokenizer, [*prompt[-_CONTEXT:], *ids[: -self._tail]], ids[-self._tail :])
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """The completion up to the first stop text."""
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text
