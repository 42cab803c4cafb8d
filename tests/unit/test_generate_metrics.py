"""Metrics against values worked out by hand, and against what they are defined by."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.errors import UserError
from lowrank_dist.generate.metrics import METRICS, bleu, check_metrics, exact_match, rouge_l, score, words


def test_exact_match_takes_any_reference_and_no_white_space_at_the_ends() -> None:
    texts = [" goes, went", "ran", "Sat", "sits  down"]
    references = [["goes, went"], ["runs", "ran\n"], ["sat"], ["sits down"]]
    assert exact_match(texts, references) == 2 / 4


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # Lin 2004, section 3.1: LCS 3 of 4 and 4; LCS 2.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        # P 3/3, R 3/5.
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


def test_words_are_those_of_rouge_score() -> None:
    """Its tokenizer: lower case, and anything but a to z and 0 to 9 separates."""
    assert words("Don't  stop 3.5—Über x_y") == ["don", "t", "stop", "3", "5", "ber", "x", "y"]


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
    # Negative control: without the second reference of the first text.
    assert bleu(texts, [references[:1] for references in several]) < 80
    # A corpus is not the mean of its sentences: counts are summed.
    parts = [bleu([text], [references[:1]]) for text, references in zip(texts, several, strict=True)]
    assert bleu(texts, [references[:1] for references in several]) != pytest.approx(sum(parts) / 2, abs=1)


def test_metrics_that_are_not_there_are_said_before_decoding() -> None:
    check_metrics(tuple(METRICS))
    with pytest.raises(UserError, match="'rouge' is not known: give one of exact_match, bleu, rouge_l"):
        check_metrics(["exact_match", "rouge"])
    with mock.patch.dict(sys.modules, sacrebleu=None), pytest.raises(UserError, match="pip install 'sacrebleu"):
        check_metrics(["bleu"])


def test_score_gives_every_metric_by_name() -> None:
    found = score(["rouge_l", "exact_match"], ["a b"], [["a b", "c"]])
    assert found == {"rouge_l": 1.0, "exact_match": 1.0}


def test_metrics_import_no_torch() -> None:
    code = "import sys, lowrank_dist.generate.metrics as m; m.bleu(['a'], [['a']]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
