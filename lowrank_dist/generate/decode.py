"""Generation of completions: left-padded batches over data-parallel ranks, a key/value cache, one token per step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lowrank_dist.data.tokenizer import Tokenizer
from lowrank_dist.errors import UserError, some_of
from lowrank_dist.generate.metrics import check_metrics, score
from lowrank_dist.generate.prompts import Prompt
from lowrank_dist.generate.sampling import SamplingParams, next_tokens
from lowrank_dist.generate.texts import StopTexts, written_text
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.topology import Topology


@dataclass(frozen=True)
class Generation:
    """A generated completion.

    text: without the token or text that stopped it. tokens: all ids, a stop token included. finish_reason: "stop" for a
    stop token or text, "length" for max_new_tokens or the model's last position.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


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
    params: SamplingParams,
    topology: Topology,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    in_step: bool = False,
) -> list[Generation]:
    """Return the completion of every prompt, in their order, on every rank. Collective over all ranks.

    Prompts of similar length share a batch, longest first; batches go round the data-parallel ranks in turn. The model
    is in evaluation mode and without sequence parallelism during the call. progress: called after each batch of this
    rank with its number of prompts. in_step: data-parallel ranks wait for one another after every batch instead of only
    at the end, when a rank with long completions may be far behind.

    Raises UserError, before anything runs, for a prompt that leaves no position for a completion.
    """
    check_lengths(prompts, model.architecture.max_positions - model.virtual_positions)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    batches = [order[start : start + params.batch] for start in range(0, len(order), params.batch)]
    stops, training = StopTexts(tokenizer, params.stop), model.training
    found: list[tuple[int, Generation]] = []
    mine = batches[topology.dp_rank :: topology.dp_size]
    model.eval()
    try:
        with model.without_sequence_parallelism():
            for batch in mine:
                rows = [_Row(number, prompts[number], _limit(prompts[number], model, params)) for number in batch]
                for row, finish_reason in _decode_batch(model, rows, stops, params, topology):
                    text = stops.cut(written_text(tokenizer, row.prompt.ids, row.ids, row.prompt.stop_ids))
                    found.append((row.number, Generation(text, tuple(row.ids), finish_reason)))
                progress(len(rows))
                if in_step:
                    _meet(model, topology)
            if in_step and len(mine) * topology.dp_size < len(batches):  # other ranks have one more batch
                _meet(model, topology)
    finally:
        model.train(training)
    return _shared(found, len(prompts), topology, next(model.parameters()).device)


def check_lengths(prompts: Sequence[Prompt], max_positions: int) -> None:
    """Raise UserError naming the prompts that leave no position for a completion."""
    too_long = [f"{p.where} ({len(p.ids)} tokens)" for p in prompts if len(p.ids) >= max_positions]
    if too_long:
        raise UserError(
            f"{some_of(too_long)}: longer than the model's {max_positions} positions with its completion; shorten it"
        )


def _meet(model: CausalLM, topology: Topology) -> None:
    if topology.dp_size > 1:
        dist.all_reduce(torch.zeros(1, device=next(model.parameters()).device), group=topology.dp_group)


def _limit(prompt: Prompt, model: CausalLM, params: SamplingParams) -> int:
    return min(params.max_new_tokens, model.architecture.max_positions - model.virtual_positions - len(prompt.ids))


def _decode_batch(
    model: CausalLM, rows: list[_Row], stops: StopTexts, params: SamplingParams, topology: Topology
) -> list[tuple[_Row, Literal["stop", "length"]]]:
    """Decode the rows until all have finished; return each with its reason. A finished row leaves the batch."""
    device = next(model.parameters()).device
    width = max(len(row.prompt.ids) for row in rows)
    padding = [width - len(row.prompt.ids) for row in rows]
    input_ids = torch.tensor(
        [[0] * empty + [*model.virtual_token_ids, *row.prompt.ids] for empty, row in zip(padding, rows, strict=True)],
        device=device,
    )
    # The last token of a row is never fed to the model, so it needs no column.
    needed = (empty + len(row.prompt.ids) + row.limit for empty, row in zip(padding, rows, strict=True))
    columns = len(model.virtual_token_ids) + max(needed) - 1
    cache = model.new_cache(torch.tensor(padding, device=device), columns)
    finished: list[tuple[_Row, Literal["stop", "length"]]] = []
    step = 0
    while rows:
        logits = model.decode(input_ids, cache)
        numbers = [row.number for row in rows]
        tokens = next_tokens(logits, model.architecture.vocab, params, numbers, step, topology.tp_group)
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


def _shared(
    found: list[tuple[int, Generation]], count: int, topology: Topology, device: torch.device
) -> list[Generation]:
    """Return all ranks' generations, in the order of the prompts."""
    if topology.dp_size == 1:
        parts = [[(number, asdict(generation)) for number, generation in found]]
    else:
        # The ranks of a tensor-parallel group hold the same generations, so only the first contributes.
        mine = [(number, asdict(generation)) for number, generation in found] if topology.tp_rank == 0 else []
        parts = gather_json(mine, topology.world_group, device)
    whole = {number: fields for part in parts for number, fields in part}
    assert len(whole) == count, "a prompt was assigned to no rank, or to two"
    return [
        Generation(whole[number]["text"], tuple(whole[number]["tokens"]), whole[number]["finish_reason"])
        for number in range(count)
    ]


def gather_json(value: Any, group: ProcessGroup, device: torch.device) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank of the group. device: that of the group's tensors."""
    text = json.dumps(value).encode()
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(text)], device=device), group=group)
    longest = int(sizes.max())
    mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(device)
    everyone = torch.empty(group.size() * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    return [json.loads(part.numpy().tobytes()) for part in everyone.cpu().split(longest)]


@dataclass(frozen=True)
class EvaluationParams:
    """Sampling parameters and metrics of an evaluation. Raises UserError for a metric not in `metrics.METRICS`."""

    metrics: tuple[str, ...]
    sampling: SamplingParams

    def __post_init__(self) -> None:
        check_metrics(self.metrics)


def evaluate_generation(
    model: CausalLM,
    tokenizer: Tokenizer,
    samples: Sequence[Prompt],
    params: EvaluationParams,
    topology: Topology,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """Return the metrics and how the completions ended (see `summarize`), the same on every rank. Collective.

    samples: prompts of `read_prompts` with references. No rank waits for another longer than one batch takes, so the
    timeouts of training suffice.
    """
    found = generate(model, tokenizer, samples, params.sampling, topology, progress, in_step=True)
    return summarize(found, samples, params.metrics)


def summarize(found: Sequence[Generation], samples: Sequence[Prompt], metrics: Sequence[str]) -> dict[str, float]:
    """Return the metrics by name, and how the completions ended.

    Further keys: samples, their number; met_length_limit, how many completions ended at the length limit and not at a
    stop; mean_tokens, generated tokens per sample.
    """
    return {
        **score(metrics, [generation.text for generation in found], [sample.references for sample in samples]),
        "samples": float(len(samples)),
        "met_length_limit": float(sum(generation.finish_reason == "length" for generation in found)),
        "mean_tokens": sum(len(generation.tokens) for generation in found) / len(found),
    }
