"""The references of `lowrank-dist verify`: transformers' modules trained by every method, in every family for LoRA."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowrank_dist.arch.config_json import parse_architecture, read_architecture
from lowrank_dist.arch.cut import cut_config
from lowrank_dist.arch.model_files import read_config
from lowrank_dist.arch.placement import place_factors
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.config import Config
from lowrank_dist.data.masking import Sample
from lowrank_dist.engine.run_method import build_method
from lowrank_dist.engine.zero import OptimiserRules
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.methods.bottleneck.files import BottleneckConfig, places, stored_shapes
from lowrank_dist.methods.lora.footprint import placement_rules
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.reference import Reference, Start
from lowrank_dist.methods.registry import method_package
from lowrank_dist.verify.compare import Record, compare, first_difference
from lowrank_dist.verify.reference import inputs_of, run_reference
from lowrank_dist.verify.trace import Traced
from tests.tiny_models import FAMILY_NAMES, VOCAB, make_tiny

RULES = OptimiserRules(1, 0.5, None, 0.01, (0.9, 0.999), 1e-3)
LENGTHS, VIRTUAL, WIDTH = (7, 12, 9), 3, 10
LORA = {"rank": 4, "alpha": 8.0}
# Name here → (method, its section).
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"lora": LORA}),
    "dora": ("lora", {"lora": {**LORA, "dora": True}}),
    "parts": ("lora", {"lora": {**LORA, "targets": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}}),
    "full": ("full", {}),
    "adapter_h": ("adapter_h", {"adapter": {"bottleneck": WIDTH}}),
    "adapter_l": ("adapter_l", {"adapter": {"bottleneck": WIDTH}}),
    "prefix": ("prefix", {"prefix": {"length": VIRTUAL, "width": None}}),
    "prefix_mlp": ("prefix", {"prefix": {"length": VIRTUAL, "width": WIDTH}}),
    "prompt": ("prompt", {"prompt": {"length": VIRTUAL}}),
}
CASES = [*(("llama", name) for name in METHODS), *(("gpt2", name) for name in ("dora", "parts", "full", "prompt"))]
CASES += [(family, "lora") for family in FAMILY_NAMES if family != "llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("references")
    return {family: make_tiny(family, base / family) for family in FAMILY_NAMES}


def config_of(folder: Path, name: str) -> Config:
    method, section = METHODS[name]
    data = {"train": "none.jsonl", "max_length": 32}
    return Config.model_validate(
        {"model": {"path": str(folder)}, "method": method, **section, "data": data, "output": {"dir": "none"}}
    )


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Return stored name → shape of Θ, by the tables of each method. tests/dist compares them with the run's."""
    architecture, section = read_architecture(config.model.path), config.own_section
    hidden, heads = architecture.hidden, (len(architecture.layers), 2, architecture.kv_heads, architecture.head_dim)
    if config.method == "full":
        return hf_shapes(architecture)
    if config.method == "prompt":
        return {"prompt.embeddings": (VIRTUAL, hidden)}
    if config.method == "prefix":
        if config.prefix.width is None:
            return {"prefix": (VIRTUAL, *heads)}
        inner = {"prefix.embedding": (VIRTUAL, hidden), "prefix.hidden.weight": (WIDTH, hidden)}
        outer = {"prefix.output.weight": (*heads, WIDTH), "prefix.output.bias": heads}
        return {**inner, "prefix.hidden.bias": (WIDTH,), **outer}
    found: dict[str, tuple[int, ...]] = {}
    if config.method == "lora":
        for placement in place_factors(architecture, placement_rules(section)):
            for spec in placement.factors:
                found[f"{spec.path}.lora_A"] = (spec.adapter_rank, spec.in_features)
                found[f"{spec.path}.lora_B"] = (spec.rows, spec.adapter_rank)
                if section.dora:
                    found[f"{spec.path}.lora_magnitude_vector"] = (spec.rows,)
        return found
    sizes = BottleneckConfig(method=config.method, bottleneck=WIDTH, layers=heads[0], hidden=hidden, base="")
    for layer, place in itertools.product(range(heads[0]), places(config.method)):
        found |= stored_shapes(sizes, layer, place)
    return found


def start_of(config: Config, folder: Path) -> Start:
    """Return drawn values, exported to `folder` by the run's own writer; none for full, which starts from the base."""
    if config.method == "full":
        return Start(folder, {})
    generator = torch.Generator().manual_seed(3)
    values = {
        name: torch.randn(shape, generator=generator) * 0.1 + name.endswith(("norm.weight", "magnitude_vector"))
        for name, shape in shapes_of(config).items()
    }
    folder.mkdir()
    base = config.model.path
    files = build_method(config, read_architecture(base)).files(
        folder, Provenance(fingerprint(base), str(base), {}), trained=True
    )
    for name, value in values.items():
        files.put(name, value)
    files.finish()
    return Start(folder, values)


def built(config: Config, start: Start, dtype: torch.dtype = torch.float32) -> Reference:
    setting = Setting(config.method, config.model.path, 0, 32, "off")
    builder = method_package(config.method).reference
    return builder.build(config.own_section, setting, start, dtype, torch.device("cpu"))


def samples(virtual: int) -> list[Sample]:
    """Return samples of LENGTHS tokens behind the ids of `virtual` virtual tokens; the first third is no target."""
    generator, made = np.random.default_rng(7), []
    for length in LENGTHS:
        tokens = np.concatenate((np.arange(VOCAB, VOCAB + virtual), generator.integers(5, 100, length)))
        made.append(Sample(tokens.astype(np.int32), np.arange(len(tokens)) >= virtual + length // 3, 1))
    return made


def trained(reference: Reference, name: str) -> Record:
    own = samples(VIRTUAL if name == "prompt" else 0)
    return run_reference(reference, [own, own[:2]], 1e-2, RULES)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_reference_trains(folders: dict[str, Path], tmp_path: Path, family: str, name: str) -> None:
    config = config_of(folders[family], name)
    start = start_of(config, tmp_path / "start")
    reference = built(config, start)
    assert {stored: tuple(leaf.shape) for stored, leaf in reference.parameters.items()} == shapes_of(config)
    assert reference.by.startswith("PEFT") == (config.method == "lora" and (family, name) != ("gpt2", "parts"))
    assert _equal(reference.exported(), written(start, config))
    record = trained(reference, name)
    assert record.losses[0] > 0 and len(record.norms) == len(record.gradients) == 2
    for gradients in record.gradients:
        assert {stored: tuple(value.shape) for stored, value in gradients.items()} == shapes_of(config)
    # Every tensor learns, except those that softmax makes idle.
    idle = {stored for stored, value in record.gradients[0].items() if not value.any()}
    assert not idle, idle
    assert not _equal(record.exported, written(start, config))


def test_inputs_of_linears(folders: dict[str, Path], tmp_path: Path) -> None:
    """The named rows of the named linears, sample by sample; a shared input is that of the first projection."""
    config = config_of(folders["llama"], "lora")
    reference = built(config, start_of(config, tmp_path / "start"))
    own, layer = samples(0), "model.layers.0"
    paths = [f"{layer}.self_attn.q_proj", f"{layer}.mlp.down_proj"]
    names = (1, 2, 40 + 0, 40 + 5)
    found = inputs_of(reference, own, Traced(dict.fromkeys(paths, torch.empty(0)), names, 40))
    assert [tuple(found[path].shape) for path in paths] == [(4, 64), (4, 96)]
    base: Any = reference.model
    norm = base.get_submodule(f"{layer}.input_layernorm")
    words = base.get_input_embeddings()(torch.from_numpy(own[1].tokens).long())
    assert torch.allclose(found[paths[0]][2:], norm(words)[[0, 5]], atol=1e-6)


def written(start: Start, config: Config) -> dict[str, Tensor]:
    """Return the tensors of the exported files; where full starts, those of the base."""
    folder = config.model.path if config.method == "full" else start.folder
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def _equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize(("family", "name"), [("llama", "lora"), ("llama", "dora"), ("gpt2", "dora")])
def test_without_peft_the_numbers_are_the_same(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str
) -> None:
    config = config_of(folders[family], name)
    start = start_of(config, tmp_path / "start")
    expected = trained(built(config, start), name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    plain = built(config, start)
    assert plain.by == "plain PyTorch"
    found = trained(plain, name)
    assert first_difference(compare(found, expected, None)) is None
    # Control: another start is seen.
    other = {stored: value * 1.01 for stored, value in start.values.items()}
    found = trained(built(config, replace(start, values=other)), name)
    assert first_difference(compare(found, expected, None)) is not None


@pytest.mark.parametrize("name", METHODS)
def test_bf16_casts_what_is_trained_in_fp32(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    config = config_of(folders["llama"], name)
    start = start_of(config, tmp_path / "start")
    exact, rounded = built(config, start), built(config, start, torch.bfloat16)
    assert {leaf.dtype for leaf in rounded.parameters.values()} == {torch.float32}
    expected, found = trained(exact, name), trained(rounded, name)
    gap = abs(found.losses[0] / expected.losses[0] - 1)
    assert 0 < gap < 2e-2


def test_a_cut_section_names_the_same_factors(tmp_path: Path) -> None:
    """Targets, ranks and alphas that depend on the layer, by lists and by a regular expression."""
    base = make_tiny("llama", tmp_path / "base", num_hidden_layers=3)
    whole, kept = read_architecture(base), (1, 2)
    cut = parse_architecture(cut_config(read_config(base), whole, kept), "config.json")
    builder = method_package("lora").reference
    for targets in (
        r"model\.layers\.[02]\.self_attn\.[qv]_proj",
        ["layers.2.mlp.up_proj", "model.layers.0.mlp.up_proj"],
    ):
        patterns = {"rank_pattern": {r"layers\.2\.\w+\.\w+": 2}, "alpha_pattern": {r"layers\.2\.\w+\.\w+": 3.0}}
        section = config_of(base, "lora").lora.model_validate({**LORA, "targets": targets, **patterns, "rslora": True})
        assert list(builder.adapted_layers(section, whole)) == [0, 2]
        found = place_factors(cut, placement_rules(builder.cut_section(section, whole, kept)))
        expected = [each for each in place_factors(whole, placement_rules(section)) if each.layer == 2]
        assert [each.layer for each in found] == [1] * len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            for one, other in zip(ours.factors, theirs.factors, strict=True):
                path = one.path.replace(".1.", ".2.", 1)
                assert replace(one, path=path, export_path=path) == other
    section = config_of(base, "prompt").own_section
    builder = method_package("prompt").reference
    assert list(builder.adapted_layers(section, whole)) == [0, 1, 2]
    assert builder.cut_section(section, whole, kept) == section
