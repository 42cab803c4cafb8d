"""Comparison of the run's numbers with the reference's: differences, bounds, and the first module that differs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Bound of a relative difference in fp32, where only the order of sums differs.
FP32 = 1e-4
# In bf16 the run may differ from fp32 this many times as much as transformers in bf16 does. Correct runs of
# SmolLM2-135M (full, and LoRA with DoRA) reached 2.4 times, a planted fault is far above.
BF16_FACTOR = 4.0
# Half of the distance of two neighbours in bf16, relative: less than this cannot be asked of a number that was rounded.
_ROUNDING = 2.0**-9
# A tensor counts as at least this share of the largest one of its step: a gradient may be zero but for rounding.
_SMALLEST = 1e-3


@dataclass(frozen=True)
class Record:
    """The numbers of one training.

    inputs: path of a linear, in the order of execution → its input [tokens, K] in the first forward pass. losses,
    norms: of each step. gradients: of each step, stored name → tensor. exported: name in the exported files → tensor.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Sequence[float] = ()
    norms: Sequence[float] = ()
    gradients: Sequence[Mapping[str, Tensor]] = ()
    exported: Mapping[str, Tensor] = field(default_factory=dict)

    def quantities(self) -> dict[str, Mapping[str, Tensor]]:
        """Return name of a quantity → its tensors by name, in the order in which a difference can first appear."""
        found: dict[str, Mapping[str, Tensor]] = {"inputs of linears": self.inputs}
        for step, (loss, norm, gradients) in enumerate(zip(self.losses, self.norms, self.gradients, strict=True), 1):
            found[f"loss, step {step}"] = {"": torch.tensor(loss, dtype=torch.float64)}
            # Backward meets the last linear first.
            found[f"gradients, step {step}"] = dict(reversed(list(gradients.items())))
            found[f"gradient norm, step {step}"] = {"": torch.tensor(norm, dtype=torch.float64)}
        return {**found, "adapter as exported": self.exported}


@dataclass(frozen=True)
class Difference:
    """The difference of one tensor of one quantity, relative to the reference's largest element, and its bound."""

    quantity: str
    name: str
    found: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.found <= self.bound  # False for NaN


def compare(run: Record, reference: Record, rounded: Record | None) -> list[Difference]:
    """Return the difference of every tensor, in the order in which a fault shows.

    rounded: the reference computed in bf16, where the run is in bf16; None in fp32. In fp32 the largest element counts,
    in bf16 the Euclidean norm, since rounding makes the largest of many elements a matter of chance. Tensors that only
    one side has differ by infinity.
    """
    found, expected = run.quantities(), reference.quantities()
    plain = None if rounded is None else rounded.quantities()
    differences: list[Difference] = []
    least = _ROUNDING
    for quantity in dict.fromkeys([*expected, *found]):
        ours, theirs = found.get(quantity, {}), expected.get(quantity, {})
        errors = _differences(ours, theirs, _largest if plain is None else _length)
        bounds = dict.fromkeys(errors, FP32)
        if plain is not None:
            own = _differences(plain.get(quantity, {}), theirs, _length)
            if "" not in own:
                # A single tensor may agree by chance, and so may a number. The norm of the gradients follows them, and
                # differs at most as much as they do.
                least = max(statistics.median(own.values()), _ROUNDING) if own else _ROUNDING
            bounds = {name: BF16_FACTOR * max(own.get(name, 0.0), least) for name in errors}
        differences += [Difference(quantity, name, error, bounds[name]) for name, error in errors.items()]
    return differences


def first_difference(differences: Sequence[Difference]) -> Difference | None:
    """Return the first difference that exceeds its bound, or None."""
    return next((each for each in differences if not each.agrees), None)


def largest(differences: Sequence[Difference]) -> list[Difference]:
    """Return, for each quantity, the difference that is largest beside its bound."""
    by_quantity: dict[str, Difference] = {}
    for each in differences:
        before = by_quantity.get(each.quantity)
        # `not <=`, so that NaN counts as the largest.
        if before is None or (
            before.found == before.found and not each.found / each.bound <= before.found / before.bound
        ):
            by_quantity[each.quantity] = each
    return list(by_quantity.values())


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _differences(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], size: Callable[[Tensor], float]
) -> dict[str, float]:
    """Return name → size of the difference, relative to that of the expected tensor."""
    scales = {name: size(tensor.double()) for name, tensor in expected.items()}
    smallest = _SMALLEST * max(scales.values(), default=0.0)
    errors = {}
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            errors[name] = float("inf")
            continue
        gap = size(found[name].double() - expected[name].double())
        scale = max(scales[name], smallest)
        errors[name] = gap / scale if scale > 0 else gap
    return errors
