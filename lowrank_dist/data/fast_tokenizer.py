"""A tokenizer.json, read through transformers and run by the `tokenizers` library in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lowrank_dist.data.template import ChatTemplate
from lowrank_dist.errors import UserError


@dataclass(frozen=True, slots=True)
class Encoding:
    """Ids of one text and each token's [start, end) in its characters."""

    ids: list[int]
    spans: list[tuple[int, int]]


class FastTokenizer:
    """`Tokenizer` over a folder with tokenizer.json; `template` is its chat template, None where it has none.

    tokenizer.json alone decides how text is cut: transformers' AutoTokenizer may put a class in its place that
    rebuilds the normaliser and pre-tokenizer (transformers 5: a GPT2Tokenizer loses SmolLM2's digit splitting), so
    the plain PreTrainedTokenizerFast is used, which takes the file as it is.

    A continuation is encoded apart from what precedes it: inference feeds the prompt alone, so no token may span the
    boundary and the prompt's own tokens may not depend on what follows. Tokenizers that put a dummy space before a
    text (Llama 2, Mistral) would put one at the boundary, so a second copy without that rule encodes continuations.

    Special-looking text in the data ("</s>", "<|im_end|>") becomes the special token, as transformers does it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            hf = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            definition = json.loads(hf.backend_tokenizer.to_str())
        except Exception as error:  # tokenizers raises bare Exception, transformers a dozen kinds
            raise UserError(f"{folder}: tokenizer.json or tokenizer_config.json can't be read: {error}") from error
        self.path = folder
        definition |= {"truncation": None, "padding": None}
        self._start = Backend.from_str(json.dumps(definition))
        bare = definition | {
            "normalizer": _without_prefix(definition["normalizer"]),
            "pre_tokenizer": _without_prefix(definition["pre_tokenizer"]),
        }
        self._middle = self._start if bare == definition else Backend.from_str(json.dumps(bare))
        self.eos_id = hf.eos_token_id if hf.eos_token_id is not None else _eos_of_model(folder / "config.json")
        probe = self._start.encode("a", add_special_tokens=True)
        before = len(list(takewhile(bool, probe.special_tokens_mask)))
        self.prefix_ids = tuple(probe.ids[:before])
        self._added_ids = frozenset(hf.added_tokens_decoder)
        self.turn_end_ids = self._added_ids if self.eos_id is None else self._added_ids | {self.eos_id}
        self.template = ChatTemplate(hf, folder) if hf.chat_template else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._start.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_continuations(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._middle.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_turns(self, texts: Sequence[str]) -> list[Encoding]:
        """As `encode_continuations` for pieces of a rendered chat, with character offsets into each piece.

        The dummy space is left out at the piece's beginning only: after a special token the tokenizer puts it as
        always.
        """
        whole = self._start.encode_batch(list(texts), add_special_tokens=False)
        if self._middle is self._start:
            return [Encoding(e.ids, e.offsets) for e in whole]
        first = [next((k for k, i in enumerate(e.ids) if i in self._added_ids), len(e.ids)) for e in whole]
        heads = [
            text[: e.offsets[k][0]] if k < len(e.ids) else text for text, e, k in zip(texts, whole, first, strict=True)
        ]
        bare = self._middle.encode_batch(heads, add_special_tokens=False)
        return [
            Encoding(h.ids + e.ids[k:], h.offsets + e.offsets[k:]) for h, e, k in zip(bare, whole, first, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._start.decode([int(i) for i in ids], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        return str(self._start.id_to_token(token_id))


def _eos_of_model(config: Path) -> int | None:
    """config.json's eos_token_id where it is one id: GPT-2's tokenizer_config.json on the hub names no EOS."""
    if not config.is_file():
        return None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config}: malformed JSON ({error}); mend it") from error
    eos = settings["eos_token_id"] if isinstance(settings, dict) and "eos_token_id" in settings else None
    return eos if isinstance(eos, int) else None


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer of tokenizer.json without the steps that put a space before the text."""
    if part is None:
        return None
    match part["type"]:
        case "Prepend":
            return None
        case "Metaspace":
            return part | {"prepend_scheme": "never"}
        case "ByteLevel" if "add_prefix_space" in part:
            return part | {"add_prefix_space": False}
        case "Sequence":
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            return part | {key: [kept for step in part[key] if (kept := _without_prefix(step)) is not None]}
    return part
