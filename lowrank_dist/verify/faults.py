"""Faults that are planted in the run's side on purpose, to show that a comparison finds them.

Legend: s positions, b rows, h query heads and g key/value heads of this rank, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.errors import UserError
from lowrank_dist.model.attention import CoreAttention
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.theta import Theta, is_partial, mark


def _drop_deferred(model: CausalLM, theta: Theta) -> None:
    """Mark the partial gradients as whole ones, so that the optimiser does not sum them over the ranks."""
    partial = [parameter for parameter in theta.parameters if is_partial(parameter)]
    if model.topology.tp_size == 1 or not partial:
        raise UserError(
            "--plant deferred: no gradient is summed over tensor-parallel ranks here; give a parallel.tensor above 1 "
            "and a method with replicated parameters, such as lora"
        )
    for parameter in partial:
        mark(parameter, sharded=False, partial=False)


def _swap_queries_and_keys(model: CausalLM, theta: Theta) -> None:
    def swapped(q_sbhd: Tensor, k_sbgd: Tensor, v_sbgd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group = q_sbhd.size(2) // k_sbgd.size(2)
        queries = q_sbhd.clone()
        queries[:, :, ::group] = k_sbgd
        return queries, q_sbhd[:, :, ::group].contiguous(), v_sbgd

    _before_attention(model, swapped)


def _shift_mask(model: CausalLM, theta: Theta) -> None:
    def shifted(q_sbhd: Tensor, k_sbgd: Tensor, v_sbgd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A query that sees keys up to its position then sees the next one too.
        keys, values = (torch.cat((x[1:], x[-1:])) for x in (k_sbgd, v_sbgd))
        return q_sbhd, keys, values

    _before_attention(model, shifted)


def _skip_norm(model: CausalLM, theta: Theta) -> None:
    """Skip the first norm of width `hidden` in the lowest layer."""
    rule = next(
        rule for rule in model.architecture.layers[0].tensors if "norm" in rule.megatron and rule.shape == ("hidden",)
    )
    module = model.get_submodule(rule.megatron.format(layer=0).rpartition(".")[0])
    module.register_forward_hook(lambda norm, inputs, output: inputs[0])


def _before_attention(
    model: CausalLM, change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
) -> None:
    def changed(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*change(inputs[0], inputs[1], inputs[2]), *inputs[3:])

    for module in model.modules():
        if isinstance(module, CoreAttention):
            module.register_forward_pre_hook(changed)


def plant(name: str, model: CausalLM, theta: Theta) -> None:
    """Plant the fault of this name, after the method is attached and before the optimiser is built.

    Raises UserError for a fault that changes nothing at this layout.
    """
    planted = {"deferred": _drop_deferred, "qk": _swap_queries_and_keys, "mask": _shift_mask, "norm": _skip_norm}
    planted[name](model, theta)
