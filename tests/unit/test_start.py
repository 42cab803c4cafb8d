"""lora.init_from: the config takes over the adapter's settings, or says why it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.placement import LoraRules, place_factors
from lowrank_dist.config import Config
from lowrank_dist.engine.resumable import complete
from lowrank_dist.errors import UserError
from lowrank_dist.methods.lora.adopt import initial_factors
from tests.tiny_adapters import Size, random_adapter, save_adapter
from tests.tiny_models import make_tiny


def config(base: Path, **lora: Any) -> Config:
    return Config.model_validate(
        {"model": {"path": str(base)}, "lora": lora, "data": {"train": "x"}, "output": {"dir": "y"}}
    )


def placements(config: Config) -> Any:
    lora = config.lora
    rules = LoraRules(lora.rank, lora.alpha, lora.targets, lora.rslora, lora.rank_pattern, lora.alpha_pattern)
    return place_factors(read_architecture(config.model.path), rules)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_tiny(family, tmp_path_factory.mktemp(family)) for family in ("llama", "gpt2", "opt")}


def mixed(module: str) -> tuple[int, float] | None:
    return (
        None if module == "lm_head" else (1 + len(module) % 5, 0.5 * len(module)) if sum(map(ord, module)) % 3 else None
    )


def alike(module: str) -> tuple[int, float] | None:
    return None if module == "lm_head" else (3, 6.0)


@pytest.mark.parametrize("size", [mixed, alike])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_placement_reproduces_the_factors(bases: dict[str, Path], tmp_path: Path, family: str, size: Size) -> None:
    adapter = random_adapter(bases[family], size, rslora=True)
    folder = save_adapter(tmp_path / "adapter", bases[family], adapter)
    adopted = complete(config(bases[family], init_from=str(folder), dropout=0.25), None)
    assert adopted.lora.dropout == 0.25 and adopted.lora.rslora
    placed = placements(adopted)
    specs = {spec.path: spec for placement in placed for spec in placement.factors}
    assert {p: (s.adapter_rank, s.alpha) for p, s in specs.items()} == {
        m: (f.rank, f.alpha) for m, f in adapter.factors.items()
    }
    for path, found in initial_factors(folder, placed, bases[family]).items():
        assert torch.equal(found.a, adapter.factors[path].a) and torch.equal(found.b, adapter.factors[path].b)
    assert complete(adopted, None) == adopted, "the config that a run writes down starts the same run"


def test_contradictions_come_together(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base, alike))
    with pytest.raises(UserError) as caught:
        complete(config(base, init_from=str(folder), rank=4, alpha=7.0, targets=["q_proj"], rslora=False), None)
    for part in (
        "lora.rank is 4 in the config and 3 in the adapter",
        "lora.alpha is 7.0 in the config and 6.0 in the adapter",
        "lora.targets",
    ):
        assert part in str(caught.value)
    assert "rslora" not in str(caught.value)
    assert complete(config(base, init_from=str(folder), rank=3, targets="all-linear"), None).lora.alpha == 6.0
    assert complete(config(base), None) == config(base)


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", -2), ("lora_alpha", 0), ("alpha_pattern", {"q_proj": -1})])
def test_an_alpha_that_no_run_has(bases: dict[str, Path], tmp_path: Path, key: str, value: Any) -> None:
    folder = save_adapter(tmp_path / "adapter", bases["llama"], random_adapter(bases["llama"], alike))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match="adapter_config.json.*alpha"):
        complete(config(bases["llama"], init_from=str(folder)), None)


def test_another_model(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", bases["llama"], random_adapter(bases["llama"], alike))
    with pytest.raises(UserError, match="none of its modules, .*, is in the base, a gpt2 model"):
        complete(config(bases["gpt2"], init_from=str(folder)), None)
    other = make_tiny("llama", tmp_path / "wide", intermediate_size=128)
    adopted = complete(config(other, init_from=str(folder)), None)
    with pytest.raises(UserError, match="base_fingerprint"):
        initial_factors(folder, placements(adopted), other)
    (folder / "lowrank_dist.json").unlink()
    with pytest.raises(UserError, match=r"gate_proj has lora_A .* takes \[3, 64\] and \[128, 3\]"):
        initial_factors(folder, placements(adopted), other)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        complete(config(other, init_from=str(tmp_path / "nowhere")), None)
