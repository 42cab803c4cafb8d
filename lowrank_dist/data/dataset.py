"""A data set in memory, and a report of the samples that were dropped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lowrank_dist.data.formats import Kind, Records, Use, read_jsonl
from lowrank_dist.data.masking import Sample, mask_completions, mask_conversations
from lowrank_dist.data.tokenizer import Tokenizer
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.untrusted.json import brief

# Limits of the records tokenised together: enough to keep the tokenizer's threads busy, few enough to hold twice. The
# limit on characters is for long records: tokenising takes some 250 bytes of memory per character.
_CHUNK, _CHUNK_CHARACTERS = 1024, 1 << 20
_SHOWN_LINES = 5
_SHOWN_KEYS = 20


@dataclass(frozen=True)
class DropReport:
    """Sample counts of one file: total = kept + too_long + no_target.

    The line tuples hold the first few line numbers, counted from 1. longest: tokens of the longest sample, dropped ones
    included. ignored_keys: extra JSON key → number of lines that have it. own_bos, own_end: number of samples whose
    text spells out the BOS or the end token itself (see `Sample`). whole: False where only the first lines were read.
    kind: the format of the lines.
    """

    path: Path
    max_length: int
    total: int
    kept: int
    too_long: int
    too_long_lines: tuple[int, ...]
    no_target: int
    no_target_lines: tuple[int, ...]
    longest: int
    ignored_keys: dict[str, int]
    own_bos: int = 0
    own_end: int = 0
    whole: bool = True
    kind: Kind = "completion"

    def summary(self) -> str:
        """Return one line for the log."""
        parts = [f"{self.path}: {self.kept} of {self.total} samples kept"]
        if self.too_long:
            lines = _listed(self.too_long_lines, self.too_long)
            parts.append(f"{self.too_long} over {self.max_length} tokens dropped (longest {self.longest}; {lines})")
        if self.no_target:
            lines = _listed(self.no_target_lines, self.no_target)
            parts.append(f"{self.no_target} without target tokens dropped ({lines})")
        if self.own_bos:
            parts.append(f"{self.own_bos} have the tokenizer's BOS in their text, so no second BOS is added")
        if self.own_end:
            parts.append(f"{self.own_end} have the end of the completion in their text, so no second end is added")
        if self.ignored_keys:
            keys = [f"{brief(key)} ({n} {_lines(n)})" for key, n in self.ignored_keys.items()]
            parts.append(f"ignored keys: {some_of(keys, _SHOWN_KEYS)}")
        return "; ".join(parts)


def _listed(lines: tuple[int, ...], count: int) -> str:
    return f"{_lines(count)} {', '.join(map(str, lines))}{', ...' if count > len(lines) else ''}"


def _lines(count: int) -> str:
    return "line" if count == 1 else "lines"


class Dataset:
    """Samples in file order, kept as flat arrays; `dataset[i]` is a view.

    lengths [n] int64: tokens of each sample. targets [n] int64: target tokens of each sample. virtual_tokens: number of
    tokens that the method put before each sample. others: line of the file → further accepted completions, for
    evaluation.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        report: DropReport,
        virtual_tokens: int = 0,
        others: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.report, self._virtual_tokens, self._others = report, virtual_tokens, others
        self.lengths = np.array([len(s.tokens) for s in samples], dtype=np.int64)
        self.targets = np.array([np.count_nonzero(s.target[1:]) for s in samples], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._tokens = np.concatenate([s.tokens for s in samples]) if samples else np.empty(0, np.int32)
        self._target = np.concatenate([s.target for s in samples]) if samples else np.empty(0, np.bool_)
        self._lines = np.array([s.line for s in samples], dtype=np.int64)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the samples in order as token ids and targets, so it depends on tokenizer, template and masking.

        It covers further accepted completions too, which affect evaluation. It does not cover the virtual tokens, which
        belong to the method and not to the data.
        """
        own = np.ones(len(self._tokens), np.bool_)
        own[(self._ends - self.lengths)[:, None] + np.arange(self._virtual_tokens)] = False
        sha = hashlib.sha256()
        for array in (self.lengths - self._virtual_tokens, self._tokens[own], self._target[own]):
            sha.update(np.ascontiguousarray(array).data)
        if self._others:
            sha.update(json.dumps(list(self._others.items())).encode())
        return sha.hexdigest()

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The ids that samples end in, each once. A sample's last token is its last target, where generation stops."""
        return tuple(np.unique(self._tokens[self._ends - 1]).tolist())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        end = int(self._ends[index])
        start = end - int(self.lengths[index])
        return Sample(self._tokens[start:end], self._target[start:end], int(self._lines[index]))


def load_dataset(
    path: Path,
    tokenizer: Tokenizer,
    max_length: int,
    vocab_size: int,
    virtual_token_ids: Sequence[int] = (),
    use: Use = Use.TRAINING,
    most: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Read, tokenise and mask a JSONL file; drop samples over `max_length` tokens or without a target.

    vocab_size: the model's vocabulary without padding rows. virtual_token_ids: ids put before every kept sample; they
    are no targets and do not count towards max_length. use: purpose of the file; where a line has several completions,
    the sample is made of the first. most: number of samples after which to stop reading; None to read the whole file.
    progress: called with (samples tokenised, samples in all) after each. Raises UserError for bad lines (see
    `read_jsonl`), a template or tokenizer that can't be trained on, ids that the model does not have, and a whole file
    without a sample to keep.
    """
    records = read_jsonl(path, use, most=most)
    kept: list[Sample] = []
    too_long: list[int] = []
    no_target: list[int] = []
    total, longest, own_bos, own_end = 0, 0, 0, 0
    count = len(records.completions) + len(records.conversations)
    for sample in _samples(records, tokenizer):
        total += 1
        progress(total, count)
        own_bos += sample.own_bos
        own_end += sample.own_end
        longest = max(longest, len(sample.tokens))
        _check_ids(sample, tokenizer, vocab_size, path)
        if not sample.target.any():
            no_target.append(sample.line)
        elif len(sample.tokens) > max_length:
            too_long.append(sample.line)
        else:
            kept.append(_with_virtual_tokens(sample, virtual_token_ids))
    report = DropReport(
        path=path,
        max_length=max_length,
        total=total,
        kept=len(kept),
        too_long=len(too_long),
        too_long_lines=tuple(too_long[:_SHOWN_LINES]),
        no_target=len(no_target),
        no_target_lines=tuple(no_target[:_SHOWN_LINES]),
        longest=longest,
        ignored_keys=records.ignored_keys,
        own_bos=own_bos,
        own_end=own_end,
        whole=records.whole,
        kind=records.kind,
    )
    if not kept and records.whole:
        raise UserError(
            f"{report.summary()}. No sample is left to train on; raise data.max_length (the longest sample has "
            f"{longest} tokens), shorten the samples, or give them a completion or an assistant turn"
        )
    others = {record.line: record.others for record in records.completions if record.others}
    return Dataset(kept, report, len(virtual_token_ids), others)


def _samples(records: Records, tokenizer: Tokenizer) -> Iterator[Sample]:
    if records.kind == "completion":
        sizes = [len(record.prompt) + len(record.completion) for record in records.completions]
        for start, end in _chunks(sizes):
            yield from mask_completions(tokenizer, records.completions[start:end])
    else:
        sizes = [sum(len(turn["content"]) for turn in record.messages) for record in records.conversations]
        for start, end in _chunks(sizes):
            yield from mask_conversations(tokenizer, records.conversations[start:end], records.path)


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the records to tokenise together. sizes: characters of each record."""
    start, held = 0, 0
    for at, size in enumerate(sizes):
        if at > start and (at - start == _CHUNK or held + size > _CHUNK_CHARACTERS):
            yield start, at
            start, held = at, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)


def _with_virtual_tokens(sample: Sample, virtual_token_ids: Sequence[int]) -> Sample:
    if not virtual_token_ids:
        return sample
    tokens = np.concatenate([np.array(virtual_token_ids, dtype=sample.tokens.dtype), sample.tokens])
    return Sample(tokens, np.concatenate([np.zeros(len(virtual_token_ids), np.bool_), sample.target]), sample.line)


def _check_ids(sample: Sample, tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    if len(sample.tokens) and (worst := int(sample.tokens.max())) >= vocab_size:
        raise UserError(
            f"{path}:{sample.line}: token {tokenizer.token(worst)!r} has id {worst}, but the model's vocabulary has "
            f"{vocab_size} rows, so the tokenizer in {tokenizer.path} does not belong to this model; set "
            "data.tokenizer to the model's own"
        )
