"""Prefix tuning: trained keys and values at l positions of every layer (Li & Liang 2021), sharded by heads.

Legend: l virtual positions, L layers, G key/value heads of the model and g of this rank, d head width, H hidden, w
width of the reparametrising MLP, N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import Provenance, refuse_another_base
from lowrank_dist.methods.files import Collected
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.prompt_files import (
    PREFIX,
    PromptLearning,
    read_prompt_learning,
    require_fit,
    write_prompt_learning,
)
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.coordinates import RankCoordinates
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import ALL, Index, LocalShard, TensorSlice, Theta, TrainedParameter, mark, whole_tensor
from lowrank_dist.parallel.topology import Topology

KEYS_VALUES = "prefix"
EMBEDDING, HIDDEN, HIDDEN_BIAS, OUTPUT, OUTPUT_BIAS = (
    f"prefix.{name}" for name in ("embedding", "hidden.weight", "hidden.bias", "output.weight", "output.bias")
)


class Prefix(nn.Module):
    """Keys and values [L, 2, g, l, d] of this rank's heads, in fp32.

    Without `width` they are the parameters. With it they are an MLP's output for a trained embedding of each position:
    W_o·tanh(W_h·e + b_h) + b_o. Where there are fewer key/value heads than ranks, several ranks share a head: every
    rank then has all parameters, and its gradient is that of its own head.
    """

    def __init__(
        self,
        length: int,
        width: int | None,
        *,
        hidden: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.length = length
        self._size = group.size()
        self._cut = kv_heads % self._size == 0
        self._heads, self._rank = kv_heads, group.rank()
        local_heads = kv_heads // self._size if self._cut else kv_heads
        self._whole = (layers, 2, kv_heads, head_dim)
        local = (layers, 2, local_heads, head_dim)
        alone = self._size == 1

        def parameter(*shape: int, sharded: bool) -> nn.Parameter:
            tensor = torch.zeros(shape, dtype=torch.float32, device=device)
            # A replicated parameter gets a gradient from each rank's heads; the sum over ranks is the whole gradient.
            return mark(nn.Parameter(tensor), sharded=sharded and not alone, partial=not sharded)

        self.keys_values = self.embedding = None
        if width is None:
            self.keys_values = parameter(length, *local, sharded=self._cut)
        else:
            self.embedding = parameter(length, hidden, sharded=False)
            self.hidden, self.hidden_bias = parameter(width, hidden, sharded=False), parameter(width, sharded=False)
            self.output = parameter(*local, width, sharded=self._cut)
            self.output_bias = parameter(*local, sharded=self._cut)
        self._width, self._hidden = width, hidden

    def forward(self) -> Tensor:
        found: Tensor
        if self.keys_values is not None:
            found = self.keys_values
        else:
            assert self.embedding is not None
            inner = torch.tanh(F.linear(self.embedding, self.hidden, self.hidden_bias))
            found = F.linear(inner, self.output.flatten(0, 3), self.output_bias.flatten()).unflatten(
                1, self.output_bias.shape
            )
        if not self._cut:
            # Several ranks share this head.
            own = self._rank * self._heads // self._size
            found = found[:, :, :, own : own + 1]
        return found.permute(1, 2, 3, 0, 4)

    def trained(self) -> tuple[TrainedParameter, ...]:
        """Return each parameter with the name and shape of its stored tensor."""
        stored: tuple[tuple[str, tuple[int, ...]], ...]
        if self._width is None:
            stored = ((KEYS_VALUES, (self.length, *self._whole)),)
        else:
            stored = (
                (EMBEDDING, (self.length, self._hidden)),
                (HIDDEN, (self._width, self._hidden)),
                (HIDDEN_BIAS, (self._width,)),
                (OUTPUT, (*self._whole, self._width)),
                (OUTPUT_BIAS, self._whole),
            )
        return tuple(
            TrainedParameter(parameter, {name: shape}, partial(self._shard_at, name, tuple(parameter.shape)))
            for parameter, (name, shape) in zip(self.parameters(), stored, strict=True)
        )

    def _shard_at(self, name: str, local: tuple[int, ...], coordinates: RankCoordinates) -> LocalShard:
        if not self._cut:
            return LocalShard(local, (whole_tensor(name),))
        return LocalShard(local, (TensorSlice(name, self._heads_of(name, coordinates.dense.tp), lambda part: part),))

    def _heads_of(self, name: str, tp_rank: int) -> Index:
        before = {KEYS_VALUES: 3, OUTPUT: 2, OUTPUT_BIAS: 2}.get(name)
        if before is None:
            return ALL
        count = self._heads // self._size
        return (*(slice(None),) * before, slice(tp_rank * count, (tp_rank + 1) * count))


def keys_values(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the unsharded keys and values [l, L, 2, G, d] from the stored tensors of a `Prefix`."""
    if KEYS_VALUES in tensors:
        return tensors[KEYS_VALUES]
    inner = torch.tanh(F.linear(tensors[EMBEDDING], tensors[HIDDEN], tensors[HIDDEN_BIAS]))
    output, bias = tensors[OUTPUT], tensors[OUTPUT_BIAS]
    return F.linear(inner, output.flatten(0, 3), bias.flatten()).unflatten(1, bias.shape)


# Initial standard deviation of keys and values without an MLP: about that of a layer's own, in any model.
_SPREAD = 0.02


class PrefixTuning:
    """The `Method` of prefix tuning. width: w of the MLP, None for none; the published files do not hold the MLP."""

    virtual_token_ids: tuple[int, ...] = ()
    published = PREFIX.published

    def __init__(self, length: int, width: int | None, architecture: Architecture, base: str, seed: int) -> None:
        self.virtual_positions, self._width = length, width
        self._architecture, self._base, self._seed = architecture, base, seed

    @property
    def summary(self) -> str:
        through = "" if self._width is None else f", through an MLP of width {self._width}"
        return f"prefix tuning: keys and values at {self.virtual_positions} positions of every layer{through}"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        architecture = self._architecture
        prefix = Prefix(
            self.virtual_positions,
            self._width,
            hidden=architecture.hidden,
            layers=len(architecture.layers),
            kv_heads=architecture.kv_heads,
            head_dim=architecture.head_dim,
            group=topology.tp_group,
            device=next(model.parameters()).device,
        )
        model.prefix = prefix
        theta = Theta(prefix.trained(), MaskSource(self._seed, 0))
        theta.set_from_whole(self._initial(theta.all_shapes()), topology.coordinates)
        return theta

    def _initial(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Return initial values, the same at every layout: as in PEFT, except for keys and values without an MLP."""
        generator = torch.Generator().manual_seed(self._seed)
        values = {}
        for name, shape in shapes.items():
            values[name] = torch.zeros(shape)
            if name == KEYS_VALUES:
                values[name].normal_(0, _SPREAD, generator=generator)
            elif name == EMBEDDING:
                values[name].normal_(generator=generator)
            elif name in (HIDDEN, OUTPUT):
                bound = 1 / math.sqrt(shape[-1])
                values[name].uniform_(-bound, bound, generator=generator)
        return values

    def files(self, folder: Path, provenance: Provenance, *, trained: bool) -> Collected:
        def write(tensors: Mapping[str, Tensor]) -> None:
            architecture = self._architecture
            learned = PromptLearning(
                PREFIX.kind,
                keys_values(tensors).flatten(1),
                len(architecture.layers),
                architecture.kv_heads,
                architecture.kv_heads * architecture.head_dim,
                self._base,
            )
            write_prompt_learning(folder, learned, provenance)

        return Collected(write)


def build(section: PrefixConfig, setting: Setting, architecture: Architecture) -> PrefixTuning:
    """See `method.MethodBuilder`."""
    if reason := section.reason_without_room(setting.method, setting.max_length):
        raise UserError(reason)
    return PrefixTuning(section.length, section.width, architecture, str(setting.base), setting.seed)


def attach_trained(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """See `method.MethodBuilder`."""
    refuse_another_base(folder, base)
    found, architecture = read_prompt_learning(folder), model.architecture
    require_fit(folder, found, architecture)
    length = found.embeddings.size(0)
    theta = PrefixTuning(length, None, architecture, str(folder), 0).attach(model, topology, resumed=True)
    shape = (length, len(architecture.layers), 2, architecture.kv_heads, architecture.head_dim)
    theta.set_from_whole({KEYS_VALUES: found.embeddings.view(shape)}, topology.coordinates)
