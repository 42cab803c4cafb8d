"""PEFT is the reference: it loads what we write, and we read what it writes, both exactly."""

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.checkpoint.folder import copy_adapter, export
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import write_manifest
from lowrank_dist.formats.provenance import PROVENANCE_FILE, fingerprint, read_provenance
from lowrank_dist.merging.merge import merge
from lowrank_dist.methods.files import CONFIG_FILE, VLLM, WEIGHTS_FILE
from lowrank_dist.methods.lora.adopt import adopt_adapter
from lowrank_dist.methods.lora.config import LoraConfig as LoraSection
from lowrank_dist.methods.lora.files import LowRankFactor, read_adapter
from lowrank_dist.methods.lora.folder import FILES
from lowrank_dist.methods.lora.method import attach_trained
from lowrank_dist.methods.lora.peft_config import describe, read_config
from lowrank_dist.untrusted.patterns import Patterns
from tests.tiny_adapters import Size, inspected, random_adapter, save_adapter
from tests.tiny_models import make_tiny

FAMILIES = ("llama", "gpt2", "opt")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def load_base(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, local_files_only=True).eval()


def peft_layers(model: PeftModel) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def layer_of(module: str) -> int:
    """Return the module's layer; -1 for lm_head."""
    return int(next(iter(re.findall(r"\.(\d+)\.", module)), -1))


def _in_layers(module: str, size: tuple[int, float]) -> tuple[int, float] | None:
    return size if layer_of(module) >= 0 else None


_LAST_GPT2 = "transformer.h.1.mlp.c_proj"
_OUTPUT = re.compile(r"attn\.(c_proj|o_proj|out_proj)$")

# The modules that get factors, and their (rank, alpha). Each entry needs another form of target_modules and patterns.
SIZES: Mapping[str, Size] = {
    "all linears alike": lambda module: _in_layers(module, (3, 6.0)),
    "one name": lambda module: (2, 5.5) if module.endswith(("q_proj", "c_attn")) else None,
    "one layer": lambda module: (2, 4.0) if layer_of(module) == 1 else None,
    "output layer": lambda module: (2, 4.0) if "q_proj" in module or module in ("lm_head", _LAST_GPT2) else None,
    "one module": lambda module: (2, 4.0) if _OUTPUT.search(module) and layer_of(module) == 0 else None,
    "attention output": lambda module: (4, 8.0) if _OUTPUT.search(module) else None,
    "mixed": lambda module: (
        (1 + len(module) % 5 + layer_of(module), 0.7 * len(module)) if sum(map(ord, module)) % 3 else None
    ),
    "by layer": lambda module: _in_layers(module, (2 + layer_of(module), 7.0 - layer_of(module))),
}


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_write(
    bases: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder, family: str, sizes: str, rslora: bool
) -> None:
    base = bases[family]
    adapter = random_adapter(base, SIZES[sizes], rslora=rslora)
    folder = save_adapter(tmp_path / "adapter", base, adapter)
    model = PeftModel.from_pretrained(load_base(base), folder)

    layers = peft_layers(model)
    assert set(layers) == set(adapter.factors)
    for module, factor in adapter.factors.items():
        delta = adapter.factors[module].scale(rslora) * (factor.b @ factor.a)
        found = layers[module].get_delta_weight("default")
        assert torch.equal(found, delta.T if family == "gpt2" else delta), module
        assert layers[module].scaling["default"] == factor.scale(rslora)
    assert not [warning for warning in recwarn if re.search("fan_in_fan_out|missing|unexpected", str(warning.message))]

    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    by_hand = load_base(base)
    untouched = by_hand(ids).logits
    with torch.no_grad():
        for module, factor in adapter.factors.items():
            delta = factor.scale(rslora) * (factor.b @ factor.a)
            by_hand.get_submodule(module).weight += delta.T if family == "gpt2" else delta
        found, expected = model.eval()(ids).logits, by_hand(ids).logits
    tolerance = 1e-4 * expected.abs().max()
    assert (found - expected).abs().max() <= tolerance < (untouched - expected).abs().max()


def test_the_referee_sees_a_wrong_scale_and_swapped_factors(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = random_adapter(base, lambda module: _in_layers(module, (2, 8.0)))
    module = "model.layers.0.self_attn.o_proj"
    factor = adapter.factors[module]
    wrong = {
        "scale": replace(adapter, rslora=True),
        "swapped": replace(
            adapter,
            factors={**adapter.factors, module: LowRankFactor(factor.b.T.contiguous(), factor.a.T.contiguous(), 8.0)},
        ),
    }
    for name, written in wrong.items():
        layers = peft_layers(PeftModel.from_pretrained(load_base(base), save_adapter(tmp_path / name, base, written)))
        assert not torch.allclose(layers[module].get_delta_weight("default"), 4.0 * factor.b @ factor.a)


@pytest.mark.parametrize(
    ("family", "sizes", "targets"),
    [
        ("llama", "all linears alike", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("gpt2", "all linears alike", "c_attn c_fc c_proj"),
        ("gpt2", "attention output", "attn.c_proj"),
        ("opt", "all linears alike", "fc1 fc2 k_proj out_proj q_proj v_proj"),
    ],
)
def test_target_names_are_as_short_as_is_exact(
    bases: dict[str, Path], tmp_path: Path, family: str, sizes: str, targets: str
) -> None:
    folder = save_adapter(tmp_path / "adapter", bases[family], random_adapter(bases[family], SIZES[sizes]))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == targets.split()
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


_PART = st.text("ab0_", min_size=1, max_size=2)
_MODULES = st.sets(st.lists(_PART, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12)


def _describable(modules: set[str], chosen: set[str]) -> bool:
    """Return whether PEFT's lists can name `chosen`: they cannot name `x` without `y.x`. Ours have no such pair."""
    return not any(module != other and other.endswith(f".{module}") for module in chosen for other in modules)


@given(modules=_MODULES, data=st.data())
def test_described_configs_are_exact_by_pefts_own_matching(modules: set[str], data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(modules)), min_size=1))
    if not _describable(modules, chosen):
        return
    sizes = {m: (data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1.0, 2.5]))) for m in sorted(chosen)}
    config = describe(sizes, modules, dropout=0.0, rslora=False, dora=False, fan_in_fan_out=False, base="")
    lora = LoraConfig(target_modules=list(config.targets))
    assert {module for module in modules if check_target_module_exists(lora, module)} == chosen
    for module, (rank, alpha) in sizes.items():
        assert config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.rank) == rank
        assert config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.alpha) == alpha


PATTERNS = {
    "none": {},
    "leaf": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"v_proj": 3.5, "c_fc": 3}},
    "path": {"rank_pattern": {"layers.1.self_attn.q_proj": 7, "h.1.attn.c_attn": 7}},
    "regex": {"rank_pattern": {r"^.*\.1\.(self_attn|attn|mlp)\..*": 6}, "alpha_pattern": {r"(q|k)_proj|c_.*": 1}},
    "first wins": {
        "rank_pattern": {r".*0\..*": 2, "[qc]_.*": 5, "_proj": 9},
        "alpha_pattern": {".*1.*": 2, "[^1]*": 3},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 5, "c_proj": 5}, "r": 3},
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_what_peft_writes(bases: dict[str, Path], tmp_path: Path, family: str, patterns: str) -> None:
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "mlp.c_proj"], "opt": r".*\.(q_proj|fc2)"}[family]
    options = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "init_lora_weights": False, **PATTERNS[patterns]}
    model = get_peft_model(
        load_base(bases[family]),
        LoraConfig(target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2", **options),
    )
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)

    # Compare the file as PEFT understands it: saving sorts the patterns, and their order matters.
    layers = peft_layers(PeftModel.from_pretrained(load_base(bases[family]), tmp_path))
    assert set(adapter.factors) == set(layers) and adapter.dropout == 0.1
    assert adapter.rslora == (patterns == "rslora") and adapter.fan_in_fan_out == (family == "gpt2")
    for module, factor in adapter.factors.items():
        assert torch.equal(factor.a, layers[module].lora_A["default"].weight)
        assert torch.equal(factor.b, layers[module].lora_B["default"].weight)
        assert factor.scale(adapter.rslora) == layers[module].scaling["default"]
    assert len({(factor.rank, factor.alpha) for factor in adapter.factors.values()}) > (patterns == "leaf")


def test_round_trip_and_provenance(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = replace(random_adapter(bases["gpt2"], SIZES["mixed"], rslora=True), dropout=0.25)
    folder = save_adapter(tmp_path / "adapter", bases["gpt2"], adapter)
    back = read_adapter(folder)
    assert replace(back, factors={}) == replace(adapter, factors={})
    for module, factor in adapter.factors.items():
        assert torch.equal(back.factors[module].a, factor.a) and torch.equal(back.factors[module].b, factor.b)
        assert back.factors[module].alpha == factor.alpha
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors", "lowrank_dist.json"]
    provenance = json.loads((folder / "lowrank_dist.json").read_text())
    assert provenance["format"] == 1 and provenance["base"] == str(bases["gpt2"])
    assert provenance["base_fingerprint"] == read_provenance(folder).base_fingerprint == fingerprint(bases["gpt2"])


def test_scale() -> None:
    factor = LowRankFactor(torch.ones(4, 3), torch.ones(5, 4), 6.0)
    assert (factor.rank, factor.scale(False), factor.scale(True)) == (4, 1.5, 6.0 / math.sqrt(4))
    with pytest.raises(AssertionError):
        LowRankFactor(torch.ones(4, 3), torch.ones(4, 5), 6.0)


def test_low_precision_factors_are_widened(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = random_adapter(bases["llama"])
    folder = save_adapter(tmp_path / "adapter", bases["llama"], adapter)
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    for module, factor in read_adapter(folder).factors.items():
        assert factor.a.dtype == torch.float32 and torch.equal(factor.a, adapter.factors[module].a.bfloat16().float())


class TestRefusedToWrite:
    def test_empty(self, bases: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no factors"):
            save_adapter(tmp_path / "adapter", bases["llama"], random_adapter(bases["llama"], lambda module: None))

    def test_b_zero_after_training(self, bases: dict[str, Path], tmp_path: Path) -> None:
        adapter = random_adapter(bases["llama"])
        zero = {m: LowRankFactor(f.a, torch.zeros_like(f.b), f.alpha) for m, f in adapter.factors.items()}
        with pytest.raises(UserError, match="B is zero"):
            save_adapter(tmp_path / "adapter", bases["llama"], replace(adapter, factors=zero))
        save_adapter(tmp_path / "adapter", bases["llama"], replace(adapter, factors=zero), trained=False)
        one = {**zero, next(iter(zero)): next(iter(adapter.factors.values()))}
        save_adapter(tmp_path / "other", bases["llama"], replace(adapter, factors=one))

    def test_nan(self, bases: dict[str, Path], tmp_path: Path) -> None:
        adapter = random_adapter(bases["llama"])
        adapter.factors["model.layers.1.mlp.up_proj"].b[0, 0] = math.nan
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.lora_B.* NaN"):
            save_adapter(tmp_path / "adapter", bases["llama"], adapter)
        assert os.listdir(tmp_path) == []

    def test_existing_folder(self, bases: dict[str, Path], tmp_path: Path) -> None:
        folder = save_adapter(tmp_path / "adapter", bases["llama"], random_adapter(bases["llama"]))
        other = random_adapter(bases["llama"], seed=1)
        with pytest.raises(UserError, match="already exists"):
            save_adapter(folder, bases["llama"], other)
        files = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE)
        source = save_adapter(tmp_path / "new", bases["llama"], other)
        write_manifest(source)
        copy_adapter(source, folder, files)
        assert torch.equal(
            read_adapter(folder).factors["model.layers.0.mlp.up_proj"].b, other.factors["model.layers.0.mlp.up_proj"].b
        )
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / "thesis.tex").touch()
        with pytest.raises(UserError, match="was not written by lowrank-dist"):
            copy_adapter(source, foreign, files)
        assert (foreign / "thesis.tex").exists()


@pytest.fixture
def folder(bases: dict[str, Path], tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", bases["llama"], random_adapter(bases["llama"], SIZES["one name"]))


def set_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank_pattern": {"(.|.)*[!Z]": 4}}, "and those before it take more than 0.2 s"),
        ({"alpha_pattern": {"(.|.)*[!Z]": 4}}, "and those before it take more than 0.2 s"),
        ({"target_modules": "(.|.)*[!Z]"}, "and those before it take more than 0.2 s"),
        ({"exclude_modules": "(.|.)*[!Z]"}, "and those before it take more than 0.2 s"),
        ({"layers_to_transform": [0], "layers_pattern": "(.|.)*[!Z]"}, "and those before it take more than 0.2 s"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern: '(?i)q_proj': not a regular expression: global flags"),
        ({"layers_to_transform": [0], "layers_pattern": "(?i)h"}, "layers_pattern: '(?i)h': not a regular expression"),
        ({"alpha_pattern": {"((a{999}){999}){999}": 4}}, "': has more than 262144 characters once its repetitions"),
        (
            {"target_modules": "a{9999999999999999999}"},
            "target_modules: 'a{9999999999999999999}': has more than 262144",
        ),
        ({"target_modules": "(" * 9000 + ")" * 9000}, "the regular expression is nested too deeply"),
    ],
)
def test_a_hostile_expression_is_an_error_in_time(
    folder: Path, values: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patterns, "seconds", 0.2)
    set_config(folder, **values)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_adapter(folder)
    assert "adapter_config.json: " in str(caught.value)


@pytest.mark.parametrize("expression", ["([a-z_.0-9]+)+!", "(?i:Q_PROJ)|.*[13]{30}", r"(?!.*visual)(x|y)\.{2}"])
def test_an_expression_that_is_odd_and_harmless_is_read(folder: Path, expression: str) -> None:
    before = read_adapter(folder).factors
    set_config(folder, rank_pattern={expression: next(iter(before.values())).rank})
    assert read_adapter(folder).factors.keys() == before.keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("modules_to_save", ["lm_head"] * 100_000),
        ("r", [8] * 100_000),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]),
        ("layer_replication", [[0, 1]]),
        ("kasa_config", {"beta": 0.1}),
        ("use_qalora", True),
        ("enable_lora", [True, False, True]),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa_niter_4"),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [3]),
        ("target_modules", "(q_proj"),
        ("r", 0),
        ("r", True),
        ("r", 2.5),
        ("r", "8"),
        ("r", 10**400),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_alpha", "16"),
        ("lora_dropout", None),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", []),
        ("alpha_pattern", False),
        ("exclude_modules", {}),
        ("layers_pattern", 0),
        ("base_model_name_or_path", ["a"]),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"*": 1}),
    ],
)
def test_a_config_that_means_more_or_nothing_is_refused(folder: Path, key: str, value: object) -> None:
    read_adapter(folder)
    set_config(folder, **{key: value})
    with pytest.raises(UserError, match=r"adapter_config\.json|adapter_model\.safetensors") as caught:
        read_adapter(folder)
    assert key in str(caught.value) or key == "r"
    assert len(str(caught.value)) < 1000


_LAYERED = tuple(
    f"{prefix}.{layer}.{leaf}"
    for prefix in ("model.layers", "transformer.h", "a.layers.1.experts", "layers")
    for layer in (0, 1, 12)
    for leaf in ("attn.q_proj", "mlp.up_proj")
) + ("lm_head", "model.embed_tokens", "q_proj")
_LIST = st.lists(st.sampled_from(("q_proj", "up_proj", "attn.q_proj", "lm_head", "h.1.mlp.up_proj", *_LAYERED[:3])))
_REGEX = st.sampled_from((r".*q_proj", r"model\.layers\.[01]\..*", "lm_head", r".*\.1\..*", "q_proj"))
_PATTERN = st.sampled_from(("layers", "h", "experts", r"\w+", "layers|h", "none"))
_NARROWED = st.fixed_dictionaries(
    {"target_modules": _LIST.filter(bool) | _REGEX},
    optional={
        "exclude_modules": st.none() | _LIST | _REGEX | st.just(""),
        "layers_to_transform": st.none() | st.integers(-1, 2) | st.lists(st.integers(0, 12), max_size=3),
        "layers_pattern": st.none() | _PATTERN | st.lists(_PATTERN, max_size=2) | st.just(""),
    },
)


@given(values=_NARROWED)
def test_any_config_adapts_what_it_adapts_in_peft(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    path = tmp_path_factory.getbasetemp() / CONFIG_FILE
    path.write_text(json.dumps({"peft_type": "LORA", **values}))
    try:
        peft = LoraConfig(**values)
    except ValueError:
        with pytest.raises(UserError, match="layers_to_transform"):
            read_config(path)
        return
    config = read_config(path)
    for module in _LAYERED:
        # For an excluded module PEFT returns a value that is false in a boolean context.
        assert config.adapts(module) == bool(check_target_module_exists(peft, module)), module
    path.write_text(config.to_json())
    assert replace(read_config(path), layer_patterns=()) == replace(config, layer_patterns=())


@pytest.mark.parametrize(
    ("values", "dropped"),
    [
        ({"exclude_modules": ["v_proj"]}, "v_proj"),
        ({"exclude_modules": r"model\.layers\.1\..*"}, "layers.1"),
        ({"layers_to_transform": 0}, "layers.1"),
        ({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, "layers.0"),
        ({"target_modules": ["q_proj"]}, "v_proj"),
    ],
)
def test_factors_that_peft_drops_are_refused_and_its_own_choice_is_read(
    bases: dict[str, Path], tmp_path: Path, values: dict[str, Any], dropped: str
) -> None:
    base, options = bases["llama"], {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    get_peft_model(load_base(base), LoraConfig(**options, task_type="CAUSAL_LM")).save_pretrained(wide)
    get_peft_model(load_base(base), LoraConfig(**{**options, **values}, task_type="CAUSAL_LM")).save_pretrained(narrow)

    chosen = set(peft_layers(PeftModel.from_pretrained(load_base(base), narrow)))
    assert read_adapter(narrow, read_architecture(base)).factors.keys() == chosen
    assert not any(dropped in module for module in chosen)
    report = inspected(narrow, base)
    assert not report.problems and not any("no factors for" in warning for warning in report.warnings)
    merge(base, narrow, tmp_path / "out")
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load_base(base), narrow).eval()(ids).logits
        found = load_base(tmp_path / "out")(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    set_config(wide, **values)
    assert set(peft_layers(PeftModel.from_pretrained(load_base(base), wide))) == chosen, "PEFT drops the others"
    with pytest.raises(UserError, match=rf"{next(iter(values))}.*so PEFT would ignore its factors"):
        read_adapter(wide)
    with pytest.raises(UserError, match="PEFT would ignore"):
        merge(base, wide, tmp_path / "none")
    assert any("PEFT would ignore" in problem for problem in inspected(wide, base).problems)


@pytest.mark.parametrize("targets", ["all-linear", "ALL-linear"])
def test_all_linear_leaves_the_output_layer_out(bases: dict[str, Path], tmp_path: Path, targets: str) -> None:
    base = bases["llama"]
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    assert "lm_head" in read_adapter(folder).factors
    set_config(folder, target_modules=targets)
    assert "lm_head" not in peft_layers(PeftModel.from_pretrained(load_base(base), folder))
    with pytest.raises(UserError, match="lm_head is not a target .* PEFT would ignore"):
        read_adapter(folder)


def test_an_adapter_of_none_of_the_base_s_modules_is_not_called_incomplete(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """The language model inside a model for images and text has other names. Control: half of the modules are right."""
    base = bases["llama"]
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base, SIZES["all linears alike"]))
    tensors = load_file(folder / WEIGHTS_FILE)
    for part, message in (("layers.", "none of its modules, such as model.language_model"), ("layers.1", "no factors")):
        moved = {name.replace(f".{part}", f".language_model.{part}"): tensor for name, tensor in tensors.items()}
        save_file(moved, folder / WEIGHTS_FILE)
        with pytest.raises(UserError, match=message):
            merge(base, folder, tmp_path / "out")
        assert any(message in problem for problem in inspected(folder, base).problems)


@pytest.mark.parametrize(
    ("values", "lacking"),
    [
        ({}, "model.layers.1.mlp.up_proj"),
        ({"target_modules": "all-linear"}, "model.layers.1.mlp.up_proj"),
        ({"target_modules": "All-Linear"}, "model.layers.1.mlp.up_proj"),
        ({"target_modules": r".*_proj"}, "model.layers.1.mlp.up_proj"),
        ({"exclude_modules": ["layers.1.mlp.up_proj"]}, None),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp\.up_proj"}, None),
        ({"target_modules": r".*_proj|lm_head", "exclude_modules": ["layers.1.mlp.up_proj"]}, "lm_head"),
        ({"target_modules": r".*(_proj|tokens)", "exclude_modules": ["1.mlp.up_proj"]}, "model.embed_tokens"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_an_incomplete_adapter_is_refused_in_every_room(
    bases: dict[str, Path], tmp_path: Path, values: dict[str, Any], lacking: str | None, ours: bool
) -> None:
    """An adapter with target_modules all-linear is complete without the output layer, which PEFT leaves out."""
    base = bases["llama"]
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base, SIZES["all linears alike"]))
    if not ours:
        (folder / PROVENANCE_FILE).unlink()
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: tensor for name, tensor in tensors.items() if "1.mlp.up_proj" not in name}, folder / WEIGHTS_FILE)
    set_config(folder, **values)
    architecture = read_architecture(base)
    rooms: tuple[Callable[[], object], ...] = (
        lambda: merge(base, folder, tmp_path / "out"),
        lambda: adopt_adapter(LoraSection(init_from=folder), base),
        lambda: read_adapter(folder, architecture),
    )
    if ours:  # names its base by fingerprint
        rooms = (*rooms, lambda: export(folder, tmp_path / "exported"))
    else:
        (note,) = (note for note in export(folder, tmp_path / "unseen") if "its base was not found" in note)
        assert "checks that no factor is missing" in note
    said = [problem for problem in inspected(folder, base).problems if "no factors for" in problem]
    if lacking is None:
        assert not said
        for room in rooms:
            room()
        return
    message = rf"no factors for {re.escape(lacking)}, which adapter_config\.json names \(target_modules"
    assert len(said) == 1 and re.search(message, said[0])
    decoding = cast(Any, SimpleNamespace(architecture=architecture))
    for room in (*rooms, lambda: attach_trained(decoding, base, folder, cast(Any, None))):
        with pytest.raises(UserError, match=message):
            room()
    assert not (tmp_path / "out").exists() and not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_to_transform": "1"}, "must be a layer number"),
        ({"layers_to_transform": [1.0]}, "must be a layer number"),
        ({"layers_to_transform": True}, "must be a layer number"),
        ({"layers_to_transform": 1, "layers_pattern": 3}, "must be the module name"),
        ({"layers_to_transform": 1, "layers_pattern": ["(h"]}, "not a regular expression"),
        ({"layers_pattern": "h"}, "remove it, or give both"),
        ({"layers_to_transform": 1, "target_modules": "all-linear"}, "only with a list of target_modules"),
        ({"layers_to_transform": 1, "target_modules": [f"q{i}" for i in range(20)]}, "20 or more target_modules"),
        ({"exclude_modules": {"q_proj": 1}}, "exclude_modules must be a list"),
        ({"exclude_modules": "(q_proj"}, "exclude_modules: .* not a regular expression"),
    ],
)
def test_keys_that_narrow_and_make_no_sense(folder: Path, values: dict[str, object], message: str) -> None:
    set_config(folder, **values)
    with pytest.raises(UserError, match=message):
        read_config(folder / CONFIG_FILE)


def test_dora_there_and_back(bases: dict[str, Path], tmp_path: Path) -> None:
    written = random_adapter(bases["llama"], SIZES["one name"], dora=True)
    folder = save_adapter(tmp_path / "adapter", bases["llama"], written)
    found = read_adapter(folder)
    assert found.dora and json.loads((folder / CONFIG_FILE).read_text())["use_dora"] is True
    for module, factor in written.factors.items():
        assert torch.equal(found.factors[module].magnitude, factor.magnitude)
    report = inspected(folder, bases["llama"])
    assert not report.problems and report.facts["dora"] is True
    with pytest.raises(UserError, match="vLLM does not serve DoRA"):
        FILES.publish(folder, "name", target=VLLM, max_rank=None)
    card = FILES.publish(folder, "name", target=None, max_rank=None).card
    assert "vllm serve MERGED" in card and "--enable-lora" not in card


def test_a_dora_adapter_without_b_may_still_change_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """Its magnitudes can change the base, as test_merge.py shows. Without magnitudes the adapter is untrained."""
    for dora, effect in ((True, "only its magnitudes can change the base"), (False, "changes nothing")):
        written = random_adapter(bases["llama"], SIZES["one name"], scale=0.0, dora=dora)
        folder = save_adapter(tmp_path / f"adapter-{dora}", bases["llama"], written, trained=False)
        assert [warning for warning in inspected(folder).warnings if effect in warning]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no magnitude", "has no lora_magnitude_vector, but use_dora is true"),
        ("use_dora", "has a lora_magnitude_vector, but use_dora is false"),
        ("half a pair", "lacks lora_A or lora_B"),
        ("another length", r"lora_magnitude_vector is F32 \[3\], expected \["),
        ("not finite", "lora_magnitude_vector has NaN"),
    ],
)
def test_a_dora_adapter_that_is_not_whole(bases: dict[str, Path], tmp_path: Path, mistake: str, message: str) -> None:
    written = random_adapter(bases["llama"], SIZES["one name"], dora=True)
    folder = save_adapter(tmp_path / "adapter", bases["llama"], written)
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
    if mistake == "use_dora":
        set_config(folder, use_dora=False)
    elif mistake == "half a pair":
        del tensors[name.replace("lora_magnitude_vector", "lora_A.weight")]
        del tensors[name.replace("lora_magnitude_vector", "lora_B.weight")]
    elif mistake == "no magnitude":
        del tensors[name]
    else:
        tensors[name] = torch.ones(3) if mistake == "another length" else torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        read_adapter(folder)
    assert inspected(folder).problems


def test_harmless_keys_of_other_versions_are_accepted(folder: Path) -> None:
    set_config(
        folder, peft_version="9", qalora_group_size=16, some_future_switch=None, eva_config={"rho": 2.0}, revision="x"
    )
    read_adapter(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_adapter(folder)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def _drop(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(key)


def _put(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: value(tensors[A])})


@pytest.mark.parametrize(
    ("message", "damage"),
    [
        ("lacks lora_A or lora_B", _drop(B)),
        ("lacks lora_A or lora_B", _drop(A)),
        ("has no factors", dict.clear),
        ("rank 2", _put(A, lambda a: a.T.contiguous())),
        ("rank 2", _put(A, lambda a: a[:1].clone())),
        ("rank 2", _put(B, lambda a: a.clone())),
        ("must be a matrix", _put(A, lambda a: a.flatten())),
        ("must be a matrix", _put(A, lambda a: a[:, :0].clone())),
        ("must be a matrix", _put(A, lambda a: a.double())),
        ("must be a matrix", _put(A, lambda a: a.to(torch.int32))),
        ("NaN", _put(A, lambda a: a * math.nan)),
        ("infinity", _put(A, lambda a: a / 0)),
        ("an adapter without 'base_model.model.'", _put(A.replace("base_model.model.", ""), torch.clone)),
        ("not LoRA factors", _put(A.replace("q_proj", "../../etc/passwd"), torch.clone)),
        ("not LoRA factors", _put(A.replace("q_proj", "q_proj\n"), torch.clone)),
        ("an adapter with its name in", _put(A.replace("lora_A", "lora_A.default"), torch.clone)),
        (
            "an adapter with factors of an embedding",
            _put("base_model.model.model.embed_tokens.lora_embedding_A", torch.clone),
        ),
        ("not LoRA factors", _put("base_model.model.lm_head.modules_to_save.weight", torch.clone)),
        ("not a target", lambda t: t.update({k.replace("q_proj", "k_proj"): t[k].clone() for k in (A, B)})),
    ],
)
def test_damaged_weights_are_refused(
    folder: Path, message: str, damage: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(folder)
    assert str(path) in str(caught.value)


def test_a_malformed_file_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip()
    one = json.dumps({A: json.loads(header)[A]})[1:-1].encode()
    duplicate = header[:-1] + b"," + one + b"}"
    absurd = re.sub(rb'"shape":\[2,64\]', b'"shape":[2,99999999999999999999]', header)
    assert absurd != header
    for bad in (
        b"",
        whole[:-1],
        whole + b"\0",
        whole[:40],
        (2**60).to_bytes(8, "little") + whole[8:],
        len(duplicate).to_bytes(8, "little") + duplicate + whole[8 + length :],
        len(absurd).to_bytes(8, "little") + absurd + whole[8 + length :],
    ):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_adapter(folder)


def test_no_pickle_is_ever_read(folder: Path, tmp_path: Path) -> None:
    planted = SimpleNamespace(run=tmp_path / "ran")

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(planted.run),)

    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="pickle"):
        read_adapter(folder)
    assert not planted.run.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        read_adapter(folder)


def test_links_stay_inside_except_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    outside = weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(outside)
    with pytest.raises(UserError, match="link to a file outside its folder"):
        read_adapter(folder)

    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, source in (("adapter_config.json", folder / "adapter_config.json"), (weights.name, outside)):
        source.rename(blobs / name[:9])
        (snapshot / name).symlink_to(f"../../blobs/{name[:9]}")
    read_adapter(snapshot)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', "[]", '{"format": 1, "base_fingerprint": 3}'])
def test_a_malformed_provenance_is_refused(folder: Path, text: str) -> None:
    (folder / "lowrank_dist.json").write_text(text)
    with pytest.raises(UserError, match=r"lowrank_dist\.json"):
        read_provenance(folder)
    (folder / "lowrank_dist.json").unlink()
    assert read_provenance(folder) is None
