"""The plan's counts against published figures, transformers' own models and the code that places factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import parse_architecture, read_architecture
from lowrank_dist.arch.model_files import BUILT_IN, built_in_config
from lowrank_dist.arch.placement import LoraRules, place_factors
from lowrank_dist.engine.planning import find_model, read_model
from lowrank_dist.errors import UserError
from lowrank_dist.methods.bottleneck.config import AdapterConfig
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.registry import method_package
from lowrank_dist.planner.factors import low_rank
from lowrank_dist.planner.job import Parameters
from lowrank_dist.planner.parameters import frozen_size
from lowrank_dist.sections.section import MethodName, MethodSection
from tests.tiny_models import FAMILY_NAMES, make_tiny
from tests.unit.test_architecture_rules import modules, names_in, under

QV = ["q_proj", "v_proj"]


def test_the_formulas_import_nothing_that_they_describe() -> None:
    """The formulas import neither the modules that train nor their operators: they are an independent second count."""
    formulas = [*modules("lowrank_dist/planner"), *modules("lowrank_dist/methods")]
    formulas = [
        (name, path) for name, path in formulas if under(name, "lowrank_dist.planner") or path.stem == "footprint"
    ]
    assert len(formulas) > 16
    sizes = ("methods.MethodName", "methods.registry", "sections.section")
    for name, path in formulas:
        own = name.removeprefix("lowrank_dist.").replace("footprint", "config")
        allowed = ("planner", "arch", "errors", "untrusted", *((own, *sizes) if path.stem == "footprint" else ()))
        found = names_in(path.read_text(), name, path.stem == "__init__").found
        foreign = {x for x in found if under(x, "lowrank_dist")} - {"lowrank_dist", "lowrank_dist.methods"}
        assert [x for x in foreign if not any(under(x, f"lowrank_dist.{room}") for room in allowed)] == [], name


@pytest.mark.parametrize(("rank", "elements"), [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_gpt3_as_published(rank: int, elements: int) -> None:
    """Hu et al. 2021, table 4: 4.7M and 37.7M of 175B; 0.01 % at rank 4."""
    shape = find_model("gpt3-175b").architecture
    placement = low_rank(shape, LoraRules(rank, 1.0, QV))
    assert placement.elements == elements
    assert placement.by_module() == {"q_proj": elements // 2, "v_proj": elements // 2}
    if rank == 4:
        assert round(100 * elements / frozen_size(shape), 2) == 0.01
        assert round(2 * elements / 1e6, 1) == 37.7
        assert round(2 * frozen_size(shape) / 1e9, -1) == 350


def test_gpt2_medium_as_published() -> None:
    """Hu et al. 2021, table 3: 0.35M, by its own count of 24 layers, q and v, rank 4."""
    assert low_rank(find_model("gpt2-medium").architecture, LoraRules(4, 1.0, QV)).elements == 393_216


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
        ("ministral-3-14b", 13.5),
        ("gemma-3-27b", 27.0),
        ("olmo-3-32b", 32.2),
    ],
)
def test_built_in_sizes_as_published(name: str, billions: float) -> None:
    assert frozen_size(find_model(name).architecture) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_built_in_shape_has_a_size_here() -> None:
    assert len(BUILT_IN) == 12


def parameters(method: MethodName, section: MethodSection, architecture: Architecture) -> Parameters:
    return method_package(method).footprint.footprint_of(method, section, architecture).parameters(architecture)


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
    found = parameters(method, AdapterConfig(bottleneck=bottleneck), find_model(name).architecture)
    assert found.trained == found.stored
    assert round(found.trained / 1e6, 2 if millions < 1 else 1) == millions


def test_prefix_and_prompt_counts() -> None:
    """Li & Liang 2021: keys and values of l positions in every layer; Lester et al. 2021: l embeddings."""
    shape = find_model("gpt2-medium").architecture
    keys = 24 * 2 * 10 * 1024
    assert parameters("prefix", PrefixConfig(length=10, width=None), shape) == Parameters(keys, keys)
    # The embedding, and two linears with biases: 1024 → 512 → 24·2·1024.
    made = 10 * 1024 + 1025 * 512 + 513 * 24 * 2 * 1024
    assert parameters("prefix", PrefixConfig(length=10, width=512), shape) == Parameters(made, keys)
    assert parameters("prompt", PromptConfig(length=20), shape) == Parameters(20 * 1024, 20 * 1024)
    grouped = find_model("llama-3-8b").architecture
    assert parameters("prefix", PrefixConfig(length=1), grouped).stored == 32 * 2 * 8 * 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("plan")
    return {family: make_tiny(family, base / family, dtype=torch.bfloat16) for family in FAMILY_NAMES}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_frozen_size_is_that_of_transformers(folders: dict[str, Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[family])
    # OPT's table has two rows that no position reads; loading leaves them out.
    unread = 2 * model.config.hidden_size if family == "opt" else 0
    found = read_model(folders[family])
    assert frozen_size(found.architecture) == sum(p.numel() for p in model.parameters()) - unread
    assert (found.dtype, found.name) == ("bf16", family)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("targets", "pattern"),
    [
        ("all-linear", {}),
        (QV, {}),
        (r".*\.1\..*\.(q_proj|v_proj|k_proj)", {}),
        (["k_proj", "v_proj"], {r"1\.(self_)?attn\.v_proj": 3}),
    ],
)
def test_factors_are_those_that_are_placed(
    folders: dict[str, Path], family: str, targets: Any, pattern: dict[str, int]
) -> None:
    """Grouping equal layers loses nothing: every factor keeps its layer, linear, name, rank and shape."""
    rules, architecture = LoraRules(4, 8.0, targets, rank_pattern=pattern), read_architecture(folders[family])
    expected = [
        (p.layer, p.linear, f.path.rpartition(".")[2], f.adapter_rank, f.in_features, f.rows)
        for p in place_factors(architecture, rules)
        for f in p.factors
    ]
    placement = low_rank(architecture, rules)
    found = [
        (number, name, f.name, f.adapter_rank, f.in_features, f.rows)
        for number, layer in enumerate(placement.layers)
        for name in layer.kind.linears
        for f in layer.on(name)
    ]
    assert found == expected and found
    assert sum(count for *_, count in placement.kinds) == len(architecture.layers)
    assert placement.elements == sum(rank * (inputs + rows) for *_, rank, inputs, rows in found)


@pytest.mark.parametrize(
    ("family", "targets", "pattern"),
    [
        ("llama", "all-linear", {}),
        ("qwen3", ["q_proj", "v_proj"], {"1.self_attn.v_proj": 3}),
        ("gpt2", ["c_attn", "mlp.c_proj"], {"c_attn": 2}),
        ("opt", r".*\.1\..*(q_proj|fc2)", {}),
    ],
)
def test_theta_is_of_the_size_that_peft_makes(
    folders: dict[str, Path], family: str, targets: Any, pattern: dict[str, int]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=targets, rank_pattern=pattern, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders[family]), config)
    rules = LoraRules(4, 8.0, targets, rank_pattern=pattern)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert low_rank(read_architecture(folders[family]), rules).elements == trained


def test_what_matches_nothing_is_refused() -> None:
    shape = find_model("llama-3-8b").architecture
    with pytest.raises(UserError, match=r"lora.targets: 'c_attn'.*q_proj"):
        low_rank(shape, LoraRules(4, 1.0, ["q_proj", "c_attn"]))
    with pytest.raises(UserError, match="lora.rank_pattern: 'w'"):
        low_rank(shape, LoraRules(4, 1.0, ["q_proj"], rank_pattern={"w": 2}))
    with pytest.raises(UserError, match="name the same weights"):
        low_rank(find_model("gpt2-medium").architecture, LoraRules(4, 1.0, ["c_attn", "q_proj"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "hidden_size must be a positive integer"),
        ({"num_attention_heads": 7}, "is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"num_hidden_layers": True}, "must be an integer from 1 to 10000"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_architecture({**built_in_config("llama-3-8b"), **changes}, "config.json")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_config_that_lacks_a_field_is_refused(key: str) -> None:
    values = {name: value for name, value in built_in_config("llama-3-8b").items() if name != key}
    with pytest.raises(UserError, match=f"config.json: {key} is missing"):
        parse_architecture(values, "config.json")
