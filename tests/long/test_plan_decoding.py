"""The plan's memory of an evaluation that generates, for further shapes, methods and layouts."""

from __future__ import annotations

import pytest

from tests.unit.test_plan_decoding import Case, compare

CASES: list[Case] = [
    ("llama-3-8b", 1, "lora", ()),
    ("llama-3-8b", 8, "lora", ("lora.rank=64",)),
    ("qwen2.5-7b", 4, "prefix", ()),
    ("llama-3-8b", 2, "prompt", ()),
    ("llama-3-8b", 4, "adapter_h", ("adapter.placement=sharded",)),
    ("gpt2-medium", 1, "lora", ()),
    ("gpt2-medium", 2, "full", ()),
]


@pytest.mark.parametrize("case", CASES)
def test_prompts_of_an_evaluation(case: Case) -> None:
    compare(case)
