"""Scores of texts against references, any of which is right. No torch: a pure function of texts.

exact_match  share of texts that equal a reference, white space at both ends aside.
bleu         corpus BLEU from 0 to 100 (Papineni et al. 2002) as sacrebleu computes it by default (Post 2018).
rouge_l      mean over texts of the best F-measure of the longest common subsequence, from 0 to 1 (Lin 2004, β = 1), on
             words of lower-case letters and digits: rouge_score's rougeL without stemming.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank_dist.errors import UserError

References = Sequence[Sequence[str]]

_WORD = re.compile(r"[a-z0-9]+")


def exact_match(texts: Sequence[str], references: References) -> float:
    hits = (
        text.strip() in (reference.strip() for reference in given)
        for text, given in zip(texts, references, strict=True)
    )
    return sum(hits) / len(texts)


def bleu(texts: Sequence[str], references: References) -> float:
    """Texts may have different numbers of references. Raises UserError where sacrebleu is not installed."""
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise UserError(f"the metric bleu is sacrebleu's ({error}): `pip install 'sacrebleu>=2.4'`") from error
    most = max(map(len, references))
    # One list for each place among the references, None where a text has fewer.
    streams: Any = [[given[place] if place < len(given) else None for given in references] for place in range(most)]
    return corpus_bleu(list(texts), streams).score


def rouge_l(texts: Sequence[str], references: References) -> float:
    best = (
        max(_lcs_f(words(text), words(reference)) for reference in given)
        for text, given in zip(texts, references, strict=True)
    )
    return sum(best) / len(texts)


def words(text: str) -> list[str]:
    """The words that ROUGE compares."""
    return _WORD.findall(text.lower())


def _lcs_f(found: Sequence[str], wanted: Sequence[str]) -> float:
    """2·P·R / (P + R), P and R the longest common subsequence over the two lengths."""
    common = _lcs(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _lcs(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


METRICS: Mapping[str, Callable[[Sequence[str], References], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
}


def check_metrics(names: Sequence[str]) -> None:
    """Raise UserError for a name that is no metric, and for one that is not installed, before anything is decoded."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"metric {name!r} is not known: give one of {', '.join(METRICS)}")
        METRICS[name](["a"], [["a"]])


def score(names: Sequence[str], texts: Sequence[str], references: References) -> dict[str, float]:
    """Every metric by name; every text has at least one reference."""
    return {name: METRICS[name](texts, references) for name in names}
