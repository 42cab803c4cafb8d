"""Tokenizer folders, chat templates and rows drawn by hypothesis, which tests compare with transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.tiny_tokenizers import LLAMA3_PATTERN, SENTENCES, byte_level, dummy_prefix

Definition = dict[str, Any]
Messages = list[dict[str, str]]

ADDED = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<tool>", "ox", "  "]
ENDS = ["<|im_end|>", "[/INST]", "</s>"]
WORDS = ["the", "fox", "ox", "Hello", "a", "it's", "don't", "12", "2345", "A:", ".", " .", ",", "Q", "x"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2581", "\u200b"]
OTHERS = ["é", "e\u0301", "日", "日本語", "😀", "👩‍👧", "ﬁ", "İ", "\ufffd", "\x00", "½", "عربي"]
SPECIALS = ["<s>", "</s>", "<unk>", "<|new|>", *ADDED[:5], "<0x41>"]


def texts(smallest: int = 0) -> st.SearchStrategy[str]:
    """Draw words with separators, characters that no vocabulary has, and the spelling of special tokens."""
    fragment = st.sampled_from([WORDS, WORDS, SPACES, SPACES, OTHERS, SPECIALS]).flatmap(st.sampled_from)
    return st.lists(fragment, min_size=smallest, max_size=6).map("".join)


@cache
def _trained(kind: str) -> str:
    """Draw a tokenizer.json around the trained vocabulary of a kind."""
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"])
        tokenizer.train_from_iterator(SENTENCES, trainer)
        return tokenizer.to_str()
    with TemporaryDirectory() as folder:
        path = byte_level(Path(folder)) if kind == "bytes" else dummy_prefix(Path(folder))
        return (path / "tokenizer.json").read_text()


@dataclass(frozen=True)
class Folder:
    """The files of a tokenizer: tokenizer.json, tokenizer_config.json and the chat template.

    parts: those of tokenizer.json around the trained vocabulary of a kind. lossless: whether decoding restores every
    text.
    """

    kind: str
    parts: Definition
    config: dict[str, Any]
    template: str | None
    lossless: bool

    def write(self, folder: Path) -> Path:
        (folder / "tokenizer.json").write_text(json.dumps(json.loads(_trained(self.kind)) | self.parts))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config))
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template)
        return folder


def _sequence(kind: str, steps: list[Definition]) -> Definition | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", kind: steps}


@st.composite
def _normalizers(draw: st.DrawFn) -> list[Definition]:
    strip = {"type": "Strip", "strip_left": draw(st.booleans()), "strip_right": draw(st.booleans())}
    replace = {"type": "Replace", "pattern": {"String": "Q"}, "content": "question"}
    kinds = [{"type": "NFC"}, {"type": "NFKC"}, {"type": "Lowercase"}, strip, replace]
    return draw(st.one_of(st.just([]), st.just([]), st.lists(st.sampled_from(kinds), max_size=2)))


@st.composite
def _byte_level(draw: st.DrawFn) -> Definition:
    space = draw(st.sampled_from([False, False, True]))
    split = draw(st.sampled_from([None, None, LLAMA3_PATTERN, r"\p{N}"]))
    steps = [] if split is None else [_split(split)]
    steps.append({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": split is None})
    return {
        "normalizer": _sequence("normalizers", draw(_normalizers())),
        "pre_tokenizer": _sequence("pretokenizers", steps),
    }


def _split(pattern: str) -> Definition:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@st.composite
def _spaces_shown(draw: st.DrawFn, kind: str) -> Definition:
    """Draw the place where "▁" stands for a space: Llama 2's Prepend, or a scheme of Metaspace."""
    normalizers = draw(_normalizers())
    scheme = draw(st.sampled_from(["Prepend", "first", "always", "never", "none"]))
    pre: list[Definition] = []
    if scheme in ("Prepend", "none"):
        normalizers = [*normalizers, *([{"type": "Prepend", "prepend": "▁"}] if scheme == "Prepend" else [])]
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    else:
        split = draw(st.booleans())
        pre = [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}]
        if draw(st.integers(0, 9)) == 0:
            pre.insert(0, {"type": "WhitespaceSplit"})
    if kind == "unigram" or draw(st.booleans()):
        shown: list[Definition] = [
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": draw(st.sampled_from(["first", "never"]))}
        ]
        shown[0]["split"] = True
        decoder = shown if kind == "unigram" else [{"type": "ByteFallback"}, *shown]
    else:
        decoder = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if draw(st.booleans()) else []),
        ]
    return {
        "normalizer": _sequence("normalizers", normalizers),
        "pre_tokenizer": _sequence("pretokenizers", pre),
        "decoder": _sequence("decoders", decoder),
    }


@st.composite
def _added(draw: st.DrawFn, first: int) -> list[Definition]:
    names = draw(st.lists(st.sampled_from(ADDED), unique=True, max_size=5))
    rarely = st.integers(0, 7).map(lambda n: n == 0)
    return [
        {
            "id": first + place,
            "content": name,
            "special": draw(st.booleans()),
            "normalized": draw(rarely) and bool(name.strip()),  # a Strip would leave "", which every text contains
            "lstrip": draw(rarely),
            "rstrip": draw(rarely),
            "single_word": draw(rarely),
        }
        for place, name in enumerate(names)
    ]


def _post_processor(shape: str, bos: tuple[str, int], eos: tuple[str, int]) -> Definition | None:
    if not shape:
        return None
    names = {"B": bos, "E": eos}
    single: list[Definition] = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if letter == "A"
        else {"SpecialToken": {"id": names[letter][0], "type_id": 0}}
        for letter in shape
    ]
    used = {letter: names[letter] for letter in shape if letter != "A"}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [at], "tokens": [name]} for name, at in used.values()},
    }


@st.composite
def _configs(draw: st.DrawFn, bos: str, eos: str) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": draw(st.booleans()), "single_word": False, "normalized": draw(st.booleans())}
    new = {"content": "<|new|>", "special": draw(st.booleans()), **flags}
    settings: list[dict[str, Any]] = [
        {"split_special_tokens": True},
        {"additional_special_tokens": ["<|new|>", "[INST]"]},
        {"extra_special_tokens": {"image_token": "<|new|>"}},
        {"added_tokens_decoder": {"9999": new}},
        {"add_bos_token": draw(st.booleans()), "add_eos_token": draw(st.booleans())},
        {"add_prefix_space": draw(st.booleans()), "legacy": draw(st.booleans())},
        {"clean_up_tokenization_spaces": True},
        {"pad_token": draw(st.sampled_from([eos, "<pad>"])), "model_max_length": 3, "padding_side": "left"},
        {"eos_token": draw(st.sampled_from([*ENDS, "<|new|>"]))},
    ]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    for said in draw(st.lists(st.sampled_from(settings), max_size=2)):
        config |= said
    return config


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Draw a chat template: how turns begin and end, the text between them, markers or none."""
    opened = {
        role: draw(st.sampled_from([f"<|im_start|>{role}\n", "[INST] ", "[INST]", f"### {role}:\n", "\n", ""]))
        for role in ("system", "user")
    }
    ends = st.sampled_from(["<|im_end|>", "[/INST]", " [/INST]", "</s>", "EOS", "\n"])
    closed = {role: draw(ends) for role in ("system", "user")}
    said = draw(st.sampled_from(["<|im_start|>assistant\n", "### assistant:\n", "", ""]))
    end, between = draw(st.sampled_from(["<|im_end|>", "EOS", "EOS", "EOS", " EOS"])), draw(st.sampled_from(["", "\n"]))
    content = "message['content']" + draw(st.sampled_from(["", "", " | trim"]))
    marked, inside = draw(st.booleans()), draw(st.booleans())

    def put(text: str) -> str:
        shown = json.dumps(text.removesuffix("EOS"))
        return "{{ " + shown + (" + eos_token" if text.endswith("EOS") else "") + " }}"

    turn = "{{ " + content + " }}" + put(end)
    turn = "{% generation %}" + turn + (put(between) if inside else "") + "{% endgeneration %}" if marked else turn
    turn += "" if marked and inside else put(between)
    others = "".join(
        "{% elif message['role'] == '" + role + "' %}" + put(opened[role]) + "{{ " + content + " }}" + put(closed[role])
        for role in ("system", "user")
    )
    return (
        ("{{ bos_token }}" if draw(st.booleans()) else "")
        + "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        + put(said)
        + turn
        + others
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + put(said)
        + "{% endif %}"
    )


@st.composite
def folders(draw: st.DrawFn) -> Folder:
    kind = draw(st.sampled_from(["bytes", "llama", "llama", "unigram"]))
    trained: Definition = json.loads(_trained(kind))
    parts = draw(_byte_level() if kind == "bytes" else _spaces_shown(kind))
    own = {token["content"] for token in trained["added_tokens"]}
    drawn = [token for token in draw(_added(len(trained["model"]["vocab"]))) if token["content"] not in own]
    added = [*trained["added_tokens"], *drawn]
    bos, eos = ("<|bos|>", "<|endoftext|>") if kind == "bytes" else ("<s>", "</s>")
    known = {token["content"]: token["id"] for token in added}
    shape = draw(st.sampled_from(["", "BA", "BA", "BAE", "AE", "BBA"]))
    post_processor = _post_processor(shape, (bos, known[bos]), (eos, known[eos]))
    config = draw(_configs(bos, eos))
    lossless = (
        kind == "bytes"
        and parts["normalizer"] is None
        and '"add_prefix_space": true' not in json.dumps(parts)
        and not any(token["lstrip"] or token["rstrip"] for token in added)
        and "added_tokens_decoder" not in config
    )
    parts |= {"added_tokens": added, "post_processor": post_processor, "truncation": None, "padding": None}
    return Folder(kind, parts, config, draw(templates()), lossless)


@st.composite
def chats(draw: st.DrawFn) -> Messages:
    messages = [{"role": "system", "content": draw(texts())}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts())})
        messages.append({"role": "assistant", "content": draw(texts(1).filter(str.strip))})
    return messages
