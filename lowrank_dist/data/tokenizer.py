"""The `Tokenizer` interface, `load_tokenizer`, and the tokenizer of a tokenizer.json (the `tokenizers` library)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lowrank_dist.arch.keys import is_integer
from lowrank_dist.arch.model_files import TOKENIZER_CONFIG_FILE, hub_hint
from lowrank_dist.data.sentencepiece_model import SentencePieceTokenizer, settings_in, write_fast
from lowrank_dist.data.template import TEMPLATE_FILE, ChatTemplate, require_template
from lowrank_dist.errors import UserError
from lowrank_dist.terminal import escape_all
from lowrank_dist.untrusted.files import MIB, require_size
from lowrank_dist.untrusted.json import brief, parse_json, read_object

# Size limits of the files that transformers reads itself. A published tokenizer.json has 35 MB.
_LARGEST = {
    "tokenizer.json": 64 * MIB,
    TOKENIZER_CONFIG_FILE: 32 * MIB,
    "special_tokens_map.json": MIB,
    "added_tokens.json": 32 * MIB,
    TEMPLATE_FILE: MIB,
}
# Sixteen times the largest published vocabulary.
_MOST_TOKENS = 1 << 22
# Factor by which a tokenizer's steps may lengthen a text, in characters ("▁" for " ": 1). Tokenising takes some 250
# bytes of memory per byte of text.
_MOST_LONGER = 16
_SHOWN = 60  # characters of a text in a message
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(Protocol):
    """The interface of all tokenizers here; made by `load_tokenizer`.

    path: the folder or file it came from, for messages. eos_id: end of text, None where the tokenizer has none.
    prefix_ids: ids that the tokenizer itself puts before a text (BOS, or nothing).
    """

    path: Path
    eos_id: int | None
    prefix_ids: tuple[int, ...]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as the beginning of a document, without added special tokens."""

    def encode_continuations(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text as a continuation of `before[i]`: no token across the boundary, no added space.

        decode(encode(before) + these) is before + text, up to the tokenizer's usual normalisation. Where `before[i]` is
        empty the text is the beginning of a document.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included where the tokenizer can show them."""

    def token(self, token_id: int) -> str:
        """Return the vocabulary's spelling of one id."""

    def byte_of(self, token_id: int) -> int | None:
        """Return the byte that a byte-fallback token stands for, None for every other token."""


def load_tokenizer(path: Path, moment: datetime | None = None) -> Tokenizer:
    """Return the tokenizer of a folder (tokenizer.json, else a bare SentencePiece tokenizer.model) or of one such file.

    moment: time that the clock of a chat template returns, by default the present. Reads local files only and runs no
    code from them. Raises UserError where there is neither file or the file is broken.
    """
    folder = path.parent if path.name == "tokenizer.json" else path
    if (folder / "tokenizer.json").is_file():
        return _load_fast(folder, moment)
    model = path if path.is_file() else path / "tokenizer.model"
    if model.is_file():
        return SentencePieceTokenizer(model)
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; set data.tokenizer or --tokenizer to the model's tokenizer (by default "
            f"that of the model folder){hub_hint(path)}"
        )
    raise UserError(
        f"{path}: has neither tokenizer.json nor tokenizer.model; set data.tokenizer to a folder that has one, or "
        f"{write_fast(path)}"
    )


def has_prefix(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Return whether ids begin with those that the tokenizer itself puts before a text; False where it puts none."""
    prefix = tokenizer.prefix_ids
    return bool(prefix) and tuple(ids[: len(prefix)]) == prefix


def with_prefix(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return a text's ids with the tokenizer's prefix before them; it is not doubled if the text begins with it."""
    return list(ids) if has_prefix(tokenizer, ids) else [*tokenizer.prefix_ids, *ids]


def _load_fast(folder: Path, moment: datetime | None) -> FastTokenizer:
    for name, largest in _LARGEST.items():
        require_size(folder / name, "set data.tokenizer to another folder", largest=largest)
        path = folder / name
        # transformers parses them again, but its errors name no place in the file.
        if path.suffix == ".json" and path.is_file():
            values = read_object(path, "download the file again", largest=largest)
            if name == "tokenizer.json":
                _refuse_far_ids(path, values)
            elif name == TOKENIZER_CONFIG_FILE and not (folder / TEMPLATE_FILE).is_file():
                require_template(values, path)
    try:
        return FastTokenizer(folder, moment)
    except UserError:
        raise
    except BaseException as error:  # tokenizers raises bare Exception, transformers many types
        # A Rust panic is no Exception, and its class is known only by its name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{folder}: tokenizer.json or tokenizer_config.json can't be read: {escape_all(str(error))}; download both "
            "again"
        ) from error


def _refuse_far_ids(path: Path, definition: Mapping[str, Any]) -> None:
    """Raise UserError for an id beyond every vocabulary: the library allocates memory for all numbers up to it.

    definition: the content of tokenizer.json.
    """
    model, added = definition.get("model"), definition.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        ids += [(token.get("content"), token.get("id")) for token in added if isinstance(token, dict)]
    for token, token_id in ids:
        if is_integer(token_id) and token_id >= _MOST_TOKENS:
            raise UserError(
                f"{path}: {brief(token)} has id {brief(token_id)}; the limit is {_MOST_TOKENS}; download it again"
            )


@dataclass(frozen=True, slots=True)
class Encoding:
    """The ids of one text and the character range [start, end) of each token."""

    ids: list[int]
    spans: list[tuple[int, int]]


class FastTokenizer:
    """`Tokenizer` over a folder with tokenizer.json; `template` is its chat template, None where it has none.

    tokenizer.json alone decides how text is cut. transformers' AutoTokenizer may use a class that rebuilds normalizer
    and pre-tokenizer (transformers 5: a GPT2Tokenizer loses SmolLM2's digit splitting), so the plain
    PreTrainedTokenizerFast is used, which takes the file as it is.

    A continuation is encoded separately from the text before it: inference feeds the prompt alone, so no token may span
    the boundary and the prompt's tokens may not depend on what follows. Tokenizers that put a dummy space before a text
    (Llama 2, Mistral) would put one at the boundary, so there are two more copies: `_middle` adds no space.
    `_after_token` is for text after an added token ("[/INST]", "</s>"). There most tokenizers add the space again
    (transformers' `legacy`); only a Metaspace with prepend_scheme "first" does not.

    Special-looking text in the data ("</s>", "<|im_end|>") becomes the special token, as in transformers.
    """

    def __init__(self, folder: Path, moment: datetime | None = None) -> None:
        hf = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        definition = parse_json(hf.backend_tokenizer.to_str())
        self.path = folder
        definition |= {"truncation": None, "padding": None}
        _check_repeatable(definition, folder)
        _check_growth(definition, folder)
        after_token, middle = (_without_prefix_of(definition, after_token) for after_token in (True, False))
        self._start = Backend.from_str(json.dumps(definition))
        self._after_token = self._start if after_token == definition else Backend.from_str(json.dumps(after_token))
        # Added tokens whose match depends on the text before: a `normalized` "</s>" is compared with "▁</s>".
        by_normalizer = middle["normalizer"] != after_token["normalizer"]
        flags = ["single_word", *(["normalized"] if by_normalizer else [])]
        self._matched_in_context = any(token[flag] for token in definition["added_tokens"] for flag in flags)
        alike = middle == after_token and not self._matched_in_context
        # This copy is given only the text before the first added token, and must not match any.
        bare = middle | {"added_tokens": []}
        self._middle = self._after_token if alike else Backend.from_str(json.dumps(bare))
        for copy in (self._start, self._after_token, self._middle):
            copy.encode_special_tokens = hf.split_special_tokens  # not part of the definition
        self._cleaned = _cleaning(hf, definition["model"]["type"])
        self._byte_fallback = _has_step(definition["decoder"], "ByteFallback")
        self.eos_id = hf.eos_token_id if hf.eos_token_id is not None else _eos_of_model(folder / "config.json")
        probe = self._start.encode("a", add_special_tokens=True)
        before = len(list(takewhile(bool, probe.special_tokens_mask)))
        self.prefix_ids = tuple(probe.ids[:before])
        added = hf.added_tokens_decoder
        self._matched_ids = frozenset(i for i, t in added.items() if not (t.special and hf.split_special_tokens))
        # A normalizer runs before `normalized` tokens are matched, and so adds no space after them.
        self._anew_ids = frozenset(i for i in self._matched_ids if not (by_normalizer and added[i].normalized))
        # "<unk>" is an added token, but also the model's id for unknown characters.
        self._unknown = _unknown_id(self._start, definition["model"])
        self.turn_end_ids = (frozenset(added) - {self._unknown}) | ({self.eos_id} - {None})
        self.template = ChatTemplate(hf, folder, moment or datetime.now()) if hf.chat_template else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._encoded(self._start.encode_batch_fast, list(texts))]

    def encode_continuations(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        if self._middle is self._start or (self._middle is self._after_token and all(before)):
            return [e.ids for e in self._encoded(self._middle.encode_batch_fast, list(texts))]
        return [encoding.ids for encoding in self.encode_turns(texts, before)]

    def encode_turns(self, texts: Sequence[str], before: Sequence[str]) -> list[Encoding]:
        """Return encodings as `encode_continuations` does, with character offsets into each text.

        The texts are pieces of a rendered chat. The dummy space is omitted only at the beginning of a text. After an
        added token inside a text, the tokenizer inserts it as usual.
        """
        found = self._batch(self._after_token, list(texts))
        if self._middle is self._start:
            return found
        starting = [k for k, left in enumerate(before) if not left]
        for k, e in zip(starting, self._batch(self._start, [texts[k] for k in starting]), strict=True):
            found[k] = e
        if self._middle is self._after_token:
            return found
        ends = self.encode(before)
        inside = [k for k, ids in enumerate(ends) if ids and not self._begins_anew(before[k], ids[-1])]
        rests = [self._from_first_added(texts[k], found[k]) for k in inside]
        if self._matched_in_context:
            longer = [before[k][-1] + texts[k] for k in inside]
            behind = zip(longer, self._batch(self._after_token, longer), strict=True)
            rests = [self._moved(text, e, rest) for (text, e), rest in zip(behind, rests, strict=True)]
        heads = [texts[k][: rest.spans[0][0]] if rest.ids else texts[k] for k, rest in zip(inside, rests, strict=True)]
        for k, rest, head in zip(inside, rests, self._batch(self._middle, heads), strict=True):
            found[k] = Encoding(head.ids + rest.ids, head.spans + rest.spans)
        return found

    def _is_added(self, text: str, token_id: int, span: tuple[int, int]) -> bool:
        """Return whether a token of a text was matched as an added token."""
        spelled = token_id != self._unknown or text[slice(*span)].strip() == self.token(token_id)
        return spelled and token_id in self._matched_ids

    def _begins_anew(self, before: str, last: int) -> bool:
        """Return whether text after `before`, whose last id is `last`, is encoded like the beginning of a text.

        That is so after an added token.
        """
        spelled = last != self._unknown or before.rstrip().endswith(self.token(last))
        return spelled and last in self._anew_ids

    def _from_first_added(self, text: str, encoding: Encoding, start: int = 0) -> Encoding:
        """Return the part of an encoding from the first added token that ends after character `start`."""
        pairs = enumerate(zip(encoding.ids, encoding.spans, strict=True))
        found = (n for n, (i, span) in pairs if span[1] > start and self._is_added(text, i, span))
        n = next(found, len(encoding.ids))
        return Encoding(encoding.ids[n:], encoding.spans[n:])

    def _moved(self, text: str, behind: Encoding, rest: Encoding) -> Encoding:
        """Return the tokens of `rest` as matched in `behind`, the encoding with one more character before the text.

        Where the first added token in `behind` takes in that character, `rest` is returned unchanged.
        """
        found = self._from_first_added(text, behind, 1)
        if found.ids and found.spans[0][0] < 1:
            return rest
        return Encoding(found.ids, [(start - 1, end - 1) for start, end in found.spans])

    def _batch(self, copy: Backend, texts: list[str]) -> list[Encoding]:
        return [Encoding(e.ids, e.offsets) for e in self._encoded(copy.encode_batch, texts)]

    def _encoded(self, encode_batch: Callable[..., list[Any]], texts: list[str]) -> list[Any]:
        try:
            return encode_batch(texts, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a Rust panic: no Exception, and known only by its name
                raise
            if len(texts) > 1:
                for text in texts:
                    self._encoded(encode_batch, [text])
            raise UserError(
                f"{self.path}: the tokenizers library fails on {texts[0][:_SHOWN]!r} ({error}); change this text, or "
                "the added tokens of tokenizer.json in it"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        text = self._start.decode([int(i) for i in ids], skip_special_tokens=False)
        return self._cleaned(text) if self._cleaned else text

    def token(self, token_id: int) -> str:
        return str(self._start.id_to_token(token_id))

    def byte_of(self, token_id: int) -> int | None:
        found = _BYTE.fullmatch(self.token(token_id)) if self._byte_fallback else None
        return int(found[1], 16) if found else None


def _unknown_id(tokenizer: Backend, model: dict[str, Any]) -> int | None:
    """Return the id that the model of tokenizer.json gives to unknown characters, None where it has none."""
    named = model.get("unk_token")
    return tokenizer.token_to_id(named) if named else model.get("unk_id")


def _eos_of_model(config: Path) -> int | None:
    """Return eos_token_id of config.json (the first one if it is a list), None where it has none.

    For tokenizers whose own settings name no EOS, such as GPT-2's tokenizer_config.json on the Hub.
    """
    eos = settings_in(config, "correct it").get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    return first if is_integer(first) else None


def _cleaning(hf: PreTrainedTokenizerFast, kind: str) -> Callable[[str], str] | None:
    """Return the function that transformers applies to decoded text for clean_up_tokenization_spaces, or None.

    transformers does so for a BPE model only if a second option forces it. kind: type of tokenizer.json's model.
    """
    forced = hf.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return hf.clean_up_tokenization if hf.clean_up_tokenization_spaces and (kind != "BPE" or forced) else None


def _has_step(part: dict[str, Any] | None, kind: str) -> bool:
    """Return whether a part of tokenizer.json is, or contains, a step of a type."""
    return any(step["type"] == kind for step in _steps(part))


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a normalizer or decoder of tokenizer.json, or the steps of a sequence, nested or not."""
    if part is not None and part["type"] == "Sequence":
        for step in part.get("normalizers") or part.get("decoders") or ():
            yield from _steps(step)
    elif part is not None:
        yield part


def _without_prefix_of(definition: dict[str, Any], after_token: bool) -> dict[str, Any]:
    """Return tokenizer.json for text that follows an added token (`after_token`) or other text."""
    parts = {name: _without_prefix(definition[name], after_token) for name in ("normalizer", "pre_tokenizer")}
    return definition | parts


def _without_prefix(part: dict[str, Any] | None, after_token: bool) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer of tokenizer.json without the steps that change where a text begins.

    after_token: remove only the steps that apply at the beginning of a document and not after an added token.
    """
    if part is None:
        return None
    match part["type"]:
        case "Metaspace" if part["prepend_scheme"] == "first":
            return part | {"prepend_scheme": "never"}
        case "Sequence":
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            steps = (_without_prefix(step, after_token) for step in part[key])
            return part | {key: [step for step in steps if step is not None]}
        case _ if after_token:
            return part
        case "Prepend":
            return None
        case "Strip" if "strip_left" in part:
            return part | {"strip_left": False}
        case "Metaspace":
            return part | {"prepend_scheme": "never"}
        case "ByteLevel" if "add_prefix_space" in part:
            return part | {"add_prefix_space": False}
    return part


def _check_repeatable(definition: dict[str, Any], folder: Path) -> None:
    """Raise UserError for a tokenizer whose ids change from call to call, or that puts a space before each word."""
    if definition["model"].get("dropout"):
        raise UserError(
            f"{folder}/tokenizer.json: model.dropout is {definition['model']['dropout']}, so every rank and every "
            "run would train on different tokens; set it to null"
        )
    pre = definition["pre_tokenizer"] or {}
    for step in pre.get("pretokenizers", [])[1:]:
        if step.get("prepend_scheme") == "always" or (step["type"] == "ByteLevel" and step["add_prefix_space"]):
            raise UserError(
                f"{folder}/tokenizer.json: pre_tokenizer puts a space before each word ({step['type']}), so a "
                "completion cannot follow its prompt without one; such tokenizers are not supported"
            )


def _check_growth(definition: dict[str, Any], folder: Path) -> None:
    """Raise UserError for a tokenizer whose steps together make a text more than `_MOST_LONGER` times longer.

    Memory grows with the text, and the library aborts the process where it runs out.
    """
    for name in ("normalizer", "decoder"):
        longer = 1.0
        for step in _steps(definition[name]):
            match step:
                case {"type": "Replace", "pattern": pattern, "content": content}:
                    longer *= max(1.0, len(content) / max(1, len(pattern.get("String", ""))))
                case {"type": "Prepend", "prepend": content}:
                    longer *= max(1, len(content))
        if longer > _MOST_LONGER:
            raise UserError(
                f"{folder}/tokenizer.json: {name} makes texts up to {longer:.3g} times longer; the limit is "
                f"{_MOST_LONGER}. Download the file again, or set data.tokenizer to another folder"
            )
