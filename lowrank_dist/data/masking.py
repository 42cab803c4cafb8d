"""Conversion of records to samples: token ids and a mask of the targets.

Targets are a completion and its EOS, or the assistant's turns and their end-of-turn tokens.

Masks follow from the origin of each piece of text, never from its ids, so a pad token equal to EOS changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from lowrank_dist.data.formats import Completion, Conversation
from lowrank_dist.data.template import RenderedChat, Turn
from lowrank_dist.data.tokenizer import Encoding, FastTokenizer, Tokenizer, has_prefix, with_prefix
from lowrank_dist.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A tokenised sample; `line` is its line in the file.

    tokens [n] int32; target [n] bool, False at position 0, which nothing predicts. own_bos: the text itself begins with
    the BOS that the tokenizer adds. own_end: a completion or turn itself ends with the end token.
    """

    tokens: np.ndarray
    target: np.ndarray
    line: int
    own_bos: bool = False
    own_end: bool = False


def mask_completions(tokenizer: Tokenizer, records: Sequence[Completion]) -> list[Sample]:
    """Return samples of BOS (if the tokenizer adds one) + prompt + completion + EOS; targets are completion and EOS.

    With an empty prompt the completion is the beginning of the text. A text that begins with BOS gets no second BOS,
    and BOS is never a target. A completion that ends with EOS gets no second EOS, and white space after that EOS is cut
    off, since generation would stop before it. Raises UserError where the tokenizer has no EOS.
    """
    if tokenizer.eos_id is None:
        raise UserError(
            f"{tokenizer.path}: the tokenizer has no end-of-sequence token, so the model would never learn to end a "
            "completion; set eos_token in tokenizer_config.json"
        )
    prompts = tokenizer.encode([r.prompt for r in records])
    completions = tokenizer.encode_continuations([r.completion for r in records], [r.prompt for r in records])
    samples = []
    for record, prompt, trained in zip(records, prompts, completions, strict=True):
        own_bos = has_prefix(tokenizer, prompt if record.prompt else trained)
        if own_bos and not record.prompt:
            trained = trained[len(tokenizer.prefix_ids) :]
        end = _first_end(tokenizer, trained, tokenizer.eos_id)
        trained = trained[:end] if end else [*trained, tokenizer.eos_id]
        context = with_prefix(tokenizer, prompt)
        span = (len(context), len(context) + len(trained))
        samples.append(_sample(context + trained, [span], record.line, own_bos, own_end=end > 0))
    return samples


def _first_end(tokenizer: Tokenizer, ids: Sequence[int], end: int) -> int:
    """Return the number of ids up to and including the first `end` of a final run of `end` and white space, else 0."""
    count = 0
    for k in range(len(ids) - 1, -1, -1):
        if ids[k] == end:
            count = k + 1
        elif tokenizer.decode([ids[k]]).strip():
            break
    return count


def mask_conversations(tokenizer: Tokenizer, records: Sequence[Conversation], path: Path) -> list[Sample]:
    """Return samples of the chat template's text; targets are the assistant's turns with their end-of-turn tokens.

    The text is cut where a turn begins and each piece is encoded separately, so that the tokens before a turn are those
    that inference feeds and no token spans the boundary ("\\n" + "\\nHi" must not become one token "\\n\\n"). Tokens
    after the last target can't influence the loss and are left out. Raises UserError if there is no template, and if a
    turn does not end in a special or added token, since the model would then learn no end of turn.
    """
    if not isinstance(tokenizer, FastTokenizer) or tokenizer.template is None:
        raise UserError(
            f"{path}: the lines hold 'messages', but {tokenizer.path} has no chat template; use a tokenizer.json "
            "folder with chat_template.jinja (or chat_template in tokenizer_config.json), or prompt/completion lines"
        )
    chats = tokenizer.template.render([r.messages for r in records], [f"{path}:{r.line}" for r in records])
    contexts = iter(tokenizer.encode([_context(c) for c in chats]))
    cut = [text for c in chats for text in pairwise([_context(c), *_pieces(c)])]
    pieces = iter(tokenizer.encode_turns([piece for _, piece in cut], [before for before, _ in cut]))
    samples = []
    for record, chat in zip(records, chats, strict=True):
        ids, trained, own_end = next(contexts), list[tuple[int, int]](), False
        for turn, text in zip(chat.turns, _pieces(chat), strict=True):
            encoding = next(pieces)
            length = _turn_length(tokenizer, turn, text, encoding, f"{path}:{record.line}")
            # A message that spells out the end token has it twice: generation stops at the first.
            kept = _first_end(tokenizer, encoding.ids[:length], encoding.ids[length - 1])
            own_end = own_end or kept < length
            trained.append((len(ids), len(ids) + kept))
            ids = ids + encoding.ids
        samples.append(_sample(ids[: trained[-1][1]] if trained else ids, trained, record.line, own_end=own_end))
    return samples


def _context(chat: RenderedChat) -> str:
    return chat.text[: chat.turns[0].start] if chat.turns else chat.text


def _pieces(chat: RenderedChat) -> list[str]:
    cuts = [*(turn.start for turn in chat.turns), len(chat.text)]
    return [chat.text[a:b] for a, b in pairwise(cuts)]


def _turn_length(tokenizer: FastTokenizer, turn: Turn, text: str, encoding: Encoding, where: str) -> int:
    """Return the number of tokens of the piece up to and including the turn's end token.

    Raises UserError where the turn does not end in a special or added token.
    """
    # White space after the end token is layout of the template, and a white-space token ends no turn.
    inside = [k for k, (a, b) in enumerate(encoding.spans) if a < turn.end - turn.start and text[a:b].strip()]
    last = inside[-1] if inside else None
    ends = last is not None and encoding.ids[last] in tokenizer.turn_end_ids
    if last is None or not ends or encoding.spans[last][0] < turn.content_end - turn.start:
        assert tokenizer.template is not None
        found = "no token" if last is None else repr(tokenizer.token(encoding.ids[last]))
        raise UserError(
            f"{where}: with {tokenizer.template.name} the model would never learn to end a turn, because the "
            f"assistant's turn ends in {found} and not in a special token after the message; let the template end "
            "the turn with the EOS or another special token of this tokenizer (before {% endgeneration %} if it "
            "has markers)"
        )
    return last + 1


def _sample(
    ids: list[int], trained: list[tuple[int, int]], line: int, own_bos: bool = False, own_end: bool = False
) -> Sample:
    tokens = np.asarray(ids, dtype=np.int32)
    target = np.zeros(len(ids), dtype=np.bool_)
    for start, end in trained:
        target[start:end] = True
    target[:1] = False
    return Sample(tokens, target, line, own_bos, own_end)
