"""Checks that are the same for all three operators; each is called by the operator's own test.

Legend: T tokens, K features, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf, nan

import pytest
import torch
from torch import Tensor

from lowrank_dist.ops.extension import cpu_capability
from lowrank_dist.ops.mask import Mask, counters
from tests.dist import ranks
from tests.operands import OperatorCase, arguments, on_device, same_bits

MASKED = {"threshold": 6554, "feature_offset": 3}
BLOCKS = (0, 130, 0, 3, 130, 1, 3, 4, 200, 500, 7, 13, 700, 600, 0, 3, 9, 0, 3, 4)


def operator(name: str) -> Callable[..., None]:
    return getattr(torch.ops.lowrank_dist, name).default


def repeatable(name: str, dtype: torch.dtype) -> None:
    """Check that repeated calls, with any number of threads, give the same bits."""
    for blocks in [(), BLOCKS] if ranks.device().type == "cpu" else [()]:
        case = OperatorCase(name, dtype, 700, 1300, 20, blocks=blocks, **MASKED)
        inside = case.wanted() if name == "grad_a" else slice(None)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 1, 2, 3):
                torch.set_num_threads(count)
                found.append(case.run().cpu()[inside])
        finally:
            torch.set_num_threads(threads)
        assert all(same_bits(found[0], other) for other in found[1:])


def notices_another_order(name: str) -> None:
    """The control of `repeatable`: the same sums in another order give other bits."""
    case = OperatorCase(name, torch.float32, 700, 1300, 20)
    axes, by = {"down": ((1, 1), 433), "expand": ((1, 0), 7), "grad_a": ((0, 0), 233)}[name]
    turned = {side: getattr(case, side).roll(by, axis) for side, axis in zip(("left", "right"), axes, strict=True)}
    assert not same_bits(case.run(), case.run(**turned))


def far_apart(name: str) -> None:
    """Check rows more than 2^31 elements apart, for each operand. On a CPU the pages between are never touched."""

    def far(near: Tensor) -> Tensor:
        return torch.empty_strided(near.shape, (2**31 + 8, 1), dtype=near.dtype, device=near.device).copy_(near)

    case = OperatorCase(name, torch.bfloat16, 2, 40, 2, **MASKED)
    near = case.run()
    for tensor in list(arguments(case))[:3]:
        call = arguments(case)
        call[tensor] = far(call[tensor])
        operator(name)(**call)
        assert same_bits(call["out"], near)


def checked_by_torch(name: str, dtype: torch.dtype) -> None:
    """Run torch.library.opcheck: the schema, the fake, and the operator under torch.compile's tracing."""
    for layouts, tokens, masked in (
        (("contiguous", "contiguous"), 6, MASKED),
        (("transposed", "columns"), 6, {}),
        (("misaligned", "every other"), 1, MASKED),
        (("contiguous", "contiguous"), 0, {}),
    ):
        call = arguments(OperatorCase(name, dtype, tokens, 20, 5, layouts=layouts, **masked))
        out = call.pop("out")
        message = torch.zeros(out.size(0), out.size(1) + 3, dtype=out.dtype, device=out.device)
        for written in (out, message[:, 2 : 2 + out.size(1)]):
            torch.library.opcheck(operator(name), (written,), call)


def notices_what_is_broken(name: str, dtype: torch.dtype) -> None:
    """Negative controls of the tolerance: each mistake is far outside of it."""
    case = OperatorCase(name, dtype, 65, 264, 16, **MASKED)
    mask, right = case.mask, case.run()
    assert case.error_over_tolerance(right) <= 1
    broken = {
        "next feature": case.run(mask=replace(mask, feature_offset=4)),
        "next stream": case.run(mask=replace(mask, stream=mask.stream + 1)),
        "next row": case.run(mask=replace(mask, rows=mask.rows + 1)),
        "next step": case.run(mask=replace(mask, key=mask.key + torch.tensor([0, 1]))),
        "other p": case.run(mask=replace(mask, threshold=6600)),
        "no mask": case.run(mask=None),
        "scale": right * mask.scale,
    }
    # The last rank, feature or token of every sum left out.
    shorter = case.left.clone()
    shorter.select(0 if name == "grad_a" else 1, -1).zero_()
    broken["a term"] = case.run(left=shorter)
    if name == "expand":
        broken["out"] = right - case.initial.to(right)
    if ranks.device().type == "cpu":
        broken["blocks"] = case.run(blocks=(0, 264, 0, 15))
    if name == "grad_a" and ranks.device().type == "cpu":
        broken["blocks"][15:] = 0
    for mistake, found in broken.items():
        assert not case.error_over_tolerance(found) <= 2, mistake


def refusals(name: str, call: dict[str, object]) -> Iterator[tuple[dict[str, object], str]]:
    """An operator's error cases: arguments to replace in a valid call of T = 5, K = 12, R = 3, and the message."""
    out, left, right = list(call.values())[:3]
    _, first, second = list(call)[:3]
    device = out.device
    shape = {"down": r"\[5, 3\]", "expand": r"\[5, 12\]", "grad_a": r"\[3, 12\]"}[name]
    yield {first: left[0]}, f"{first} and {second} must be matrices, not"
    yield {second: right[None]}, f"{first} and {second} must be matrices, not"
    yield {first: left.int(), second: right.int()}, "tensors must be float64, float32, bfloat16 or float16, not Int"
    yield (
        {second: right[:, :-1] if name == "down" else right[:-1]},
        r"[ua] must be Float \[\d, \d+\] on .*, not Float \[",
    )
    yield {second: right.bfloat16()}, r"[uax] must be (Float|BFloat16) \[\d, \d+\] on .*, not (Float|BFloat16) \["
    yield {"out": out[:-1]}, rf"out must be Float {shape} on .*, not Float \["
    yield {"out": out[0]}, rf"out must be Float {shape} on .*, not Float \[\d+\]"
    yield {"out": out.bfloat16()}, rf"out must be Float {shape} on .*, not BFloat16 {shape}"
    yield {"out": out.double()}, rf"out must be Float {shape} on .*, not Double {shape}"
    yield {"out": out.t().contiguous().t()}, "out must have unit inner stride, not strides"
    yield {"out": out[:1].expand_as(out)}, "rows of out must not overlap, strides are"
    overlapping = torch.zeros(99, device=device).as_strided(out.shape, (out.size(1) - 1, 1))
    yield {"out": overlapping}, "rows of out must not overlap, strides are"
    if device.type == "cpu":
        yield {"blocks": [0, 12, 0]}, "blocks must be quadruples, not 3 numbers"
        outside = [
            (0, 13, 0, 3),
            (1, 12, 0, 3),
            (0, 12, 1, 3),
            (0, 12, 0, 4),
            (2**62, 2**62, 0, 3),
            (0, 1, 2**63 - 1, 1),
        ]
        negative = [(-1, 3, 0, 3), (0, -1, 0, 3), (0, 3, -1, 3), (0, 3, 0, -1)]
        for block in outside + negative:
            yield {"blocks": [0, 6, 0, 3, *block]}, r"block \[.*\] does not lie in \[3, 12\]"
    else:
        yield {"blocks": [0, 12, 0, 3]}, "blocks must be empty on CUDA"
    yield {"threshold": -1}, r"threshold must be in \[0, 65536\], not -1"
    yield {"threshold": 65537}, r"threshold must be in \[0, 65536\], not 65537"
    yield {"feature_offset": -8}, "feature_offset must not be negative, is -8"
    yield {"rows": None}, "a mask needs rows and key"
    yield {"key": None}, "a mask needs rows and key"
    for rows in (torch.arange(4), torch.arange(5, dtype=torch.int32), torch.arange(5)[:, None]):
        yield {"rows": rows.to(device)}, r"rows must be int64 \[T\] on .* with T = 5, not"
    for key in (torch.arange(3), torch.ones(2), torch.tensor(1), torch.ones(2, 1, dtype=torch.int64)):
        yield {"key": key.to(device)}, r"key must be int64 \[2\] on .* \(seed, step\), not"


def refuses(name: str) -> None:
    """Check that each error names the operator, the argument and the expected value, and that nothing was written."""
    good = arguments(OperatorCase(name, torch.float32, 5, 12, 3, **MASKED))
    before = good["out"].clone()
    for changed, message in refusals(name, good):
        with pytest.raises(RuntimeError, match=f"lowrank_dist::{name}: .*{message}"):
            operator(name)(**(good | changed))
    assert torch.equal(good["out"], before)
    # The control: the call itself is good.
    operator(name)(**good)
    assert not torch.equal(good["out"], before)


def ignores_what_is_dropped(name: str, dtype: torch.dtype) -> None:
    """A dropped NaN or infinity of x has no effect; a kept one shows. For down and grad_a."""
    case = OperatorCase(name, dtype, 40, 72, 8, threshold=32768, feature_offset=3)
    side = "left" if name == "down" else "right"
    x, keep, clean = getattr(case, side), case.mask.keep(72), case.run()
    poison = torch.tensor([nan, inf, -inf], dtype=dtype).repeat(960).view(40, 72)
    assert same_bits(case.run(**{side: torch.where(keep, x, poison)}), clean)
    row, feature = keep.nonzero()[77].tolist()
    for bad in (nan, inf):
        poisoned = x.clone()
        poisoned[row, feature] = bad
        found = case.run(**{side: poisoned}).cpu()
        shown = torch.zeros(found.shape, dtype=torch.bool)
        shown[(row, slice(None)) if name == "down" else (slice(None), feature)] = True
        assert torch.equal(found.isnan() if bad is nan else found.isinf(), shown)
        assert torch.equal(found[~shown], clean.cpu()[~shown])


def draws(name: str, dtype: torch.dtype, mask: Mask, features: int) -> Tensor:
    """Return the operator's mask, bool [T, features], from products with ones and with the identity."""
    tokens, device = len(mask.rows), ranks.device()
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    ones = torch.ones(1, 1, dtype=dtype, device=device)
    if name == "down":
        out = torch.full((tokens, features), nan, dtype=dtype, device=device)
        operands = {"x": ones.expand(tokens, features), "a": torch.eye(features, dtype=dtype, device=device)}
    elif name == "expand":
        out = torch.zeros(tokens, features, dtype=dtype, device=device)
        operands = {"u": ones.expand(tokens, 1), "a": ones.expand(1, features), "accumulate": True}
    else:
        out = torch.full((tokens, features), nan, dtype=summed, device=device)
        operands = {"u": torch.eye(tokens, dtype=dtype, device=device), "x": ones.expand(tokens, features)}
    names = ("rows", "key", "stream", "threshold", "feature_offset")
    operator(name)(out, **operands, blocks=[], **dict(zip(names, counters(on_device(mask)), strict=True)))
    found = out.cpu()
    assert ((found == 0) | (found == 1)).all()
    return found == 1


def every(dtype: torch.dtype) -> Tensor:
    """Return all 65536 numbers of a half precision."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def rounds_as_pytorch(name: str, dtype: torch.dtype) -> None:
    """Check that sums are rounded as torch rounds the fp32 sum.

    Summed are every number of a half precision and zero, half a spacing (a tie), or nearly that. For down and expand.
    Where bf16 is multiplied by AVX512_BF16, subnormals of bf16 and fp32 are zeros.
    """
    numbers = every(dtype)
    above, below = ((numbers.view(torch.int16) + step).view(dtype).double() for step in (1, -1))
    # Beyond the largest number lies infinity, as far away as the number below.
    half_step = (torch.where(above.isinf(), below, above) - numbers.double()).nan_to_num(0, 0, 0).abs() / 2
    flushes = dtype == torch.bfloat16 and ranks.device().type == "cpu" and "bf16" in cpu_capability()
    device = ranks.device()
    for factor in (0.0, 1.0, -1.0, 1.0 + 2.0**-7, 1.0 - 2.0**-7, -1.0 - 2.0**-7):
        added = (half_step * factor * 256).to(dtype)
        if name == "expand":
            out = numbers.to(device)[None].clone()
            u = torch.full((1, 1), 2.0**-8, dtype=dtype, device=device)
            operator(name)(out, u, added.to(device)[None], True, [], None, None, 0, 0, 0)
            found = out[0].cpu()
        else:
            out = torch.full((2**16, 1), nan, dtype=dtype, device=device)
            a = torch.tensor([[1, 2.0**-8]], dtype=dtype, device=device)
            operator(name)(out, torch.stack((numbers, added), 1).to(device), a, [], None, None, 0, 0, 0)
            found = out[:, 0].cpu()
        total = numbers.float() + added.float() / 256
        expected = total.to(dtype)
        compared = torch.ones_like(expected, dtype=torch.bool)
        if flushes:
            tiny = torch.finfo(dtype).tiny
            terms = torch.stack((numbers.float(), added.float() / 256, total))
            compared = ((terms == 0) | (terms.abs() >= tiny) | terms.isnan()).all(0)
            assert compared.sum() > 62000
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7)[compared], expected.nan_to_num(7)[compared]), factor
