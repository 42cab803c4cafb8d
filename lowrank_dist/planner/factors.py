"""The factors of a plan: those of arch/placement.py, with identical layers grouped so that sums are short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.arch.placement import ALL_LINEAR, FactorSpec, LoraRules, place_factors
from lowrank_dist.arch.rows import Linear


@dataclass(frozen=True)
class Factor:
    """One pair A [r, in_features], B [rows, r], without its layer.

    name: the last part of the module's path. adapter_rank: r. parts: the projections of the fused linear to which the
    rows of B belong.
    """

    name: str
    adapter_rank: int
    in_features: int
    rows: int
    parts: tuple[int, ...]

    @property
    def elements(self) -> int:
        return self.adapter_rank * (self.in_features + self.rows)


@dataclass(frozen=True)
class Layer:
    """A layer with its factors. factors: those of each linear of `kind`, in the order of the linears."""

    kind: LayerKind
    factors: tuple[tuple[Factor, ...], ...]

    @property
    def linears(self) -> Iterator[tuple[Linear, tuple[Factor, ...]]]:
        """Every linear with its factors, in the order of execution."""
        return zip(self.kind.linears.values(), self.factors, strict=True)

    @property
    def adapted(self) -> bool:
        """True if any linear has factors, or other trained parameters act after it (OTHER_TRAINED_PARAMETERS)."""
        return any(self.factors)

    def on(self, linear: str) -> tuple[Factor, ...]:
        """Return the factors of the linear of this name."""
        return self.factors[list(self.kind.linears).index(linear)]

    def part(self, *, in_attention: bool) -> Layer:
        """Return the layer with only the factors of attention, or only those of the MLP."""
        return replace(
            self, factors=tuple(found if x.in_attention == in_attention else () for x, found in self.linears)
        )

    def total_rank(self, linear: str) -> int:
        """Return R of the linear of this name."""
        return total_rank(self.on(linear))


# Marks a linear after which a method has trained parameters other than factors. It has rank 0 and is in no message.
OTHER_TRAINED_PARAMETERS = Factor("", 0, 0, 0, ())


@dataclass(frozen=True)
class Placement:
    """The factors of every layer.

    all_inputs_require_grad: every layer's input requires a gradient, for example because the embeddings are trained.
    """

    layers: tuple[Layer, ...]
    all_inputs_require_grad: bool = False

    @cached_property
    def lowest(self) -> int:
        """The number of the lowest adapted layer. No layer below it runs backward, unless `all_inputs_require_grad`."""
        return next((number for number, layer in enumerate(self.layers) if layer.adapted), len(self.layers))

    @cached_property
    def kinds(self) -> tuple[tuple[Layer, bool, int], ...]:
        """Distinct pairs (layer, whether its input requires a gradient), each with its number of layers."""
        return tuple((*kind, count) for kind, count in Counter(zip(self.layers, self._gradient, strict=True)).items())

    @property
    def top(self) -> tuple[Layer, bool]:
        """The last layer, and whether its input requires a gradient."""
        return self.layers[-1], self._gradient[-1]

    @cached_property
    def topmost_of_each_kind(self) -> tuple[tuple[Layer, bool, tuple[tuple[Layer, bool], ...]], ...]:
        """For each kind of layer: the topmost one, whether its input requires a gradient, and the layers above it.

        The layers above are pairs (layer, whether its input requires a gradient).
        """
        layers = tuple(zip(self.layers, self._gradient, strict=True))
        topmost = {layer.kind: number for number, layer in enumerate(self.layers)}
        return tuple((*layers[number], layers[number + 1 :]) for number in topmost.values())

    @property
    def _gradient(self) -> list[bool]:
        return [self.all_inputs_require_grad or number > self.lowest for number in range(len(self.layers))]

    @property
    def trains(self) -> bool:
        """True where backward runs at all."""
        return self.all_inputs_require_grad or self.lowest < len(self.layers)

    @cached_property
    def elements(self) -> int:
        """|Θ|, unsharded."""
        return sum(self.by_module().values())

    def by_module(self) -> dict[str, int]:
        """Return the elements of Θ by the name of the module, over all layers."""
        found: Counter[str] = Counter()
        for layer, _, count in self.kinds:
            for factor in (factor for factors in layer.factors for factor in factors):
                found[factor.name] += count * factor.elements
        return dict(found)


def low_rank(arch: Architecture, rules: LoraRules) -> Placement:
    """Return the factors that `place_factors` computes, by layer. Raises UserError as `place_factors` does."""
    found = {
        (placement.layer, placement.linear): tuple(map(_factor, placement.factors))
        for placement in place_factors(arch, rules)
    }
    return Placement(
        tuple(
            Layer(kind, tuple(found.get((layer, linear), ()) for linear in kind.linears))
            for layer, kind in enumerate(arch.layers)
        )
    )


def on_every_linear(arch: Architecture, rank: int) -> Placement:
    """Return factors of adapter rank `rank` on all linears. Their scale, set by alpha, does not matter to a plan."""
    return low_rank(arch, LoraRules(rank, rank, ALL_LINEAR))


def placement_without_factors(arch: Architecture, linear: str | None) -> Placement:
    """Return a placement without factors, for a method that trains other parameters.

    linear: name of a linear in the first layer. The lowest of the method's parameters acts on its output; None if it
    acts before the first layer.
    """
    first, *others = arch.layers
    joins = Layer(first, tuple((OTHER_TRAINED_PARAMETERS,) if name == linear else () for name in first.linears))
    frozen = (Layer(kind, ((),) * len(kind.linears)) for kind in others)
    return Placement((joins, *frozen), all_inputs_require_grad=linear is None)


def total_rank(factors: Sequence[Factor]) -> int:
    """Return R = Σ r of the factors that share an input."""
    return sum(factor.adapter_rank for factor in factors)


def gradients(layer: Layer, input_requires_grad: bool) -> dict[str, bool]:
    """Return, for each linear, whether its input requires a gradient.

    Everything after an adapted linear requires one. A column-parallel linear reads the residual stream, to which the
    output of the row-parallel linear before it is added.
    """
    needs, inner = {}, input_requires_grad
    for name, (linear, factors) in zip(layer.kind.linears, layer.linears, strict=True):
        needs[name] = input_requires_grad if linear.kind == "column" else inner
        inner = inner or bool(factors)
        if linear.kind == "row":
            input_requires_grad = inner
    return needs


def _factor(spec: FactorSpec) -> Factor:
    parts = tuple(part for part, _ in spec.parts)
    return Factor(spec.path.rpartition(".")[2], spec.adapter_rank, spec.in_features, spec.rows, parts)
