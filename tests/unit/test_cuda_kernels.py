"""The CUDA kernels, run on a CPU by tests/emulation, against float64 and against the definition of the mask.

Legend: T tokens, K features, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.ops.mask import LEVELS, Mask
from tests import emulation
from tests.emulation import EmulationError

pytestmark = pytest.mark.slow

# "write" is expand that overwrites out: out starts as NaN.
OPERATORS = ["down", "expand", "write", "grad_a"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
TOKENS = [1, 2, 63, 65, 127, 129]
# Multiples of 8, 64 and 256, and sizes next to them.
FEATURES = [264, 1, 250, 64, 7, 328, 257, 72, 512]
RANKS = [1, 2, 3, 7, 8, 12, 16, 24, 48, 64, 100, 128, 256]
THRESHOLDS = [0, 1, 66, 6554, 32768, 65535, 65536]


def place(values: Tensor, extra: int, offset: int) -> Tensor:
    """Copy the matrix into a larger NaN-filled one with `extra` more columns, `offset` elements after its beginning."""
    rows, columns = values.shape
    ld = columns + extra
    # torch aligns memory to 64 bytes, so offset alone decides the matrix's alignment.
    storage = torch.full((offset + rows * ld + 16,), float("nan"), dtype=values.dtype)
    view = storage[offset:].as_strided((rows, columns), (ld, 1))
    view.copy_(values)
    return view


def storage_of(view: Tensor) -> Tensor:
    return torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())


@dataclass
class Case:
    """One problem: its operands with their alignment, and plain PyTorch's result.

    u is placed separately: it is a range of columns of a message.
    """

    operator: str
    dtype: torch.dtype
    tokens: int
    features: int
    ranks: int
    threshold: int = 0
    feature_offset: int = 0
    stream: int = 5
    extra: int = 0
    offset: int = 0
    u_extra: int = 0
    u_offset: int = 0
    seed: int = 0
    multiprocessors: int = 4
    left: Tensor = field(init=False)
    right: Tensor = field(init=False)
    initial: Tensor = field(init=False)
    mask: Mask = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, u: bool = False) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            return place(values, self.u_extra if u else self.extra, self.u_offset if u else self.offset)

        x, a = draw(self.tokens, self.features), draw(self.ranks, self.features)
        u = draw(self.tokens, self.ranks, u=True)
        self.left, self.right = {"down": (x, a), "grad_a": (u, x)}.get(self.operator, (u, a))
        rows = torch.randint(0, 2**40, (self.tokens,), generator=generator)
        key = torch.randint(0, 2**35, (2,), generator=generator)
        self.mask = Mask(rows, key, self.stream, self.threshold, self.feature_offset)
        if self.operator == "expand":
            self.initial = draw(self.tokens, self.features)
        else:
            shape = {
                "down": (self.tokens, self.ranks),
                "write": (self.tokens, self.features),
                "grad_a": (self.ranks, self.features),
            }[self.operator]
            dtype = self.dtype if self.operator != "grad_a" or self.dtype == torch.float64 else torch.float32
            self.initial = place(torch.full(shape, float("nan"), dtype=dtype), self.extra, self.offset)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the result by the definition, in plain PyTorch and in this dtype."""
        left, right, keep = self.left.to(dtype), self.right.to(dtype), self.keep()
        if self.operator == "down":
            return left.masked_fill(~keep, 0) @ right.t()
        if self.operator == "expand":
            return self.initial.to(dtype) + (left @ right).masked_fill(~keep, 0)
        if self.operator == "write":
            return (left @ right).masked_fill(~keep, 0)
        return left.t() @ right.masked_fill(~keep, 0)

    def keep(self) -> Tensor:
        if self.threshold == 0:
            return torch.ones(self.tokens, self.features, dtype=torch.bool)
        return self.mask.keep(self.features)

    def magnitude(self) -> float:
        """Return the largest sum of absolute terms, to which the sum's rounding error is relative."""
        left, right = (matrix.double().abs().nan_to_num(0, 0) for matrix in (self.left, self.right))
        total = {"down": lambda: left @ right.t(), "grad_a": lambda: left.t() @ right}
        return total.get(self.operator, lambda: left @ right)().max().item()

    def launch(
        self, schedule: int = 0, fault: int = emulation.NO_FAULT, out: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Return out, a view of its storage, and the number of kernels launched."""
        out = place(self.initial, self.extra, self.offset) if out is None else out
        masked = self.threshold != 0
        launches = emulation.run(
            self.operator,
            out,
            self.left,
            self.right,
            rows=self.mask.rows if masked else None,
            key=self.mask.key if masked else None,
            stream=self.stream,
            threshold=self.threshold,
            feature_offset=self.feature_offset,
            multiprocessors=self.multiprocessors,
            schedule=schedule,
            fault=fault,
        )
        return out, launches

    def padding(self, view: Tensor) -> Tensor:
        """Return the bits of the storage around the matrix."""
        storage = storage_of(view).clone()
        storage[view.storage_offset() :].as_strided(view.shape, view.stride()).zero_()
        return bits(storage)

    def error_over_tolerance(self, out: Tensor) -> float:
        """Return our error over the allowed one, which is twice plain PyTorch's; NaN or above 1 fails."""
        exact = self.plain(torch.float64)
        # grad_a writes its fp32 sums unrounded, so it is compared with plain PyTorch in fp32.
        plain = self.plain(torch.float32 if self.operator == "grad_a" and self.dtype in HALVES else self.dtype)
        summed = torch.float64 if self.dtype == torch.float64 else torch.float32
        # Tolerance where PyTorch happens to be exact.
        floor = 4 * torch.finfo(summed).eps * self.magnitude()
        allowed = 2 * (plain.double() - exact).abs().max().item() + floor
        return ((out.double() - exact).abs().max() / allowed).item()

    def check(self, schedule: int = 0) -> int:
        out, launches = self.launch(schedule)
        assert self.error_over_tolerance(out) <= 1, self
        assert torch.equal(self.padding(out), self.padding(self.initial)), self
        return launches


def bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_machines_mma_is_a_matrix_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(16, 16, generator=generator).to(dtype), torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    # PTX ISA, figures of mma.m16n8k16: groups of four lanes walk down the rows of A, the columns of B, the rows of C.
    lanes = torch.arange(32)
    group, pair = lanes // 4, lanes % 4 * 2
    a_LE = torch.stack([a[group + r, pair + k + e] for k in (0, 8) for r in (0, 8) for e in (0, 1)], dim=1)
    b_LE = torch.stack([b[pair + k + e, group] for k in (0, 8) for e in (0, 1)], dim=1)
    c_LE = torch.stack([c[group + r, pair + e] for r in (0, 8) for e in (0, 1)], dim=1)
    emulation.mma(dtype, a_LE.contiguous().view(torch.int32), b_LE.contiguous().view(torch.int32), c_LE)
    product = torch.empty(16, 8)
    for i, (r, e) in enumerate((r, e) for r in (0, 8) for e in (0, 1)):
        product[group + r, pair + e] = c_LE[:, i]
    torch.testing.assert_close(product.double(), a.double() @ b.double() + c.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_machine_rounds_as_pytorch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    random = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32).view(torch.float32)
    small = torch.randn(20000, generator=generator) * 2.0 ** torch.randint(-30, 18, (20000,), generator=generator)
    # Every number of the dtype, and the midpoint to the next, which is a tie.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middle = (every.double() + every.roll(-1).double()) / 2
    values = torch.cat((random, small, every, middle.float()))
    values = values[~values.isnan()]
    assert torch.equal(emulation.rounded(dtype, values), values.to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_error_at_most_twice_pytorchs(operator: str, dtype: torch.dtype) -> None:
    step = 1 if dtype in HALVES else 3
    grid = [(tokens, ranks) for tokens in TOKENS for ranks in RANKS]
    for i, (tokens, ranks) in list(enumerate(grid))[::step]:
        # Cycles of coprime lengths: over the grid every pair of values occurs.
        Case(
            operator,
            dtype,
            tokens,
            FEATURES[i % len(FEATURES)],
            ranks,
            threshold=THRESHOLDS[i % len(THRESHOLDS)],
            feature_offset=(0, 8, 3, 0, 2**20)[i % 5],
            extra=(0, 8, 0, 5)[i % 4],
            offset=(0, 8, 0, 0, 3, 0, 0, 0, 0, 0, 1)[i % 11],
            u_extra=(0, 264, 1)[i % 3],
            u_offset=(0, 2, 0, 5, 1)[i % 5],
            seed=i,
            multiprocessors=(1, 4, 132)[i % 3],
        ).check(schedule=i)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("ranks", [8, 16, 32, 48, 64, 128, 192])
@pytest.mark.parametrize("operator", OPERATORS)
def test_main_configurations(operator: str, ranks: int, dtype: torch.dtype) -> None:
    """Aligned operands with and without a mask, few rows and many: several rounds of the pipeline, and split sums."""
    for tokens, features, multiprocessors in ((8, 1024, 132), (200, 1024, 132), (300, 1024, 1)):
        for threshold in (0, 6554):
            launches = Case(
                operator, dtype, tokens, features, ranks, threshold, extra=8, multiprocessors=multiprocessors
            ).check()
            if multiprocessors == 1 or operator == "expand":
                assert launches == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ["down", "grad_a"])
def test_split_sums(operator: str, dtype: torch.dtype) -> None:
    long, short = 3000, 40
    tokens, features = (short, long) if operator == "down" else (long, short)
    case = Case(operator, dtype, tokens, features, 20, threshold=6554, multiprocessors=132)
    size = emulation.workspace_bytes(operator, dtype, tokens, features, 20, 132)
    assert size > 0 and case.check() == 2
    first = case.launch(schedule=1)[0]
    assert torch.equal(bits(first), bits(case.launch(schedule=2)[0]))


@pytest.mark.parametrize("operator", ["expand", "grad_a"])
def test_columns_of_a_message(operator: str) -> None:
    """u at any alignment, with all other operands on the fast path."""
    for ranks in (1, 2, 7, 8, 20):
        for u_extra in (0, 1, 8):
            for u_offset in (0, 1, 2):
                Case(operator, torch.bfloat16, 40, 72, ranks, 6554, u_extra=u_extra, u_offset=u_offset).check()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_thousand_ranks(operator: str, dtype: torch.dtype) -> None:
    for threshold in (0, 6554):
        Case(operator, dtype, 40, 264, 1024, threshold).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("threshold", [0, 6554])
def test_no_tokens(operator: str, dtype: torch.dtype, threshold: int) -> None:
    case = Case(operator, dtype, 0, 72, 20, threshold)
    out, launches = case.launch()
    if operator == "grad_a":
        assert not out.any()
    else:
        assert launches == 0
    assert torch.equal(case.padding(out), case.padding(case.initial))


@settings(max_examples=300)
@given(
    operator=st.sampled_from(OPERATORS),
    dtype=st.sampled_from([*DTYPES, *HALVES]),
    tokens=st.integers(1, 140),
    features=st.integers(1, 600) | st.sampled_from([64, 72, 256, 264, 512]),
    ranks=st.integers(1, 70) | st.sampled_from([16, 48, 96, 200]),
    threshold=st.sampled_from(THRESHOLDS) | st.integers(0, LEVELS),
    feature_offset=st.sampled_from([0, 8]) | st.integers(0, 1000) | st.integers(2**35 - 600, 2**35 + 8),
    stream=st.integers(0, 2**32 - 1),
    extra=st.sampled_from([0, 8]) | st.integers(0, 20),
    offset=st.sampled_from([0, 8]) | st.integers(0, 9),
    u_extra=st.sampled_from([0, 8, 1]) | st.integers(0, 20),
    u_offset=st.sampled_from([0, 8, 1]) | st.integers(0, 9),
    seed=st.integers(0, 2**31),
    multiprocessors=st.sampled_from([1, 4, 132]),
)
def test_any_problem(**problem) -> None:
    case = Case(**problem)
    case.check(schedule=1)
    # The order in which lanes, warps and blocks run does not change a bit.
    assert torch.equal(bits(case.launch(schedule=2)[0]), bits(case.launch(schedule=3)[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("features", "feature_offset"), [(72, 0), (72, 40), (75, 0), (72, 3), (80, 2**35 - 40)])
def test_mask_is_the_definition_bit_for_bit(
    operator: str, dtype: torch.dtype, features: int, feature_offset: int
) -> None:
    tokens = 70
    rows = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7, 2**63 - 1])
    rows = torch.cat((rows, torch.randint(0, 2**62, (tokens - len(rows),), generator=torch.Generator().manual_seed(1))))
    key = torch.tensor([2**32 + 11, 2**33 + 4])
    one = torch.ones(1, 1, dtype=dtype)
    for threshold in THRESHOLDS[1:]:
        mask = Mask(rows, key, 2**31 + 9, threshold, feature_offset)
        # Products with ones and with the identity give the mask itself.
        if operator == "down":
            out = torch.full((tokens, features), float("nan"), dtype=dtype)
            left, right = one.repeat(tokens, features), torch.eye(features, dtype=dtype)
        elif operator in ("expand", "write"):
            out = torch.full((tokens, features), 0.0 if operator == "expand" else float("nan"), dtype=dtype)
            left, right = one.repeat(tokens, 1), one.repeat(1, features)
        else:
            summed = torch.float64 if dtype == torch.float64 else torch.float32
            out = torch.full((tokens, features), float("nan"), dtype=summed)
            left, right = torch.eye(tokens, dtype=dtype), one.repeat(tokens, features)
        arguments = {"stream": mask.stream, "threshold": threshold, "feature_offset": feature_offset}
        emulation.run(operator, out, left, right, rows=rows, key=key, **arguments)
        assert torch.equal(out, mask.keep(features).to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_offset", [0, 1])
def test_a_dropped_element_contributes_nothing_whatever_it_is(dtype: torch.dtype, feature_offset: int) -> None:
    problem = {"tokens": 40, "features": 72, "ranks": 8, "threshold": 32768, "feature_offset": feature_offset}
    for operator in ("down", "grad_a"):
        case = Case(operator, dtype, **problem)
        dropped = ~case.keep()
        x = case.left if operator == "down" else case.right
        x[dropped] = torch.tensor([float("nan"), float("inf")], dtype=dtype).repeat(int(dropped.sum()))[: dropped.sum()]
        case.check()
    case = Case("expand", dtype, **problem)
    dropped = ~case.keep()
    case.initial[dropped] = -0.0
    case.initial[:, 3][dropped[:, 3]] = float("nan")
    case.right[:, 5] = float("inf")
    out, _ = case.launch()
    # Dropped elements keep their bits: −0 + 0 would be +0.
    assert torch.equal(bits(out.contiguous())[dropped], bits(case.initial.contiguous())[dropped])
    assert not out[:, 5][~dropped[:, 5]].isfinite().any()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_elements_than_an_int_counts(operator: str, dtype: torch.dtype) -> None:
    """Two rows are 2³¹ elements apart; only the pages that are touched take memory."""

    def far(near: Tensor) -> Tensor:
        return torch.empty_strided(near.shape, (2**31 + 8, 1), dtype=near.dtype).copy_(near)

    case = Case(operator, dtype, 2, 40, 2, threshold=6554)
    out = far(case.initial)
    assert case.error_over_tolerance(case.launch(out=out)[0]) <= 1
    del out
    for name in ("left", "right"):
        near = getattr(case, name)
        setattr(case, name, far(near))
        assert case.error_over_tolerance(case.launch()[0]) <= 1
        setattr(case, name, near)


@pytest.mark.parametrize("fault", [emulation.NO_BARRIER, emulation.NO_WAIT, emulation.SWAPPED_FRAGMENT])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_harness_notices_what_is_broken(operator: str, fault: int) -> None:
    """The same check fails with barriers, waits or a fragment's registers deliberately broken."""
    case = Case(operator, torch.bfloat16, 70, 520, 40, threshold=6554)
    assert case.error_over_tolerance(case.launch(schedule=1)[0]) <= 1
    assert not case.error_over_tolerance(case.launch(schedule=1, fault=fault)[0]) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_harness_notices_a_missing_barrier_in_full_precision(operator: str, dtype: torch.dtype) -> None:
    case = Case(operator, dtype, 70, 520, 40)
    assert not case.error_over_tolerance(case.launch(schedule=1, fault=emulation.NO_BARRIER)[0]) <= 1


def test_the_harness_notices_an_access_outside_of_the_operands() -> None:
    case = Case("down", torch.bfloat16, 4, 64, 8)
    short = case.mask.rows[:2]
    with pytest.raises(EmulationError, match="read outside"):
        emulation.run("down", case.initial, case.left, case.right, rows=short, key=case.mask.key, threshold=1)
