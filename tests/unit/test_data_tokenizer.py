"""Tokenizers: the boundary between prompt and completion, BOS and EOS, and broken folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from lowrank_dist.data.tokenizer import FastTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from lowrank_dist.errors import UserError
from tests.tiny_tokenizers import byte_level, dummy_prefix, sentencepiece

TEXTS = ["a", "Hello", " ", "\n", "  two", "A:", " 4", "tail ", "\n\nx", "été", "日本", "😀 x", "[/INST]"]


@pytest.fixture(scope="module", params=["byte_level", "prepend", "metaspace", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "byte_level":
            byte_level(folder)
        case "prepend":
            dummy_prefix(folder)
        case "metaspace":
            dummy_prefix(folder, metaspace=True)
        case "sentencepiece":
            sentencepiece(folder)
    return load_tokenizer(folder)


def test_prompt_and_completion_join_without_a_made_up_space(tokenizer: Tokenizer) -> None:
    for prompt, completion in itertools.product(TEXTS, TEXTS):
        ids = tokenizer.encode([prompt])[0] + tokenizer.encode_continuations([completion], [prompt])[0]
        # Metaspace takes a document's first space for its own dummy one: " a" and "a" are the same text to it.
        start = prompt.removeprefix(" ") if "metaspace" in str(tokenizer.path) else prompt
        assert tokenizer.decode(ids) == start + completion


def test_control_the_dummy_prefix_would_be_seen(tokenizer: Tokenizer) -> None:
    # encode() in place of encode_continuations() is the usual bug: harmless for GPT-2's kind, a space for the others.
    joined = tokenizer.decode(tokenizer.encode(["A:"])[0] + tokenizer.encode(["4"])[0])
    assert joined == ("A:4" if "byte_level" in str(tokenizer.path) else "A: 4")


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(TEXTS) == [tokenizer.encode([t])[0] for t in TEXTS]
    before = ["x "] * len(TEXTS)
    assert tokenizer.encode_continuations(TEXTS, before) == [
        tokenizer.encode_continuations([t], ["x "])[0] for t in TEXTS
    ]


def test_fast_ids_are_those_of_transformers(tmp_path: Path) -> None:
    for folder in (
        byte_level(tmp_path / "a"),
        dummy_prefix(tmp_path / "b"),
        dummy_prefix(tmp_path / "c", metaspace=True),
    ):
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
        for text in TEXTS:
            assert ours.encode([text])[0] == theirs(text, add_special_tokens=False)["input_ids"]
            assert [*ours.prefix_ids, *ours.encode([text])[0]] == theirs(text)["input_ids"]


def test_prefix_is_what_the_tokenizer_puts_before_a_text_and_not_after(tmp_path: Path) -> None:
    assert load_tokenizer(byte_level(tmp_path / "plain")).prefix_ids == ()
    both = load_tokenizer(byte_level(tmp_path / "both", bos=True))
    assert [both.token(i) for i in both.prefix_ids] == ["<|bos|>"]
    assert load_tokenizer(dummy_prefix(tmp_path / "llama")).prefix_ids == (1,)


def test_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    # AutoTokenizer puts Qwen2Tokenizer in its place, whose own rules do not lowercase.
    folder = byte_level(tmp_path)
    ours = FastTokenizer(folder)
    backend = ours._start
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = load_tokenizer(folder)
    assert loaded.decode(loaded.encode(["Hello"])[0]) == "hello"


def test_what_the_config_says_of_special_tokens_is_honoured_as_transformers_honours_it(tmp_path: Path) -> None:
    flags = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    said: list[dict[str, object]] = [
        {"split_special_tokens": True},
        {"additional_special_tokens": ["<|new|>", "<|im_start|>"]},
        {"extra_special_tokens": {"image_token": "<|new|>"}},
        {"added_tokens_decoder": {"400": {"content": "<|new|>", **flags}}},
        {"added_tokens_decoder": {"400": {"content": "ox", **flags, "single_word": True, "special": False}}},
        {"eos_token": "<|new|>"},
        {"eos_token": {"__type": "AddedToken", "content": "<|new|>", **flags}},
        {"add_prefix_space": True, "add_bos_token": True, "add_eos_token": True, "model_max_length": 2},
        {"clean_up_tokenization_spaces": True},
        {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
        | {"clean_up_tokenization_spaces": True},
        {"legacy": True, "sp_model_kwargs": {}, "bos_token": "<|im_start|>"},
    ]
    texts = ["a <|new|> fox", "<|im_end|>ox fox ox", "<|new|>", " it 's . ", "<|endoftext|>\n<|new|>"]
    plain = load_tokenizer(byte_level(tmp_path / "plain", bos=True))
    changed = 0
    for number, settings in enumerate(said):
        folder = byte_level(tmp_path / str(number), bos=True)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert ours.eos_id == theirs.eos_token_id
        for text in texts:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode([text])[0] == ids and ours.decode(ids) == theirs.decode(ids)
            changed += plain.encode([text])[0] != ids or plain.decode(ids) != ours.decode(ids)
            # None of this family puts anything at a beginning: a text that follows another is cut as it is.
            assert ours.encode_continuations([text], ["A:"])[0] == ids
    assert changed > 15  # control: most of them matter


@pytest.mark.parametrize("name", ["tokens_map", "added"])
def test_older_files_beside_tokenizer_json_are_read_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    folder = byte_level(tmp_path)
    size = FastTokenizer(folder)._start.get_vocab_size()
    if name == "added":
        (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": size}))
    else:
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|new|>", "pad_token": "<pad>"}))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "a <|new|> fox <pad>"
    assert ours.encode([text])[0] == theirs(text, add_special_tokens=False)["input_ids"]
    assert size in ours.encode([text])[0] and ours.eos_id == theirs.eos_token_id


def edit(folder: Path, **parts: object) -> Path:
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    for name, value in parts.items():
        definition[name] = value(definition[name]) if callable(value) else value
    path.write_text(json.dumps(definition))
    return folder


def test_tokenizers_that_cut_at_random_or_space_every_word_are_refused(tmp_path: Path) -> None:
    for dropout, refused in ((0.1, True), (0.0, False), (None, False)):
        folder = edit(byte_level(tmp_path / str(dropout)), model=lambda part, d=dropout: part | {"dropout": d})
        if refused:
            with pytest.raises(UserError, match=r"tokenizer\.json: model\.dropout is 0\.1: every rank"):
                load_tokenizer(folder)
        else:
            load_tokenizer(folder)
    spaced = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    words = {"type": "WhitespaceSplit"}
    for steps, refused in (
        ([words, spaced], True),
        ([spaced], False),
        ([words, spaced | {"prepend_scheme": "first"}], 0),
    ):
        folder = dummy_prefix(tmp_path / f"{len(steps)}{refused}", metaspace=True)
        edit(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        if refused:
            with pytest.raises(UserError, match=r"pre_tokenizer cuts words and then puts a space before each +\(Metas"):
                load_tokenizer(folder)
        else:
            load_tokenizer(folder)


def test_a_normalizer_that_strips_a_beginning_leaves_the_space_of_a_continuation(tmp_path: Path) -> None:
    strip = {"type": "Strip", "strip_left": True, "strip_right": False}
    tokenizer = load_tokenizer(edit(byte_level(tmp_path), normalizer=strip))
    assert tokenizer.encode([" fox"]) == tokenizer.encode(["fox"])
    assert tokenizer.decode(tokenizer.encode_continuations([" fox"], ["the"])[0]) == " fox"
    # Behind a special token it is stripped, as transformers strips it there.
    (ids,) = tokenizer.encode_continuations([" fox"], ["the<|im_end|>"])
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.encode(["the<|im_end|> fox"])[0] == [*tokenizer.encode(["the<|im_end|>"])[0], *ids]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    backend = FastTokenizer(folder)._start
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert loaded.decode(loaded.encode(["a long text with many words"])[0]) == "a long text with many words"


def test_eos_falls_back_on_the_models_config(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, eos=None)
    assert load_tokenizer(folder).eos_id is None
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert load_tokenizer(folder).eos_id == 0
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load_tokenizer(folder).eos_id is None
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_tokenizer(folder)


def test_sentencepiece_from_file_or_folder(tmp_path: Path) -> None:
    model = sentencepiece(tmp_path)
    for path in (model, tmp_path):
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert (tokenizer.prefix_ids, tokenizer.eos_id) == ((1,), 2)
        assert tokenizer.token(2) == "</s>"
    renamed = tmp_path / "tokenizer.model.v1"
    model.rename(renamed)
    assert load_tokenizer(renamed).encode(["the fox"]) == tokenizer.encode(["the fox"])


def test_sentencepiece_bos_can_be_switched_off(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for settings, prefix in (({"add_bos_token": False}, ()), ({"add_bos_token": True}, (1,)), ({}, (1,))):
        config.write_text(json.dumps(settings))
        assert load_tokenizer(tmp_path).prefix_ids == prefix
    config.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: malformed"):
        load_tokenizer(tmp_path)


def test_sentencepiece_that_collapses_spaces_keeps_the_one_between_words(tmp_path: Path) -> None:
    sentencepiece(tmp_path, llama=False)
    tokenizer = load_tokenizer(tmp_path)
    for prompt, completion in itertools.product(["the", "the ", "the quick", "the  "], ["fox", " fox", "  fox", " "]):
        ids = tokenizer.encode([prompt])[0] + tokenizer.encode_continuations([completion], [prompt])[0]
        assert tokenizer.decode(ids).strip() == " ".join((prompt + completion).split())


def test_broken_or_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: no such file or folder; data\.tokenizer"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    folder = byte_level(tmp_path / "fast")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"fast: tokenizer\.json or tokenizer_config\.json can't be read"):
            load_tokenizer(folder)
        (folder / name).write_text(whole)
    assert load_tokenizer(folder / "tokenizer.json").encode(["a"]) == load_tokenizer(folder).encode(["a"])
