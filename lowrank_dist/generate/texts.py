"""The text of a completion: decoding of its tokens, and the tokens and texts that stop it.

Generated texts and their references are both decoded here, so that the changes of template and tokenizer (case, spaces,
normal forms, special tokens, a thinking block) are the same in both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from os.path import commonprefix
from pathlib import Path

from lowrank_dist.data.tokenizer import Tokenizer
from lowrank_dist.errors import some_of
from lowrank_dist.formats.text_files import read_stop_ids

# Prompt tokens decoded before a completion's: a tokenizer may drop a space where a text begins.
_CONTEXT = 8
_SHOWN = 5  # tokens of an empty completion in a message
_CHARACTER = 4  # bytes of the longest UTF-8 character


def stop_tokens(model: Path, tokenizer: Tokenizer, adapter: Path | None = None) -> frozenset[int]:
    """Return the ids that end a text: the tokenizer's EOS and those in the files of the model and the adapter.

    An adapter's generation_config.json has the ids that its training texts end in, which may not be its base's.
    """
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    trained = () if adapter is None else read_stop_ids(adapter)
    return frozenset((*own, *read_stop_ids(model), *trained))


def reason_empty(tokenizer: Tokenizer, ids: Sequence[int], stop_ids: Collection[int], stopped: bool) -> str:
    """Return why a completion of these ids has no text but white space. stopped: a stop token or text ended it."""
    if ids and ids[0] in stop_ids:
        return f"it ended at once with token {ids[0]} ({tokenizer.token(ids[0])!r})"
    if stopped and ids[-1] not in stop_ids:
        return "it began with a stop text"
    tokens = some_of([repr(tokenizer.token(token)) for token in ids], _SHOWN)
    return f"it is white space, the tokens {tokens}{'' if stopped else ', up to the length limit'}"


def written_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], stop_ids: Collection[int]) -> str:
    """Return the text of generated or trained ids after the prompt, up to the first stop token."""
    return completion_text(tokenizer, prompt, list(takewhile(lambda token: token not in stop_ids, ids)))


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of `ids` as a continuation of the prompt: with spaces as trained, without text of the prompt.

    A decoder turns a run of byte tokens into U+FFFD for each byte unless the whole run is UTF-8. A run is therefore
    decoded from its first byte in `ids`, and a character that `ids` leave incomplete becomes one U+FFFD, as with
    byte-level BPE.
    """
    context = [] if ids and tokenizer.byte_of(ids[0]) is not None else list(prompt[-_CONTEXT:])
    cut = _broken_off(tokenizer, ids)
    whole = tokenizer.decode([*context, *ids[: len(ids) - cut]])
    # The common prefix is cut off and not the context's length, since byte-level BPE may end the context within a
    # character.
    return whole[len(commonprefix([tokenizer.decode(context), whole])) :] + ("\ufffd" if cut else "")


def _broken_off(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Return the number of tokens at the end that are bytes of an incomplete UTF-8 character."""
    for count, token in enumerate(reversed(ids[-_CHARACTER:]), start=1):
        byte = tokenizer.byte_of(token)
        if byte is None:
            return 0
        if not _continues(byte):
            return count if count < 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) else 0
    return 0


def _continues(byte: int) -> bool:
    """Return whether a byte is a UTF-8 continuation byte."""
    return 0x80 <= byte < 0xC0


class StopTexts:
    """Finds the first stop text in a completion. The cost per token does not grow with the completion's length."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        # A token stands for at least one byte, except special tokens, which decoding may leave out.
        self._tail = 2 * max((len(text.encode()) for text in texts), default=0) + _CONTEXT

    def found_in(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """Return whether the completion holds a stop text. It must have held none before its last token."""
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
