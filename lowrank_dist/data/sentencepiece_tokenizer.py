"""A bare SentencePiece tokenizer.model, without transformers and without protobuf."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from lowrank_dist.errors import UserError

# A protobuf message followed by another of its kind is their merge (protobuf.dev, "Last One Wins"), so these four bytes
# override one field of the model: normalizer_spec (3) { add_dummy_prefix (3): 0 or 1 } in sentencepiece_model.proto.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_DUMMY_PREFIX = b"\x1a\x02\x18\x01"


class SentencePieceTokenizer:
    """`Tokenizer` over a SentencePiece model file. BOS and EOS are the model's own.

    SentencePiece puts a dummy space before a text, which is right where a document begins and wrong where a completion
    continues a prompt: "A:" + " 4" would decode as "A:  4". Continuations are therefore encoded without it. No token
    spans the boundary, which is what inference, fed the prompt alone, needs.

    Special-looking text ("</s>") is encoded as plain text. A tokenizer_config.json beside the model may switch BOS off.
    """

    def __init__(self, model: Path) -> None:
        raw = model.read_bytes()
        try:
            self._own = SentencePieceProcessor(model_proto=raw)
            self._bare = SentencePieceProcessor(model_proto=raw + _NO_DUMMY_PREFIX)
            self._spaced = SentencePieceProcessor(model_proto=raw + _DUMMY_PREFIX)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{model}: not a SentencePiece model ({error}); fetch the file again") from error
        self.path = model
        self.eos_id = self._own.eos_id() if self._own.eos_id() >= 0 else None
        bos = self._own.bos_id()
        self.prefix_ids: tuple[int, ...] = (
            (bos,) if bos >= 0 and _adds_bos(model.parent / "tokenizer_config.json") else ()
        )
        # Models trained with remove_extra_whitespaces drop a leading space, also the one that separates two words.
        self._drops_leading_space = self._bare.normalize(" a") == self._bare.normalize("a")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._own.encode(list(texts))

    def encode_continuations(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        return [self._encode_after(text, left) for text, left in zip(texts, before, strict=True)]

    def _encode_after(self, text: str, left: str) -> list[int]:
        if self._drops_leading_space and (text[:1].isspace() or left[-1:].isspace()):
            # Both sides of the boundary lost their spaces and one has to come back: the dummy prefix is that one.
            return self._spaced.encode(text)
        return self._bare.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._own.decode([int(i) for i in ids])

    def token(self, token_id: int) -> str:
        return self._own.id_to_piece(token_id)


def _adds_bos(config: Path) -> bool:
    """`add_bos_token` of the tokenizer_config.json that Hugging Face folders have; True where it is not said."""
    if not config.is_file():
        return True
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config}: malformed JSON ({error}); mend or remove it") from error
    return not (isinstance(settings, dict) and "add_bos_token" in settings and settings["add_bos_token"] is False)
