"""Dropout: kernel and reference against an independent Philox in Python integers, and what a mask must be."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.ops import dropout as module
from lowrank_dist.ops import extension
from lowrank_dist.ops.dropout import philox_dropout, philox_dropout_ref, quantise

MASK32 = 0xFFFFFFFF
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = [pytest.param(philox_dropout, id="kernel"), pytest.param(philox_dropout_ref, id="reference")]
CALL = {"seed": 7, "step": 3, "stream": 5, "threshold": quantise(0.3)}


def philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Philox4x32 from the paper's definition, in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def keep(row: int, feature: int, *, seed: int, step: int, stream: int, threshold: int) -> bool:
    """Whether one element is kept, from the definition of the mask."""
    counter = ((feature >> 3) & MASK32, row & MASK32, row >> 32, stream & MASK32)
    words = philox(counter, (seed & MASK32, step & MASK32), rounds=7)
    j = feature & 7
    return (words[j >> 1] >> (16 * (j & 1))) & 0xFFFF >= threshold


def mask(rows: Tensor, features: int, **call: int) -> Tensor:
    return philox_dropout(torch.ones(len(rows), features), rows, **call) != 0


# Random123's known answers (kat_vectors, philox4x32, 10 rounds): counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, output: str) -> None:
    words = tuple(int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    expected = tuple(int(word, 16) for word in output.split())
    assert philox(words, (k0, k1), rounds=10) == expected
    assert philox(words, (k0, k1), rounds=7) != expected
    ours = module._philox4x32([torch.tensor(word) for word in words], k0, k1, rounds=10)
    assert tuple(int(word) for word in ours) == expected


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(0, 2**63 - 1) | st.integers(2**32 - 2, 2**32 + 2), max_size=3),
    features=st.integers(0, 300),
    feature_offset=st.integers(0, 40) | st.integers(2**34, 2**34 + 20),
    seed=st.integers(-5, 2**33),
    step=st.integers(0, 2**40),
    stream=st.integers(0, 2**32 - 1),
    threshold=st.integers(1, 65535),
)
def test_mask_is_the_definition(
    function, rows: list[int], features: int, feature_offset: int, seed: int, step: int, stream: int, threshold: int
) -> None:
    call = {"seed": seed, "step": step, "stream": stream, "threshold": threshold}
    x = torch.ones(len(rows), features, dtype=torch.float64)
    y = function(x, torch.tensor(rows, dtype=torch.int64), feature_offset=feature_offset, **call)
    expected = [[keep(row, feature_offset + k, **call) for k in range(features)] for row in rows]
    expected_TK = torch.tensor(expected, dtype=torch.float64).reshape(len(rows), features)
    assert torch.equal(y, expected_TK * (65536 / (65536 - threshold)))


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 9),
    features=st.integers(0, 700),
    feature_offset=st.integers(0, 1000),
    layout=st.sampled_from(["contiguous", "columns", "transposed", "every other", "broadcast"]),
    threshold=st.integers(1, 65535),
)
def test_kernel_equals_reference_bit_for_bit(
    dtype: torch.dtype, tokens: int, features: int, feature_offset: int, layout: str, threshold: int
) -> None:
    generator = torch.Generator().manual_seed(tokens + features)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = {
        "contiguous": lambda: draw(tokens, features),
        "columns": lambda: draw(tokens, features + 11)[:, 3 : 3 + features],
        "transposed": lambda: draw(features, tokens).t(),
        "every other": lambda: draw(2 * tokens, 2 * features)[::2, ::2],
        "broadcast": lambda: draw(1, features).expand(tokens, features),
    }[layout]()
    rows = torch.randint(0, 2**40, (2 * tokens,), generator=generator)[::2]
    call = {"seed": 1, "step": 2, "stream": 3, "threshold": threshold, "feature_offset": feature_offset}
    before = x.clone()
    y = philox_dropout(x, rows, **call)
    assert y.is_contiguous() and y.dtype == dtype and torch.equal(x, before)
    assert torch.equal(y, philox_dropout_ref(x, rows, **call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.arange(64)
    exact = philox_dropout(x.double(), rows, **CALL)
    plain = (exact != 0).to(dtype) * x * (65536 / (65536 - CALL["threshold"]))
    error = (philox_dropout(x, rows, **CALL).double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.001).all()
    assert error.max() <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_extreme_values(function) -> None:
    big = torch.tensor([[math.inf, -math.inf, math.nan, 1e38, -0.0] * 40])
    y = function(big, torch.zeros(1, dtype=torch.int64), **CALL)
    kept = mask(torch.zeros(1, dtype=torch.int64), 200, **CALL)
    # As in PyTorch's own dropout the mask is a factor: a dropped infinity becomes NaN, so that it is not hidden.
    assert torch.equal(y.isnan(), big.isnan() | big.isinf() & ~kept)
    assert torch.equal(y.isinf(), big.isinf() & kept)
    assert torch.equal(y.signbit() & ~y.isnan(), big.signbit() & ~y.isnan())


def test_shards_of_tokens_and_features_are_slices_of_the_whole() -> None:
    rows = torch.arange(24) * 5 + 3
    x = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    whole = philox_dropout(x, rows, **CALL)
    for parts in (2, 3, 4, 24):
        by_tokens = [philox_dropout(a, b, **CALL) for a, b in zip(x.chunk(parts), rows.chunk(parts), strict=True)]
        assert torch.equal(torch.cat(by_tokens), whole)
        width = 96 // parts
        columns = [x[:, i * width : (i + 1) * width] for i in range(parts)]
        by_features = [philox_dropout(c, rows, **CALL, feature_offset=i * width) for i, c in enumerate(columns)]
        assert torch.equal(torch.cat(by_features, 1), whole)
        # The control: a mask shifted by one feature, and every shard drawing the first shard's mask (a peer's bug).
        shifted = [philox_dropout(c, rows, **CALL, feature_offset=i * width + 1) for i, c in enumerate(columns)]
        assert not torch.equal(torch.cat(shifted, 1), whole)
        assert not torch.equal(torch.cat([philox_dropout(c, rows, **CALL) for c in columns], 1), whole)


def test_rows_lie_more_than_two_to_the_31_elements_apart() -> None:
    """Virtual memory only: the pages between the rows are never touched."""
    x = torch.empty(2**32 + 64, dtype=torch.bfloat16).as_strided((3, 64), (2**31, 1))
    x.copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(2)))
    rows = torch.arange(3)
    assert torch.equal(philox_dropout(x, rows, **CALL), philox_dropout_ref(x.clone(), rows, **CALL))


def test_threads_do_not_change_the_result() -> None:
    x, rows = torch.randn(700, 256), torch.arange(700)
    one = philox_dropout(x, rows, **CALL)
    torch.set_num_threads(3)
    try:
        assert torch.equal(philox_dropout(x, rows, **CALL), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_and_mean(p: float) -> None:
    threshold = quantise(p)
    rows = torch.arange(2000)
    y = philox_dropout(torch.ones(2000, 512), rows, seed=1, step=0, stream=0, threshold=threshold)
    n, q = y.numel(), threshold / 65536
    kept = int((y != 0).sum())
    assert abs(kept - n * (1 - q)) < 5 * math.sqrt(n * q * (1 - q))
    assert abs(y.double().mean().item() - 1) < 5 * math.sqrt(q / (1 - q) / n)
    # The control: this many draws tell p from a probability 5 % further on.
    assert abs(kept - n * (1 - 1.05 * q)) > 5 * math.sqrt(n * q * (1 - q))
    per_feature = (y != 0).double().mean(0)
    assert (per_feature - (1 - q)).abs().max() < 6 * math.sqrt(q * (1 - q) / 2000)


def correlation(a: Tensor, b: Tensor) -> float:
    """Correlation of two masks in standard deviations of what independent masks give."""
    pair = torch.stack((a.flatten(), b.flatten())).double()
    return abs(torch.corrcoef(pair)[0, 1].item()) * math.sqrt(a.numel())


def test_seed_step_stream_row_and_feature_give_independent_masks() -> None:
    rows = torch.arange(1000)
    base = mask(rows, 512, **CALL)
    others = {
        "seed": mask(rows, 512, **{**CALL, "seed": 8}),
        "step": mask(rows, 512, **{**CALL, "step": 4}),
        "stream": mask(rows, 512, **{**CALL, "stream": 6}),
        "row": mask(rows + 1000, 512, **CALL),
        "high half of the row": mask(rows + 2**32, 512, **CALL),
        "next row": mask(rows + 1, 512, **CALL),
        "feature": mask(rows, 512, **CALL, feature_offset=512),
        "next feature": mask(rows, 512, **CALL, feature_offset=1),
        "seed and step exchanged": mask(rows, 512, **{**CALL, "seed": 3, "step": 7}),
    }
    for name, other in others.items():
        assert correlation(base, other) < 5, name
    assert correlation(base, base) > 500
    assert torch.equal(mask(rows, 512, **{**CALL, "step": 3 + 2**32}), base)


def test_quantise() -> None:
    assert [quantise(p) for p in (0.0, 0.5, 0.1, 1e-6, 65535 / 65536)] == [0, 32768, 6554, 0, 65535]
    for p in (-0.1, 1.0, 1 - 1e-9, math.nan):
        with pytest.raises(ValueError, match="dropout probability"):
            quantise(p)


def test_threshold_zero_is_the_input_itself() -> None:
    x = torch.randn(3, 5)
    assert philox_dropout(x, torch.arange(3), seed=0, step=0, stream=0, threshold=0) is x
    y = torch.ops.lowrank_dist.dropout(x, torch.arange(3), 0, 0, 0, 0, 0)
    assert torch.equal(y, x) and y is not x


def test_a_gradient_cannot_be_lost_in_silence() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(AssertionError, match="no autograd"):
        philox_dropout(x, torch.arange(3), **CALL)
    with torch.no_grad():
        y = philox_dropout(x, torch.arange(3), **CALL)
    # The reference has one, and its gradient is the operator on dY.
    philox_dropout_ref(x, torch.arange(3), **CALL).backward(torch.ones(3, 5))
    assert torch.equal(x.grad, philox_dropout(torch.ones(3, 5), torch.arange(3), **CALL)) and not y.requires_grad


@pytest.mark.parametrize(
    ("x", "rows", "rest", "message"),
    [
        (torch.ones(5), torch.arange(5), (1, 0), r"x must be \[T, K\]"),
        (torch.ones(5, 2), torch.arange(4), (1, 0), "T = 5"),
        (torch.ones(5, 2), torch.arange(5, dtype=torch.int32), (1, 0), "rows must be int64"),
        (torch.ones(5, 2, dtype=torch.int64), torch.arange(5), (1, 0), "x must be float64, float32"),
        (torch.ones(5, 2), torch.arange(5), (65536, 0), "threshold"),
        (torch.ones(5, 2), torch.arange(5), (-1, 0), "threshold"),
        (torch.ones(5, 2), torch.arange(5), (1, -8), "feature_offset"),
    ],
)
def test_what_the_operator_refuses(x: Tensor, rows: Tensor, rest: tuple[int, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowrank_dist.dropout(x, rows, 1, 2, 3, *rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    wide = torch.randn(6, 40).to(dtype)
    for x in (wide, wide[:, 3:20], torch.randn(40, 6).to(dtype).t(), wide[:0]):
        torch.library.opcheck(torch.ops.lowrank_dist.dropout.default, (x, torch.arange(len(x)), 1, 2, 3, 6554, 5))


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """As if the library had not been built."""
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    for cached in (extension.why_not, module._compiled):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (extension.why_not, module._compiled):
        cached.cache_clear()


def test_without_the_extension_the_reference_runs_and_says_so_once(
    no_extension: None, caplog: pytest.LogCaptureFixture
) -> None:
    x, rows = torch.randn(4, 30), torch.arange(4)
    with caplog.at_level(logging.WARNING):
        first, second = philox_dropout(x, rows, **CALL), philox_dropout(x, rows, **CALL)
    assert torch.equal(first, philox_dropout_ref(x, rows, **CALL)) and torch.equal(first, second)
    (record,) = caplog.records
    assert "was not built" in record.message and "plain PyTorch" in record.message


def test_a_library_that_does_not_load_says_why(no_extension: None) -> None:
    extension.LIBRARY.write_bytes(b"not a library")
    assert not extension.extension_loaded()
    assert "does not load in torch" in extension.why_not()


def test_the_extension_is_built_here() -> None:
    assert extension.extension_loaded() and extension.why_not() is None
