"""benchmarks/training.py: the configs of its runs. No model is trained: tests/gpu/bench.sh rehearses it on a CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from lowrank_dist.config import load_config
from lowrank_dist.data.formats import read_jsonl
from lowrank_dist.data.masking import mask_completions
from lowrank_dist.data.tokenizer import load_tokenizer
from tests.tiny_models import make_tiny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import training  # noqa: E402


@pytest.mark.parametrize("method", training.METHODS)
@pytest.mark.parametrize(("length", "prompt"), [(64, 32), (101, 1)])
def test_every_method_sees_the_same_tokens(
    method: str, length: int, prompt: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samples have the requested length; positions that a method takes from the sequence are added to it."""
    monkeypatch.setattr(training, "PLACE", tmp_path)
    args = argparse.Namespace(device="cpu", steps=5)
    recipe = training.Recipe({}, length, micro_batch=3, global_batch=3, prompt=prompt)
    config = load_config(training.write_config(args, recipe, tmp_path / "base", method, tmp_path / "run"))
    samples = mask_completions(
        load_tokenizer(make_tiny("llama", tmp_path / "tiny")), read_jsonl(config.data.train).completions
    )
    assert {sample.tokens.size for sample in samples} == {length} and len(samples) == 12
    taken = {"prefix": config.prefix, "prompt": config.prompt}.get(method)
    assert config.data.max_length - (taken.length if taken else 0) == length
    assert {int(sample.target.sum()) for sample in samples} == {length - prompt}
    assert config.method == method and config.train.steps > training.FIRST_STEPS + args.steps + 1
    assert not any(
        (sample.tokens == other.tokens).all() for sample in samples for other in samples if sample is not other
    )
