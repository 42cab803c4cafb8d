"""The inputs of a model's linears in the run's first microbatch, whole on every rank, a row for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lowrank_dist.data.batches import Microbatch
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.collectives import all_gather_columns, gather_rows
from lowrank_dist.parallel.linear import LowRankLinear
from lowrank_dist.parallel.topology import Topology


@dataclass(frozen=True)
class Traced:
    """The inputs of linears in a microbatch. inputs: Hugging Face path → [tokens, K] fp32, in the order of execution.

    names: of each row, ascending: number of the sample in the global batch · stride + position. Position 0 of sample 0
    is not among them, since padding has the same name.
    """

    inputs: Mapping[str, Tensor]
    names: tuple[int, ...]
    stride: int


class InputTrace:
    """Keeps the input of every linear of a model while it is on, whole on every rank. Collective then.

    Of projections that share an input, the first is kept.
    """

    def __init__(self, model: CausalLM, topology: Topology) -> None:
        self.on = False
        self._inputs: dict[str, Tensor] = {}
        self._topology = topology
        for number, kind in enumerate(model.architecture.layers):
            for linear in kind.linears.values():
                module = model.get_submodule(linear.module_of(number))
                name = linear.parts[0].path.format(layer=number)
                module.register_forward_pre_hook(partial(self._keep, name=name))

    def of(self, batch: Microbatch, stride: int) -> Traced:
        """Return what was kept of a microbatch. stride: between the names of two samples' first tokens."""
        names = batch.dropout_rows.flatten()
        order = names.argsort()[int((names == 0).sum()) :]
        inputs = {name: whole.flatten(0, 1)[order].float().cpu() for name, whole in self._inputs.items()}
        return Traced(inputs, tuple(names[order].tolist()), stride)

    def _keep(self, module: LowRankLinear, arguments: tuple[Tensor, ...], *, name: str) -> None:
        if self.on and name not in self._inputs:
            self._inputs[name] = self._whole(module, arguments[0].detach())

    def _whole(self, module: LowRankLinear, local: Tensor) -> Tensor:
        """Return the input [s, b, K] of all tokens and features."""
        group = self._topology.tp_group
        if module.kind == "row":
            return all_gather_columns(local, group)
        if not module.sequence_parallel:
            return local
        whole, pending = gather_rows(local.flatten(1), group)
        pending.wait()
        return whole.unflatten(1, local.shape[1:])
