"""Faults of a model folder are told by their cause, in a line each: tied embeddings, wrapped names, another model."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import check_checkpoint, open_checkpoint
from lowrank_dist.methods.lora.load import load_adapter
from tests.tiny_adapters import inspected, random_adapter, save_adapter
from tests.tiny_models import make_tiny


def fault(folder: Path) -> str:
    """Return the error of a model folder, "" where there is none."""
    with open_checkpoint(folder) as checkpoint:
        try:
            check_checkpoint(read_architecture(folder), checkpoint)
        except UserError as error:
            return str(error)
    return ""


def with_key(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "key", "stated"),
    [
        ("llama", False, "is false, but"),
        ("llama", None, "is false (it is missing, and that is the default of a llama), but"),
        ("qwen2", None, "is false (it is missing, and that is the default of a qwen2), but"),
        ("gpt2", False, "is false, but"),
        ("opt", False, "is false, but"),
    ],
)
def test_weights_without_an_output_layer_name_the_key(
    family: str, key: bool | None, stated: str, tmp_path: Path
) -> None:
    folder = make_tiny(family, tmp_path, tie_word_embeddings=True)
    assert fault(folder) == ""
    with_key(folder, tie_word_embeddings=key)
    said = fault(folder)
    assert said.startswith(
        f"{folder / 'config.json'}: tie_word_embeddings {stated} the weights have no lm_head.weight; "
    )
    assert "set it to true if" in said and "\n" not in said


def test_weights_without_word_embeddings_name_the_key(tmp_path: Path) -> None:
    """As a tied model is stored whose embeddings have only the name of the output layer."""
    folder = make_tiny("llama", tmp_path, tie_word_embeddings=True)
    rewrite(
        folder, lambda held: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in held.items()}
    )
    assert fault(folder) == ""
    with_key(folder, tie_word_embeddings=False)
    assert "tie_word_embeddings is false, but the weights have no model.embed_tokens.weight; set it" in fault(folder)
    assert "\n" not in fault(folder)


@pytest.mark.parametrize(("family", "words"), [("llama", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_an_output_layer_of_its_own_is_not_tied(family: str, words: str, tmp_path: Path) -> None:
    """Transformers 5 does not tie the two either: the same numbers or an error."""
    folder = make_tiny(family, tmp_path, tie_word_embeddings=False)
    ids = torch.arange(8)[None]
    untied = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    with_key(folder, tie_word_embeddings=True)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, untied)
    said = fault(folder)
    assert said.startswith(
        f"{folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from {words}"
    )
    assert "set it to false" in said and "\n" not in said


def test_a_copy_of_the_word_embeddings_is_tied(tmp_path: Path) -> None:
    """The control: old pickles were converted with both names."""
    folder = make_tiny("llama", tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda held: {**held, "lm_head.weight": held["model.embed_tokens.weight"]})
    assert fault(folder) == ""


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "_orig_mod.": (lambda name: f"_orig_mod.{name}", "torch.compile"),
    "_orig_mod. inside": (lambda name: name.replace(".0.", ".0._orig_mod."), "torch.compile"),
    "_fsdp_wrapped_module.": (lambda name: name.replace(".1.", ".1._fsdp_wrapped_module."), "FSDP"),
    "_checkpoint_wrapped_module.": (lambda name: f"_checkpoint_wrapped_module.{name}", "checkpoint_wrapper"),
    "module.": (lambda name: f"module.{name}", "DistributedDataParallel or DeepSpeed"),
}


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_names_that_a_wrapper_gave_are_one_line(wrapped: str, family: str, tmp_path: Path) -> None:
    rename, origin = WRAPPED[wrapped]
    folder = make_tiny(family, tmp_path)
    rewrite(folder, lambda held: {rename(name): tensor for name, tensor in held.items()})
    said = fault(folder)
    assert repr(wrapped.split()[0]) in said and origin in said and "\n" not in said, said


ADAPTED = "base_model.model."


@pytest.mark.parametrize(
    ("rename", "part", "origin"),
    [
        (lambda name: name.replace(ADAPTED, f"{ADAPTED}_orig_mod."), "_orig_mod.", "torch.compile"),
        (lambda name: f"_orig_mod.{name}", "_orig_mod.", "torch.compile"),
        (lambda name: name.replace("mlp.", "mlp._fsdp_wrapped_module."), "_fsdp_wrapped_module.", "FSDP"),
        (lambda name: f"module.{name}", "module.", "DistributedDataParallel or DeepSpeed"),
        (
            lambda name: name.replace(ADAPTED, f"{ADAPTED}module."),
            "base_model.model.module.",
            "DistributedDataParallel",
        ),
        (lambda name: f"{ADAPTED}{name}", f"{ADAPTED}{ADAPTED}", "PEFT, applied to a model that it had adapted"),
    ],
)
def test_an_adapter_of_a_wrapped_model_is_one_line(
    rename: Callable[[str], str], part: str, origin: str, tmp_path: Path
) -> None:
    base = make_tiny("llama", tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    path = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    report = inspected(folder, base)
    (said,) = report.problems
    assert f"have {part!r} in their names, which {origin}" in said
    with pytest.raises(UserError, match="adapter_model.safetensors: ") as error:
        load_adapter(folder)
    assert str(error.value) == said
    # The command of the message mends it.
    command = said[said.index("python -c ") :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert inspected(folder, base).problems == [] and len(load_adapter(folder).ranks) == 15


def test_another_model_is_a_few_lines(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    with_key(folder, hidden_size=32)
    lines = fault(folder).splitlines()
    assert len(lines) == 4 and lines[-1].endswith("more tensors with such a fault") and "has shape" in lines[0]
    rewrite(folder, lambda held: {f"other.{name}": tensor for name, tensor in held.items()})
    missing, unknown = fault(folder).splitlines()
    assert "21 tensors (" in missing and "21 tensors (" in unknown
