"""Prompts → completions: left-padded batches over data-parallel ranks, a key/value cache, one token a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from os.path import commonprefix
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lowrank_dist.data.tokenizer import Tokenizer
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.generate.metrics import check_metrics, score
from lowrank_dist.generate.prompts import Prompt
from lowrank_dist.generate.sampling import DecodingRules, next_tokens
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.topology import Topology

# A tokenizer may drop a space where a text begins, so ids are decoded behind the last few of the prompt.
_CONTEXT = 8
_CHARACTER = 4  # bytes of UTF-8's longest characters


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of `ids` as what follows the prompt: spaces as they were trained, no text of the prompt.

    A run of byte tokens is one text to a decoder, and U+FFFD for each byte where it is not UTF-8 as a whole. So it is
    decoded from its first byte in `ids`, and a character that `ids` break off is one U+FFFD, as with byte-level BPE.
    """
    context = [] if ids and tokenizer.byte_of(ids[0]) is not None else list(prompt[-_CONTEXT:])
    cut = _broken_off(tokenizer, ids)
    whole = tokenizer.decode([*context, *ids[: len(ids) - cut]])
    # Not the length of the context's text alone, which byte-level BPE may end within a character, too.
    return whole[len(commonprefix([tokenizer.decode(context), whole])) :] + ("\ufffd" if cut else "")


def _broken_off(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Return how many of the last tokens are bytes of a UTF-8 character that lacks its last ones."""
    for count, token in enumerate(reversed(ids[-_CHARACTER:]), start=1):
        byte = tokenizer.byte_of(token)
        if byte is None:
            return 0
        if not _continues(byte):
            return count if count < 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) else 0
    return 0


def _continues(byte: int) -> bool:
    """Return whether a byte is one of a UTF-8 character's after its first."""
    return 0x80 <= byte < 0xC0


class StopTexts:
    """Finds the first of some texts in a completion, at a cost for each token that does not grow with its length."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        # A token stands for at least one byte, but for the special ones, which decoding may leave out.
        self._tail = 2 * max((len(text.encode()) for text in texts), default=0) + _CONTEXT

    def found_in(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """Return whether the completion holds a stop text, given that it held none before its last token."""
        if not self._texts:
            return False
        start = max(len(ids) - self._tail, 0)
        for _ in range(_CHARACTER - 1):  # back to where a character begins
            byte = self._tokenizer.byte_of(ids[start]) if start else None
            if byte is None or not _continues(byte):
                break
            start -= 1
        tail = completion_text(self._tokenizer, [*prompt[-_CONTEXT:], *ids[:start]], ids[start:])
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """Return the completion up to the first stop text."""
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text


@dataclass(frozen=True)
class Generation:
    """A completion. text: without the token or text that stopped it. tokens: all ids, a stop token included.

    finish: "stop" for a stop token or text, "length" for max_new_tokens or the model's last position.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


@dataclass
class _Row:
    number: int
    prompt: Prompt
    limit: int
    ids: list[int] = field(default_factory=list)


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rules: DecodingRules,
    topology: Topology,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    in_step: bool = False,
) -> list[Generation]:
    """Return the completion of every prompt, in their order, on every rank. Collective over all ranks.

    Prompts of like length share a batch, the longest first; batches go round the data-parallel ranks. The model is in
    evaluation mode and without sequence parallelism for as long as this takes. progress: told of a batch that is done
    on this rank, in prompts. in_step: data-parallel ranks wait for one another after every batch, and not at the end
    alone, when one may have had all the long completions.

    Raises UserError for a prompt that leaves no position to write to, before anything runs.
    """
    check_lengths(prompts, model.architecture.max_positions - model.virtual)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    batches = [order[start : start + rules.batch] for start in range(0, len(order), rules.batch)]
    stops, training = StopTexts(tokenizer, rules.stop), model.training
    found: list[tuple[int, Generation]] = []
    mine = batches[topology.dp_rank :: topology.dp_size]
    model.eval()
    try:
        with model.without_sequence_parallelism():
            for batch in mine:
                rows = [_Row(number, prompts[number], _limit(prompts[number], model, rules)) for number in batch]
                for row, finish in _decode_batch(model, rows, stops, rules, topology):
                    text = stops.cut(completion_text(tokenizer, row.prompt.ids, _without_stop(row)))
                    found.append((row.number, Generation(text, tuple(row.ids), finish)))
                progress(len(rows))
                if in_step:
                    _meet(model, topology)
            if in_step and len(mine) * topology.dp_size < len(batches):  # the others have one more
                _meet(model, topology)
    finally:
        model.train(training)
    return _shared(found, len(prompts), topology, next(model.parameters()).device)


def check_lengths(prompts: Sequence[Prompt], max_positions: int) -> None:
    """Raise UserError naming the prompts that leave none of the positions for a token."""
    too_long = [f"{p.where} ({len(p.ids)} tokens)" for p in prompts if len(p.ids) >= max_positions]
    if too_long:
        raise UserError(
            f"{some_of(too_long)}: there are {max_positions} positions for a prompt and its completion: shorten it"
        )


def _meet(model: CausalLM, topology: Topology) -> None:
    if topology.dp_size > 1:
        dist.all_reduce(torch.zeros(1, device=next(model.parameters()).device), group=topology.dp_group)


def _limit(prompt: Prompt, model: CausalLM, rules: DecodingRules) -> int:
    return min(rules.max_new_tokens, model.architecture.max_positions - model.virtual - len(prompt.ids))


def _decode_batch(
    model: CausalLM, rows: list[_Row], stops: StopTexts, rules: DecodingRules, topology: Topology
) -> list[tuple[_Row, Literal["stop", "length"]]]:
    """Decode the rows until each has finished; a row leaves the batch when it has."""
    device = next(model.parameters()).device
    width = max(len(row.prompt.ids) for row in rows)
    padding = [width - len(row.prompt.ids) for row in rows]
    input_ids = torch.tensor(
        [[0] * empty + [*model.lead, *row.prompt.ids] for empty, row in zip(padding, rows, strict=True)], device=device
    )
    # The last token of a row is drawn from the columns before it and never fed.
    needed = (empty + len(row.prompt.ids) + row.limit for empty, row in zip(padding, rows, strict=True))
    columns = len(model.lead) + max(needed) - 1
    cache = model.new_cache(torch.tensor(padding, device=device), columns)
    finished: list[tuple[_Row, Literal["stop", "length"]]] = []
    step = 0
    while rows:
        logits = model.decode(input_ids, cache)
        numbers = [row.number for row in rows]
        tokens = next_tokens(logits, model.architecture.vocab, rules, numbers, step, topology.tp_group)
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            row.ids.append(token)
            if token in row.prompt.stop_ids or stops.found_in(row.prompt.ids, row.ids):
                finished.append((row, "stop"))
            elif len(row.ids) == row.limit:
                finished.append((row, "length"))
            else:
                going.append(place)
        if going and len(going) < len(rows):
            cache.keep(going)
        rows, input_ids = [rows[place] for place in going], tokens[going, None]
        step += 1
    return finished


def _without_stop(row: _Row) -> list[int]:
    return row.ids[:-1] if row.ids[-1] in row.prompt.stop_ids else row.ids


def _shared(
    found: list[tuple[int, Generation]], count: int, topology: Topology, device: torch.device
) -> list[Generation]:
    """Return all ranks' generations, in the order of the prompts."""
    if topology.dp_size == 1:
        parts = [[(number, asdict(generation)) for number, generation in found]]
    else:
        # The ranks of a tensor-parallel group hold the same: the first speaks for them.
        mine = [(number, asdict(generation)) for number, generation in found] if topology.tp_rank == 0 else []
        parts = gather_json(mine, topology.world_group, device)
    whole = {number: fields for part in parts for number, fields in part}
    assert len(whole) == count, "a prompt was dealt to no rank, or to two"
    return [
        Generation(whole[number]["text"], tuple(whole[number]["tokens"]), whole[number]["finish"])
        for number in range(count)
    ]


def gather_json(value: Any, group: ProcessGroup, device: torch.device) -> list[Any]:
    """Return `value` of every rank of the group, in rank order, on each. device: where the group's tensors live."""
    text = json.dumps(value).encode()
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(text)], device=device), group=group)
    longest = int(sizes.max())
    mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    everyone = torch.empty(group.size() * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return [json.loads(part.numpy().tobytes()) for part in everyone.cpu().split(longest)]


@dataclass(frozen=True)
class EvaluationRules:
    """The decoding and the metrics of an evaluation. UserError for a metric that is not in `metrics.METRICS`."""

    metrics: tuple[str, ...]
    decoding: DecodingRules

    def __post_init__(self) -> None:
        check_metrics(self.metrics)


def evaluate_generation(
    model: CausalLM,
    tokenizer: Tokenizer,
    samples: Sequence[Prompt],
    rules: EvaluationRules,
    topology: Topology,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """Return the metrics, the same on every rank, and how the completions ended; see `summary`. Collective.

    samples: of `read_prompts` with references. No rank waits for another for longer than a batch takes, so that this
    can run under the timeouts of training.
    """
    found = generate(model, tokenizer, samples, rules.decoding, topology, progress, in_step=True)
    return summary(found, samples, rules.metrics)


def summary(found: Sequence[Generation], samples: Sequence[Prompt], metrics: Sequence[str]) -> dict[str, float]:
    """Return the metrics by name, and beside them how the completions ended.

    samples: their number. met_length_limit: how many of them ended for their length and not for a stop. mean_tokens:
    generated for each.
    """
    return {
        **score(metrics, [generation.text for generation in found], [sample.references for sample in samples]),
        "samples": float(len(samples)),
        "met_length_limit": float(sum(generation.finish == "length" for generation in found)),
        "mean_tokens": sum(len(generation.tokens) for generation in found) / len(found),
    }
