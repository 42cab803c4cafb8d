"""Gather whole factors by collectives, independently of the checkpoint code: the reference for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.methods.lora.factors import AdaptedLinear, WholeFactor, lora_theta, stored_tensors
from lowrank_dist.methods.lora.files import LowRankFactor
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology


def theta_of(adapted: Sequence[AdaptedLinear]) -> list[torch.nn.Parameter]:
    """Return Θ on this rank, in the order of its linears."""
    return [parameter for linear in adapted for parameter in linear.factors.parameters()]


def spread_factors(
    adapted: Sequence[AdaptedLinear], topology: Topology, values: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Set this rank's factors from whole ones, by module path."""
    factors = {path: LowRankFactor(a, b, 1.0) for path, (a, b) in values.items()}
    lora_theta(adapted, topology.tp_size, MaskSource(0, 0)).set_from_whole(
        stored_tensors(factors), topology.coordinates
    )


Select = Callable[[torch.nn.Parameter], Tensor]


def gather_factors(
    adapted: Sequence[AdaptedLinear], tp_group: ProcessGroup, select: Select = lambda parameter: parameter.detach()
) -> dict[str, WholeFactor]:
    """Return every factor, whole, by module path; collective over the tensor-parallel group.

    `select` maps a parameter to the tensor that is gathered: itself, its gradient, or an optimiser moment of its shape.
    Each shard is copied into zeros and the ranks are summed. The sum is exact: each element lies on one rank only.
    """
    whole = {}
    for linear in adapted:
        factors, sharded_a = linear.factors, linear.placement.layout.kind == "row"
        source_a, source_b = select(factors.lora_A), select(factors.lora_B)
        for index, spec in enumerate(linear.placement.factors):
            a, b = factors.a_of(index, source_a), factors.b_of(index, source_b)
            rows = torch.tensor(factors.shards[index].factor_rows, dtype=torch.int64, device=a.device)
            if sharded_a:
                whole_a, whole_b = a.new_zeros(spec.adapter_rank, spec.in_features), b.clone()
                whole_a.narrow(1, tp_group.rank() * a.size(1), a.size(1)).copy_(a)
            else:
                whole_a, whole_b = a.clone(), b.new_zeros(spec.rows, spec.adapter_rank)
                whole_b[rows] = b
            if tp_group.size() > 1:
                dist.all_reduce(whole_a if sharded_a else whole_b, group=tp_group)
            whole[spec.path] = WholeFactor(spec, whole_a.cpu(), whole_b.cpu())
    return whole
