"""Scores of texts against references, of which any is accepted. Pure functions of texts, without torch.

exact_match  share of texts that equal a reference, apart from white space at both ends.
bleu         corpus BLEU from 0 to 100 (Papineni et al. 2002) as sacrebleu computes it by default (Post 2018).
rouge_l      mean over texts of the best F-measure of the longest common subsequence, from 0 to 1 (Lin 2004, β = 1), on
             words of lower-case letters and digits of any script: on ASCII rouge_score's rougeL without stemming.

bleu and rouge_l count each character of a script without spaces (Chinese, Japanese, Thai, …) as a word. In bleu,
sacrebleu's default tokeniser `13a` splits the rest. No tokeniser has to be chosen for a text or a corpus: text with
spaces has the tokens of `13a`, Chinese those of sacrebleu's `zh` (except that …… and —— are one token each), Japanese
and Thai those of its `char` (except that Latin words and numbers stay whole). Both metrics compare texts in NFC, where
é is one character however it was written.

A reference is not the text of the file but what a model that learned it writes (`generate.texts.written_text`): its
trained tokens up to the first stop, decoded like a generated text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unicodedata import normalize

import regex

from lowrank_dist.errors import UserError

References = Sequence[Sequence[str]]

# Scripts without spaces, and the characters used with them: punctuation, kana marks, units, full-width forms. Hangul
# and its compatibility letters are left out, since Korean has spaces.
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
_UNSPACED = regex.compile(
    "(["
    + "".join(rf"\p{{{script}}}" for script in _SCRIPTS)
    + r"\u3000-\u30ff\u3200-\u33ff\uff00-\uff9f\uffe0-\uffef])"
)
# Includes vowel signs and accents, but not the variation selectors, which ask for a coloured emoji.
_WORD = regex.compile(r"(?V1)[[\p{L}\p{Mn}\p{Mc}\p{N}]--\p{Variation_Selector}]+")


def exact_match(texts: Sequence[str], references: References) -> float:
    hits = (
        text.strip() in (reference.strip() for reference in given)
        for text, given in zip(texts, references, strict=True)
    )
    return sum(hits) / len(texts)


def bleu(texts: Sequence[str], references: References) -> float:
    """Return corpus BLEU; texts may have different numbers of references.

    Raises UserError where sacrebleu is not installed.
    """
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise UserError(f"metric bleu needs sacrebleu ({error}); run `pip install 'sacrebleu>=2.4'`") from error
    most = max(map(len, references))
    # One list for each index of a reference, with None for texts that have fewer.
    streams: Any = [
        [spaced(given[place]) if place < len(given) else None for given in references] for place in range(most)
    ]
    return corpus_bleu([spaced(text) for text in texts], streams).score


def rouge_l(texts: Sequence[str], references: References) -> float:
    best = (
        max(_lcs_f(words(text), words(reference)) for reference in given)
        for text, given in zip(texts, references, strict=True)
    )
    return sum(best) / len(texts)


def words(text: str) -> list[str]:
    """Return the words that ROUGE compares."""
    return _WORD.findall(spaced(text).lower())


def spaced(text: str) -> str:
    """Return the text in NFC with spaces around each character of a script without spaces."""
    return _UNSPACED.sub(r" \1 ", normalize("NFC", text))


def _lcs_f(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Return 2·P·R / (P + R), where P and R are the longest common subsequence divided by the two lengths."""
    common = _lcs(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _lcs(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


_BLEU_WORDS = 4  # BLEU counts runs of one to four words
_NO_FOUR_WORDS = "and bleu counts groups of four words; use exact_match or rouge_l for short texts"

# Increase it when a change makes a metric return another value for the same texts: only values of one definition are
# compared with each other. 2: BLEU and ROUGE-L count words by script, and references are the trained tokens, decoded.
DEFINITION = 2
METRICS: Mapping[str, Callable[[Sequence[str], References], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
}


def check_metrics(names: Sequence[str]) -> None:
    """Raise UserError for an unknown metric and for one whose package is not installed, before anything is decoded."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"metric {name!r} is unknown; give one of {', '.join(METRICS)}")
        METRICS[name](["a"], [["a"]])


def score(names: Sequence[str], texts: Sequence[str], references: References) -> dict[str, float]:
    """Return the value of each metric by name. Every text must have at least one reference."""
    return {name: METRICS[name](texts, references) for name in names}


def notes_on_texts(names: Sequence[str], texts: Sequence[str], references: References) -> list[str]:
    """Return a note for each metric that is 0 only because the generated texts are too short.

    If the references are too short as well, `notes_on_references` says so.
    """
    if "bleu" not in names or any(map(has_four_words, texts)) or not _have_four_words(references):
        return []
    return [f"bleu is 0 because no generated text has four words, {_NO_FOUR_WORDS}"]


def has_four_words(text: str) -> bool:
    """Return whether a text has four words in a row; without them BLEU counts nothing."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return len(Tokenizer13a()(spaced(text)).split()) >= _BLEU_WORDS


def _have_four_words(references: References) -> bool:
    return any(has_four_words(reference) for given in references for reference in given)


def notes_on_references(names: Sequence[str], references: References) -> list[str]:
    """Return a note for each property of the references that affects what the named metrics measure."""
    split: Mapping[str, Callable[[str], list[str]]] = {"bleu": str.split, "rouge_l": words}
    asked, lines = [name for name in split if name in names], []
    unspaced = sum(any(_UNSPACED.search(reference) for reference in given) for given in references)
    if asked and unspaced:
        lines.append(
            f"{' and '.join(asked)}: each character of a script without spaces counts as a word, in the references of "
            f"{unspaced} of {len(references)} samples"
        )
    if "bleu" in names and not _have_four_words(references):
        lines.append(f"bleu: no reference has four words, {_NO_FOUR_WORDS}; such a short text scores 0, right or wrong")
    for name in asked:
        empty = sum(not any(map(split[name], given)) for given in references)
        if empty:
            lines.append(
                f"{name}: the references of {empty} of {len(references)} samples have no words, so no generated text "
                "can match them"
            )
    return lines
