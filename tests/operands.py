"""Test cases for the low-rank operators: operands in any layout, the float64 result, and the tolerance.

The tolerance (`error_over_tolerance`): in the largest and in the root mean square difference from float64 on the same
rounded inputs an operator errs at most twice as much as plain PyTorch does in that dtype. Sums are random walks, and
over few elements PyTorch's may end near float64's by chance: f ε · ‖terms‖ is added, with ε of the sums (fp32's,
whatever they are rounded to) and ‖terms‖ the Euclidean norm of the products that make one element; f = 6 up to 16
elements and 2 beyond, where it is a fraction of PyTorch's own error. float64 has no better judge than itself: 1e-13 ·
‖terms‖.

Tensors are drawn on the CPU, computed on tests.dist.ranks.device() and compared on the CPU.

Legend: T tokens, K features, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.ops.low_rank import down, down_ref, expand, expand_ref, grad_a, grad_a_ref
from lowrank_dist.ops.mask import LEVELS, Mask, counters, quantise
from tests.dist import ranks

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
TOKENS = [0, 1, 2, 63, 65, 127, 129, 2047]
RANKS = [1, 2, 3, 7, 8, 12, 16, 24, 48, 64, 100, 128, 256]
# Sizes on and off multiples of 8, 64 and 256; some larger than the CPU sums in registers.
FEATURES = [264, 1, 250, 64, 1032, 7, 257, 72, 512]
THRESHOLDS = [0, *(quantise(p) for p in (1e-3, 0.1, 0.5, 1))]
LAYOUTS = ["contiguous", "columns", "transposed", "misaligned", "every other", "broadcast"]
# Columns of a message before and after the operator's own, and elements before the first row.
MESSAGES = [(0, 0, 0), (8, 0, 0), (3, 2, 1), (0, 7, 0), (16, 8, 0), (0, 0, 1)]


def place(values: Tensor, layout: str) -> Tensor:
    """Return a copy of the matrix on the tested device with this memory layout, surrounded by NaN."""
    rows, columns = values.shape
    device = ranks.device()
    if layout == "broadcast":
        return values[:1].to(device).expand(rows, columns)
    if layout == "contiguous":
        return values.to(device, copy=True)
    view = {
        "columns": lambda: full((rows, columns + 11), values.dtype)[:, 3 : 3 + columns],
        "transposed": lambda: full((columns, rows), values.dtype).t(),
        "misaligned": lambda: full((rows * columns + 1,), values.dtype)[1:].view(rows, columns),
        "every other": lambda: full((2 * rows, 2 * columns), values.dtype)[::2, ::2],
    }[layout]()
    return view.copy_(values)


def full(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=ranks.device())


def draw(*shape: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return normally distributed numbers on the CPU, rounded to the dtype."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def on_device(mask: Mask | None) -> Mask | None:
    device = ranks.device()
    return mask and replace(mask, rows=mask.rows.to(device), key=mask.key.to(device))


def error_over_tolerance(found: Tensor, plain: Tensor, exact: Tensor, floor: float) -> float:
    """Return our error relative to the tolerance of the rule above. NaN or above 1 is wrong."""
    if exact.numel() == 0:
        return 0.0 if found.shape == exact.shape else float("inf")
    ours, theirs = found.double().cpu() - exact, plain.double().cpu() - exact
    if not ours.any():
        return 0.0
    norms = (lambda error: error.abs().max(), lambda error: error.square().mean().sqrt())
    # As a tensor, whose maximum is NaN where any element is.
    return torch.stack([norm(ours) / (2 * norm(theirs) + floor) for norm in norms]).max().item()


def fp32_tolerance(elements: int) -> float:
    """Return the tolerance in units of ‖terms‖ that the rule above adds to twice PyTorch's error."""
    return (6 if elements <= 16 else 2) * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class OperatorCase:
    """One call of an operator.

    `left` and `right` are its operands in its own order; `initial` is the first content of `out`.
    layouts: of left and of right. message: the place of `out` in a wider tensor. blocks, accumulate: the operators' own
    arguments.
    """

    operator: str
    dtype: torch.dtype
    tokens: int
    features: int
    ranks: int
    threshold: int = 0
    feature_offset: int = 0
    stream: int = 5
    blocks: tuple[int, ...] = ()
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    message: tuple[int, int, int] = (0, 0, 0)
    accumulate: bool = True
    seed: int = 0
    left: Tensor = field(init=False, compare=False, repr=False)
    right: Tensor = field(init=False, compare=False, repr=False)
    initial: Tensor = field(init=False, compare=False, repr=False)
    mask: Mask | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        wide, thin, factor = (self.tokens, self.features), (self.tokens, self.ranks), (self.ranks, self.features)
        shapes = {"down": (wide, factor, thin), "expand": (thin, factor, wide), "grad_a": (thin, wide, factor)}
        left, right, initial = (draw(*shape, generator=generator, dtype=self.dtype) for shape in shapes[self.operator])
        if self.operator != "grad_a":
            right = right * self.wanted()
        if not self.accumulate:
            initial.zero_()
        left, right = (
            values[:1].expand_as(values) if layout == "broadcast" else values
            for values, layout in zip((left, right), self.layouts, strict=True)
        )
        rows = torch.randint(0, 2**40, (self.tokens,), generator=generator)
        key = torch.randint(0, 2**35, (2,), generator=generator)
        mask = Mask(rows, key, self.stream, self.threshold, self.feature_offset) if self.threshold else None
        for name, value in (("left", left), ("right", right), ("initial", initial), ("mask", mask)):
            object.__setattr__(self, name, value)

    def wanted(self) -> Tensor:
        """Return bool [R, K], True inside the blocks."""
        if not self.blocks:
            return torch.ones(self.ranks, self.features, dtype=torch.bool)
        inside = torch.zeros(self.ranks, self.features, dtype=torch.bool)
        for i in range(0, len(self.blocks), 4):
            column, columns, rank, ranks_ = self.blocks[i : i + 4]
            inside[rank : rank + ranks_, column : column + columns] = True
        return inside

    def run(self, **changed: object) -> Tensor:
        """Return the operator's result on the device. Checks that nothing around `out` was written.

        Arguments that are given replace the case's own operands, mask and blocks.
        """
        given = {name: changed.get(name, getattr(self, name)) for name in ("left", "right", "mask", "blocks")}
        assert changed.keys() <= given.keys()
        left, right = (place(*pair) for pair in zip((given["left"], given["right"]), self.layouts, strict=True))
        mask, blocks = on_device(given["mask"]), given["blocks"]
        if self.operator == "grad_a":
            return grad_a(left, right, mask, blocks)
        before, after, first = self.message
        rows, columns = self.initial.shape
        storage = full((first + rows * (before + columns + after),), self.dtype)
        message = storage[first:].view(rows, before + columns + after)
        out = message[:, before : before + columns]
        if self.operator == "down":
            down(out, left, right, mask, blocks)
        else:
            if self.accumulate:
                out.copy_(self.initial)
            expand(out, left, right, mask, blocks, self.accumulate)
        found = out.clone()
        out.fill_(float("nan"))
        assert same_bits(storage, full((len(storage),), self.dtype)), "something around out was written"
        return found

    def plain(self, dtype: torch.dtype, device: torch.device, *, placed: bool = False) -> Tensor:
        """Return the result by definition in this precision, on this device. placed: with the layouts of `run`."""
        operands = zip((self.left, self.right), self.layouts, strict=True)
        left, right = (place(*pair) if placed else pair[0] for pair in operands)
        left, right, initial = (t.to(device, dtype) for t in (left, right, self.initial))
        mask = on_device(self.mask) if device == ranks.device() else self.mask
        if self.operator == "expand":
            return expand_ref(initial, left, right, mask)
        return {"down": down_ref, "grad_a": grad_a_ref}[self.operator](left, right, mask)

    def norm_of_terms(self) -> float:
        """Return the largest ‖terms‖ of any element."""
        left, right = self.left.double().square(), self.right.double().square()
        total = {"down": lambda: left @ right.t(), "expand": lambda: left @ right, "grad_a": lambda: left.t() @ right}
        start = self.initial.double().square() if self.operator == "expand" else 0.0
        return (total[self.operator]() + start).max().sqrt().item()

    def error_over_tolerance(self, found: Tensor) -> float:
        """Return `error_over_tolerance` of this result."""
        exact = self.plain(torch.float64, torch.device("cpu"))
        # grad_a's sums stay unrounded, so they are compared with plain PyTorch in fp32.
        dtype = torch.float32 if self.operator == "grad_a" and self.dtype in HALVES else self.dtype
        assert found.shape == exact.shape and found.dtype == dtype
        if exact.numel() == 0:
            return 0.0
        plain = self.plain(dtype, ranks.device())
        inside = self.wanted() if self.operator == "grad_a" else torch.ones_like(exact, dtype=torch.bool)
        if not inside.any():
            return 0.0
        found, plain = found.cpu(), plain.cpu()
        if dtype == torch.float64:
            return error_over_tolerance(found[inside], exact[inside], exact[inside], 1e-13 * self.norm_of_terms())
        floor = fp32_tolerance(int(inside.sum())) * self.norm_of_terms()
        return error_over_tolerance(found[inside], plain[inside], exact[inside], floor)

    def check(self) -> None:
        assert self.error_over_tolerance(self.run()) <= 1, self


def grid(operator: str, dtype: torch.dtype, step: int = 1) -> Iterator[OperatorCase]:
    """Return a case for each step-th pair (T, r). For odd step ≤ 4 every T and every r still occurs."""
    for i in range(0, len(TOKENS) * len(RANKS), step):
        # Cycles whose lengths have no common factor, so that every value meets every other.
        yield OperatorCase(
            operator,
            dtype,
            TOKENS[i % 8],
            FEATURES[i % 9],
            RANKS[i % 13],
            threshold=THRESHOLDS[i % 5],
            feature_offset=(0, 8, 3, 0, 2**35 + 5, 16, 1)[i % 7],
            layouts=(LAYOUTS[:5][i % 5], LAYOUTS[:5][i // 2 % 5]),
            message=MESSAGES[i // 3 % 6],
            accumulate=operator != "expand" or i % 11 != 3,
            seed=i,
        )


@st.composite
def block_lists(pick: st.DrawFn, features: int, ranks_: int) -> tuple[int, ...]:
    """Draw block lists: factors take consecutive ranks and disjoint runs of columns, some of them empty."""
    cuts = sorted(pick(st.lists(st.integers(0, features), min_size=2, max_size=7)))
    bounds = sorted({0, ranks_, *pick(st.lists(st.integers(0, ranks_), max_size=3))})
    blocks: list[int] = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        factor = pick(st.integers(-1, len(bounds) - 2))
        if factor >= 0:
            blocks += (start, stop - start, bounds[factor], bounds[factor + 1] - bounds[factor])
    return tuple(blocks) or (0, 0, 0, 0)


@st.composite
def operator_cases(pick: st.DrawFn, operator: str) -> OperatorCase:
    """Draw any case of up to 150 × 700 × 70; with blocks only on a CPU, where the operators support them."""
    features = pick(st.integers(1, 700) | st.sampled_from([64, 128, 256, 512]))
    ranks_ = pick(st.integers(1, 70) | st.sampled_from([16, 32, 64]))
    blocked = ranks.device().type == "cpu" and pick(st.booleans())
    return OperatorCase(
        operator,
        pick(st.sampled_from(DTYPES)),
        pick(st.integers(0, 150)),
        features,
        ranks_,
        threshold=pick(st.sampled_from(THRESHOLDS) | st.integers(0, LEVELS)),
        feature_offset=pick(st.sampled_from([0, 8]) | st.integers(0, 1000) | st.integers(2**35 - 700, 2**35 + 8)),
        stream=pick(st.integers(0, 2**32 - 1)),
        blocks=pick(block_lists(features, ranks_)) if blocked else (),
        layouts=(pick(st.sampled_from(LAYOUTS)), pick(st.sampled_from(LAYOUTS[:5]))),
        message=(pick(st.integers(0, 20)), pick(st.integers(0, 20)), pick(st.integers(0, 9))),
        accumulate=operator != "expand" or pick(st.booleans()),
        seed=pick(st.integers(0, 2**31)),
    )


def arguments(case: OperatorCase) -> dict[str, object]:
    """Return the arguments of torch.ops.lowrank_dist.<operator> for this case, by name in order, on the device.

    `out` is dense and has its initial values.
    """
    first, second = {"down": ("x", "a"), "expand": ("u", "a"), "grad_a": ("u", "x")}[case.operator]
    summed = torch.float64 if case.dtype == torch.float64 else torch.float32
    initial = case.initial.to(summed) if case.operator == "grad_a" else case.initial
    left, right = (place(*pair) for pair in zip((case.left, case.right), case.layouts, strict=True))
    accumulate = {"accumulate": case.accumulate} if case.operator == "expand" else {}
    tensors = {"out": initial.to(ranks.device(), copy=True), first: left, second: right}
    names = ("rows", "key", "stream", "threshold", "feature_offset")
    mask = dict(zip(names, counters(on_device(case.mask)), strict=True))
    return tensors | accumulate | {"blocks": list(case.blocks)} | mask
