"""The one face that every tokenizer has in data/, and the choice between its two makers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lowrank_dist.data.fast_tokenizer import FastTokenizer
from lowrank_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from lowrank_dist.errors import UserError


class Tokenizer(Protocol):
    """What masking needs from a tokenizer; made by `load_tokenizer`.

    path: the folder or file it came from, for messages. eos_id: end of text, None where the tokenizer has none.
    prefix_ids: what the tokenizer itself puts before a text (BOS, or nothing).
    """

    path: Path
    eos_id: int | None
    prefix_ids: tuple[int, ...]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as the beginning of a document, without added special tokens."""

    def encode_continuations(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        """Ids of each text as what follows `before[i]`, no token across the boundary and no space made up at it.

        decode(encode(before) + these) is before + text, up to what the tokenizer normalises anyway.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included where the tokenizer can show them."""

    def token(self, token_id: int) -> str:
        """The vocabulary's spelling of one id."""


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json, else a bare SentencePiece tokenizer.model) or of one such file.

    Reads local files only and runs no code from them. Raises UserError where there is neither or the file is broken.
    """
    folder = path.parent if path.name == "tokenizer.json" else path
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(folder)
    model = path if path.is_file() else path / "tokenizer.model"
    if model.is_file():
        return SentencePieceTokenizer(model)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; data.tokenizer (default: model.path) names the folder to use")
    raise UserError(
        f"{path}: holds neither tokenizer.json nor tokenizer.model; point data.tokenizer at a folder that does, or "
        "write one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )
