"""Ids, masks and decoded text of drawn tokenizers, templates and rows equal transformers', or are refused by name.

A prompt and its continuation are encoded separately here, since inference feeds the prompt alone. So transformers' ids
of the whole text may differ where one of its tokens, or a word of byte-level BPE's expressions, spans the boundary, or
where the prompt's own tokens depend on the text after it. Every difference must be of that kind, and the ids of a
context must be those that inference feeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lowrank_dist.data.formats import Completion, Conversation
from lowrank_dist.data.masking import mask_completions, mask_conversations
from lowrank_dist.data.tokenizer import FastTokenizer, has_prefix, load_tokenizer
from lowrank_dist.errors import UserError
from tests.tokenizer_cases import Folder, Messages, chats, folders, texts

FILE = Path("data.jsonl")


class Pair:
    """Both readers of one folder. seen: counts of outcomes. words: expressions tell words apart."""

    def __init__(self, path: Path, seen: Counter[str], words: bool) -> None:
        tokenizer = load_tokenizer(path)
        assert isinstance(tokenizer, FastTokenizer)
        self.ours, self.seen, self.words = tokenizer, seen, words
        self.theirs: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def ids(self, text: str) -> list[int]:
        """Return transformers' ids of a text, without the special tokens around it."""
        found: list[int] = self.theirs(text, add_special_tokens=False)["input_ids"]
        return found

    def depends_on_a_boundary(self, text: str, cuts: Sequence[int]) -> bool:
        """Return whether one of the differences stated above is possible."""
        whole = self.theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans, words = whole["input_ids"], whole["offset_mapping"], whole.word_ids()
        for cut in cuts:
            left = [n for n, (start, _) in enumerate(spans) if start < cut]
            if any(spans[n][1] > cut for n in left) or [ids[n] for n in left] != self.ids(text[:cut]):
                return True
            if self.words and left and words[left[-1]] in words[left[-1] + 1 :]:
                return True
        return False

    def compare(self, kind: str, found: list[int], text: str, cuts: Sequence[int]) -> bool:
        """Compare the ids of pieces with transformers' of the whole text; count the outcome; return whether equal."""
        whole = self.ids(text)[: len(found)]
        if found != whole:
            assert self.depends_on_a_boundary(text, cuts), (kind, found, whole, text, cuts)
        self.seen[f"{kind}: {'equal' if found == whole else 'over the boundary'}"] += 1
        return found == whole


def check_texts(pair: Pair, some: Sequence[str], strange: Sequence[int]) -> None:
    ours, theirs = pair.ours, pair.theirs
    for text in some:
        ids = pair.ids(text)
        assert ours.encode([text])[0] == ours.encode_continuations([text], [""])[0] == ids
        around = theirs(text)["input_ids"]
        assert around[: len(around) - theirs.num_special_tokens_to_add() + len(ours.prefix_ids)] == [
            *ours.prefix_ids,
            *ids,
        ]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(strange) == theirs.decode(list(strange))
    assert ours.eos_id == theirs.eos_token_id


def check_row(pair: Pair, prompt: str, completion: str, lossless: bool) -> None:
    ours = pair.ours
    (sample,) = mask_completions(ours, [Completion(1, prompt, completion)])
    tokens, target = sample.tokens.tolist(), sample.target.tolist()
    fed = pair.ids(prompt)
    assert sample.own_bos == has_prefix(ours, fed if prompt else pair.ids(completion))
    context = fed if prompt and sample.own_bos else [*ours.prefix_ids, *fed]
    assert tokens[: len(context)] == context and tokens[-1] == ours.eos_id
    begins = max(len(context), 1)
    assert target == [False] * begins + [True] * (len(tokens) - begins)
    (written,) = ours.encode_continuations([completion], [prompt])
    pair.compare("rows", fed + written, prompt + completion, [len(prompt)] if prompt else [])
    if lossless:
        assert ours.decode(fed + written) == prompt + completion
    if not sample.own_end:
        start = len(ours.prefix_ids) if sample.own_bos and not prompt else 0
        assert tokens[len(context) :] == [*written[start:], ours.eos_id]


def check_chat(pair: Pair, messages: Messages) -> None:
    ours, theirs, template = pair.ours, pair.theirs, pair.ours.template
    assert template is not None
    try:
        (sample,) = mask_conversations(ours, [Conversation(1, messages)], FILE)
    except UserError as error:
        if "the tokenizers library fails on" in str(error):
            raise
        reason = next(
            r
            for r in ("never learn to end", "does not begin with the generation prompt", "differently", "refuses")
            if r in str(error)
        )
        pair.seen[f"chats: refused, {reason}"] += 1
        return
    tokens, target = sample.tokens.tolist(), sample.target.tolist()
    (chat,) = template.render([messages], [""])
    cuts = [turn.start for turn in chat.turns]
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    fed = theirs.apply_chat_template(messages[:first], add_generation_prompt=True, return_dict=False)
    if chat.text.startswith(theirs.apply_chat_template(messages[:first], add_generation_prompt=True, tokenize=False)):
        assert tokens[: len(fed)] == fed
        assert target[: len(fed)] == [False] * len(fed) and (not fed or target[len(fed)])
    equal = pair.compare("chats", tokens, chat.text, [cut for cut in cuts if cut])
    if not (equal and template.marked) or sample.own_end:
        return
    encoding = theirs(chat.text, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoding["offset_mapping"]
    if None in (encoding.char_to_token(at) for turn in chat.turns for at in (turn.start, turn.end - 1)):
        pair.seen["chats: masks that transformers can't tell"] += 1  # it marks no token, or all that follow
        return
    said = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    for place, (mine, other) in enumerate(zip(target, said["assistant_masks"], strict=False)):
        # Nothing predicts the first token; white space after the end of a turn is no target here.
        layout = not chat.text[slice(*spans[place])].strip()
        assert mine == bool(other) or place == 0 or layout, (place, tokens, target, said)
    pair.seen["chats: masks compared"] += 1


# Drawn tokenizers that `load_tokenizer` refuses by name.
REFUSALS = ("puts a space before each word", "times longer")


def check(folder: Folder, some: list[str], rows: list[tuple[str, str]], chat: Messages, seen: Counter[str]) -> None:
    with TemporaryDirectory() as path:
        folder.write(Path(path))
        try:
            pair = Pair(Path(path), seen, words=folder.kind == "bytes")
        except UserError as error:
            reasons = [reason for reason in REFUSALS if reason in str(error)]
            assert reasons, error
            seen[f"refused: {reasons[0]}"] += 1
            return
        seen["folders"] += 1
        strange = [i for text in some for i in pair.ids(text)[::-1]]
        try:
            check_texts(pair, some, strange)
            for prompt, completion in rows:
                check_row(pair, prompt, completion, folder.lossless)
            check_chat(pair, chat)
        except UserError as error:
            assert "the tokenizers library fails on" in str(error), error
            seen["refused: a panic of the library"] += 1


def compare_cases(cases: int, phases: Sequence[Phase] = (Phase.generate, Phase.shrink)) -> Counter[str]:
    """Draw and compare this many cases, the same every time; return the counts of outcomes."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=phases,
    )
    @given(folders(), st.lists(texts(), max_size=3), st.lists(st.tuples(texts(), texts(1)), max_size=3), chats())
    def each(folder: Folder, some: list[str], rows: list[tuple[str, str]], chat: Messages) -> None:
        check(folder, some, rows, chat, seen)

    each()
    print(*(f"{count:6} {kind}" for kind, count in sorted(seen.items())), sep="\n")
    return seen


@pytest.mark.parametrize("cases", [200, pytest.param(2000, marks=pytest.mark.nightly)])
def test_ids_masks_and_text_are_those_of_transformers(cases: int) -> None:
    seen = compare_cases(cases)
    assert seen["folders"] > 0.8 * cases and seen["chats: masks compared"] > 0.2 * cases
    for kind in ("rows", "chats"):
        assert seen[f"{kind}: equal"] > 0.6 * cases
        assert seen[f"{kind}: over the boundary"] < 0.25 * seen[f"{kind}: equal"]


# The beginning of a text, text after a special token, and which tokens are special.
FAULTS: dict[str, Callable[[FastTokenizer], None]] = {
    "a made-up space at every boundary": lambda ours: setattr(ours, "_middle", ours._start),
    "none behind a special token": lambda ours: setattr(ours, "_anew_ids", frozenset()),
    "unknown characters are special": lambda ours: setattr(ours, "_unknown", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_control_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FastTokenizer.__init__

    def spoilt(self: FastTokenizer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        FAULTS[fault](self)

    monkeypatch.setattr(FastTokenizer, "__init__", spoilt)
    with pytest.raises(AssertionError):
        compare_cases(2000, [Phase.generate])
