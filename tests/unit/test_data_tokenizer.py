"""Tokenizers: the boundary between prompt and completion, BOS and EOS, and broken folders."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_dist.data.tokenizer import FastTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from lowrank_dist.errors import UserError
from tests.tiny_tokenizers import CHATML, byte_level, dummy_prefix, sentencepiece

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
        # Metaspace replaces a document's first space by its dummy prefix: " a" and "a" are the same text to it.
        start = prompt.removeprefix(" ") if "metaspace" in str(tokenizer.path) else prompt
        assert tokenizer.decode(ids) == start + completion


def test_control_the_dummy_prefix_would_be_seen(tokenizer: Tokenizer) -> None:
    # The usual bug: encode() in place of encode_continuations() adds a space, except for GPT-2's kind.
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
    # AutoTokenizer would use Qwen2Tokenizer instead, whose own rules do not lowercase.
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
            # No tokenizer of this family adds a prefix: a continuation is tokenised like a text.
            assert ours.encode_continuations([text], ["A:"])[0] == ids
    assert changed > 15  # control: most of the settings matter


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
            with pytest.raises(UserError, match=r"tokenizer\.json: model\.dropout is 0\.1, so every rank"):
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
            with pytest.raises(UserError, match=r"pre_tokenizer puts a space before each word +\(Metas"):
                load_tokenizer(folder)
        else:
            load_tokenizer(folder)


def test_a_normalizer_that_strips_a_beginning_leaves_the_space_of_a_continuation(tmp_path: Path) -> None:
    strip = {"type": "Strip", "strip_left": True, "strip_right": False}
    tokenizer = load_tokenizer(edit(byte_level(tmp_path), normalizer=strip))
    assert tokenizer.encode([" fox"]) == tokenizer.encode(["fox"])
    assert tokenizer.decode(tokenizer.encode_continuations([" fox"], ["the"])[0]) == " fox"
    # After a special token the space is stripped, as in transformers.
    (ids,) = tokenizer.encode_continuations([" fox"], ["the<|im_end|>"])
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.encode(["the<|im_end|> fox"])[0] == [*tokenizer.encode(["the<|im_end|>"])[0], *ids]


def test_tokens_whose_match_depends_on_the_text_before_are_found_as_in_the_whole_text(tmp_path: Path) -> None:
    folder = dummy_prefix(tmp_path)
    for name, flags in (("<x>", {"normalized": True}), ("ox", {"single_word": True, "normalized": False})):
        tokenizer = Backend.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(name, **flags)])
        tokenizer.save(str(folder / "tokenizer.json"))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for left, text in (
        ("A:", "<x> a"),
        ("A:", "ox ox"),
        ("A", "ox ox"),
        ("A: ", "ox"),
        ("A:", " <x>fox <x>"),
        ("A: <x>", "fox"),
        ("A:ox", " fox"),
    ):
        apart = ours.encode([left])[0] + ours.encode_continuations([text], [left])[0]
        assert apart == theirs(left + text, add_special_tokens=False)["input_ids"], (left, text)


def test_a_text_on_which_the_library_panics_is_named(tmp_path: Path) -> None:
    # An added token that the normalizer makes empty matches inside characters, and the library panics.
    folder = edit(byte_level(tmp_path), normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
    tokenizer = Backend.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("  ", normalized=True, single_word=True, lstrip=True, rstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    with pytest.raises(UserError, match="the tokenizers library fails on '日本'"):
        ours.encode_continuations(["a", "日本", "b"], ["x", "x", "x"])


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
    (folder / "config.json").write_text(json.dumps({"eos_token_id": True}))
    assert load_tokenizer(folder).eos_id is None
    # A merged model that was also trained to end in another token: its own EOS comes first.
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load_tokenizer(folder).eos_id == 0
    (folder / "config.json").write_text(json.dumps({"eos_token_id": []}))
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
    with pytest.raises(UserError, match=r"tokenizer_config\.json:1: malformed"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("9" * 4301, r":2: key 'x' holds an integer of 4301 digits at column 7;"),
        (r'"\ud800"', ": key 'x' holds an unpaired surrogate"),
        ("[" * 200 + "]" * 200, ": JSON nested more than"),
        ("1,", ":3: malformed JSON at column 1"),
    ],
    ids=["digits", "surrogate", "depth", "comma"],
)
def test_a_fault_in_a_file_that_transformers_reads_has_its_place(
    tmp_path: Path, name: str, value: str, said: str
) -> None:
    byte_level(tmp_path, template=CHATML)
    (tmp_path / name).write_text(f'{{\n "x": {value}\n}}')
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name)) + said):
        load_tokenizer(tmp_path)


IM_END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}


def beside(folder: Path, files: dict[str, object], **kwargs: object) -> Path:
    """Write a tokenizer.model with JSON files beside it."""
    sentencepiece(folder, **kwargs)  # type: ignore[arg-type]
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


# Settings that tokenizer.model alone does not have: another EOS, or another way to tokenise.
NOT_THE_MODELS: dict[str, dict[str, object]] = {
    "eos_token": {"tokenizer_config.json": LLAMA | {"eos_token": "<|im_end|>"}},
    "eos_token as an object": {"tokenizer_config.json": LLAMA | {"eos_token": {"__type": "AddedToken"} | IM_END}},
    "added_tokens_decoder": {
        "tokenizer_config.json": LLAMA | {"eos_token": "<|im_end|>", "added_tokens_decoder": {"340": IM_END}}
    },
    "eos_token under another id": {
        "tokenizer_config.json": LLAMA
        | {"eos_token": "</s>", "added_tokens_decoder": {"7": IM_END | {"content": "</s>"}}}
    },
    "special_tokens_map.json": {"special_tokens_map.json": {"eos_token": IM_END}, "tokenizer_config.json": LLAMA},
    "bos_token": {"tokenizer_config.json": LLAMA | {"bos_token": "<|startoftext|>"}},
    "add_prefix_space": {"tokenizer_config.json": LLAMA | {"add_prefix_space": False}},
    "sp_model_kwargs": {"tokenizer_config.json": LLAMA | {"sp_model_kwargs": {"enable_sampling": True}}},
    "tokenizer_class": {"tokenizer_config.json": {"tokenizer_class": "XGLMTokenizer"}},
}


@pytest.mark.parametrize("case", NOT_THE_MODELS)
def test_a_model_file_whose_neighbours_say_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    folder = beside(tmp_path, NOT_THE_MODELS[case])
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    named = "special_tokens_map.json" if case == "special_tokens_map.json" else "tokenizer_config.json"
    assert str(caught.value).startswith(f"{folder / named}: ")
    # The suggested command makes a folder that loads, with the same tokens as transformers.
    command = str(caught.value).split("python -c ")[1]
    assert command.startswith('"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained(')
    if case not in ("tokenizer_class", "sp_model_kwargs"):
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        theirs.save_pretrained(folder)
        ours = load_tokenizer(folder)
        assert isinstance(ours, FastTokenizer) and ours.eos_id == theirs.eos_token_id
        for text in ("the fox<|im_end|>", "fox</s>"):
            assert [*ours.prefix_ids, *ours.encode([text])[0]] == theirs(text)["input_ids"]


ADDED: dict[str, dict[str, object]] = {
    "added_tokens.json": {"added_tokens.json": {"<|im_end|>": 340}},
    "added_tokens_decoder": {"tokenizer_config.json": LLAMA | {"added_tokens_decoder": {"340": IM_END}}},
    "additional_special_tokens": {"special_tokens_map.json": {"additional_special_tokens": ["<|im_end|>"]}},
    "extra_special_tokens": {"tokenizer_config.json": LLAMA | {"extra_special_tokens": {"image_token": "<|im_end|>"}}},
    "pad_token": {"tokenizer_config.json": LLAMA | {"pad_token": "<|im_end|>"}},
}


@pytest.mark.parametrize("case", ADDED)
def test_a_text_that_holds_a_token_from_beside_the_model_is_refused(tmp_path: Path, case: str) -> None:
    tokenizer = load_tokenizer(beside(tmp_path / "a", ADDED[case]))
    plain = load_tokenizer(sentencepiece(tmp_path / "b"))
    # Control: such files are common (Llama 2 with a pad token), and every other text is tokenised as before.
    texts = ["the fox", "Q: 2 + 2\nA:", "<|im_", "im_end"]
    assert tokenizer.encode(texts) == plain.encode(texts) and tokenizer.eos_id == plain.eos_id == 2
    assert tokenizer.encode_continuations(texts, ["a"] * 4) == plain.encode_continuations(texts, ["a"] * 4)
    for encode in (tokenizer.encode, lambda texts: tokenizer.encode_continuations(texts, ["a"] * len(texts))):
        for token in ("<|im_end|>", "</s>"):
            with pytest.raises(UserError, match=r"tokenizer\.model: a text of the data has .*python -c") as caught:
                encode(["fox", f"the fox{token}and"])
            assert f"'the fox{token}and'" in str(caught.value)


def test_a_symbol_of_the_model_itself_is_read(tmp_path: Path) -> None:
    said = LLAMA | {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], "bos_token": None}
    folder = beside(tmp_path, {"tokenizer_config.json": said}, symbols=["<|im_start|>", "<|im_end|>"])
    ours = load_tokenizer(folder)
    assert ours.token(ours.eos_id or 0) == "<|im_end|>" and ours.prefix_ids == ()
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "<|im_start|>user\nthe fox<|im_end|>\n"
    # transformers adds no dummy space before a text that begins with a special token; SentencePiece does.
    assert [i for i in ours.encode(["x" + text])[0]] == theirs("x" + text, add_special_tokens=False)["input_ids"]


def test_no_eos_by_the_config_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(beside(tmp_path, {"tokenizer_config.json": LLAMA | {"eos_token": None}})).eos_id is None


def test_other_files_that_are_named_tokenizer_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UserError, match=r"a tiktoken vocabulary .* data\.tokenizer to .* tokenizer\.json"):
        load_tokenizer(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n")
    with pytest.raises(UserError, match="Git LFS pointer .*git lfs pull"):
        load_tokenizer(tmp_path)
    for raw in (b"", b"<!doctype html>", b"\x0a"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            load_tokenizer(tmp_path)


def test_ids_beyond_the_pieces_have_no_text(tmp_path: Path) -> None:
    # A model has more rows than the tokenizer has pieces (a pad token, padding), and may generate their ids.
    tokenizer = load_tokenizer(sentencepiece(tmp_path))
    (ids,) = tokenizer.encode(["the fox"])
    assert tokenizer.decode([*ids, 5000]) == "the fox" and tokenizer.byte_of(5000) is None


def test_sentencepiece_that_collapses_spaces_keeps_the_one_between_words(tmp_path: Path) -> None:
    sentencepiece(tmp_path, llama=False)
    tokenizer = load_tokenizer(tmp_path)
    for prompt, completion in itertools.product(["the", "the ", "the quick", "the  "], ["fox", " fox", "  fox", " "]):
        ids = tokenizer.encode([prompt])[0] + tokenizer.encode_continuations([completion], [prompt])[0]
        assert tokenizer.decode(ids).strip() == " ".join((prompt + completion).split())


def test_broken_or_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: no such file or folder; set data\.tokenizer"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="has neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    folder = byte_level(tmp_path / "fast")
    for name, said in (
        ("tokenizer_config.json", r"fast/tokenizer_config\.json:\d+: malformed JSON"),
        ("tokenizer.json", r"fast/tokenizer\.json:\d+: malformed JSON"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=said):
            load_tokenizer(folder)
        (folder / name).write_text(whole)
    assert load_tokenizer(folder / "tokenizer.json").encode(["a"]) == load_tokenizer(folder).encode(["a"])


class PanicException(BaseException):
    """Stands for the exception that pyo3 raises where Rust panics."""


def test_a_panic_of_the_library_is_an_error_and_an_interrupt_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    remedied = r"can't be read: index\\nout of bounds; download both again$"
    for raised, expected in ((PanicException("index\nout of bounds"), UserError), (KeyboardInterrupt(), None)):

        def fail(*_: object, raised: BaseException = raised, **__: object) -> None:
            raise raised

        monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", fail)
        with pytest.raises(expected or KeyboardInterrupt, match=remedied if expected else ""):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "added_tokens.json"])
def test_a_file_beyond_every_published_one_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / ("tokenizer.model" if name == "tokenizer.model" else "tokenizer.json")).write_text("{}")
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=rf"{name}: larger than \d+ MiB"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("number", [2**31, 2**31 - 1, 10**9])
@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_for_which_the_library_would_take_all_memory_is_refused(tmp_path: Path, number: int, place: str) -> None:
    path = byte_level(tmp_path) / "tokenizer.json"
    definition = json.loads(path.read_text())
    if place == "vocab":
        definition["model"]["vocab"]["x" * 9] = number
    else:
        definition["added_tokens"][0]["id"] = number
    path.write_text(json.dumps(definition))
    with pytest.raises(UserError, match=rf"tokenizer\.json: .* has id {number}; the limit is 4194304"):
        load_tokenizer(tmp_path)


def replace(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def nested(steps: list[dict[str, object]]) -> dict[str, object]:
    inner = {"type": "Sequence", "normalizers": steps[1:]}
    return {"type": "Sequence", "normalizers": [*steps[:1], inner]}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", replace({"String": "a"}, "a" * 1_000_000)),
        ("normalizer", nested([replace({"Regex": "a"}, "aaaa")] * 3)),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 1_000_000}),
        ("decoder", {"type": "Sequence", "decoders": [replace({"String": "Ġ"}, " " * 1_000_000)]}),
    ],
    ids=["one step", "steps that multiply", "a beginning", "decoder"],
)
def test_a_tokenizer_that_makes_texts_many_times_longer_is_refused(tmp_path: Path, part: str, value: object) -> None:
    """A word of 20,000 letters took 20 GB; where memory runs out the process is aborted."""
    with pytest.raises(UserError, match=rf"tokenizer\.json: {part} makes texts up to .* times longer; the limit is 16"):
        load_tokenizer(edit(byte_level(tmp_path), **{part: value}))


def test_steps_that_published_tokenizers_have_are_taken(tmp_path: Path) -> None:
    quotes = [replace({"String": "``"}, '"'), replace({"Regex": " {2,}"}, "▁▁"), replace({"String": " "}, "▁")]
    steps = nested([*quotes, {"type": "Prepend", "prepend": "▁"}, {"type": "NFC"}])
    tokenizer = load_tokenizer(edit(byte_level(tmp_path), normalizer=steps))
    assert tokenizer.encode(["a b"])[0]
