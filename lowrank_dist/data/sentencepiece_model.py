"""Tokenizer over a bare SentencePiece tokenizer.model, and the token settings in the files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from lowrank_dist.arch.model_files import TOKENIZER_CONFIG_FILE
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.untrusted.files import MIB, read_bytes
from lowrank_dist.untrusted.json import read_json

# Appending a second protobuf message of the same type merges it into the first (protobuf.dev, "Last One Wins"), so
# these four bytes override one field of the model: normalizer_spec (3) { add_dummy_prefix (3): 0 or 1 } in
# sentencepiece_model.proto.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_DUMMY_PREFIX = b"\x1a\x02\x18\x01"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")
# Tokenizer classes that use the file's ids. Others shift them (XGLM, XLM-R: fairseq's order) or are code in the folder.
_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_LLAMAS = ("<unk>", "<s>", "</s>")  # LlamaTokenizer's defaults
_AROUND = 20  # characters of a text shown around a token


def write_fast(folder: Path) -> str:
    """Return the remedy for a folder that needs a tokenizer.json, as text."""
    load, save = f"AutoTokenizer.from_pretrained({str(folder)!r})", f"save_pretrained({str(folder)!r})"
    return f'convert it to tokenizer.json with python -c "from transformers import AutoTokenizer; {load}.{save}"'


def settings_in(config: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file beside a tokenizer; empty if the file is missing or holds no object."""
    if not config.is_file():
        return {}
    settings = read_json(config, remedy)
    return settings if isinstance(settings, dict) else {}


class SentencePieceTokenizer:
    """`Tokenizer` over a SentencePiece model file.

    SentencePiece puts a dummy space before a text. That is right at the beginning of a document and wrong where a
    completion continues a prompt: "A:" + " 4" would decode as "A:  4". Continuations are therefore encoded without it.
    No token spans the boundary, because inference encodes the prompt alone.

    Special-looking text ("</s>") is encoded as plain text if there is only the model file. If tokenizer_config.json,
    special_tokens_map.json or added_tokens.json lie beside it, transformers makes such text a token, which
    SentencePiece can't do. BOS and EOS are then those that these files name, and a text with a token that the model
    alone does not produce is refused.
    """

    def __init__(self, model: Path) -> None:
        raw = read_bytes(model, "set data.tokenizer to another folder", largest=64 * MIB)
        _check_kind(raw, model)
        try:
            self._own = SentencePieceProcessor(model_proto=raw)
            self._bare = SentencePieceProcessor(model_proto=raw + _NO_DUMMY_PREFIX)
            self._spaced = SentencePieceProcessor(model_proto=raw + _DUMMY_PREFIX)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model}: not a SentencePiece model ({error}); download the file again") from error
        self.path = model
        # Models trained with remove_extra_whitespaces drop a leading space, even one that separates two words.
        self._drops_leading_space = self._bare.normalize(" a") == self._bare.normalize("a")
        settings = _read_token_settings(model.parent)
        self.eos_id = self._named(settings, "eos")
        bos = self._named(settings, "bos") if settings.adds_bos else None
        self.prefix_ids: tuple[int, ...] = () if bos is None else (bos,)
        spaced = self._own.normalize("a") != self._bare.normalize("a")
        if settings.prefix_space not in (None, spaced):
            raise UserError(
                f"{model.parent / TOKENIZER_CONFIG_FILE}: add_prefix_space is {str(settings.prefix_space).lower()}, "
                f"but {model.name} says the opposite; {write_fast(model.parent)}"
            )
        self._apart = tuple(text for text, at in settings.tokens.items() if not self._finds(text, at))

    def _named(self, settings: _TokenSettings, role: str) -> int | None:
        """Return the id of the BOS or EOS (`role`) that the files beside the model name, else the model's own or None.

        Raises UserError where the model does not have the named token, or has it under another id.
        """
        own: int = getattr(self._own, f"{role}_id")()
        if role not in settings.roles:
            return own if own >= 0 else None
        name, source = settings.roles[role]
        if name is None:
            return None
        found: int = self._own.piece_to_id(name)
        if self._own.id_to_piece(found) == name and settings.tokens.get(name) in (None, found):
            return found
        raise UserError(
            f"{source}: {role}_token is {name!r}, which {self.path.name} lacks or has under another id; "
            f"{write_fast(self.path.parent)}"
        )

    def _finds(self, token: str, at: int | None) -> bool:
        """Return whether the model itself always encodes this text as one token, with id `at` unless that is None."""
        piece = self._own.piece_to_id(token)
        # True of user-defined symbols, whose score is 0. A piece with another score may be cut differently beside other
        # text.
        return at in (None, piece) and self._own.get_score(piece) == 0 and self._bare.encode(token) == [piece]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self._check(texts)
        return self._own.encode(list(texts))

    def encode_continuations(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        self._check(texts)
        return [self._encode_after(text, left) for text, left in zip(texts, before, strict=True)]

    def _encode_after(self, text: str, left: str) -> list[int]:
        if not left:
            return self._own.encode(text)
        if self._drops_leading_space and (text[:1].isspace() or left[-1:].isspace()):
            # Both sides of the boundary lost their spaces; the dummy prefix puts one back.
            return self._spaced.encode(text)
        return self._bare.encode(text)

    def _check(self, texts: Sequence[str]) -> None:
        """Raise UserError for a text that transformers would encode to other ids."""
        for token in self._apart:
            for text in texts:
                if (at := text.find(token)) >= 0:
                    shown = text[max(at - _AROUND, 0) : at + len(token) + _AROUND]
                    raise UserError(
                        f"{self.path}: a text of the data has {token!r} ({shown!r}), which is a special token in the "
                        f"files next to {self.path.name} but not in {self.path.name}; {write_fast(self.path.parent)}"
                    )

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than its tokenizer has pieces. Such ids are left out, as by tokenizer.json's
        # decoder.
        return self._own.decode([int(i) for i in ids if i < len(self._own)])

    def token(self, token_id: int) -> str:
        return self._own.id_to_piece(token_id)

    def byte_of(self, token_id: int) -> int | None:
        known = token_id < len(self._own) and self._own.is_byte(token_id)
        return int(self.token(token_id)[3:5], 16) if known else None


def _check_kind(raw: bytes, model: Path) -> None:
    """Raise UserError with a remedy for a tokenizer.model that is a tiktoken vocabulary or a Git LFS pointer."""
    if _TIKTOKEN.match(raw):
        raise UserError(
            f"{model}: a tiktoken vocabulary (as in Llama 3's original/), which lacks the special tokens and the "
            "rules for splitting words; set data.tokenizer to the model's Hugging Face folder, which has "
            "tokenizer.json"
        )
    if raw.startswith(b"version https://git-lfs"):
        raise UserError(f"{model}: a Git LFS pointer instead of the file; run `git lfs pull`")


@dataclass(frozen=True)
class _TokenSettings:
    """Token settings in the files beside a tokenizer.model.

    roles: "bos" or "eos" → its token, None if there is to be none, and the file that says so. tokens: tokens that are
    matched before a text is cut, with their ids where given. adds_bos: BOS is put before a text. prefix_space: a space
    is put before a text, None where no file says.
    """

    roles: dict[str, tuple[str | None, Path]]
    tokens: dict[str, int | None]
    adds_bos: bool
    prefix_space: bool | None


def _read_token_settings(folder: Path) -> _TokenSettings:
    """Return the settings as transformers reads them.

    A tokenizer_config.json with added_tokens_decoder overrides the older files.
    """
    source = folder / TOKENIZER_CONFIG_FILE
    config = settings_in(source, "correct it or remove it")
    _check_config(config, source)
    added = config.get("added_tokens_decoder")
    tokens: dict[str, int | None]
    if isinstance(added, dict):
        tokens = {name: _id(key) for key, token in added.items() if (name := _content(token))}
        named = {}
    else:
        named = settings_in(folder / "special_tokens_map.json", "correct it or remove it")
        older = settings_in(folder / "added_tokens.json", "correct it or remove it")
        tokens = {name: _id(at) for name, at in older.items()}
    roles = {
        role: (_content(said[key]), path)
        for path, said in ((source, config), (folder / "special_tokens_map.json", named))
        for role in ("bos", "eos")
        if (key := f"{role}_token") in said
    }
    config = config | named
    listed: list[object] = []
    for said in (config.get("extra_special_tokens"), config.get("additional_special_tokens")):
        listed += said.values() if isinstance(said, dict) else said if isinstance(said, list) else []
    listed += [value for key, value in config.items() if key.endswith("_token")]
    listed += _LLAMAS if config or tokens else ()
    for token in listed:
        if name := _content(token):
            tokens.setdefault(name)
    space = config.get("add_prefix_space")
    space = space if isinstance(space, bool) else None
    return _TokenSettings(roles, tokens, config.get("add_bos_token") is not False, space)


def _check_config(config: dict[str, Any], source: Path) -> None:
    """Raise UserError where tokenizer_config.json asks for a class or options that differ from plain SentencePiece."""
    kind = config.get("tokenizer_class")
    reasons = []
    if isinstance(kind, str) and kind.removesuffix("Fast") not in _CLASSES:
        reasons.append(f"tokenizer_class is {kind!r}, whose ids may differ from the file's")
    if config.get("sp_model_kwargs"):
        reasons.append("sp_model_kwargs change how texts are split")
    if reasons:
        raise UserError(f"{source}: {some_of(reasons)}; {write_fast(source.parent)}")


def _id(said: object) -> int:
    """Return an id from these files, given as a number or its digits; -1, which no token has, for anything else."""
    return int(text) if (text := str(said)).isdecimal() and len(text) < 10 else -1


def _content(token: object) -> str | None:
    """Return the text of a token from these files: a string, or an object with its flags. None where it has none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None
