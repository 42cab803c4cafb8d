"""The text of a completion: what stops it, and the rest decoded as what follows its prompt.

Generated texts and the references that they are compared with both come from here, so that what template and tokenizer
change (case, spaces, normal forms, special tokens, a block of thinking) is the same in both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from os.path import commonprefix
from pathlib import Path

from lowrank_dist.data.tokenizer import Tokenizer
from lowrank_dist.formats.text_files import stops_of

# A tokenizer may drop a space where a text begins, so ids are decoded behind the last few of the prompt.
_CONTEXT = 8
_CHARACTER = 4  # bytes of UTF-8's longest characters


def stop_tokens(model: Path, tokenizer: Tokenizer, adapter: Path | None = None) -> frozenset[int]:
    """Return the ids that end a text: the tokenizer's EOS, and what the files of the model say, and of the adapter.

    An adapter's generation_config.json has what it was trained to end in, which may end nothing for its base.
    """
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    trained = () if adapter is None else stops_of(adapter)
    return frozenset((*own, *stops_of(model), *trained))


def written_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], stop_ids: Collection[int]) -> str:
    """Return the text of the ids that a model writes, or is trained to write, after the prompt: up to its first stop
    token."""
    return completion_text(tokenizer, prompt, list(takewhile(lambda token: token not in stop_ids, ids)))


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of `ids` as what follows the prompt: spaces as they were trained, no text of the prompt.

    A run of byte tokens is one text to a decoder, and U+FFFD for each byte where it is not UTF-8 as a whole. So it is
    decoded from its first byte in `ids`, and a character that `ids` break off is one U+FFFD, as with byte-level BPE.
    """
    context = [] if ids and tokenizer.byte_of(ids[0]) is not None else list(prompt[-_CONTEXT:])
    cut = _broken_off(tokenizer, ids)
    whole = tokenizer.decode([*context, *ids[: len(ids) - cut]])
    # Not the length of the context's text alone, which byte-level BPE may end within a character, too.
    return whole[len(commonprefix([tokenizer.decode(context), whole])) :] + ("\ufffd" if cut else "")


def _broken_off(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Return how many of the last tokens are bytes of a UTF-8 character that lacks its last ones."""
    for count, token in enumerate(reversed(ids[-_CHARACTER:]), start=1):
        byte = tokenizer.byte_of(token)
        if byte is None:
            return 0
        if not _continues(byte):
            return count if count < 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) else 0
    return 0


def _continues(byte: int) -> bool:
    """Return whether a byte is one of a UTF-8 character's after its first."""
    return 0x80 <= byte < 0xC0


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
        start = max(len(ids) - self._tail, 0)
        for _ in range(_CHARACTER - 1):  # back to where a character begins
            byte = self._tokenizer.byte_of(ids[start]) if start else None
            if byte is None or not _continues(byte):
                break
            start -= 1
        tail = completion_text(self._tokenizer, [*prompt[-_CONTEXT:], *ids[:start]], ids[start:])
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """Return the completion up to the first stop text."""
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text
