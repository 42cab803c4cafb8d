"""Checks before the times of benchmarks/overhead.py: the tensors that the sides save, and that their results agree.

Legend: N ranks, T tokens, T_j = T / N the token shard of a rank, K inputs of the rank's weight, R = Σ r.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from sides import Layer, Side
from torch import Tensor, nn

# Relative difference (Frobenius) between our result and PEFT's, which rounds in other places.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


def tensors_of(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield every tensor within reach of a context's attribute: containers, dataclasses, modules, objects of ours."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    inside: Iterable[object] = ()
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set):
        inside = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, nn.Module) or type(value).__module__.startswith("lowrank_dist."):
        inside = list(vars(value).values())
    for part in inside:
        yield from tensors_of(part, seen)


def nodes_of(outputs: Sequence[Tensor]) -> Iterator[Any]:
    waiting, seen = [output.grad_fn for output in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [below for below, _ in node.next_functions]
        yield node


def saved_bytes(
    forward: Callable[[], Sequence[Tensor]], owned: Iterable[Tensor], holders: Iterable[nn.Module] = ()
) -> int:
    """Return the bytes kept from forward to backward: distinct storages of saved tensors and of contexts' attributes.

    A view keeps its whole storage. `owned`: weights, parameters and counters, which exist anyway and do not count.
    `holders`: modules that might keep tensors for backward themselves.
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward()
    seen: set[int] = set()
    # The node of a Python function is its context, whose attributes are in its __dict__. C++ nodes have none.
    for attributes in (getattr(part, "__dict__", {}) for part in (*nodes_of(outputs), *holders)):
        for value in attributes.values():
            for tensor in tensors_of(value, seen):
                keep(tensor)
    for tensor in owned:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def owned_by(layer: Layer, side: Side) -> list[Tensor]:
    """Return the storages that exist without any microbatch: weights, factors, their buffers, the mask's counters."""
    modules = [tensor for module in side.modules for part in module.modules() for tensor in tensors_of(part, set())]
    return [*layer.weights, *side.parameters, layer.rows, *modules]


def expected_bytes(layer: Layer, r: int) -> int:
    """Return the bytes of the distinct inputs (token shards if sharded) and of U (all tokens' if column-parallel)."""
    size, total = layer.dtype.itemsize, 0
    for x, layout in zip(layer.inputs, layer.layouts, strict=True):
        tokens = layer.tokens if layout.kind == "column" else layer.tokens // layer.n
        total += x.numel() * size + tokens * r * len(layout.parts) * size
    return total


def differences(layer: Layer, ours: Side, peft: Side) -> dict[str, float]:
    """Return the largest relative difference of outputs, dX and factor gradients at dropout 0.

    Under sequence parallelism copies of one shard stand for all tokens, so the first T_j of PEFT's rows are ours. A
    gradient that is a partial sum over ranks has no counterpart.
    """

    def relative(mine: Tensor, theirs: Tensor) -> float:
        theirs = theirs.flatten(0, -2)[: mine.flatten(0, -2).size(0)].float()
        return float((mine.flatten(0, -2).float() - theirs).norm() / theirs.norm())

    for side in (ours, peft):
        side.train(False)
    pairs = zip(ours.forward(ours.inputs), layer.layouts, strict=True)
    outputs = [part for y, layout in pairs for part in layer.cut(y.detach(), layout, -1)]
    found = {"y": max(relative(a, b.detach()) for a, b in zip(outputs, peft.forward(peft.inputs), strict=True))}
    mine, theirs = ours.step(), peft.step()
    count = len(layer.inputs)
    found["dx"] = max(relative(a, b) for a, b in zip(mine[:count], theirs[:count], strict=True))
    if len(mine) > count and ours.name != "eager":
        found["factors"] = max(relative(a, b) for a, b in factor_gradients(layer, ours, mine[count:], theirs[count:]))
    for side in (ours, peft):
        side.train(True)
    return found


def factor_gradients(
    layer: Layer, ours: Side, mine: Sequence[Tensor], theirs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return (ours, PEFT's) for A and B of every projection whose gradient is whole on this rank."""
    linears = (module for module in ours.modules[0].modules() if getattr(module, "update", None) is not None)
    rest = iter(theirs)
    for number, module in enumerate(linears):
        factors = module.update
        for index in range(len(factors.shards)):
            views = (factors.a_of(index, mine[2 * number]), factors.b_of(index, mine[2 * number + 1]))
            for parameter, view in zip((factors.lora_A, factors.lora_B), views, strict=True):
                other = next(rest)
                if layer.n == 1 or not parameter.tp_partial_grad:
                    yield view, other


def require_same(layer: Layer, sides: Sequence[Side], dtype: str, copies: bool) -> dict[str, dict[str, float]]:
    """Exit unless our sides and eager agree with PEFT.

    Nothing is compared where the fake collectives do not even copy.
    """
    peft = next(side for side in sides if side.name == "peft")
    found = {}
    for side in sides:
        if side.twin == "frozen" and side.parameters and (layer.n == 1 or copies):
            found[side.name] = differences(layer, side, peft)
            if not max(found[side.name].values()) <= TOLERANCE[dtype]:
                sys.exit(f"{dtype}: {side.name} differs from PEFT by {found[side.name]}, more than {TOLERANCE[dtype]}")
    return found


def count_saved(layer: Layer, sides: Sequence[Side], r: int) -> dict[str, float]:
    """Return the saved bytes per token of every adapted side; exit unless ours are exactly the inputs and U."""
    counted = {}
    for side in sides:
        if side.parameters:
            forward = partial(side.forward, side.inputs)
            counted[side.name] = saved_bytes(forward, owned_by(layer, side), side.modules)
    if counted["ours"] != expected_bytes(layer, r):
        sys.exit(f"ours saves {counted['ours']} bytes; distinct inputs and U are {expected_bytes(layer, r)}")
    return {name: count / layer.tokens for name, count in counted.items()}
