"""Prompts are tokenised as in training, before a completion, and completions are decoded back to text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from lowrank_dist.data.dataset import load_dataset
from lowrank_dist.data.formats import Use
from lowrank_dist.data.tokenizer import Tokenizer, load_tokenizer
from lowrank_dist.errors import UserError
from lowrank_dist.generate.metrics import score
from lowrank_dist.generate.prompts import note_on_rewritten, prompt_of, read_prompts
from lowrank_dist.generate.texts import StopTexts, completion_text, stop_tokens, written_text
from tests.integration.launching import write_jsonl
from tests.tiny_tokenizers import (
    CHATML,
    CHATML_MARKED,
    DROPS_THINKING,
    LLAMA2,
    LLAMA3,
    byte_level,
    dummy_prefix,
    sentencepiece,
)

VOCAB = 1000
KINDS: dict[str, Callable[[Path], Path]] = {
    "byte level": lambda folder: byte_level(folder, bos=True),
    "dummy prefix": dummy_prefix,
    "metaspace": lambda folder: dummy_prefix(folder, metaspace=True),
    "sentencepiece": sentencepiece,
    "sentencepiece unigram": lambda folder: sentencepiece(folder, llama=False),
}


def read(path: Path, tokenizer: Tokenizer, references: bool = True) -> list[Any]:
    return read_prompts(path, tokenizer, {2}, vocab=VOCAB, references=references)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_completions_are_cut_as_in_training(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path / "tokenizer"))
    rows = [
        {"prompt": "Q: 2 + 2\nA:", "completion": " 4"},
        {"prompt": "hello", "completion": "world again"},
        {"prompt": "the ", "completion": "fox jumps"},
        {"prompt": "Q:", "completion": "\ncode"},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    trained = load_dataset(path, tokenizer, 100, VOCAB)
    for prompt, row, sample in zip(read(path, tokenizer), rows, trained, strict=True):
        begins = int(sample.target.argmax())
        assert prompt.ids == tuple(sample.tokens[:begins])
        assert (prompt.source, prompt.raw_references) == (row["prompt"], (row["completion"],))
        written = sample.tokens[begins:-1].tolist()
        found = completion_text(tokenizer, prompt.ids, written)
        assert prompt.references == (found,)
        if kind == "sentencepiece unigram":  # its normaliser moves white space, as in training
            assert found.split() == row["completion"].split()
        else:
            assert found == row["completion"]


def test_a_prompt_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(dummy_prefix(tmp_path / "tokenizer"))
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": p, "completion": " 4"} for p in ("<s>A:", "A:")])
    spelled, plain = read(path, tokenizer)
    assert spelled.ids == plain.ids == (1, *tokenizer.encode(["A:"])[0])
    assert prompt_of("<s>A:", tokenizer, (), VOCAB).ids == prompt_of("A:", tokenizer, (), VOCAB).ids == plain.ids
    # Control: where the tokenizer adds no BOS, the text's own is the only one and is kept.
    bare = load_tokenizer(byte_level(tmp_path / "bare"))
    assert bare.prefix_ids == () and prompt_of("<|bos|>a", bare, (), VOCAB).ids == tuple(bare.encode(["<|bos|>a"])[0])


def test_a_completion_alone_would_lose_its_space(tmp_path: Path) -> None:
    """Negative control of decoding after the prompt."""
    tokenizer = load_tokenizer(dummy_prefix(tmp_path))
    (ids,) = tokenizer.encode_continuations([" 4 is"], ["A:"])
    assert completion_text(tokenizer, tokenizer.encode(["A:"])[0], ids) == " 4 is" != tokenizer.decode(ids)


# Characters outside every tiny vocabulary: runs of byte tokens, or of bytes in byte-level BPE. Nine characters of three
# bytes are longer than the context used to decode a completion; the emoji has four bytes.
WRITTEN = ["日本語で書く文章です", "日", "the 日本 fox 😀 x", "\n日\n", "😀", "é à", " 日", "fox"]
RUNS = ["Q:", "日本語で書く文章", "the 日", "😀", "A:\n", "the "]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece unigram"])
@pytest.mark.parametrize("before", RUNS)
def test_byte_tokens_come_back_as_text(kind: str, before: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    prompt = tokenizer.encode([before])[0]
    for text in WRITTEN:
        (ids,) = tokenizer.encode_continuations([text], [before])
        assert completion_text(tokenizer, prompt, ids) == text
        # Cut off anywhere: the complete characters, and one U+FFFD for a character that lacks its last bytes.
        for n in range(1, len(ids)):
            found = completion_text(tokenizer, prompt, ids[:n])
            assert text.startswith(found.removesuffix("\ufffd")) and found.count("\ufffd") <= 1
        for stop in {*text} - {" "}:
            stops = StopTexts(tokenizer, [stop])
            met = next(n for n in range(1, len(ids) + 1) if stops.found_in(prompt, ids[:n]))
            assert stops.cut(completion_text(tokenizer, prompt, ids[:met])) == text[: text.index(stop)]


def test_a_stop_text_far_into_a_run_of_bytes(tmp_path: Path) -> None:
    # In two of three places the searched tail begins within a character of the run.
    for kind in ("dummy prefix", "sentencepiece", "byte level"):
        tokenizer = load_tokenizer(KINDS[kind](tmp_path / kind))
        for lead in range(3):
            text = "日" * 20 + "x" * lead + "本語で"
            (ids,) = tokenizer.encode_continuations([text], ["Q:"])
            met = [n for n in range(1, len(ids) + 1) if StopTexts(tokenizer, ["本語"]).found_in([1], ids[:n])]
            assert met and completion_text(tokenizer, [1], ids[: met[0]]).endswith("本語")


def test_bytes_that_are_no_text_are_left_as_the_decoder_shows_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(dummy_prefix(tmp_path))
    (whole,) = tokenizer.encode(["一"])
    assert [tokenizer.byte_of(i) for i in whole] == [None, 0xE4, 0xB8, 0x80]
    alone = whole[2:]
    assert completion_text(tokenizer, [1], alone) == tokenizer.decode(alone) == "\ufffd\ufffd"
    # The completion's bytes corrupt the prompt's run of bytes, but no text of the prompt comes along.
    assert completion_text(tokenizer, whole, alone) == "\ufffd\ufffd"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, LLAMA3])
def test_the_last_turn_of_a_chat_is_asked_for(template: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer", template=template))
    chat = [
        {"role": "user", "content": "what is 2 + 2"},
        {"role": "assistant", "content": "It is 4"},
        {"role": "user", "content": "and again?"},
    ]
    answer = {"role": "assistant", "content": "again 4"}
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": [*chat, answer]}, {"messages": chat[:2]}])
    trained = load_dataset(path, tokenizer, 200, VOCAB)
    end = tokenizer.encode(["<|eot_id|>" if template is LLAMA3 else "<|im_end|>"])[0]
    for prompt, sample, asked, text in zip(
        read(path, tokenizer), trained, (chat, chat[:1]), ("again 4", "It is 4"), strict=True
    ):
        written = sample.tokens[len(prompt.ids) :]
        assert prompt.ids == tuple(sample.tokens[: len(prompt.ids)]) and sample.target[len(prompt.ids) :].all()
        assert completion_text(tokenizer, prompt.ids, written[:-1].tolist()) == text == prompt.references[0]
        assert prompt.stop_ids == {2, *end} and written[-1] in end
        assert prompt.source == asked
    # Without the last turn the prompt is the same, and the placeholder of the missing turn is not in it.
    open_path = write_jsonl(tmp_path / "open.jsonl", [{"messages": chat}])
    (still_open,) = read(open_path, tokenizer, references=False)
    assert (still_open.ids, still_open.source, still_open.references) == (read(path, tokenizer)[0].ids, chat, ())
    assert read(open_path, tokenizer)[0].references == ("It is 4",)


def normalised(folder: Path, normalizer: normalizers.Normalizer, template: str | None = None) -> Path:
    """Write `byte_level` with a normaliser."""
    tokenizer = Backend.from_file(str(byte_level(folder, template=template) / "tokenizer.json"))
    tokenizer.normalizer = normalizer
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def without_spaces(folder: Path) -> Path:
    """Write a tokenizer that drops the spaces between words."""
    tokenizer = Backend.from_file(str(byte_level(folder) / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def answers(*contents: str) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]} for text in contents
    ]


def completions(*texts: str | list[str]) -> list[dict[str, Any]]:
    return [{"prompt": "the dog", "completion": text} for text in texts]


HEADER_TRAINED = CHATML_MARKED.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}{{",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + ",
).replace("{% else %}{{ ", "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + ")
WRITTEN: dict[str, tuple[Callable[[Path], Path], list[dict[str, Any]], str]] = {
    "an empty block of thinking": (
        lambda folder: byte_level(folder, template=DROPS_THINKING),
        answers("It is Paris.", "7"),
        "<think>\n\n</think>\n\nIt is Paris.",
    ),
    "a header between the markers": (
        lambda folder: byte_level(folder, template=HEADER_TRAINED),
        answers("world", "7"),
        "<|im_start|>assistant\nworld",
    ),
    "a template that strips": (
        lambda folder: dummy_prefix(folder, template=LLAMA2.replace("content.strip() + ' '", "content.split()[0]")),
        answers("\n world again", "Paris is it"),
        " world",
    ),
    "a chat in NFD": (
        lambda folder: normalised(folder, normalizers.NFC(), CHATML),
        answers("cafe\u0301", "7"),
        "caf\u00e9",
    ),
    "a turn's end inside a turn": (
        lambda folder: byte_level(folder, template=CHATML),
        answers("4<|im_end|>\nagain", "7"),
        "4",
    ),
    "a completion that ends in EOS": (byte_level, completions(" 4<|endoftext|>", " fox"), " 4"),
    "EOS inside a completion": (byte_level, completions(" 4<|endoftext|> again", " fox"), " 4"),
    "another special token": (byte_level, completions(" a <|im_start|>b", " fox"), " a <|im_start|>b"),
    "EOS as plain text": (sentencepiece, completions(" 4</s>", " fox"), " 4</s>"),
    "NFD": (lambda folder: normalised(folder, normalizers.NFC()), completions(" cafe\u0301", " fox"), " caf\u00e9"),
    "lower case": (lambda folder: normalised(folder, normalizers.Lowercase()), completions(" Fox", " dog"), " fox"),
    "no spaces": (without_spaces, completions(" quick brown", " fox"), "quickbrown"),
    "several references": (
        lambda folder: normalised(folder, normalizers.Lowercase()),
        completions([" Fox", " DOG<|endoftext|>"], [" 7"]),
        " fox",
    ),
}


UNCHANGED = ("another special token", "EOS as plain text")


@pytest.mark.parametrize("case", WRITTEN)
def test_what_was_trained_is_the_reference(case: str, tmp_path: Path) -> None:
    """A model that writes the trained tokens scores full marks, whatever template and tokenizer made of them."""
    maker, rows, expected = WRITTEN[case]
    folder = maker(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder.parent if folder.is_file() else folder)
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    stops = stop_tokens(tmp_path, tokenizer)
    prompts = read_prompts(path, tokenizer, stops, vocab=VOCAB, references=True)
    dataset = load_dataset(path, tokenizer, 200, VOCAB, use=Use.EVALUATION)
    trained = [dataset[place] for place in range(len(dataset))]
    texts = [
        written_text(tokenizer, prompt.ids, sample.tokens[len(prompt.ids) :].tolist(), prompt.stop_ids)
        for prompt, sample in zip(prompts, trained, strict=True)
    ]
    references = [prompt.references for prompt in prompts]
    assert texts[0] == expected == references[0][0]
    assert score(["exact_match", "rouge_l"], texts, references) == {"exact_match": 1, "rouge_l": 1}
    # Controls: with the file's raw text as reference a perfect model would be wrong, and other text stays wrong.
    assert (score(["exact_match"], texts, [prompt.raw_references for prompt in prompts])["exact_match"] < 1) == (
        case not in UNCHANGED
    )
    assert score(["exact_match"], texts[::-1], references) == {"exact_match": 0}
    if case == "several references":
        assert [prompt.references for prompt in prompts] == [(" fox", " dog"), (" 7",)]


def test_rewritten_references_are_noted_and_others_are_the_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer", template=CHATML))
    path = write_jsonl(tmp_path / "plain.jsonl", completions([" 4", " four\n"], "  Hello  World! "))
    prompts = read(path, tokenizer)
    assert note_on_rewritten(prompts) == [] and prompts[0].references == prompts[0].raw_references == (" 4", " four\n")
    assert note_on_rewritten(read(write_jsonl(tmp_path / "a.jsonl", answers("It is 4", "7 ")), tokenizer)) == []
    path = write_jsonl(tmp_path / "ends.jsonl", completions(" 4", [f" 4<|endoftext|>{'x' * 60}", " 7<|endoftext|>"]))
    prompts = read_prompts(path, tokenizer, stop_tokens(tmp_path, tokenizer), vocab=VOCAB, references=True)
    (note,) = note_on_rewritten(prompts)
    assert note.startswith("the references of 1 of 2 samples differ from the file") and "ends.jsonl:2" in note
    assert note.endswith(f"' 4' for {' 4<|endoftext|>' + 'x' * 25 + '…'!r}")


def test_references_are_cut_at_the_stop_texts_of_decoding(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    path = write_jsonl(tmp_path / "data.jsonl", completions(" 4 ### all", [" 7", " seven###"]))
    cut = read_prompts(path, tokenizer, {2}, vocab=VOCAB, references=True, stop=["###"])
    assert [prompt.references for prompt in cut] == [(" 4 ",), (" 7", " seven")]
    assert [prompt.references for prompt in read(path, tokenizer)] == [(" 4 ### all",), (" 7", " seven###")]
    assert "1 of 2" not in note_on_rewritten(cut)[0] and "2 of 2" in note_on_rewritten(cut)[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "", "completion": "x"}', "key 'prompt' is empty; fill it"),
        ('{"prompt": 3, "completion": "x"}', "key 'prompt' is a JSON number"),
        ('{"completion": "x"}', "key 'prompt' is missing"),
        ('{"prompt": "\\ud800", "completion": "x"}', "key 'prompt' .*surrogate"),
        ('{"prompt": "a", "completion": []}', "key 'completion' is an empty array"),
        ('{"prompt": "a"}', "key 'completion' is missing"),
        ('{"prompt": "a", "completion": ["b", 1]}', r"key 'completion\[1\]' is a JSON number"),
        (
            '{"prompt": "a", "completion": "b", "tools": [1]}',
            "key 'tools' is not supported, though the model would have to see it",
        ),
        ("[1]", "a JSON array where an object"),
        ('{"prompt": ', "malformed JSON at column"),
        ("[" * 100_000, "JSON nested more than "),
    ],
)
def test_lines_that_cannot_be_read_are_named(row: str, said: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(UserError, match=f"data.jsonl:2: {said}"):
        read(path, tokenizer)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("[]", "key 'messages' is an empty array"),
        ('[{"role": "bot", "content": "x"}]', r"'messages\[0\].role' is 'bot'"),
        ('[{"role": "user", "content": "x"}]', "'messages' has no message of the assistant"),
        ('[{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]', r"'messages\[1\].*is empty"),
    ],
)
def test_chats_that_cannot_be_read_are_named(messages: str, said: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer", template=CHATML))
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": good}, f'{{"messages": {messages}}}'])
    with pytest.raises(UserError, match=f"data.jsonl:2: {said}"):
        read(path, tokenizer)


def test_a_fault_of_every_line_is_said_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": ""}] * 23)
    with pytest.raises(UserError) as raised:
        read(path, tokenizer)
    assert str(raised.value).startswith(f"{path}: all 23 lines: ") and "\n" not in str(raised.value)


def test_files_and_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer", template=CHATML))
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nothing.jsonl", tokenizer)
    with pytest.raises(UserError, match="has no samples"):
        read(write_jsonl(tmp_path / "empty.jsonl", ["", "  "]), tokenizer)
    both = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "x"}]}]
    with pytest.raises(UserError, match="use one format per file"):
        read(write_jsonl(tmp_path / "both.jsonl", both), tokenizer, references=False)
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "hello"}])
    with pytest.raises(UserError, match=r"data.jsonl:1: token \d+ is beyond the model's 20"):
        read_prompts(path, tokenizer, (), vocab=20, references=False)
    with pytest.raises(UserError, match="--prompt is empty; pass some text, or --prompts"):
        prompt_of("", tokenizer, (), VOCAB)
    with pytest.raises(UserError, match="--prompt: not UTF-8"):
        prompt_of("a\udcff", tokenizer, (), VOCAB)


def test_several_references_and_other_keys(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "tokenizer"))
    rows = [{"id": 7, "prompt": "a", "completion": ["b", "c"]}, {"prompt": "a", "completion": "b"}]
    found = read(write_jsonl(tmp_path / "data.jsonl", rows), tokenizer)
    assert [prompt.references for prompt in found] == [("b", "c"), ("b",)]


def test_stop_tokens_are_the_model_s_and_the_tokenizer_s(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    own = tokenizer.eos_id
    assert stop_tokens(tmp_path, tokenizer) == {own}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 50}))
    assert stop_tokens(tmp_path, tokenizer) == {own, 50}
    # transformers reads the ids in config.json only where generation_config.json has none.
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, 61]}))
    assert stop_tokens(tmp_path, tokenizer) == {own, 60, 61}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json:1: malformed JSON"):
        stop_tokens(tmp_path, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_texts_are_found_once_they_are_whole(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    prompt = tokenizer.encode(["the dog"])[0]
    text = " jumps over the lazy dog and again it jumps over the fox"
    (ids,) = tokenizer.encode_continuations([text], ["the dog"])
    for stop in ("lazy dog", "again", "ver the f", "j"):
        stops = StopTexts(tokenizer, ["nowhere", stop])
        met = next(n for n in range(1, len(ids) + 1) if stops.found_in(prompt, ids[:n]))
        assert stop in completion_text(tokenizer, prompt, ids[:met])
        assert stop not in completion_text(tokenizer, prompt, ids[: met - 1])
        assert stops.cut(text) == text[: text.index(stop)]
    # The prompt contains the stop text, the completion does not.
    assert not any(StopTexts(tokenizer, ["the dog"]).found_in(prompt, ids[:n]) for n in range(1, len(ids) + 1))
    assert StopTexts(tokenizer, []).cut(text) == text and not StopTexts(tokenizer, []).found_in(prompt, ids)


def test_the_earliest_stop_text_counts(tmp_path: Path) -> None:
    stops = StopTexts(load_tokenizer(byte_level(tmp_path)), ["fox", "lazy", "the lazy"])
    assert stops.cut("over the lazy fox") == "over "
