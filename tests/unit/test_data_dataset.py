"""The samples of a file that are kept, those that are dropped and reported, and files with nothing to train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lowrank_dist.data import dataset
from lowrank_dist.data.dataset import load_dataset
from lowrank_dist.data.formats import Completion, Use, read_jsonl
from lowrank_dist.data.masking import mask_completions
from lowrank_dist.data.tokenizer import Tokenizer, load_tokenizer
from lowrank_dist.errors import UserError
from tests import tiny_tokenizers as tiny

VOCAB = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny.byte_level(tmp_path_factory.mktemp("tokenizer"), template=tiny.CHATML))


def write(tmp_path: Path, *rows: dict[str, object]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt: str, completion: str) -> dict[str, object]:
    return {"prompt": prompt, "completion": completion}


def test_samples_come_in_file_order_and_as_masked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row(f"question {i}" * (i % 4), f" answer {i}" * (1 + i % 3)) for i in range(2500)]  # more than one chunk
    told: list[tuple[int, int]] = []
    path = write(tmp_path, *rows)
    dataset = load_dataset(path, tokenizer, 256, VOCAB, progress=lambda done, total: told.append((done, total)))
    assert told == [(number, 2500) for number in range(1, 2501)]
    assert len(dataset) == 2500 and dataset.report.kept == dataset.report.total == 2500
    for i in (0, 1, 1023, 1024, 2499):
        (expected,) = mask_completions(
            tokenizer, [Completion(i + 1, str(rows[i]["prompt"]), str(rows[i]["completion"]))]
        )
        sample = dataset[i]
        assert sample.tokens.tolist() == expected.tokens.tolist() and sample.target.tolist() == expected.target.tolist()
        assert sample.line == i + 1 and dataset.lengths[i] == len(expected.tokens)
        assert dataset.targets[i] == np.count_nonzero(expected.target)
    assert dataset[0].tokens.dtype == np.int32 and dataset[0].tokens.base is not None


def test_what_a_method_puts_before_samples_is_not_of_the_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    virtual_token_ids = (VOCAB, VOCAB + 1, VOCAB + 2)
    path = write(tmp_path, row("q", " answer"), row("question", " a longer answer"))
    plain, prefixed = (load_dataset(path, tokenizer, 256, VOCAB, ids) for ids in ((), virtual_token_ids))
    for before, after in zip(plain, prefixed, strict=True):
        assert after.tokens.tolist() == [*virtual_token_ids, *before.tokens.tolist()]
        assert after.target.tolist() == [False] * 3 + before.target.tolist()
    assert prefixed.targets.tolist() == plain.targets.tolist() and prefixed.sha256 == plain.sha256
    other = load_dataset(
        write(tmp_path, row("q", " answer"), row("question", " another")), tokenizer, 256, VOCAB, virtual_token_ids
    )
    assert other.sha256 != plain.sha256
    # A sample's length is that in the file: virtual tokens before it do not count towards the limit.
    assert len(load_dataset(path, tokenizer, int(plain.lengths.max()), VOCAB, virtual_token_ids)) == 2


def test_of_several_completions_the_first_is_the_sample_s(tmp_path: Path, tokenizer: Tokenizer) -> None:
    several = [{**row("q", ""), "completion": [" answer", " reply"]}, row("question", " another")]
    path = write(tmp_path, *several)
    with pytest.raises(UserError, match=":1: key 'completion' is a JSON array"):
        load_dataset(path, tokenizer, 64, VOCAB)
    judged = load_dataset(path, tokenizer, 64, VOCAB, use=Use.EVALUATION)
    plain = load_dataset(write(tmp_path, row("q", " answer"), several[1]), tokenizer, 64, VOCAB, use=Use.EVALUATION)
    assert [s.tokens.tolist() for s in judged] == [s.tokens.tolist() for s in plain]
    # The other references, and the lines they are on, affect an evaluation and so the digest.
    swapped = [row("q", " answer"), {**several[1], "completion": [" another", " reply"]}]
    others = [judged, plain]
    others += [
        load_dataset(write(tmp_path, *rows), tokenizer, 64, VOCAB, use=Use.EVALUATION)
        for rows in (swapped, [{**several[0], "completion": [" answer", " rep"]}, several[1]])
    ]
    assert len({dataset.sha256 for dataset in others}) == len(others)


def test_too_long_and_targetless_samples_are_dropped_and_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (whole,) = mask_completions(tokenizer, [Completion(1, "hello", " world")])
    limit = len(whole.tokens)
    rows = [row("hello", " world"), *[row("hello" * 9, " world")] * 7, {**row("", "a"), "colour": 1}]
    rows[0] |= {f"k{number}": 1 for number in range(200)}
    dataset = load_dataset(write(tmp_path, *rows), tokenizer, limit, VOCAB)
    report = dataset.report
    assert [dataset[i].line for i in range(len(dataset))] == [1, 9]
    assert (report.total, report.kept, report.too_long, report.no_target) == (9, 2, 7, 0)
    assert report.too_long_lines == (2, 3, 4, 5, 6)
    summary = report.summary()
    assert f"2 of 9 samples kept; 7 over {limit} tokens dropped (longest {report.longest}; lines 2, 3, 4" in summary
    assert "..." in summary and "ignored keys: 'colour' (1 line), 'k0' (1 line)" in summary
    assert summary.endswith(" and 181 more")
    # With one token less the first sample is too long as well.
    assert load_dataset(write(tmp_path, *rows), tokenizer, limit - 1, VOCAB).report.kept == 1


def test_a_conversation_without_an_assistant_is_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asks, answers = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}
    path = write(tmp_path, {"messages": [asks]}, {"messages": [asks, answers]})
    report = load_dataset(path, tokenizer, 64, VOCAB).report
    assert (report.kept, report.no_target, report.no_target_lines) == (1, 1, (1,))
    assert "1 without target tokens dropped (line 1)" in report.summary()
    with pytest.raises(UserError, match="0 of 1 samples kept; 1 without target tokens"):
        load_dataset(write(tmp_path, {"messages": [asks]}), tokenizer, 64, VOCAB)


def test_a_lone_first_token_is_no_target(tmp_path: Path) -> None:
    # A lone EOS after an empty context has no predecessor to be predicted from.
    folder = tiny.byte_level(tmp_path)
    with pytest.raises(UserError, match="without target tokens"):
        load_dataset(write(tmp_path, row("", "<|endoftext|>")), load_tokenizer(folder), 64, VOCAB)


def test_what_texts_spell_out_themselves_is_said(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.dummy_prefix(tmp_path / "tokenizer"))
    plain = [row("Q:", " 4"), row("", "fox")]
    assert "BOS" not in load_dataset(write(tmp_path, *plain), tokenizer, 64, 480).report.summary()
    spelled = [row("<s>Q:", " 4"), row("", "<s>fox"), row("Q:", " 4</s>\n"), *plain]
    report = load_dataset(write(tmp_path, *spelled), tokenizer, 64, 480).report
    assert (report.own_bos, report.own_end) == (2, 1)
    assert "2 have the tokenizer's BOS in their text, so no second BOS is added" in report.summary()
    assert "1 have the end of the completion in their text, so no second end is added" in report.summary()


def test_nothing_left_names_counts_and_the_longest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (whole,) = mask_completions(tokenizer, [Completion(1, "hello hello", " world")])
    path = write(tmp_path, row("hello", " world"), row("hello hello", " world"))
    with pytest.raises(UserError) as caught:
        load_dataset(path, tokenizer, 2, VOCAB)
    message = str(caught.value)
    assert message.startswith(f"{path}: 0 of 2 samples kept; 2 over 2 tokens dropped (longest {len(whole.tokens)}")
    assert f"raise data.max_length (the longest sample has {len(whole.tokens)} tokens)" in message


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, row("a", "b"), row("hello", " the quick brown fox jumps"))
    highest = int(max(load_dataset(path, tokenizer, 64, VOCAB)[i].tokens.max() for i in range(2)))
    load_dataset(path, tokenizer, 64, highest + 1)
    with pytest.raises(UserError) as caught:
        load_dataset(path, tokenizer, 64, highest)
    assert str(caught.value).startswith(f"{path}:2: token ") and f"has id {highest}" in str(caught.value)
    assert "does not belong to this model" in str(caught.value)


def test_bad_lines_and_templates_come_through_with_their_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, row("a", "b"), {"prompt": "a"})
    with pytest.raises(UserError, match=r"data\.jsonl:2: key 'completion' is missing"):
        load_dataset(path, tokenizer, 64, VOCAB)
    alpaca = load_tokenizer(tiny.byte_level(tmp_path / "alpaca", template=tiny.ALPACA))
    path = write(tmp_path, {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]})
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*model would never learn to end a turn"):
        load_dataset(path, alpaca, 64, VOCAB)


def test_long_records_are_tokenised_in_smaller_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", 3)
    monkeypatch.setattr(dataset, "_CHUNK_CHARACTERS", 10)
    assert list(dataset._chunks([])) == []
    assert list(dataset._chunks([1] * 7)) == [(0, 3), (3, 6), (6, 7)]
    assert list(dataset._chunks([99, 1, 9, 1, 50])) == [(0, 1), (1, 3), (3, 4), (4, 5)]


def test_a_line_beyond_the_bound_is_refused_before_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a", "completion": "b"}\n{"prompt": "')
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"data\.jsonl:2: the line is longer than 2 MiB; split it, or leave it out"):
        read_jsonl(path)
