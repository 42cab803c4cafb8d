"""The plan's counts against published figures, transformers' own models and the code that places factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_dist.arch.placement import LoraRules
from lowrank_dist.arch.placement import place as place_factors
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import load_architecture
from lowrank_dist.plan.methods import adapter_parameters, prefix_parameters, prompt_parameters
from lowrank_dist.plan.parameters import frozen_size
from lowrank_dist.plan.placement import place
from lowrank_dist.plan.shapes import BUILT_IN, built_in_config, find_shape, read_shape, shape_of
from tests.tiny_models import FAMILY_NAMES, make_tiny
from tests.unit.test_architecture_rules import modules, names_in, under

QV = ["q_proj", "v_proj"]
ROOM = "lowrank_dist.plan"


def test_the_formulas_import_nothing_that_they_describe() -> None:
    """Neither torch nor the model, its factors or the counter: a second opinion. `verify` alone runs the code."""
    formulas = [(name, path) for name, path in modules("lowrank_dist/plan") if path.stem != "verify"]
    assert len(formulas) > 12
    allowed = tuple(f"lowrank_dist.{room}" for room in ("plan", "config", "errors"))
    for name, path in formulas:
        found = names_in(path.read_text(), name, path.stem == "__init__").found
        assert not [x for x in found if under(x, "torch") or under(x, "transformers") or under(x, "megatron")], name
        foreign = [x for x in found if under(x, "lowrank_dist") and not any(under(x, room) for room in allowed)]
        assert [x for x in foreign if x != "lowrank_dist"] == [] and f"{ROOM}.verify" not in found, name


@pytest.mark.parametrize(("rank", "elements"), [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_gpt3_as_published(rank: int, elements: int) -> None:
    """Hu et al. 2021, table 4: 4.7M and 37.7M of 175B; 0.01 % at rank 4."""
    shape = find_shape("gpt3-175b")
    placement = place(shape, rank=rank, targets=QV)
    assert placement.elements == elements
    assert placement.by_module() == {"q_proj": elements // 2, "v_proj": elements // 2}
    if rank == 4:
        assert round(100 * elements / frozen_size(shape), 2) == 0.01
        assert round(2 * elements / 1e6, 1) == 37.7
        assert round(2 * frozen_size(shape) / 1e9, -1) == 350


def test_gpt2_medium_as_published() -> None:
    """Hu et al. 2021, table 3: 0.35M, by its own count of 24 layers, q and v, rank 4."""
    assert place(find_shape("gpt2-medium"), rank=4, targets=QV).elements == 393_216


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2-medium", 0.355),
        ("gpt2-large", 0.774),
        ("gpt3-175b", 174.6),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("llama-3-405b", 405.9),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-72b", 72.7),
        ("qwen3-32b", 32.8),
    ],
)
def test_built_in_sizes_as_published(name: str, billions: float) -> None:
    assert frozen_size(find_shape(name)) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_built_in_shape_has_a_size_here() -> None:
    assert len(BUILT_IN) == 9


@pytest.mark.parametrize(
    ("bottleneck", "method", "name", "millions"),
    [
        (1, "adapter_h", "gpt3-175b", 7.1),
        (8, "adapter_h", "gpt3-175b", 40.1),
        (6, "adapter_l", "gpt2-medium", 0.37),
    ],
)
def test_adapters_as_published(bottleneck: int, method: Any, name: str, millions: float) -> None:
    """Hu et al. 2021, tables 3 and 4."""
    found = adapter_parameters(find_shape(name), bottleneck, method) / 1e6
    assert round(found, 2 if millions < 1 else 1) == millions


def test_prefix_and_prompt_counts() -> None:
    """Li & Liang 2021: keys and values of l positions in every layer; Lester et al. 2021: l embeddings."""
    shape = find_shape("gpt2-medium")
    assert prefix_parameters(shape, 10) == 24 * 2 * 10 * 1024
    # The embedding, and two linears with biases: 1024 → 512 → 24·2·1024.
    assert prefix_parameters(shape, 10, 512) == 10 * 1024 + 1025 * 512 + 513 * 24 * 2 * 1024
    assert prompt_parameters(shape, 20) == 20 * 1024
    grouped = find_shape("llama-3-8b")
    assert prefix_parameters(grouped, 1) == 32 * 2 * 8 * 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("plan")
    return {family: make_tiny(family, base / family, dtype=torch.bfloat16) for family in FAMILY_NAMES}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_frozen_size_is_that_of_transformers(folders: dict[str, Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[family])
    # OPT's table has two rows that no position reads, and which loading cuts off.
    unread = 2 * model.config.hidden_size if family == "opt" else 0
    shape = read_shape(folders[family])
    assert frozen_size(shape) == sum(p.numel() for p in model.parameters()) - unread
    assert shape.dtype == "bf16"


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        ("all-linear", {}),
        (QV, {}),
        (r".*\.1\..*(q_proj|v_proj|k_proj)", {}),
        (["k_proj", "v_proj"], {r"1\.(self_)?attn\.v_proj": 3}),
    ],
)
def test_placement_is_that_of_the_code(
    folders: dict[str, Path], family: str, targets: Any, pattern: dict[str, int]
) -> None:
    """Two readings of the same rules: every factor's layer, linear, name, rank and shape."""
    rules = LoraRules(4, 8.0, targets, False, pattern, {})
    expected = [
        (p.layer, p.linear, f.path.rpartition(".")[2], f.rank, f.in_features, f.rows)
        for p in place_factors(load_architecture(folders[family]), rules)
        for f in p.factors
    ]
    shape = read_shape(folders[family])
    names = list(shape.linears)
    found = [
        (number, names[index], f.name, f.rank, f.in_features, f.rows)
        for number, layer in enumerate(place(shape, rank=4, targets=targets, rank_pattern=pattern).layers)
        for index, factors in enumerate(layer)
        for f in factors
    ]
    assert found == expected and found


def test_what_matches_nothing_is_refused() -> None:
    shape = find_shape("llama-3-8b")
    with pytest.raises(UserError, match=r"lora.targets: 'c_attn'.*q_proj"):
        place(shape, rank=4, targets=["q_proj", "c_attn"])
    with pytest.raises(UserError, match="lora.rank_pattern: 'w'"):
        place(shape, rank=4, targets=["q_proj"], rank_pattern={"w": 2})
    with pytest.raises(UserError, match="name the same weights"):
        place(find_shape("gpt2-medium"), rank=4, targets=["c_attn", "q_proj"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "hidden_size must be a positive integer"),
        ({"num_attention_heads": 7}, "is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"num_hidden_layers": True}, "must be a positive integer"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        shape_of({**built_in_config("llama-3-8b"), **changes}, "x", "config.json")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_config_that_lacks_a_field_is_refused(key: str) -> None:
    values = {name: value for name, value in built_in_config("llama-3-8b").items() if name != key}
    with pytest.raises(UserError, match=f"config.json: {key} is missing"):
        shape_of(values, "x", "config.json")
