"""The factors of a plan: arch/placement.py's, with layers that are alike taken together so that sums are short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.placement import ALL_LINEAR, FactorSpec, LoraRules, place


@dataclass(frozen=True)
class Factor:
    """One pair A [rank, in_features], B [rows, rank], whatever its layer.

    name: the last part of the module's path. parts: which projections of its linear B's rows belong to.
    """

    name: str
    rank: int
    in_features: int
    rows: int
    parts: tuple[int, ...]

    @property
    def elements(self) -> int:
        return self.rank * (self.in_features + self.rows)


# The factors of a layer's linears, in the order of `Architecture.linears`.
Layer = tuple[tuple[Factor, ...], ...]
# Where what is no factor joins a layer, behind the linear that has it: of no rank, and in no message.
JOINS = Factor("", 0, 0, 0, ())


@dataclass(frozen=True)
class Placement:
    """The factors of every layer.

    flows: every layer's input requires a gradient, as where the embeddings are trained.
    """

    layers: tuple[Layer, ...]
    flows: bool = False

    @cached_property
    def lowest(self) -> tuple[int, int]:
        """(layer, index of the linear) of the lowest adapted linear, below which nothing runs backward."""
        for index, layer in enumerate(self.layers):
            for linear, factors in enumerate(layer):
                if factors:
                    return index, linear
        return len(self.layers), 0

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, bool, int], ...]:
        """Every distinct (layer, whether its input requires a gradient) with the number of layers that are alike."""
        return tuple((*kind, count) for kind, count in Counter(zip(self.layers, self._gradient, strict=True)).items())

    @property
    def top(self) -> tuple[Layer, bool]:
        """The last layer, and whether its input requires a gradient."""
        return self.layers[-1], self._gradient[-1]

    @property
    def _gradient(self) -> list[bool]:
        return [self.flows or index > self.lowest[0] for index in range(len(self.layers))]

    @property
    def trains(self) -> bool:
        """Whether backward runs at all."""
        return self.flows or self.lowest[0] < len(self.layers)

    @cached_property
    def elements(self) -> int:
        """|Θ|, unsharded."""
        return sum(self.by_module().values())

    def by_module(self) -> dict[str, int]:
        """Elements of Θ by the name of the module, over all layers."""
        found: Counter[str] = Counter()
        for layer, _, count in self.kinds:
            for factor in (factor for factors in layer for factor in factors):
                found[factor.name] += count * factor.elements
        return dict(found)


def low_rank(arch: Architecture, rules: LoraRules) -> Placement:
    """The factors that `place` gives, by layer. Raises UserError as it does."""
    found = {
        (placement.layer, placement.linear): tuple(map(_factor, placement.factors)) for placement in place(arch, rules)
    }
    return Placement(
        tuple(tuple(found.get((layer, linear), ()) for linear in arch.linears) for layer in range(arch.layers))
    )


def on_every_linear(arch: Architecture, rank: int) -> Placement:
    """Return factors of one rank on all linears. Their scale, which alpha gives, does not matter to a plan."""
    return low_rank(arch, LoraRules(rank, rank, ALL_LINEAR))


def joined(arch: Architecture, linear: int | None) -> Placement:
    """Return a placement without factors, for what is trained otherwise.

    linear: behind which linear of a layer it joins; None where it is before the first layer.
    """
    frozen: Layer = ((), (), (), ())
    if linear is None:
        return Placement((frozen,) * arch.layers, flows=True)
    first = tuple((JOINS,) if number == linear else () for number in range(4))
    return Placement((first, *(frozen,) * (arch.layers - 1)))


def total_rank(factors: Sequence[Factor]) -> int:
    """R = Σ r of the factors that share an input."""
    return sum(factor.rank for factor in factors)


def gradients(layer: Layer, stream: bool) -> tuple[bool, bool, bool, bool]:
    """Whether the input of each of the four linears requires a gradient, given whether the layer's does.

    Past an adapted linear everything does. The MLP's input is the residual sum, which attention's output joins.
    """
    qkv, proj, fc1, _ = (bool(factors) for factors in layer)
    after_attention = stream or qkv or proj
    return stream, stream or qkv, after_attention, after_attention or fc1


def _factor(spec: FactorSpec) -> Factor:
    parts = tuple(part for part, _ in spec.parts)
    return Factor(spec.path.rpartition(".")[2], spec.rank, spec.in_features, spec.rows, parts)
