"""Attention sinks, on a family that only this test has: a Qwen2 with gpt-oss's attention, windows beside full layers.

transformers' own eager attention of gpt-oss is the referee.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen2 import modeling_qwen2

from lowrank_dist.arch.architecture import SINKS, TensorRule
from lowrank_dist.arch.families import FAMILIES
from tests.dist import ranks
from tests.dist.method_runs import MethodSetting, measure, reference, twins_of
from tests.dist.ranks import run_ranks
from tests.dist.test_generate import stepwise_logits
from tests.dist.test_logits import BROKEN, LAYOUTS, LENGTH, TOLERANCE, gap, load, tokens
from tests.dist.tiny_runs import max_relative_error
from tests.tiny_models import make_tiny

HEADS, WINDOW = 8, 5


@contextmanager
def family_with_sinks() -> Iterator[None]:
    rule = TensorRule(f"decoder.layers.{{layer}}.{SINKS}", "model.layers.{layer}.self_attn.sinks", ("heads",), "heads")
    qwen2 = FAMILIES["qwen2"]
    with mock.patch.dict(FAMILIES, qwen2=replace(qwen2, tensors=(*qwen2.tensors, rule))):
        yield


def sinks_of(layer: int) -> torch.Tensor:
    """Return sinks as large as the scores of the tiny models, different for every head."""
    return torch.randn(HEADS, generator=torch.Generator().manual_seed(layer)) * 2


@contextmanager
def transformers_model(folder: str, dtype: torch.dtype = torch.float32) -> Iterator[Any]:
    with mock.patch.object(modeling_qwen2, "eager_attention_forward", modeling_gpt_oss.eager_attention_forward):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for layer, each in enumerate(model.model.layers):
            each.self_attn.sinks = nn.Parameter(sinks_of(layer))
        yield model.to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder: four heads a key/value head pair, one layer with a window and one without."""
    path = tmp_path_factory.mktemp("sinks") / "model"
    windows = {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    make_tiny("qwen2", path, num_attention_heads=HEADS, num_key_value_heads=4, hidden_size=64, **windows)
    file = path / "model.safetensors"
    tensors = load_file(file) | {f"model.layers.{layer}.self_attn.sinks": sinks_of(layer) for layer in range(2)}
    save_file(tensors, file, {"format": "pt"})
    return str(path)


def roll(sinks: torch.Tensor) -> torch.Tensor:
    return sinks.roll(1)


def remove(sinks: torch.Tensor) -> torch.Tensor:
    return torch.full_like(sinks, -100.0)


def logits(
    folder: str, tensor: int, sequence: bool, dtype: str = "fp32", change: Callable[..., Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """On one rank: return the logits of rows, and of the same tokens packed into one row as samples of two lengths."""
    with family_with_sinks():
        model = load(folder, ranks.topology(tensor, sequence), dtype)
    if change is not None:
        for layer in model.decoder.layers:
            own = layer.self_attention.core_attention.sinks
            own.data.copy_(change(own.data))
    ids = tokens().to(ranks.device())
    positions = torch.arange(LENGTH, device=ids.device).expand(ids.shape)
    found = model.logits(ids, positions)
    both = torch.cat((ids[:1], ids[1:]), dim=1)
    packed = model.logits(both, positions[:1].repeat(1, 2), ((0, 0, LENGTH), (0, LENGTH, 2 * LENGTH)))
    return found.double().cpu().numpy(), packed.unflatten(1, (2, LENGTH))[0].double().cpu().numpy()


@pytest.fixture(scope="module")
def expected(folder: str) -> np.ndarray:
    with transformers_model(folder) as model, torch.no_grad():
        return model(tokens(), use_cache=False).logits.double().numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_transformers(folder: str, expected: np.ndarray, layout: str) -> None:
    world, sequence = LAYOUTS[layout]
    for rows, packed in run_ranks(world, logits, folder, world, sequence):
        assert gap(rows, expected) < TOLERANCE and gap(packed, expected) < TOLERANCE


@pytest.mark.parametrize("change", [roll, remove])
def test_notices_sinks_of_another_head_and_none(folder: str, expected: np.ndarray, change: Any) -> None:
    for found in run_ranks(2, logits, folder, 2, True, "fp32", change)[0]:
        assert gap(found, expected) > BROKEN


def test_bf16_errs_as_transformers_does(folder: str, expected: np.ndarray) -> None:
    with transformers_model(folder, torch.bfloat16) as model, torch.no_grad():
        own = gap(model(tokens(), use_cache=False).logits.double().numpy(), expected)
    for found in run_ranks(2, logits, folder, 2, True, "bf16")[0]:
        assert 0 < gap(found, expected) < 2 * own


def measured(settings: list[MethodSetting]) -> list[dict[str, Any]]:
    with family_with_sinks():
        return measure(settings)


@pytest.mark.parametrize(
    ("world", "sequence", "varied"), [(1, False, {}), (2, True, {"recompute": True}), (4, False, {})]
)
def test_every_gradient_and_three_steps(folder: str, world: int, sequence: bool, varied: dict[str, Any]) -> None:
    """Every weight is trained, the sinks too. A packed row has several samples, each with the sink of its own."""
    from lowrank_dist.methods.full.reference import call_with, detached, leaves
    from lowrank_dist.methods.reference import Reference

    setting = replace(twins_of([MethodSetting(folder, packing=world == 2)], world, sequence)[0], **varied)
    with transformers_model(folder) as model, family_with_sinks():
        from lowrank_dist.arch.config_json import read_architecture

        own = leaves(dict(model.requires_grad_(False).named_parameters()), torch.device("cpu"))
        architecture = read_architecture(Path(folder))
        made = Reference(
            model, architecture, own, lambda ids, keep: call_with(model, own, ids, keep), lambda: detached(own)
        )
        wanted = reference(made)
    assert any("sinks" in name and np.abs(value).max() > 1e-3 for name, value in wanted.items() if "gradient" in name)
    # A key bias has no gradient but rounding errors.
    kept = [name for name in wanted if not name.endswith("k_proj.bias")]
    for (found,) in run_ranks(world, measured, [setting]):
        pair = ({name: each[name] for name in kept} for each in (found, wanted))
        assert max_relative_error(*pair) < 5e-5


def stepwise(folder: str, tensor: int) -> Any:
    with family_with_sinks():
        return stepwise_logits({"sinks": folder}, {}, tensor, False)["sinks"]


@pytest.mark.parametrize("world", [1, 2])
def test_decoding_with_the_cache(folder: str, world: int) -> None:
    """In a padded batch and alone, within and beyond the window, as without a cache."""
    for found in run_ranks(world, stepwise, folder, world):
        scale = np.abs(found["whole"]).max()
        for kind in ("batch", "alone"):
            assert np.abs(found[kind] - found["whole"]).max() <= 1e-5 * scale, kind
