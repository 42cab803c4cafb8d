"""Which projections get factors of which rank, from the `lora` section and a Shape. Plain Python.

The rules are PEFT's, as arch/placement.py has them for the model itself; the plan reads them for itself so that neither
follows the other's mistake (tests hold the two together).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lowrank_dist.errors import UserError
from lowrank_dist.plan.shapes import LINEARS, Linear, Shape

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Factor:
    """One pair A [rank, in_features], B [rows, rank]. parts: which projections of its linear B's rows belong to."""

    name: str
    rank: int
    in_features: int
    rows: int
    parts: tuple[int, ...]

    @property
    def elements(self) -> int:
        return self.rank * (self.in_features + self.rows)


# The factors of a layer's four linears, in the order of LINEARS.
Layer = tuple[tuple[Factor, ...], ...]
# Where what another method trains joins a layer, behind the linear that has it: of no rank, and in no message.
JOINS = Factor("", 0, 0, 0, ())


@dataclass(frozen=True)
class Placement:
    """The factors of every layer. flows: every layer's input requires a gradient, as where the embeddings are trained.

    Other methods than low-rank updates are planned with `joined`, a placement without factors.
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

    @cached_property
    def factors(self) -> int:
        """Adapted linears over all layers (each has one A and one B parameter)."""
        return sum(count * sum(map(bool, layer)) for layer, _, count in self.kinds)


def joined(shape: Shape, method: str) -> Placement:
    """How the gradient of another method than low-rank updates flows through the frozen base.

    Full fine-tuning and a prompt train what comes before the first layer; a prefix joins in its attention, the adapters
    behind the projection that they follow.
    """
    frozen: Layer = ((), (), (), ())
    if method in ("full", "prompt"):
        return Placement((frozen,) * shape.layers, flows=True)
    index = {"prefix": 0, "adapter_h": 1, "adapter_l": 3}[method]
    first = tuple((JOINS,) if number == index else () for number in range(4))
    return Placement((first, *(frozen,) * (shape.layers - 1)))


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


def place(
    shape: Shape,
    *,
    rank: int,
    targets: str | Sequence[str],
    rank_pattern: Mapping[str, int] | None = None,
) -> Placement:
    """All factors. Raises UserError for a target or a pattern that matches nothing, and for one that covers another."""
    rules = _Rules(shape, rank, targets, rank_pattern or {})
    layers = []
    for number in range(shape.layers):
        layer = []
        for name in LINEARS:
            linear = shape.linears[name]
            factors = tuple(rules.factor(*c, linear) for c in _candidates(linear, number) if rules.targeted(c[0], c[1]))
            parts = [part for factor in factors for part in factor.parts]
            if len(parts) != len(set(parts)):
                raise UserError(
                    f"lora.targets: {' and '.join(f.name for f in factors)} name the same weights; target one of them"
                )
            layer.append(factors)
        layers.append(tuple(layer))
    rules.refuse_unused()
    return Placement(tuple(layers))


def _candidates(linear: Linear, layer: int) -> Iterator[tuple[str, bool, tuple[int, ...]]]:
    """(path as users name it, whether it is a whole module, its projections) of all that a target may name."""
    if linear.whole is not None:
        yield linear.whole.format(layer=layer), True, tuple(range(len(linear.projections)))
    for index, projection in enumerate(linear.projections):
        path = projection.path.format(layer=layer)
        if linear.whole is not None:
            path = f"{path.rpartition('.')[0]}.{projection.name}"
        yield path, linear.whole is None, (index,)


class _Rules:
    def __init__(self, shape: Shape, rank: int, targets: str | Sequence[str], rank_pattern: Mapping[str, int]) -> None:
        self._shape, self._rank, self._rank_pattern = shape, rank, rank_pattern
        names = [targets] if isinstance(targets, str) else list(targets)
        self._targets = {
            name: None
            if name == ALL_LINEAR
            else re.compile(name)
            if isinstance(targets, str)
            else _end(re.escape(name))
            for name in names
        }
        self._ranks = {pattern: _end(pattern) for pattern in rank_pattern}
        self._used: set[str] = set()

    def targeted(self, path: str, whole: bool) -> bool:
        hits = [name for name, test in self._targets.items() if (whole if test is None else test.fullmatch(path))]
        self._used.update(hits)
        return bool(hits)

    def factor(self, path: str, whole: bool, parts: tuple[int, ...], linear: Linear) -> Factor:
        rank = self._rank
        for pattern, test in self._ranks.items():
            if test.fullmatch(path):
                self._used.add(pattern)
                rank = self._rank_pattern[pattern]
                break
        rows = sum(linear.projections[part].rows for part in parts)
        return Factor(path.rpartition(".")[2], rank, linear.in_features, rows, parts)

    def refuse_unused(self) -> None:
        unused = [f"lora.targets: {name!r}" for name in self._targets if name not in self._used]
        unused += [f"lora.rank_pattern: {name!r}" for name in self._ranks if name not in self._used]
        if unused:
            known = sorted({c[0].rpartition(".")[2] for x in self._shape.linears.values() for c in _candidates(x, 0)})
            raise UserError(
                f"{'; '.join(unused)} matches no linear of {self._shape.name}. It has {', '.join(known)} in "
                f"{self._shape.layers} layers; a list holds such names or ends of paths, a string is a regular "
                f"expression over the whole path, or {ALL_LINEAR!r}"
            )


def _end(pattern: str) -> re.Pattern[str]:
    """PEFT's rule: a regular expression for the end of the path, from a dot on."""
    return re.compile(rf"(?:.*\.)?(?:{pattern})")
