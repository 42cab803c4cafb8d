"""Draws follow the distribution after temperature, top_k and top_p, and depend only on seed, prompt and step."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lowrank_dist.errors import UserError
from lowrank_dist.generate.sampling import SamplingParams, draw, uniform_draw

CUTS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "top_k": 1000},
]


def transformers_distribution(logits: torch.Tensor, cut: dict[str, float]) -> torch.Tensor:
    scores = TemperatureLogitsWarper(cut["temperature"])(None, logits)
    if "top_k" in cut:
        scores = TopKLogitsWarper(cut["top_k"])(None, scores)
    if "top_p" in cut:
        scores = TopPLogitsWarper(cut["top_p"])(None, scores)
    return scores.double().softmax(dim=1)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_draws_from_the_distribution_of_transformers(cut: dict[str, float]) -> None:
    """Numbers spread evenly over [0, 1) fall on each token in proportion to its probability; nothing is random here."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)) * 2
    expected = transformers_distribution(logits, cut)
    points = 20000
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    for row in range(3):
        drawn = draw(logits[row].expand(points, -1), SamplingParams(**cut), uniform)
        share = torch.bincount(drawn, minlength=40) / points
        assert (share - expected[row]).abs().max() <= 1.5 / points
        assert set(drawn.tolist()) <= set(expected[row].nonzero()[:, 0].tolist())


def test_notices_another_temperature() -> None:
    """Negative control of the tolerance above: a temperature of 1.02 is noticed."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    drawn = draw(logits.expand(20000, -1), SamplingParams(temperature=1.02), uniform)
    share = torch.bincount(drawn, minlength=40) / 20000
    assert (share - transformers_distribution(logits, {"temperature": 1.0})[0]).abs().max() > 1.5 / 20000


def test_ends_of_the_unit_interval_and_equal_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 3.0]])
    rules = SamplingParams(temperature=1.0, top_k=3)
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(3, -1), rules, ends).tolist() == [1, 2, 4]
    # Among equal logits top_k keeps the lowest ids.
    kept = {draw(logits, SamplingParams(temperature=9.0, top_k=2), torch.tensor([u / 50])).item() for u in range(50)}
    assert kept == {1, 2}
    # A very low temperature does not overflow.
    assert draw(logits * 1e30, SamplingParams(temperature=1e-30), torch.tensor([0.0], dtype=torch.float64)).item() == 1


def test_numbers_are_uniform_and_functions_of_their_arguments() -> None:
    drawn = [[uniform_draw(3, sample, step) for step in range(100)] for sample in range(100)]
    numbers = torch.tensor(drawn, dtype=torch.float64)
    assert ((0 <= numbers) & (numbers < 1)).all() and numbers.unique().numel() == numbers.numel()
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    # χ² with 19 degrees of freedom: 43.8 is its 99.9 % point.
    assert ((counts - 500).square() / 500).sum() < 43.8
    # Prompt and step are not concatenated as digits: "12" and "3" differ from "1" and "23".
    assert len({uniform_draw(1, 23, 4), uniform_draw(12, 3, 4), uniform_draw(1, 2, 34)}) == 3
    assert uniform_draw(3, 7, 11) == numbers[7, 11]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0.5}, "give a temperature above 0"),
        ({"top_k": 5}, "give a temperature above 0"),
        ({"stop": ("",)}, "empty stop text"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SamplingParams(**values)
