"""The tokens that are trained: completions, chat templates of several families, and templates that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lowrank_dist.data.formats import Completion, Conversation
from lowrank_dist.data.masking import Sample, mask_completions, mask_conversations
from lowrank_dist.data.tokenizer import FastTokenizer, Tokenizer, load_tokenizer
from lowrank_dist.errors import UserError
from tests import tiny_tokenizers as tiny

FILE = Path("chat.jsonl")
Messages = list[dict[str, str]]


def chat(*turns: str, system: str | None = None) -> Messages:
    """Return turns of user and assistant in alternation, after an optional system message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def mask(tokenizer: Tokenizer, messages: Messages) -> Sample:
    (sample,) = mask_conversations(tokenizer, [Conversation(7, messages)], FILE)
    return sample


def trained_texts(tokenizer: Tokenizer, sample: Sample, shift: int = 0) -> list[str]:
    """Return the text of each run of targets; `shift` breaks the mask on purpose."""
    flags = np.roll(sample.target, shift)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]])))
    return [tokenizer.decode(sample.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# ---- prompt and completion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [tiny.byte_level, tiny.dummy_prefix, tiny.sentencepiece])
def test_completion_and_eos_are_trained_and_nothing_else(tmp_path: Path, maker: Callable[[Path], Path]) -> None:
    tokenizer = load_tokenizer(maker(tmp_path))
    (sample,) = mask_completions(tokenizer, [Completion(3, "Q: 2 + 2\nA:", " 4 again")])
    tokens, target = sample.tokens, sample.target
    assert (tokens.dtype, target.dtype, sample.line) == (np.int32, np.bool_, 3)
    assert tokens[-1] == tokenizer.eos_id and target[-1]
    context = tokens[~target].tolist()
    assert context == [*tokenizer.prefix_ids, *tokenizer.encode(["Q: 2 + 2\nA:"])[0]]
    assert tokenizer.decode([*context[len(tokenizer.prefix_ids) :], *tokens[target][:-1]]) == "Q: 2 + 2\nA: 4 again"
    assert np.all(np.diff(target.astype(int)) >= 0)


def test_an_empty_prompt_trains_all_but_the_first_token(tmp_path: Path) -> None:
    for tokenizer in (
        load_tokenizer(tiny.byte_level(tmp_path / "a")),
        load_tokenizer(tiny.sentencepiece(tmp_path / "b")),
    ):
        (sample,) = mask_completions(tokenizer, [Completion(1, "", "the quick fox")])
        own = tokenizer.encode(["the quick fox"])[0]
        assert sample.tokens.tolist() == [*tokenizer.prefix_ids, *own, tokenizer.eos_id]
        assert not sample.target[0] and sample.target[1:].all()


def test_pad_equal_to_eos_changes_nothing(tmp_path: Path) -> None:
    records = [Completion(1, "hello", " world<|endoftext|>again"), Completion(2, "", "fox")]
    messages = [Conversation(1, chat("hello", "world"))]
    results = []
    for pad in (None, "<|im_end|>"):
        folder = tiny.byte_level(tmp_path / str(pad), template=tiny.CHATML, eos="<|im_end|>", pad=pad)
        tokenizer = load_tokenizer(folder)
        samples = mask_completions(tokenizer, records) + mask_conversations(tokenizer, messages, FILE)
        results.append([(s.tokens.tolist(), s.target.tolist()) for s in samples])
        assert all(s.tokens[-1] == tokenizer.eos_id and s.target[-1] for s in samples)
    assert results[0] == results[1]


def test_eos_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path))
    (sample,) = mask_completions(tokenizer, [Completion(1, "hello", " world<|endoftext|>")])
    assert sample.tokens.tolist().count(tokenizer.eos_id) == 1 and sample.target[-1]


@pytest.mark.parametrize("tail", ["<|endoftext|>\n", "<|endoftext|> ", "<|endoftext|><|endoftext|>", "<|endoftext|>"])
def test_one_eos_is_trained_and_nothing_behind_it(tmp_path: Path, tail: str) -> None:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path))
    plain, spelled, inside = mask_completions(
        tokenizer, [Completion(n, "hello", text) for n, text in enumerate([" world", " world" + tail, tail + "again"])]
    )
    assert spelled.tokens.tolist() == plain.tokens.tolist() and spelled.target.tolist() == plain.target.tolist()
    assert (plain.own_end, spelled.own_end, inside.own_end) == (False, True, False)
    # Control: text after an EOS stays, and EOS is appended to it.
    assert trained_texts(tokenizer, inside) == [tail + "again<|endoftext|>"]


@pytest.mark.parametrize("metaspace", [False, True])
def test_bos_is_put_once_and_never_trained(tmp_path: Path, metaspace: bool) -> None:
    folder = tiny.dummy_prefix(tmp_path, metaspace=metaspace)
    tokenizer, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    (bos,) = tokenizer.prefix_ids
    texts = [("<s>Q:", " 4"), ("<s>", " 4"), ("", "<s>fox"), ("Q:", " 4"), ("", "fox"), ("Q:<s>", " 4")]
    samples = mask_completions(tokenizer, [Completion(n, *pair) for n, pair in enumerate(texts, 1)])
    for (prompt, completion), sample in zip(texts, samples, strict=True):
        fed = hf(prompt or completion, add_special_tokens=not (prompt or completion).startswith("<s>"))["input_ids"]
        assert sample.tokens[: len(fed)].tolist() == fed
        assert sample.tokens.tolist().count(bos) == 1 + ("<s>" in prompt[1:])
        # One run of targets, which begins after the prompt and never with BOS.
        begins = sample.target.tolist().index(True)
        assert begins == (len(fed) if prompt else 1) and sample.target[begins:].all()
    assert [sample.own_bos for sample in samples] == [True, True, True, False, False, False]


def test_of_several_tokens_before_a_text_all_must_be_there(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path))
    bos, start = (tokenizer.encode([name])[0][0] for name in ("<|bos|>", "<|im_start|>"))
    tokenizer.prefix_ids = (bos, start)
    found = mask_completions(tokenizer, [Completion(1, p, "x") for p in ("<|bos|><|im_start|>a", "<|bos|>a", "a")])
    assert [sample.tokens.tolist().count(bos) for sample in found] == [1, 2, 1]
    assert [sample.own_bos for sample in found] == [True, False, False]


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path, eos=None))
    with pytest.raises(UserError, match="has no end-of-sequence token.*set eos_token in tokenizer_config.json"):
        mask_completions(tokenizer, [Completion(1, "a", "b")])


# ---- chat templates -------------------------------------------------------------------------------------------------

LONG = chat("hello", "world again", "what is it?", "It is Paris.", "and?", "7", system="be brief")
CASES = {
    "chatml": (tiny.byte_level, tiny.CHATML, ["{}<|im_end|>"] * 3),
    "chatml-marked": (tiny.byte_level, tiny.CHATML_MARKED, ["{}<|im_end|>"] * 3),
    "llama3": (tiny.byte_level_llama3, tiny.LLAMA3, ["{}<|eot_id|>"] * 3),
    "llama2": (tiny.dummy_prefix, tiny.LLAMA2, ["{} </s>"] * 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("system", [False, True])
def test_the_assistants_turns_with_their_ends_are_trained(tmp_path: Path, case: str, turns: int, system: bool) -> None:
    maker, template, shapes = CASES[case]
    folder = maker(tmp_path, template=template)
    tokenizer = load_tokenizer(folder)
    messages = LONG[: 1 + 2 * turns] if system else LONG[1 : 1 + 2 * turns]
    sample = mask(tokenizer, messages)
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    expected = [shape.format(text) for shape, text in zip(shapes, contents, strict=False)]
    assert [t.strip() for t in trained_texts(tokenizer, sample)] == expected
    assert sample.line == 7 and sample.target[-1]
    # Control: a mask that is off by one is noticed.
    for shift in (-1, 1):
        assert [t.strip() for t in trained_texts(tokenizer, sample, shift)] != expected
    # The tokens are those of transformers, up to the text after the last target.
    hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs = hf.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert sample.tokens.tolist() == theirs[: len(sample.tokens)]
    assert tokenizer.decode(theirs[len(sample.tokens) :]).strip() == ""


def test_mistral_and_its_refusal_of_a_system_message(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.dummy_prefix(tmp_path, template=tiny.MISTRAL, metaspace=True))
    assert trained_texts(tokenizer, mask(tokenizer, LONG[1:5])) == ["world again</s>", "It is Paris.</s>"]
    with pytest.raises(
        UserError, match=r"chat\.jsonl:7: the chat template of .* refuses .*Only user and assistant roles!"
    ):
        mask(tokenizer, LONG)


def test_markers_agree_with_transformers_and_with_prefixes(tmp_path: Path) -> None:
    marked = tiny.byte_level(tmp_path / "marked", template=tiny.CHATML_MARKED)
    plain = load_tokenizer(tiny.byte_level(tmp_path / "plain", template=tiny.CHATML))
    tokenizer = load_tokenizer(marked)
    assert isinstance(tokenizer, FastTokenizer) and tokenizer.template is not None and tokenizer.template.marked
    sample, twin = mask(tokenizer, LONG), mask(plain, LONG)
    assert sample.tokens.tolist() == twin.tokens.tolist() and sample.target.tolist() == twin.target.tolist()
    hf = AutoTokenizer.from_pretrained(marked, local_files_only=True)
    theirs = hf.apply_chat_template(LONG, return_dict=True, return_assistant_tokens_mask=True)
    assert sample.target.tolist() == [bool(m) for m in theirs["assistant_masks"][: len(sample.tokens)]]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("content", ["\nleading newline", " leading space", "\n\n  both\n", "Hi"])
def test_no_token_spans_the_beginning_of_a_turn(tmp_path: Path, content: str, trim: bool) -> None:
    # "assistant\n" + "\n\n  both": encoded as one text, "\n\n" would be a token that inference never sees.
    folder = tiny.byte_level(tmp_path, template=tiny.CHATML, trim_offsets=trim)
    tokenizer = load_tokenizer(folder)
    messages = chat("hello", content, "and", content)
    sample = mask(tokenizer, messages)
    assert trained_texts(tokenizer, sample) == [content + "<|im_end|>"] * 2
    hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    fed = hf.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert sample.tokens[: len(fed)].tolist() == fed and not sample.target[: len(fed)].any() and sample.target[len(fed)]


def test_control_one_text_would_span_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path))
    apart = tokenizer.encode(["assistant\n"])[0] + tokenizer.encode(["\n\n  both"])[0]
    assert tokenizer.encode(["assistant\n\n\n  both"])[0] != apart


def test_the_prompts_tokens_do_not_depend_on_the_answer(tmp_path: Path) -> None:
    # GPT-2's regular expression makes "\n\n" one token at the end of a text and two before a word, so a prompt that
    # ends in it is tokenised differently once the answer follows. Training must use the tokens that inference feeds.
    folder = tiny.byte_level(tmp_path, template=tiny.LLAMA3)
    tokenizer = load_tokenizer(folder)
    sample = mask(tokenizer, LONG[1:3])
    hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    fed = hf.apply_chat_template(LONG[1:2], add_generation_prompt=True, return_dict=False)
    assert sample.tokens[: len(fed)].tolist() == fed and sample.target.tolist().index(True) == len(fed)
    whole = hf.apply_chat_template(LONG[1:3], return_dict=False)  # control: tokenised as one text, as other trainers do
    assert whole[: len(fed)] != fed


def test_llama2_history_keeps_its_spaces_after_special_tokens(tmp_path: Path) -> None:
    folder = tiny.dummy_prefix(tmp_path, template=tiny.LLAMA2)
    tokenizer = load_tokenizer(folder)
    sample = mask(tokenizer, LONG[1:])
    pieces = [tokenizer.token(int(i)) for i in sample.tokens]
    begins = [i for i, piece in enumerate(pieces) if piece == "<s>"]
    assert len(begins) == 3 and {pieces[i + 1][0] for i in begins} == {"▁"}
    # Control: encoded without the dummy prefix everywhere, the later rounds would lose theirs.
    assert not tokenizer._middle.encode("[INST]", add_special_tokens=False).tokens[0].startswith("▁")


# A template without white space between the special token that ends the prompt and the assistant's text.
TIGHT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST]' + message['content'] + '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
SPACING: dict[str, Callable[..., Path]] = {
    "Prepend": tiny.dummy_prefix,
    "Metaspace always": lambda folder, **kw: tiny.dummy_prefix(folder, scheme="always", **kw),
    "Metaspace first": lambda folder, **kw: tiny.dummy_prefix(folder, scheme="first", **kw),
    "Metaspace never": lambda folder, **kw: tiny.dummy_prefix(folder, scheme="never", **kw),
    "ByteLevel": lambda folder, **kw: tiny.byte_level(folder, bos=True, prefix_space=True, **kw),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", SPACING)
def test_what_follows_a_special_token_is_encoded_as_transformers_encodes_it(
    tmp_path: Path, kind: str, special: bool
) -> None:
    folder = SPACING[kind](tmp_path, template=TIGHT)
    for name in ("[INST]", "[/INST]"):
        tiny.add_token(folder, name, special=special)
    tokenizer, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for answer in ("yo", " yo", "hello[/INST]again", "[/INST]", "日本", "\nyo"):
        messages = chat("hello", answer, "and", answer)
        sample = mask(tokenizer, messages)
        # Every boundary is at an added token, so no token can span it: the whole text is tokenised alike.
        assert sample.tokens.tolist() == hf.apply_chat_template(messages, return_dict=False)
        fed = hf.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert sample.target.tolist().index(True) == len(fed)
        # The same for rows of prompt and completion, also where the prompt ends in other text.
        for prompt in ("[INST]hello[/INST]", "hello</s>" if kind != "ByteLevel" else "hello<|im_end|>"):
            (row,) = mask_completions(tokenizer, [Completion(1, prompt, answer)])
            whole = hf(prompt + answer, add_special_tokens=False)["input_ids"]
            assert row.tokens.tolist() == [*tokenizer.prefix_ids, *whole, tokenizer.eos_id]
    # Control: after other text no space is added.
    (row,) = mask_completions(tokenizer, [Completion(1, "A:", "yo")])
    assert tokenizer.decode(row.tokens[row.target][:-1]) == "yo"
    assert "A:yo" in tokenizer.decode(row.tokens)


def test_a_turn_that_begins_the_text_has_the_space_of_a_beginning(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
        "{% endfor %}"
    )
    for kind in SPACING:
        folder = SPACING[kind](tmp_path / kind, template=template)
        tokenizer, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
        messages = [{"role": "assistant", "content": "hello"}]
        found = mask(tokenizer, messages).tokens.tolist()
        assert found == hf.apply_chat_template(messages, return_dict=False)


def test_a_normalized_end_of_turn_that_the_text_does_not_hold_is_refused(tmp_path: Path) -> None:
    # tokenizers compares such a token in its normalised spelling, "▁</s>". "hello</s>" is then six pieces, in
    # transformers too, and the model would never see its end of turn.
    folder = tiny.dummy_prefix(tmp_path, template=TIGHT)
    definition = json.loads((folder / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.eos_id not in hf("hello</s>", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="model would never learn to end a turn"):
        mask(tokenizer, chat("hello", "world"))


def test_the_template_may_strip_content_and_add_a_system_prompt(tmp_path: Path) -> None:
    llama3 = load_tokenizer(tiny.byte_level(tmp_path / "a", template=tiny.LLAMA3))
    assert trained_texts(llama3, mask(llama3, chat("hi", "  world \n"))) == ["world<|eot_id|>"]
    chatml = load_tokenizer(tiny.byte_level(tmp_path / "b", template=tiny.CHATML))
    text = chatml.decode(mask(chatml, chat("hi", "world")).tokens)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")


def test_messages_after_the_last_turn_are_left_out_and_none_means_no_target(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path, template=tiny.CHATML))
    short, long = mask(tokenizer, chat("hi", "world")), mask(tokenizer, chat("hi", "world", "more"))
    assert short.tokens.tolist() == long.tokens.tolist()
    assert not mask(tokenizer, chat("hi")).target.any()


def test_content_that_looks_like_the_end_of_the_turn(tmp_path: Path) -> None:
    # "end" is also part of "<|im_end|>", and an end-of-turn token inside the content does not end the turn.
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path, template=tiny.CHATML))
    for content in ("end", "a<|im_end|>b", "a<|im_end|>b "):
        sample = mask(tokenizer, chat("hi", content))
        assert trained_texts(tokenizer, sample) == [content + "<|im_end|>"] and not sample.own_end


def test_an_end_that_the_message_spells_out_is_trained_once(tmp_path: Path) -> None:
    # Inference stops at the first end, so a second one is not trained. The tokens stay those of the template.
    folder = tiny.byte_level(tmp_path, template=tiny.CHATML)
    tokenizer, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for content in ("<|im_end|>", "Paris.<|im_end|>", "Paris.<|im_end|>\n", "\nParis.<|im_end|>\n <|im_end|> "):
        messages = chat("hi", content, "and?", "4")
        sample = mask(tokenizer, messages)
        kept = content[: content.index("<|im_end|>")] + "<|im_end|>"
        assert trained_texts(tokenizer, sample) == [kept, "4<|im_end|>"] and sample.own_end
        whole = hf.apply_chat_template(messages, return_dict=False)
        assert sample.tokens.tolist() == whole[: len(sample.tokens)]
        assert trained_texts(tokenizer, mask(tokenizer, messages[:2])) == [kept]


def unigram(folder: Path, template: str) -> Path:
    """Write a tokenizer without byte fallback: unknown text becomes "<unk>", which is an added token as usual."""
    path = tiny.dummy_prefix(folder, template=template)
    definition = json.loads((path / "tokenizer.json").read_text())
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdehlorwy▁[]INST/"]
    definition["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[p, -1.0] for p in dict.fromkeys(pieces)]}
    (path / "tokenizer.json").write_text(json.dumps(definition))
    return path


def test_a_character_that_the_model_does_not_know_is_no_special_token(tmp_path: Path) -> None:
    folder = unigram(tmp_path / "a", TIGHT.replace("[INST]", "").replace("[/INST]", "%"))
    tokenizer, hf = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = chat("hello", "yo")
    # "%" is unknown, and no space is added after it. After a literal "<unk>" one is added.
    assert mask(tokenizer, messages).tokens.tolist() == hf.apply_chat_template(messages, return_dict=False)
    for left in ("hello%", "hello<unk>"):
        ids = tokenizer.encode([left])[0] + tokenizer.encode_continuations(["yo"], [left])[0]
        assert ids == hf(left + "yo", add_special_tokens=False)["input_ids"]
    # It does not end a turn either.
    tokenizer = load_tokenizer(unigram(tmp_path / "b", TIGHT.replace("eos_token", "'%'")))
    with pytest.raises(UserError, match="model would never learn to end a turn"):
        mask(tokenizer, messages)


# ---- templates that must be refused ---------------------------------------------------------------------------------


def refuses(tmp_path: Path, template: str, messages: Messages, *, bos: bool = False) -> str:
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path, template=template, bos=bos))
    with pytest.raises(UserError) as caught:
        mask(tokenizer, messages)
    message = str(caught.value)
    assert message.startswith("chat.jsonl:7: ") and f"the chat template of {tmp_path}" in message
    return message


UNTRAINED_END = {
    "alpaca": tiny.ALPACA,
    "marker before the end": tiny.CHATML_MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    ),
    "end is no token of this tokenizer": tiny.CHATML.replace("<|im_end|>", "<|end_of_turn|>"),
}


@pytest.mark.parametrize("case", UNTRAINED_END)
@pytest.mark.parametrize("content", ["world", "closing <|im_end|>", "<|endoftext|>"])
def test_an_end_of_turn_that_is_never_trained_is_refused(tmp_path: Path, case: str, content: str) -> None:
    # The content may itself end in a special token, which is not an end of turn.
    message = refuses(tmp_path, UNTRAINED_END[case], chat("hi", content))
    assert "the model would never learn to end a turn" in message
    assert "let the template end the turn" in message


def test_an_added_token_ends_a_turn_but_not_a_run_of_spaces(tmp_path: Path) -> None:
    template = tiny.CHATML.replace("<|im_end|>", "<|end_of_turn|>")
    folder = tiny.byte_level(tmp_path / "added", template=template)
    tiny.add_token(folder, "<|end_of_turn|>", special=False)
    tokenizer = load_tokenizer(folder)
    assert trained_texts(tokenizer, mask(tokenizer, chat("hi", "world"))) == ["world<|end_of_turn|>"]
    folder = tiny.byte_level(tmp_path / "spaces", template=tiny.CHATML.replace("<|im_end|>", "   "))
    tiny.add_token(folder, "   ", special=False)
    with pytest.raises(UserError, match="never learn to end a turn"):
        mask(load_tokenizer(folder), chat("hi", "world"))


def test_a_generation_prompt_that_is_no_prefix_is_refused(tmp_path: Path) -> None:
    message = refuses(tmp_path, tiny.PROMPTS_THINKING, chat("hi", "world"))
    assert "assistant's turn messages[1] does not begin with the generation prompt" in message
    assert "'<think>\\n'" in message and "{% generation %}" in message


def test_a_template_that_rewrites_the_history_is_refused(tmp_path: Path) -> None:
    message = refuses(tmp_path, tiny.DROPS_THINKING, LONG)
    assert "renders messages[2] or an earlier one differently if more messages follow" in message
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path, template=tiny.DROPS_THINKING))
    assert trained_texts(tokenizer, mask(tokenizer, LONG[:3])) == ["<think>\n\n</think>\n\nworld again<|im_end|>"]


def test_an_end_only_after_the_last_turn_is_refused(tmp_path: Path) -> None:
    assert "differently if more messages follow" in refuses(tmp_path, tiny.EOS_ONLY_AT_END, LONG[1:])


def test_a_conversation_that_begins_with_the_assistant(tmp_path: Path) -> None:
    messages = [{"role": "assistant", "content": "hello"}, *LONG[1:3]]
    assert "begin with a user or system message" in refuses(tmp_path / "plain", tiny.CHATML, messages)
    tokenizer = load_tokenizer(tiny.byte_level(tmp_path / "marked", template=tiny.CHATML_MARKED))
    assert trained_texts(tokenizer, mask(tokenizer, messages)) == ["hello<|im_end|>", "world again<|im_end|>"]


def test_a_template_that_raises_names_the_line(tmp_path: Path) -> None:
    assert "roles must alternate" in refuses(tmp_path / "a", tiny.LLAMA2, [*LONG[1:2], *LONG[1:3]], bos=True)
    assert "'bos_token' is undefined" in refuses(tmp_path / "b", tiny.LLAMA2, LONG)
    assert "fails on these messages" in refuses(tmp_path / "c", "{{ messages[0]['content'] + 3 }}", LONG)
    assert "fails on these messages" in refuses(tmp_path / "d", "{% for %}", LONG)


def test_no_template_is_refused(tmp_path: Path) -> None:
    for folder in (tiny.byte_level(tmp_path / "fast"), tiny.sentencepiece(tmp_path / "sp").parent):
        with pytest.raises(UserError, match=r"chat\.jsonl: the lines hold 'messages', but .* has no chat template"):
            mask(load_tokenizer(folder), LONG)
