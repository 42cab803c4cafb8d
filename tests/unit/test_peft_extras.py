"""Adapters as PEFT saves them with the output layer, embeddings or a variant of LoRA, against PEFT's own merge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_dist.checkpoint.folder import export
from lowrank_dist.errors import UserError
from lowrank_dist.merging.merge import merge
from lowrank_dist.methods.lora.adopt import adopt_adapter
from lowrank_dist.methods.lora.config import LoraConfig as Section
from lowrank_dist.methods.lora.load import load_adapter
from tests.tiny_adapters import inspected
from tests.tiny_models import make_tiny

WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.lm_head.base_layer.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base")


def saved(
    folder: Path, base: Path, embeddings: bool | str = "auto", dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """Write an adapter with PEFT whose factors are random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    options = {"target_modules": ["q_proj", "lm_head"], **options}
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / WEIGHTS
    save_file({name: tensor.clone() for name, tensor in edit(load_file(path)).items()}, path, {"format": "pt"})


def in_peft(base: Path, folder: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.merge_and_unload().state_dict()


def assert_merges_as_in_peft(base: Path, folder: Path, out: Path) -> None:
    merge(base, folder, out)
    expected = in_peft(base, folder)
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_a_copy_of_the_output_layer_is_read_and_merged(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base)
    assert HEAD in load_file(folder / WEIGHTS)
    adapter = load_adapter(folder)
    assert adapter.copies == (HEAD,) and set(adapter.ranks) >= {"lm_head"} and len(adapter.ranks) == 3
    assert inspected(folder, base).problems == []
    assert_merges_as_in_peft(base, folder, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_copies_of_both_embeddings_are_read(family: str, tmp_path: Path) -> None:
    base = make_tiny(family, tmp_path / "base")
    targets = ["c_attn"] if family == "gpt2" else ["q_proj"]
    folder = saved(tmp_path / "adapter", base, True, target_modules=targets)
    copies = load_adapter(folder).copies
    assert len(copies) == 2 and all(name.startswith("base_model.model.") for name in copies)
    assert inspected(folder, base).problems == [] and inspected(folder, base).warnings == []
    section = adopt_adapter(Section(init_from=folder), base)
    assert section.rank == 2
    assert_merges_as_in_peft(base, folder, tmp_path / "out")


def test_copies_in_another_type_are_the_base_s(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base, dtype=torch.bfloat16)
    assert load_file(folder / WEIGHTS)[HEAD].dtype == torch.bfloat16
    assert inspected(folder, base).problems == []
    merge(base, folder, tmp_path / "out")


DIFFERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "trained": (lambda weight: weight + 1e-6, "it differs from lm_head.weight of"),
    "one value": (lambda weight: torch.cat((weight[:-1], weight[-1:] + 1)), "it differs from lm_head.weight of"),
    "resized": (lambda weight: torch.cat((weight, weight[:5])), "so the vocabulary was resized"),
}


@pytest.mark.parametrize("how", DIFFERS)
def test_a_copy_that_differs_is_refused_everywhere(how: str, base: Path, tmp_path: Path) -> None:
    edit, said = DIFFERS[how]
    folder = saved(tmp_path / "adapter", base)
    change(folder, lambda held: {**held, HEAD: edit(held[HEAD])})
    pattern = rf"{WEIGHTS}: {HEAD}: .*{said}.*merge_and_unload"
    with pytest.raises(UserError, match=pattern):
        merge(base, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (problem,) = inspected(folder, base).problems
    assert said in problem
    change(folder, lambda held: {name: tensor for name, tensor in held.items() if "lm_head.lora" not in name})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match=pattern):
        adopt_adapter(Section(init_from=folder), base)


def test_a_copy_without_its_base_is_noted_and_left_out_for_a_server(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/model"}))
    (said,) = inspected(folder).warnings
    assert said.startswith(f"{folder / WEIGHTS}: {HEAD}: taken for a copy of the base's and left out")
    notes = export(folder, tmp_path / "vllm", target="vLLM")
    assert said in notes and any("tensors that are no factors were left out, since vLLM" in note for note in notes)
    assert not [name for name in load_file(tmp_path / "vllm" / WEIGHTS) if "lora_" not in name]
    assert said in export(folder, tmp_path / "plain")
    assert HEAD in load_file(tmp_path / "plain" / WEIGHTS), "PEFT's own file stays as it is"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.bias"])
def test_other_weights_are_refused(base: Path, tmp_path: Path, name: str) -> None:
    """The control: only embeddings are left out."""
    folder = saved(tmp_path / "adapter", base)
    change(folder, lambda held: {**held, f"base_model.model.{name}": torch.ones(4, 4)})
    with pytest.raises(UserError, match="not LoRA factors of a linear"):
        load_adapter(folder)


VARIANTS: dict[str, dict[str, Any]] = {
    "mica": {"init_lora_weights": "mica"},
    "MiCA": {"init_lora_weights": "MiCA"},
    "Gaussian": {"init_lora_weights": "Gaussian"},
    "velora": {"velora_config": VeloraConfig(num_groups=2)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_leave_the_base_as_it_is(variant: str, base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"], **VARIANTS[variant])
    assert inspected(folder, base).problems == []
    assert_merges_as_in_peft(base, folder, tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "corda"])
def test_starts_that_change_the_base_are_refused(start: str, base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
    with pytest.raises(UserError, match=f"init_lora_weights: '{start}' .changes the base"):
        load_adapter(folder)
