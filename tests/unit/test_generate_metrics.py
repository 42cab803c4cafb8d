"""Metrics against values worked out by hand and against their definitions."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_bleu

from lowrank_dist.errors import UserError
from lowrank_dist.generate.metrics import (
    METRICS,
    bleu,
    check_metrics,
    exact_match,
    notes_on_references,
    notes_on_texts,
    rouge_l,
    score,
    words,
)


def test_exact_match_takes_any_reference_and_no_white_space_at_the_ends() -> None:
    texts = [" goes, went", "ran", "Sat", "sits  down"]
    references = [["goes, went"], ["runs", "ran\n"], ["sat"], ["sits down"]]
    assert exact_match(texts, references) == 2 / 4


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # Lin 2004, section 3.1: longest common subsequence 3 of 4 words, then 2.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        # Precision 3/3, recall 3/5.
        ("a b c", "a x b y c", 2 * 3 / 8),
        ("The-Cat, sat!", "the cat sat", 1.0),
        ("", "the cat", 0.0),
        ("...", "the cat", 0.0),
        ("dog", "the cat", 0.0),
    ],
)
def test_rouge_l_by_hand(text: str, reference: str, expected: float) -> None:
    assert rouge_l([text], [[reference]]) == pytest.approx(expected, abs=1e-15)


def test_rouge_l_takes_the_best_reference_and_the_mean_over_texts() -> None:
    assert rouge_l(["a b c", "x"], [["z", "a b"], ["y"]]) == pytest.approx((2 * 2 / 5 + 0) / 2)


@given(st.text(st.characters(codec="ascii")))
def test_words_of_ascii_are_those_of_rouge_score(text: str) -> None:
    """rouge_score's tokenizer lowercases and separates at anything but a to z and 0 to 9."""
    assert words(text) == re.findall("[a-z0-9]+", text.lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't  stop 3.5—Über x_y", "don t stop 3 5 über x y"),
        ("Кот съел 5", "кот съел 5"),
        ("hindi: हिन्दी", "hindi हिन्दी"),
        ("هل أكل القطُّ ٥ تفاحات؟", "هل أكل القطُّ ٥ تفاحات"),
        ("고양이가 5개를 ㅋㅋㅋ", "고양이가 5개를 ㅋㅋㅋ"),
        ("我喜欢PyTorch 2.5。", "我 喜 欢 pytorch 2 5"),
        ("カレーを「食」", "カ レ ー を 食"),
        ("𠮷野家", "𠮷 野 家"),
        ("กินข้าว", "ก ิ น ข ้ า ว"),
        ("cafe\u0301 ❤️ 🎉", "café"),
        ("！？ …", ""),
    ],
)
def test_words_of_every_script(text: str, expected: str) -> None:
    assert words(text) == expected.split()


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("кот съел 5", "дом стоит 5", 1 / 3),
        ("我喜欢苹果", "我喜欢苹果", 1.0),
        ("我喜欢苹果", "我吃苹果", 2 * 3 / 9),
        ("猫は魚を食べた", "犬は肉を食べた", 5 / 7),
        ("กา", "กิ", 1 / 2),
        ("القط أكل ٥", "القط أكل ٦", 2 / 3),
        ("고양이가 잔다", "개가 잔다", 1 / 2),
        ("un café", "un cafe\u0301", 1.0),
        ("a café", "a cafe", 1 / 2),
        ("使用 PyTorch 训练", "使用 Megatron 训练", 4 / 5),
    ],
)
def test_rouge_l_in_other_scripts(text: str, reference: str, expected: float) -> None:
    assert rouge_l([text], [[reference]]) == pytest.approx(expected, abs=1e-15)


small = st.lists(st.sampled_from("abc"), max_size=6)


@given(small, small)
def test_rouge_l_is_the_longest_common_subsequence(left: list[str], right: list[str]) -> None:
    def subsequences(items: list[str]) -> set[tuple[str, ...]]:
        return {chosen for size in range(len(items) + 1) for chosen in combinations(items, size)}

    common = max(map(len, subsequences(left) & subsequences(right)))
    expected = 2 * common / (len(left) + len(right)) if common else 0.0
    assert rouge_l([" ".join(left)], [[" ".join(right)]]) == pytest.approx(expected)


def test_bleu_by_hand() -> None:
    """One text of five words: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty (Papineni et al. 2002)."""
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(["the cat sat on mats"], [["the cat sat on it"]]) == pytest.approx(expected)


def test_bleu_with_several_references_each() -> None:
    texts = ["the cat sat on the mat", "a dog barks at night now"]
    several = [["a cat is here", "the cat sat on the mat"], ["a dog barks at night now"]]
    assert bleu(texts, several) == pytest.approx(100)
    # Negative control: without the first text's second reference.
    assert bleu(texts, [references[:1] for references in several]) < 80
    # A corpus's BLEU is not the mean of its sentences': counts are summed.
    parts = [bleu([text], [references[:1]]) for text, references in zip(texts, several, strict=True)]
    assert bleu(texts, [references[:1] for references in several]) != pytest.approx(sum(parts) / 2, abs=1)


@pytest.mark.parametrize(
    ("tokenize", "text", "reference"),
    [
        ("zh", "我喜欢吃苹果，他说：“好的”。", "我们都喜欢吃苹果，她说：“好”。"),
        ("zh", "2024年使用 PyTorch 训练模型(3.5 倍)!", "2024年用 PyTorch 2 训练大模型(3.5 倍)!"),
        ("char", "猫は魚を食べたあとで、カレーを食べた。", "犬は魚を食べたあと、カレーも食べた。"),
        ("char", "แมวกินปลาแล้วนอน", "แมวกินข้าวแล้วก็นอน"),
        ("char", "ແມວກິນປາແລ້ວ", "ແມວກິນເຂົ້າແລ້ວ"),
        ("13a", "the “cat” — it's 3.5% &amp; more…", "the “dog” — it's 3.5% &amp; no more…"),
        ("13a", "кот съел пять яблок, а потом уснул", "кот съел шесть яблок, а потом ушёл"),
        ("13a", "고양이가 생선을 먹고 나서 잤다.", "고양이가 생선을 먹고 다시 잤다."),
        ("13a", "أكل القط السمكة ثم نام طويلا", "أكل القط السمكة ثم ذهب بعيدا"),
        ("13a", "good job to all of you 🎉", "good job to both of you 🎉"),
    ],
)
def test_bleu_has_the_tokens_of_sacrebleu_for_the_script(tokenize: str, text: str, reference: str) -> None:
    expected = corpus_bleu([text], [[reference]], tokenize=tokenize).score
    assert 0 < expected < 90
    assert bleu([text], [[reference]]) == pytest.approx(expected, abs=1e-12)
    assert bleu([reference], [[reference]]) == pytest.approx(100)


def test_bleu_takes_a_mixed_corpus_and_either_form_of_an_accent() -> None:
    texts = ["the cat sat on a mat", "我喜欢吃苹果", "PyTorchで猫を学習", "un cafe\u0301 noir et chaud"]
    references = [[text] for text in texts[:3]] + [["un café noir et chaud"]]
    assert bleu(texts, references) == pytest.approx(100)


def test_references_that_decide_what_a_metric_means_are_noted() -> None:
    assert notes_on_references(["rouge_l"], [["the cat"], ["", "кот 5"], ["고양이", "🎉"]]) == []
    assert notes_on_references(["bleu", "rouge_l"], [["the cat"], ["", "кот 5 кот 6"], ["고양이", "🎉"]]) == []
    assert notes_on_references(["exact_match"], [[""], ["猫"]]) == []
    notes = notes_on_references(["rouge_l", "bleu", "exact_match"], [["cat", "猫"], ["🎉", "!"], [" \n"], ["แมว"]])
    assert [note.split(":")[0] for note in notes] == ["bleu and rouge_l", "bleu", "bleu", "rouge_l"]
    assert "in the references of 2 of 4 samples" in notes[0]
    assert "no reference has four words" in notes[1]
    assert "1 of 4 samples have no word" in notes[2] and "2 of 4 samples have no word" in notes[3]


def test_bleu_of_short_texts_is_said_to_be_0_exactly_where_it_is() -> None:
    for texts in (["Paris", "a b c"], ["a, b"], ["我喜欢"]):
        assert score(["bleu"], texts, [[text] for text in texts]) == {"bleu": 0}
        (note,) = notes_on_texts(["bleu"], texts, [["one of four words"]])
        assert note.startswith("bleu is 0 because no generated text has four words")
        # Where the references are as short, a note on them says so, and none is made on the texts.
        assert notes_on_texts(["bleu"], texts, [[text] for text in texts]) == []
    for texts in (["Paris", "a b c d"], ["a, b."], ["我喜欢吃"]):
        assert score(["bleu"], texts, [[text] for text in texts])["bleu"] == pytest.approx(100)
        assert notes_on_texts(["bleu"], texts, [["one of four words"]]) == []
    assert notes_on_texts(["rouge_l"], ["Paris"], [["one of four words"]]) == []


def test_metrics_that_are_not_there_are_said_before_decoding() -> None:
    check_metrics(tuple(METRICS))
    with pytest.raises(UserError, match="'rouge' is unknown; give one of exact_match, bleu, rouge_l"):
        check_metrics(["exact_match", "rouge"])
    with mock.patch.dict(sys.modules, sacrebleu=None), pytest.raises(UserError, match="pip install 'sacrebleu"):
        check_metrics(["bleu"])


def test_score_gives_every_metric_by_name() -> None:
    found = score(["rouge_l", "exact_match"], ["a b"], [["a b", "c"]])
    assert found == {"rouge_l": 1.0, "exact_match": 1.0}


def test_metrics_import_no_torch() -> None:
    code = "import sys, lowrank_dist.generate.metrics as m; m.bleu(['a'], [['a']]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
