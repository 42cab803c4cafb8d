"""Short training runs of tiny models on forked ranks, as plain numbers: the inputs of the twin tests.

Everything goes through the production code (load_model, inject, ZeroOptimiser); only the data are made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist import ranks

MAX_LENGTH = 48
LENGTHS = (13, 40, 7, 22)  # uneven, so that every split into microbatches pads differently
# Name → ranks, tensor-parallel size, sequence parallelism: the layouts that every twin test compares with one rank.
LAYOUTS = {
    "tp2": (2, 2, True),
    "tp2_nosp": (2, 2, False),
    "tp4": (4, 4, True),
    "tp4_nosp": (4, 4, False),
    "tp2_dp2": (4, 2, True),
    "tp2_dp2_nosp": (4, 2, False),
}


@dataclass(frozen=True)
class Setting:
    """One way of running the same training. `micro_batch` samples at a time on each data-parallel rank."""

    folder: str
    tensor: int = 1
    sequence: bool = True
    dropout: float = 0.0
    zero_b: bool = True
    targets: tuple[str, ...] = ("all-linear",)
    micro_batch: int = 4
    pad_to: int = 0
    vocab_multiple: int = 4
    packing: bool = False
    recompute: bool = False
    zero_stage: int = 1
    steps: int = 3
    lr: float = 1e-2
    dtype: str = "fp32"
    rslora: bool = False
    fuse_factors: bool = False
    transposed: bool = False  # every linear's weight is held by tests/dist/transposed.py
    broken: str = ""


def samples() -> list[tuple[Tensor, Tensor]]:
    """Return (tokens, target mask) of the four samples; the first third of each is prompt."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for length in LENGTHS:
        tokens = torch.randint(5, 100, (length,), generator=generator)
        made.append((tokens, torch.arange(length) >= max(1, length // 3)))
    return made


def microbatches(
    setting: Setting, dp_rank: int, dp_size: int, pad_multiple: int, virtual_token_ids: Sequence[int] = ()
) -> tuple[list[Any], int]:
    """Return this data-parallel rank's microbatches of the one global batch, and the number of targets in all of it.

    virtual_token_ids: ids before every sample; broken "behind" puts them after it.
    """
    from lowrank_dist.data.batches import build_microbatch
    from lowrank_dist.data.masking import Sample

    front, back = ((), virtual_token_ids) if setting.broken == "behind" else (virtual_token_ids, ())
    everything = [
        (
            i,
            Sample(
                np.concatenate((front, tokens.numpy(), back)).astype(np.int32),
                np.pad(target.numpy(), (len(front), len(back))),
                i + 1,
            ),
        )
        for i, (tokens, target) in enumerate(samples())
    ]
    targets = sum(int(sample.target[1:].sum()) for _, sample in everything)
    rows = (
        [[everything[1], everything[2]], [everything[0], everything[3]]]
        if setting.packing
        else [[s] for s in everything]
    )
    ours = rows[dp_rank * len(rows) // dp_size : (dp_rank + 1) * len(rows) // dp_size]
    size = min(setting.micro_batch, len(ours))
    return [
        on_device(
            build_microbatch(
                ours[at : at + size],
                max_length=MAX_LENGTH,
                packing=setting.packing,
                pad_multiple=setting.pad_to or pad_multiple,
            )
        )
        for at in range(0, len(ours), size)
    ], targets


def on_device(batch: Any) -> Any:
    """Return the same microbatch with its tensors on this rank's device."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved = {name: value.to(ranks.device()) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **moved)


def build(setting: Setting) -> tuple[Any, Any, Any, Any]:
    """Return (model, adapted linears, masks, topology) of this rank."""
    from lowrank_dist.arch.placement import LoraRules, place_factors
    from lowrank_dist.methods.lora.factors import inject
    from lowrank_dist.model.load import check_model, load_model
    from lowrank_dist.ops.mask import quantise
    from lowrank_dist.parallel.masks import MaskSource
    from tests.dist.transposed import hold_transposed
    from tests.dist.whole import spread_factors

    topology = ranks.topology(setting.tensor, setting.sequence)
    model = load_model(
        Path(setting.folder),
        check_model(Path(setting.folder), topology.tp_size, MAX_LENGTH),
        topology,
        device=ranks.device(),
        dtype=setting.dtype,
        vocab_multiple=setting.vocab_multiple,
        broadcast=False,
    )
    targets = "all-linear" if setting.targets == ("all-linear",) else setting.targets
    rules = LoraRules(
        4,
        8.0,
        targets,
        setting.rslora,
        {"down_proj": 6} if setting.targets == ("all-linear",) and model.architecture.gated else {},
        {},
    )
    placements = place_factors(model.architecture, rules)
    if setting.broken == "init":
        # As if every rank drew its own shard with its own fan-in: the spread grows with N.
        placements = tuple(
            replace(p, factors=tuple(replace(f, path=f"{f.path}@{topology.tp_rank}") for f in p.factors))
            for p in placements
        )
    if setting.transposed:
        hold_transposed(model, setting.broken)
    masks = MaskSource(11, quantise(setting.dropout))
    adapted = inject(model, placements, masks, 3, topology.tp_rank, topology.tp_size, setting.fuse_factors)
    model.set_recompute(setting.recompute)
    if not setting.zero_b:
        spread_factors(adapted, topology, nonzero_factors(placements))
    return model, adapted, masks, topology


def nonzero_factors(placements: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random A and B for every factor, the same on every rank."""
    from lowrank_dist.methods.lora.factors import initial_a

    generator = torch.Generator().manual_seed(1)
    return {
        spec.path: (initial_a(spec, 3), torch.randn(spec.rows, spec.adapter_rank, generator=generator) * 0.1)
        for placement in placements
        for spec in placement.factors
    }


def forward_backward(setting: Setting) -> dict[str, Any]:
    """On one rank: return loss, every factor's whole gradient and logits of fixed tokens, without DeepSpeed."""
    from tests.dist.whole import gather_factors

    model, adapted, masks, topology = build(setting)
    pad = topology.tp_size if topology.sequence_parallel else 1
    batches, targets = microbatches(setting, topology.dp_rank, topology.dp_size, pad)
    total = torch.zeros((), device=ranks.device())
    for batch in batches:
        masks.set(0, batch.dropout_rows + (setting.broken == "mask"))
        loss = model.loss(batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments)
        (loss / targets).backward()
        total += loss.detach()
    for parameter in (p for linear in adapted for p in linear.factors.parameters()):
        dist.all_reduce(parameter.grad, group=topology.dp_group)
        if parameter.tp_partial_grad and setting.broken != "deferred":
            dist.all_reduce(parameter.grad, group=topology.tp_group)
    dist.all_reduce(total, group=topology.dp_group)
    whole = gather_factors(adapted, topology.tp_group, lambda parameter: parameter.grad)
    model.eval()
    logits = model.logits(*_fixed_tokens())
    return {"loss": total.item() / targets, "logits": logits.float().cpu().numpy(), **_numbers(whole)}


def train(setting: Setting) -> dict[str, Any]:
    """On one rank: return losses, gradient norms and whole factors of `steps` clipped AdamW steps, through ZeRO."""
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
    from tests.dist.whole import gather_factors

    model, adapted, masks, topology = build(setting)
    parameters = [p for linear in adapted for p in linear.factors.parameters()]
    # A large ε: with Adam's usual one a gradient near zero turns its rounding error into a step of full size.
    optimiser = ZeroOptimiser(
        parameters, topology, OptimiserRules(setting.zero_stage, 0.5, None, 0.01, (0.9, 0.999), 1e-3)
    )
    if setting.broken == "deferred":
        optimiser._sum_partial = lambda: None
    pad = topology.tp_size if topology.sequence_parallel else 1
    batches, targets = microbatches(setting, topology.dp_rank, topology.dp_size, pad)
    losses, norms = [], []
    for step in range(setting.steps):
        total = torch.zeros((), device=ranks.device())
        for index, batch in enumerate(batches):
            masks.set(step, batch.dropout_rows)
            total += optimiser.accumulate(
                lambda batch=batch: model.loss(
                    batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.segments
                ),
                1 / targets,
                index + 1 == len(batches),
            )
        dist.all_reduce(total, group=topology.dp_group)
        losses.append(total.item() / targets)
        norms.append(optimiser.step(setting.lr))
    return {"losses": losses, "norms": norms, **_numbers(gather_factors(adapted, topology.tp_group))}


def _fixed_tokens() -> tuple[Tensor, Tensor]:
    """Return (input_ids, position_ids) [2, 16], the same for every setting."""
    ids = torch.randint(5, 100, (2, 16), generator=torch.Generator().manual_seed(5))
    return ids.to(ranks.device()), torch.arange(16, device=ranks.device()).expand(2, 16)


def _numbers(whole: Any) -> dict[str, Any]:
    return {f"{path}.{side}": getattr(factor, side).numpy() for path, factor in whole.items() for side in ("a", "b")}


def max_relative_error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference over all entries, each relative to the largest element of the expected one."""
    assert found.keys() == expected.keys()
    gaps = []
    for key in expected:
        a, b = np.asarray(found[key], dtype=np.float64), np.asarray(expected[key], dtype=np.float64)
        assert a.shape == b.shape, key
        scale = np.abs(b).max()
        gaps.append(np.abs(a - b).max() / scale if scale > 0 else np.abs(a).max())
    return float(max(gaps))
