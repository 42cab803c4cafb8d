"""The dropout mask: Philox in Python integers, properties of the mask, and that all operators draw the same.

Legend: T tokens, K features.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_dist.ops import mask as module
from lowrank_dist.ops.low_rank import down, grad_a
from lowrank_dist.ops.mask import LEVELS, Mask, quantise
from lowrank_dist.parallel.masks import MaskSource, stream_of
from tests.dist import ranks
from tests.operands import DTYPES, OperatorCase, on_device, same_bits
from tests.operator_checks import draws

MASK32 = 0xFFFFFFFF
OPERATORS = ["down", "expand", "grad_a"]


def philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Return Philox4x32 by the paper's definition, in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def kept(row: int, feature: int, seed: int, step: int, stream: int, threshold: int) -> bool:
    """Return whether one element is kept, by the definition of the mask."""
    counter = ((feature >> 3) & MASK32, row & MASK32, row >> 32, stream & MASK32)
    words = philox(counter, (seed & MASK32, step & MASK32), rounds=7)
    j = feature & 7
    return (words[j >> 1] >> (16 * (j & 1))) & 0xFFFF >= threshold


def mask_of(
    rows: Tensor, seed: int = 7, step: int = 3, stream: int = 5, threshold: int = quantise(0.3), feature_offset: int = 0
) -> Mask:
    return Mask(rows, torch.tensor([seed, step]), stream, threshold, feature_offset)


def drawn(mask: Mask, features: int) -> Tensor:
    """Return the mask that the compiled operators draw, bool [T, features]."""
    return draws("expand", torch.float32, mask, features)


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
    ours = module._philox4x32([torch.tensor(word) for word in words], torch.tensor([k0, k1]), rounds=10)
    assert tuple(int(word) for word in ours) == expected


@settings(max_examples=100)
@given(
    row=st.integers(0, 2**63 - 1),
    features=st.integers(1, 300),
    feature_offset=st.integers(0, 40) | st.integers(2**35 - 300, 2**35 + 20),
    seed=st.integers(-5, 2**33),
    step=st.integers(0, 2**40),
    stream=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from([6554, 32768]) | st.integers(1, LEVELS),
)
def test_mask_is_the_definition(
    row: int, features: int, feature_offset: int, seed: int, step: int, stream: int, threshold: int
) -> None:
    rows = [0, row, 2**32 - 1, 2**32, 2**33 + 5, 2**48 + 2**40 + 3, 2**63 - 1]
    mask = Mask(torch.tensor(rows), torch.tensor([seed, step]), stream, threshold, feature_offset)
    expected = [[kept(row, feature_offset + k, seed, step, stream, threshold) for k in range(features)] for row in rows]
    expected_TK = torch.tensor(expected)
    assert torch.equal(mask.keep(features), expected_TK)
    assert torch.equal(on_device(mask).keep(features).cpu(), expected_TK)
    for name in OPERATORS:
        assert torch.equal(draws(name, torch.float32, mask, features), expected_TK), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1, quantise(1e-3), quantise(0.1), quantise(0.5), LEVELS - 1, LEVELS])
def test_all_operators_draw_one_mask(dtype: torch.dtype, threshold: int) -> None:
    """Forward, dA and dX draw the same bits, for widths around a vector, a block and a panel."""
    generator = torch.Generator().manual_seed(threshold)
    for features, feature_offset in ((1, 0), (7, 3), (8, 0), (63, 1), (128, 8), (129, 2**34), (250, 5), (512, 0)):
        rows = torch.randint(0, 2**50, (31,), generator=generator)
        mask = mask_of(rows, threshold=threshold, feature_offset=feature_offset)
        expected = mask.keep(features)
        assert expected.any() or threshold > LEVELS - 2
        for name in OPERATORS:
            assert torch.equal(draws(name, dtype, mask, features), expected), (name, features)
        # The controls: the next feature, and the next threshold where that can show.
        if 100 < threshold < 60000 and features > 60:
            further = replace(mask, feature_offset=feature_offset + 1)
            assert not torch.equal(draws("down", dtype, further, features), expected)


def test_strided_rows_and_key() -> None:
    rows, key = torch.arange(90)[::3] * 2**31, torch.tensor([9, 0, 4, 0])[::2]
    expected = Mask(rows.clone(), key.clone(), 1, 6554, 0).keep(70)
    for name in OPERATORS:
        assert torch.equal(draws(name, torch.bfloat16, Mask(rows, key, 1, 6554, 0), 70), expected)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_zero_is_no_mask_and_the_last_drops_all(name: str, dtype: torch.dtype) -> None:
    case = OperatorCase(name, dtype, 65, 250, 12, threshold=1)
    zero = case.run(mask=replace(case.mask, threshold=0))
    assert same_bits(zero, case.run(mask=None)) and zero.any()
    nothing = case.run(mask=replace(case.mask, threshold=LEVELS)).cpu()
    assert torch.equal(nothing, case.initial if name == "expand" else torch.zeros_like(nothing))
    # Where everything is dropped the scale is 0, since 1/(1 − p) would be infinite.
    assert replace(case.mask, threshold=LEVELS).scale == 0 and mask_of(torch.arange(1), threshold=32768).scale == 2


@pytest.mark.parametrize("p", [0.1, 0.001])
def test_keep_rate_over_a_hundred_million_draws(p: float) -> None:
    """The rate is within 5 σ over all draws, and within 6 σ over each of 10000 features and of 10000 rows."""
    tokens, features, threshold = 10000, 10000, quantise(p)
    ones = torch.ones(1, 1, device=ranks.device())
    mask = on_device(mask_of(torch.arange(tokens) + 2**33, threshold=threshold))
    # Sums of ones, which fp32 counts exactly, over every row and every feature.
    per_row = torch.empty(tokens, 1, device=ranks.device())
    down(per_row, ones.expand(tokens, features), ones.expand(1, features), mask)
    per_feature = grad_a(ones.expand(tokens, 1), ones.expand(tokens, features), mask)
    q = 1 - threshold / LEVELS
    count = int(per_row.double().sum())
    assert count == int(per_feature.double().sum())
    n = tokens * features
    sigma = math.sqrt(n * q * (1 - q))
    assert abs(count - n * q) < 5 * sigma
    # The control: so many draws distinguish p from a probability that is 2 % off.
    assert abs(count - n * (1 - 1.02 * (1 - q))) > 5 * sigma
    for sums in (per_row, per_feature):
        deviation = (sums.double() - features * q) / math.sqrt(features * q * (1 - q))
        assert deviation.abs().max() < (6 if p > 0.01 else 8), "a small p is a skewed distribution"
        assert 0.95 < deviation.square().mean() < 1.05


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two masks, in standard deviations of that of independent masks."""
    pair = torch.stack((a.flatten(), b.flatten())).double()
    return abs(torch.corrcoef(pair)[0, 1].item()) * math.sqrt(a.numel())


def test_seed_step_stream_row_and_feature_give_independent_masks() -> None:
    rows = torch.arange(1000)
    base = mask_of(rows)
    mask = drawn(base, 512)
    others = {
        "seed": mask_of(rows, seed=8),
        "step": mask_of(rows, step=4),
        "stream": mask_of(rows, stream=6),
        "token shard": mask_of(rows + 1000),
        "high half of the row": mask_of(rows + 2**32),
        "next row": mask_of(rows + 1),
        "feature shard": mask_of(rows, feature_offset=512),
        "next feature": mask_of(rows, feature_offset=1),
        "next block": mask_of(rows, feature_offset=8),
        "seed and step exchanged": mask_of(rows, seed=3, step=7),
        "step and stream exchanged": mask_of(rows, step=5, stream=3),
    }
    for name, other in others.items():
        assert correlation(mask, drawn(other, 512)) < 5, name
    assert correlation(mask, mask) > 500
    assert torch.equal(drawn(mask_of(rows, step=3 + 2**32), 512), mask), "seed, step and stream count modulo 2^32"


def test_inputs_of_all_layers_have_independent_masks() -> None:
    streams = [stream_of(layer, number) for layer in range(4) for number in range(4)]
    assert streams == list(range(16))
    rows = torch.arange(400)
    masks = torch.stack([drawn(mask_of(rows, stream=stream), 512).flatten() for stream in streams]).double()
    deviations = torch.corrcoef(masks).fill_diagonal_(0) * math.sqrt(400 * 512)
    assert deviations.abs().max() < 5


@given(layer=st.integers(0, 2**22 - 1), number=st.integers(0, 2**10 - 1))
def test_a_stream_tells_its_layer_and_number(layer: int, number: int) -> None:
    """So no two share one, and the first four streams of a layer keep their numbers from when a layer had only four."""
    stream = stream_of(layer, number)
    above, below = divmod(stream, 2**24)
    assert (below // 4, 4 * above + below % 4) == (layer, number) and 0 <= stream < 2**32
    assert stream_of(layer, number % 4) == layer * 4 + number % 4


def test_the_last_stream_is_drawn_and_none_beyond_it() -> None:
    last, rows = stream_of(2**22 - 1, 2**10 - 1), torch.arange(50)
    assert last == 2**32 - 1
    assert correlation(drawn(mask_of(rows, stream=last), 512), drawn(mask_of(rows, stream=2**24 - 1), 512)) < 5
    for layer, number in ((2**22, 0), (0, 2**10), (-1, 0), (0, -1)):
        with pytest.raises(AssertionError, match="32 bits"):
            stream_of(layer, number)


def test_neighbours_within_a_mask_are_independent() -> None:
    mask = drawn(mask_of(torch.arange(2000)), 512)
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 128, 256):
        assert correlation(mask[:, :-lag], mask[:, lag:]) < 5, f"{lag} columns"
        assert correlation(mask[:-lag], mask[lag:]) < 5, f"{lag} rows"


@pytest.mark.parametrize("name", OPERATORS)
def test_shards_of_tokens_and_features_are_slices_of_the_whole(name: str) -> None:
    rows = torch.arange(24) * 5 + 3
    mask = mask_of(rows)
    whole = drawn(mask, 96)

    def shard(features: int, **changed) -> Tensor:
        return draws(name, torch.bfloat16, replace(mask, **changed), features)

    for parts in (2, 3, 4, 24):
        width = 96 // parts
        assert torch.equal(torch.cat([shard(96, rows=part) for part in rows.chunk(parts)]), whole)
        assert torch.equal(torch.cat([shard(width, feature_offset=i * width) for i in range(parts)], 1), whole)
        # The controls: shifted by one feature, and every shard with the first one's mask.
        shifted = [shard(width, feature_offset=i * width + 1) for i in range(parts)]
        assert not torch.equal(torch.cat(shifted, 1), whole)
        assert not torch.equal(torch.cat([shard(width) for _ in range(parts)], 1), whole)


def test_source_names_the_microbatch() -> None:
    """MaskSource: rows in the order of the tokens, a shard of them under sequence parallelism, key of seed and step."""
    source, rows = MaskSource(5, 6554), torch.arange(24).view(8, 3) + 2**33
    with pytest.raises(AssertionError, match="no microbatch was set"):
        source.mask(0, 0, None)
    source.set(11, rows)
    mask = source.mask(9, 40, None)
    assert torch.equal(mask.rows, rows.flatten()) and mask.key.tolist() == [5, 11]
    assert (mask.stream, mask.threshold, mask.feature_offset) == (9, 6554, 40)
    assert torch.equal(source.mask(9, 0, (1, 4)).rows, rows[2:4].flatten())
    # A mask that a forward pass holds keeps its step after the next microbatch is set.
    source.set(12, rows + 100)
    assert mask.key.tolist() == [5, 11] and torch.equal(mask.rows, rows.flatten())
    assert MaskSource(5, 0).mask(9, 0, None) is None


def test_quantise() -> None:
    assert [quantise(p) for p in (0, 0.5, 0.1, 1e-3, 1e-6, 65535 / 65536, 1)] == [0, 32768, 6554, 66, 0, 65535, 65536]
    for p in (-0.1, 1.1, 1 - 1e-9, math.nan):
        with pytest.raises(ValueError, match="dropout probability"):
            quantise(p)
