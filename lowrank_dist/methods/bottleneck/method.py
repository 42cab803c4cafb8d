"""Adapter layers: two bottlenecks per layer (Houlsby et al. 2019), or one with its own norm (Lin et al. 2020).

Under tensor parallelism a bottleneck is sharded, with collectives of its own, or replicated on every rank.

Legend: s sequence length, b microbatch, H hidden, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import Provenance, refuse_another_base
from lowrank_dist.methods.bottleneck.config import AdapterConfig, Placement, has_norm, places, reason_not_shardable
from lowrank_dist.methods.bottleneck.files import (
    PUBLISHED,
    BottleneckConfig,
    Bottlenecks,
    read_bottlenecks,
    require_fit,
    stored_shapes,
    write_bottlenecks,
)
from lowrank_dist.methods.files import Collected
from lowrank_dist.methods.method import Setting
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.collectives import enter_parallel_region, leave_parallel_region
from lowrank_dist.parallel.coordinates import RankCoordinates
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import (
    ALL,
    Index,
    LocalShard,
    TensorSlice,
    Theta,
    TrainedParameter,
    drawn_by_name,
    mark,
)
from lowrank_dist.parallel.topology import Topology

_NORM_EPS = 1e-5


class Bottleneck(nn.Module):
    """X + W_up·f(W_down·norm(X) + b_down) + b_up on [s, b, H] ([s / N, b, H] under sequence parallelism).

    placement "sharded": W_down is column- and W_up row-parallel, as in Megatron's MLP. That costs an all-gather and a
    reduce-scatter in forward and in backward (without sequence parallelism, an all-reduce in each). "replicated": every
    rank stores all of it and computes it for its tokens. Parameters are fp32 and are cast where they are used.
    """

    def __init__(
        self,
        hidden: int,
        bottleneck: int,
        activation: Callable[[Tensor], Tensor],
        *,
        norm: bool,
        placement: Literal["sharded", "replicated"],
        group: ProcessGroup,
        sequence_parallel: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._activation, self._group, self.sequence_parallel = activation, group, sequence_parallel
        self._sharded = placement == "sharded" and group.size() > 1
        rows = bottleneck // group.size() if self._sharded else bottleneck
        # Under sequence parallelism a replicated parameter's gradient covers the rank's tokens only, else all of them.
        partial = sequence_parallel and group.size() > 1

        def parameter(*shape: int, sharded: bool = False, fill: float = 0.0) -> nn.Parameter:
            tensor = torch.full(shape, fill, dtype=torch.float32, device=device)
            return mark(nn.Parameter(tensor), sharded=sharded, partial=partial and not sharded)

        self.norm_weight = parameter(hidden, fill=1.0) if norm else None
        self.norm_bias = parameter(hidden) if norm else None
        self.down = parameter(rows, hidden, sharded=self._sharded)
        self.down_bias = parameter(rows, sharded=self._sharded)
        self.up = parameter(hidden, rows, sharded=self._sharded)
        self.up_bias = parameter(hidden)

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        if self.norm_weight is not None and self.norm_bias is not None:
            weight, bias = self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype)
            inner = F.layer_norm(x, (x.size(-1),), weight, bias, _NORM_EPS)
        if self._sharded:
            inner = enter_parallel_region(inner, self._group, sequence_parallel=self.sequence_parallel)
        inner = self._activation(F.linear(inner, self.down.to(x.dtype), self.down_bias.to(x.dtype)))
        update = F.linear(inner, self.up.to(x.dtype))
        if self._sharded:
            update = leave_parallel_region(update, self._group, sequence_parallel=self.sequence_parallel)
        return x + (update + self.up_bias.to(x.dtype))


# As in the code of the papers.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"adapter_h": F.gelu, "adapter_l": F.relu}
_PLACES = {"attention": "self_attn_bda", "mlp": "mlp_bda"}


class Adapters:
    """The `Method` of adapter layers (methods/method.py)."""

    virtual_positions = 0
    virtual_token_ids: tuple[int, ...] = ()
    published = PUBLISHED

    def __init__(self, config: BottleneckConfig, placement: Placement, seed: int) -> None:
        self._config, self._placement, self._seed = config, placement, seed

    @property
    def summary(self) -> str:
        config = self._config
        which = " and ".join(places(config.method))
        return f"{config.method}: bottlenecks of {config.bottleneck} after {which} of every layer, {self._placement}"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        config = self._config
        if reason := reason_not_shardable(config.bottleneck, self._placement, topology.tp_size):
            raise UserError(reason)
        size = topology.tp_size if self._placement == "sharded" else 1
        device = next(model.parameters()).device
        built: list[tuple[int, str, Bottleneck]] = []
        for layer, module in enumerate(model.decoder.layers):
            for place in places(config.method):
                bottleneck = Bottleneck(
                    config.hidden,
                    config.bottleneck,
                    _ACTIVATIONS[config.method],
                    norm=has_norm(config.method),
                    placement=self._placement,
                    group=topology.tp_group,
                    sequence_parallel=topology.sequence_parallel,
                    device=device,
                )
                getattr(module, _PLACES[place]).bottleneck = bottleneck
                built.append((layer, place, bottleneck))
        theta = self._theta(built, size)
        theta.set_from_whole(self._initial(theta.all_shapes()), topology.coordinates)
        return theta

    def _theta(self, built: list[tuple[int, str, Bottleneck]], size: int) -> Theta:
        trained = []
        for layer, place, bottleneck in built:
            stored = stored_shapes(self._config, layer, place).items()
            for parameter, (name, shape) in zip(bottleneck.parameters(), stored, strict=True):
                shard_at = partial(_shard_at, name, shape, tuple(parameter.shape), size)
                trained.append(TrainedParameter(parameter, {name: shape}, shard_at))
        return Theta(tuple(trained), MaskSource(self._seed, 0))

    def _initial(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Return initial values: down as nn.Linear, drawn by name; up zero, so that training starts from the base."""
        values = {}
        for name, shape in shapes.items():
            values[name] = torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
            if name.endswith("down.weight"):
                values[name] = drawn_by_name(name, self._seed, *shape)
        return values

    def files(self, folder: Path, provenance: Provenance, *, trained: bool) -> Collected:
        def write(tensors: Mapping[str, Tensor]) -> None:
            write_bottlenecks(folder, Bottlenecks(self._config, tensors), provenance, trained=trained)

        return Collected(write)


def build(section: AdapterConfig, setting: Setting, architecture: Architecture) -> Adapters:
    """See `method.MethodBuilder`."""
    assert setting.method in ("adapter_h", "adapter_l")
    sizes = BottleneckConfig(
        method=setting.method,
        bottleneck=section.bottleneck,
        layers=len(architecture.layers),
        hidden=architecture.hidden,
        base=str(setting.base),
    )
    return Adapters(sizes, section.placement, setting.seed)


def attach_trained(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """See `method.MethodBuilder`."""
    refuse_another_base(folder, base)
    found = read_bottlenecks(folder)
    require_fit(folder, found.config, model.architecture)
    # Both placements compute the same function, so a width that the ranks do not divide is replicated, not refused.
    placement: Placement = "replicated" if found.config.bottleneck % topology.tp_size else "sharded"
    theta = Adapters(found.config, placement, 0).attach(model, topology, resumed=True)
    theta.set_from_whole(found.tensors, topology.coordinates)


def _shard_at(
    name: str, shape: tuple[int, ...], local: tuple[int, ...], size: int, coordinates: RankCoordinates
) -> LocalShard:
    return LocalShard(local, (TensorSlice(name, _index(name, shape, coordinates.dense.tp, size), lambda part: part),))


def _index(name: str, shape: tuple[int, ...], tp_rank: int, size: int) -> Index:
    """Return the rank's index into a stored tensor: rows of down and its bias, columns of up, all of the others."""
    if size == 1:
        return ALL
    if name.endswith(("down.weight", "down.bias")):
        count = shape[0] // size
        return (slice(tp_rank * count, (tp_rank + 1) * count),)
    if name.endswith("up.weight"):
        count = shape[1] // size
        return (slice(None), slice(tp_rank * count, (tp_rank + 1) * count))
    return ALL
