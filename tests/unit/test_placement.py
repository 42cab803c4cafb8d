"""The linears that get factors, the start values of A, and the messages for a wrong target."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.placement import LoraRules, place_factors
from lowrank_dist.errors import UserError
from lowrank_dist.methods.lora.factors import initial_a
from lowrank_dist.untrusted.patterns import Patterns
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("placement")
    return {family: make_tiny(family, base / family) for family in ("llama", "gpt2", "opt")}


@pytest.fixture(scope="module")
def architectures(folders: dict[str, Path]) -> dict[str, Architecture]:
    return {family: read_architecture(folder) for family, folder in folders.items()}


def paths(architecture: Architecture, targets: str | list[str]) -> set[str]:
    placements = place_factors(architecture, LoraRules(4, 8.0, targets, False, {}, {}))
    return {factor.path for placement in placements for factor in placement.factors}


def peft_paths(folder: Path, targets: str | list[str]) -> set[str]:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    suffix, prefix = ".lora_A.default", "base_model.model."
    return {
        name.removeprefix(prefix).removesuffix(suffix) for name, _ in model.named_modules() if name.endswith(suffix)
    }


TARGETS = {
    "llama": ["all-linear", ["q_proj", "v_proj"], ["0.self_attn.q_proj"], r".*\.1\.(self_attn|mlp)\.(o|down)_proj"],
    "gpt2": ["all-linear", ["c_attn"], ["attn.c_proj", "c_fc"], r"transformer\.h\.0\.mlp\.c_.*"],
    "opt": ["all-linear", ["out_proj", "fc1"], ["layers.1.fc2"]],
}


@pytest.mark.parametrize(("family", "targets"), [(f, t) for f, every in TARGETS.items() for t in every])
def test_targets_mean_what_they_mean_to_peft(
    folders: dict[str, Path], architectures: dict[str, Architecture], family: str, targets: str | list[str]
) -> None:
    found = paths(architectures[family], targets)
    assert found == peft_paths(folders[family], targets) and found
    other = next(t for t in TARGETS[family] if t != targets)
    assert found != peft_paths(folders[family], other), "two targets that mean the same prove nothing"


def test_ranks_and_scales_by_pattern(architectures: dict[str, Architecture]) -> None:
    rules = LoraRules(8, 16.0, "all-linear", True, {"v_proj": 2, r"1\.mlp\.down_proj": 5}, {"v_proj": 3.0})
    specs = {f.path: f for p in place_factors(architectures["llama"], rules) for f in p.factors}
    v, down0, down1 = (
        specs[f"model.layers.{layer}.{name}"]
        for layer, name in ((0, "self_attn.v_proj"), (0, "mlp.down_proj"), (1, "mlp.down_proj"))
    )
    assert (v.adapter_rank, v.alpha, v.scale) == (2, 3.0, 3.0 / math.sqrt(2))
    assert (down0.adapter_rank, down0.scale) == (8, 16.0 / math.sqrt(8))
    assert (down1.adapter_rank, down1.scale) == (5, 16.0 / math.sqrt(5))


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (LoraRules(4, 8.0, ["q_prj"], False, {}, {}), "'q_prj'"),
        (LoraRules(4, 8.0, ["q_proj", "c_attn"], False, {}, {}), "'c_attn'"),
        (LoraRules(4, 8.0, ["q_proj", "lm_head"], False, {}, {}), "'lm_head'"),
        (LoraRules(4, 8.0, "lm_head|.*layernorm", False, {}, {}), "layernorm"),
        (LoraRules(4, 8.0, r"model\.layers\.7\..*", False, {}, {}), "layers"),
        (LoraRules(4, 8.0, ["q_proj"], False, {"k_prj": 2}, {}), "lora.rank_pattern: 'k_prj'"),
        (LoraRules(4, 8.0, ["q_proj"], False, {}, {"w": 2.0}), "lora.alpha_pattern: 'w'"),
    ],
)
def test_what_matches_nothing_is_an_error(architectures: dict[str, Architecture], rules: LoraRules, named: str) -> None:
    with pytest.raises(UserError, match="matches no linear of this llama model") as error:
        place_factors(architectures["llama"], rules)
    assert named in str(error.value) and "q_proj" in str(error.value) and "down_proj" in str(error.value)


@pytest.mark.parametrize(
    ("family", "ranks", "alphas", "said"),
    [
        ("llama", {".*_proj": 4, "q_proj": 2}, {}, r"lora.rank_pattern: 'q_proj' is shadowed by '.*_proj': the first"),
        ("llama", {}, {"q_proj": 2.0, ".*q_proj": 4.0}, "lora.alpha_pattern: '.*q_proj' is shadowed by 'q_proj': "),
        (
            "llama",
            {r"0\.self_attn\.q_proj": 1, r"1\..*q_proj": 2, "q_proj": 3},
            {},
            r"'q_proj' is shadowed by '0\\.self_attn\\.q_proj', '1\\..*q_proj': the first",
        ),
        ("gpt2", {"c_attn": 4, "attn.c_attn": 2}, {}, "'attn.c_attn' is shadowed by 'c_attn'"),
        (
            "llama",
            {"k_proj": 4},
            {},
            "'k_proj' matches only model.layers.0.self_attn.k_proj, model.layers.1",
        ),
        ("llama", {".*_proj": 4, "q_proj": 2, "w": 1}, {}, "lora.rank_pattern: 'w' matches no linear"),
    ],
)
def test_a_pattern_without_effect_says_why(
    architectures: dict[str, Architecture], family: str, ranks: dict[str, int], alphas: dict[str, float], said: str
) -> None:
    rules = LoraRules(4, 8.0, ["q_proj" if family == "llama" else "c_attn"], False, ranks, alphas)
    with pytest.raises(UserError) as error:
        place_factors(architectures[family], rules)
    assert said in str(error.value) and "\n" not in str(error.value)
    # In the other order each has an effect.
    if "shadowed" in str(error.value) and len({*ranks, *alphas}) == 2:
        ranks, alphas = dict(reversed(ranks.items())), dict(reversed(alphas.items()))
        if family == "llama" and ".*_proj" in ranks:
            assert place_factors(architectures[family], replace(rules, targets="all-linear", rank_pattern=ranks))


def test_a_pattern_that_is_shadowed_in_part_has_an_effect(architectures: dict[str, Architecture]) -> None:
    rules = LoraRules(8, 8.0, ["q_proj"], False, {r"0\.self_attn\.q_proj": 1, "q_proj": 3}, {})
    placed = place_factors(architectures["llama"], rules)
    assert [factor.adapter_rank for placement in placed for factor in placement.factors] == [1, 3]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "lm_head"], ". lm_head is never adapted, only the linears of layers are"),
        ("lm_head|.*embed_tokens", ". lm_head, model.embed_tokens are never adapted, only the linears of layers are"),
        (["q_proj", "k_prj"], "or 'all-linear'"),
    ],
)
def test_a_module_that_is_never_adapted_is_named_as_such(
    architectures: dict[str, Architecture], targets: str | list[str], said: str
) -> None:
    with pytest.raises(UserError, match="matches no linear of this llama model") as error:
        place_factors(architectures["llama"], LoraRules(4, 8.0, targets, False, {}, {}))
    assert str(error.value).endswith(said)


@pytest.mark.parametrize(
    ("family", "targets", "named"),
    [
        ("llama", r".*(q_proj|lm_head)", "matches lm_head"),
        ("llama", r"model\.(embed_tokens|layers\..*_proj)", "matches model.embed_tokens"),
        ("llama", r"model\.layers\.1\.[a-z_.]*", "matches model.layers.1.input_layernorm, model.layers.1.post_"),
        ("gpt2", r".*(c_attn|wte|wpe)", "matches transformer.wpe, transformer.wte"),
        ("gpt2", r".*(c_attn|lm_head)", "matches lm_head"),
        ("opt", r".*(fc1|embed_positions)", "matches model.decoder.embed_positions"),
    ],
)
def test_a_target_that_reaches_more_than_takes_factors_is_an_error(
    architectures: dict[str, Architecture], family: str, targets: str | list[str], named: str
) -> None:
    with pytest.raises(UserError, match="only the linears of its layers") as error:
        paths(architectures[family], targets)
    assert named in str(error.value) and "lora.targets" in str(error.value)
    assert ("c_attn" if family == "gpt2" else "q_proj") in str(error.value)


def test_a_pattern_of_ranks_may_reach_further_than_the_targets(architectures: dict[str, Architecture]) -> None:
    """A rank pattern says which rank a module would have, not that the module is a target."""
    rules = LoraRules(4, 8.0, ["q_proj"], False, {".*(q_proj|lm_head)": 2}, {})
    assert {f.adapter_rank for p in place_factors(architectures["llama"], rules) for f in p.factors} == {2}


def test_a_module_and_its_part_are_one_too_many(architectures: dict[str, Architecture]) -> None:
    with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_attn and transformer\.h\.0\.attn\.q_proj"):
        place_factors(architectures["gpt2"], LoraRules(4, 8.0, ["c_attn", "q_proj"], False, {}, {}))


def test_a_starts_as_peft_starts_it(folders: dict[str, Path], architectures: dict[str, Architecture]) -> None:
    """U(−1/√in, 1/√in) with the full fan-in: the same bound and spread as PEFT's own draw."""
    placements = place_factors(architectures["llama"], LoraRules(64, 8.0, ["down_proj"], False, {}, {}))
    spec = placements[0].factors[0]
    ours = initial_a(spec, seed=1)
    config = LoraConfig(r=64, target_modules=["down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["llama"]), config).get_submodule(
        f"base_model.model.{spec.path}.lora_A.default"
    )
    assert ours.shape == theirs.weight.shape == (64, 96)
    bound = 1 / math.sqrt(96)
    for draw in (ours, theirs.weight.detach()):
        assert 0.99 * bound < draw.abs().max() <= bound
        assert abs(draw.std() / (bound / math.sqrt(3)) - 1) < 0.03
    assert torch.equal(ours, initial_a(spec, seed=1))
    assert not torch.equal(ours, initial_a(spec, seed=2))
    assert not torch.equal(ours, initial_a(placements[1].factors[0], seed=1))


@pytest.mark.parametrize("key", ["targets", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_backtracks_is_an_error_in_time(
    architectures: dict[str, Architecture], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patterns, "seconds", 0.2)
    expression: object = "(.|.)*[!Z]" if key == "targets" else {"(.|.)*[!Z]": 4}
    with pytest.raises(
        UserError, match="lora: matching the regular expression .* and those before it take more than 0.2 s"
    ):
        place_factors(
            architectures["llama"], LoraRules(**{"rank": 8, "alpha": 16, "targets": "all-linear", key: expression})
        )
