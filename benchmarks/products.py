"""Each single product of the frozen and the low-rank path of one layer's linears.

Legend: T tokens, K inputs and O outputs of the weight, R = Σ r of the projections that a linear fuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dist.arch.rows import LinearLayout
from lowrank_dist.ops.low_rank import down, expand, grad_a, up_grad_b, up_grad_u
from lowrank_dist.ops.mask import Mask, quantise

RANK, DROPOUT, DTYPE, ITEMSIZE = 16, 0.1, torch.bfloat16, 2
SQUARE = 8192


@dataclass(frozen=True)
class Product:
    """One operation. make: returns a call on random operands of its own. flops and bytes are those of one call."""

    name: str
    linear: str
    variant: str
    make: Callable[[], Callable[[], object]]
    flops: int
    bytes: int

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.linear, self.variant)))


class Operands:
    """Random tensors on one device."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens, self.device = tokens, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=self.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=DTYPE, device=self.device)

    def mask(self) -> Mask:
        rows = torch.arange(self.tokens, device=self.device)
        return Mask(rows, torch.tensor([5, 3], device=self.device), 1, quantise(DROPOUT), 0)


def products(layouts: Mapping[str, LinearLayout], operands: Operands) -> Iterator[Product]:
    """Return every product of every linear, those of one kind together."""
    yield from ceilings(operands)
    for of_linear in (frozen, thin, ours):
        for name, layout in layouts.items():
            yield from of_linear(name, layout, operands)


def ceilings(operands: Operands) -> Iterator[Product]:
    """Return products that show the highest memory and tensor-core rates of this GPU."""
    side = min(SQUARE, operands.tokens)

    def copy() -> Callable[[], object]:
        source, target = operands.normal(side, side), operands.empty(side, side)
        return lambda: target.copy_(source)

    def square() -> Callable[[], object]:
        a, b, out = operands.normal(side, side), operands.normal(side, side), operands.empty(side, side)
        return lambda: torch.mm(a, b, out=out)

    yield Product("copy", "", "", copy, 0, 2 * side * side * ITEMSIZE)
    yield Product("square", "", "", square, 2 * side**3, 3 * side * side * ITEMSIZE)


def frozen(name: str, layout: LinearLayout, operands: Operands) -> Iterator[Product]:
    """Return Y = X·Wᵀ and dX = dY·W, written or added to."""
    t, (o, k) = operands.tokens, layout.local_shape(1)
    for direction, inner, outer in (("gemm", k, o), ("gemm dX", o, k)):
        for beta in (0, 1):

            def make(inner: int = inner, outer: int = outer, beta: int = beta, dx: bool = inner == o) -> Callable:
                x, weight = operands.normal(t, inner), operands.normal(o, k)
                y, right = operands.normal(t, outer), weight if dx else weight.t()
                return (lambda: y.addmm_(x, right)) if beta else (lambda: torch.mm(x, right, out=y))

            moved = t * inner + o * k + (1 + beta) * t * outer
            yield Product(direction, name, f"beta {beta}", make, 2 * t * o * k, moved * ITEMSIZE)


def thin(name: str, layout: LinearLayout, operands: Operands) -> Iterator[Product]:
    """Return the products with B: U·Bᵀ, with which the adapted linear starts on CUDA, dY·B, Uᵀ·dY."""
    t, (o, _), r = operands.tokens, layout.local_shape(1), RANK * len(layout.parts)
    blocks = (0, o, 0, r)

    def up() -> Callable[[], object]:
        u, bt, y = operands.normal(t, r), operands.normal(r, o), operands.empty(t, o)
        return lambda: torch.mm(u, bt, out=y)

    def grad_u() -> Callable[[], object]:
        dy, bt, du = operands.normal(t, o), operands.normal(r, o), operands.empty(t, r)
        return lambda: up_grad_u(du, dy, bt, blocks)

    def grad_b() -> Callable[[], object]:
        dy, u = operands.normal(t, o), operands.normal(t, r)
        return lambda: up_grad_b(dy, u, blocks)

    flops, both = 2 * t * r * o, t * o + t * r
    yield Product("up", name, "", up, flops, (both + r * o) * ITEMSIZE)
    yield Product("dU", name, "", grad_u, flops, (both + r * o) * ITEMSIZE)
    yield Product("dB", name, "", grad_b, flops, both * ITEMSIZE + 4 * r * o)


def ours(name: str, layout: LinearLayout, operands: Operands) -> Iterator[Product]:
    """Return our kernels, with the stacked A of every projection that the linear fuses."""
    t, (_, k), r = operands.tokens, layout.local_shape(1), RANK * len(layout.parts)
    flops, both = 2 * t * r * k, t * k + t * r
    for masked in (False, True):
        mask = operands.mask() if masked else None
        variant = "masked" if masked else "unmasked"

        def down_(mask: Mask | None = mask) -> Callable[[], object]:
            u, x, a = operands.empty(t, r), operands.normal(t, k), operands.normal(r, k)
            return lambda: down(u, x, a, mask)

        def expand_(mask: Mask | None = mask) -> Callable[[], object]:
            dx, du, a = operands.empty(t, k), operands.normal(t, r), operands.normal(r, k)
            return lambda: expand(dx, du, a, mask, accumulate=False)

        def grad_a_(mask: Mask | None = mask) -> Callable[[], object]:
            du, x = operands.normal(t, r), operands.normal(t, k)
            return lambda: grad_a(du, x, mask)

        counters = 8 * t if masked else 0
        yield Product("down", name, variant, down_, flops, (both + r * k) * ITEMSIZE + counters)
        yield Product("expand", name, variant, expand_, flops, (both + r * k) * ITEMSIZE + counters)
        yield Product("grad_a", name, variant, grad_a_, flops, both * ITEMSIZE + 4 * r * k + counters)
