"""The factors of a plan: arch/placement.py's, with layers that are alike taken together so that sums are short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.arch.placement import ALL_LINEAR, FactorSpec, LoraRules, place
from lowrank_dist.arch.rows import Linear


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


@dataclass(frozen=True)
class Layer:
    """A layer of this kind. factors: those of each of the kind's linears, in their order."""

    kind: LayerKind
    factors: tuple[tuple[Factor, ...], ...]

    @property
    def linears(self) -> Iterator[tuple[Linear, tuple[Factor, ...]]]:
        """Every linear with its factors, in the order of execution."""
        return zip(self.kind.linears.values(), self.factors, strict=True)

    @property
    def adapted(self) -> bool:
        """Whether any linear has factors, or what joins behind it."""
        return any(self.factors)

    def on(self, linear: str) -> tuple[Factor, ...]:
        """The factors of the linear of this name."""
        return self.factors[list(self.kind.linears).index(linear)]

    def part(self, *, in_attention: bool) -> Layer:
        """The layer with the factors of attention alone, or of the MLP alone."""
        return replace(
            self, factors=tuple(found if x.in_attention == in_attention else () for x, found in self.linears)
        )

    def rank(self, linear: str) -> int:
        """R of the linear of this name."""
        return total_rank(self.on(linear))


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
    def lowest(self) -> int:
        """The number of the lowest adapted layer, below which nothing runs backward."""
        return next((number for number, layer in enumerate(self.layers) if layer.adapted), len(self.layers))

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, bool, int], ...]:
        """Every distinct (layer, whether its input requires a gradient) with the number of layers that are alike."""
        return tuple((*kind, count) for kind, count in Counter(zip(self.layers, self._gradient, strict=True)).items())

    @property
    def top(self) -> tuple[Layer, bool]:
        """The last layer, and whether its input requires a gradient."""
        return self.layers[-1], self._gradient[-1]

    @cached_property
    def tops(self) -> tuple[tuple[Layer, bool, tuple[tuple[Layer, bool], ...]], ...]:
        """Of every kind of layer its topmost one, whether its input requires a gradient, and likewise those above."""
        layers = tuple(zip(self.layers, self._gradient, strict=True))
        topmost = {layer.kind: number for number, layer in enumerate(self.layers)}
        return tuple((*layers[number], layers[number + 1 :]) for number in topmost.values())

    @property
    def _gradient(self) -> list[bool]:
        return [self.flows or number > self.lowest for number in range(len(self.layers))]

    @property
    def trains(self) -> bool:
        """Whether backward runs at all."""
        return self.flows or self.lowest < len(self.layers)

    @cached_property
    def elements(self) -> int:
        """|Θ|, unsharded."""
        return sum(self.by_module().values())

    def by_module(self) -> dict[str, int]:
        """Elements of Θ by the name of the module, over all layers."""
        found: Counter[str] = Counter()
        for layer, _, count in self.kinds:
            for factor in (factor for factors in layer.factors for factor in factors):
                found[factor.name] += count * factor.elements
        return dict(found)


def low_rank(arch: Architecture, rules: LoraRules) -> Placement:
    """The factors that `place` gives, by layer. Raises UserError as it does."""
    found = {
        (placement.layer, placement.linear): tuple(map(_factor, placement.factors)) for placement in place(arch, rules)
    }
    return Placement(
        tuple(
            Layer(kind, tuple(found.get((layer, linear), ()) for linear in kind.linears))
            for layer, kind in enumerate(arch.layers)
        )
    )


def on_every_linear(arch: Architecture, rank: int) -> Placement:
    """Return factors of one rank on all linears. Their scale, which alpha gives, does not matter to a plan."""
    return low_rank(arch, LoraRules(rank, rank, ALL_LINEAR))


def joined(arch: Architecture, linear: str | None) -> Placement:
    """Return a placement without factors, for what is trained otherwise.

    linear: behind which linear of a layer it joins; None where it is before the first layer.
    """
    first, *others = arch.layers
    joins = Layer(first, tuple((JOINS,) if name == linear else () for name in first.linears))
    frozen = (Layer(kind, ((),) * len(kind.linears)) for kind in others)
    return Placement((joins, *frozen), flows=linear is None)


def total_rank(factors: Sequence[Factor]) -> int:
    """R = Σ r of the factors that share an input."""
    return sum(factor.rank for factor in factors)


def gradients(layer: Layer, stream: bool) -> dict[str, bool]:
    """Whether the input of each linear requires a gradient, given whether the layer's does.

    Past an adapted linear everything does. A column-parallel linear reads the residual sum, which the output of a
    row-parallel one joins.
    """
    needs, inner = {}, stream
    for name, (linear, factors) in zip(layer.kind.linears, layer.linears, strict=True):
        needs[name] = stream if linear.kind == "column" else inner
        inner = inner or bool(factors)
        if linear.kind == "row":
            stream = inner
    return needs


def _factor(spec: FactorSpec) -> Factor:
    parts = tuple(part for part, _ in spec.parts)
    return Factor(spec.path.rpartition(".")[2], spec.rank, spec.in_features, spec.rows, parts)
