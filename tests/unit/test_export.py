"""export: an adapter with a model card, unchanged or as vLLM and llama.cpp read it; refusals of what they cannot."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowrank_dist.checkpoint.folder import export
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import write_manifest
from lowrank_dist.methods.files import CONFIG_FILE, LLAMA_CPP, PUBLISHED, TARGETS, VLLM, WEIGHTS_FILE
from tests.tiny_adapters import Size, random_adapter, save_adapter
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_exports_the_adapter_unchanged_and_nothing_else(base: Path, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "run/checkpoints/step-2", base, random_adapter(base))
    (source / "optimizer.safetensors").write_bytes(b"large")
    write_manifest(source)
    result = CliRunner().invoke(app, ["export", str(source), "--out", str(tmp_path / "out"), "--for", "vllm"])
    assert result.exit_code == 0, result.output
    names = {"adapter_config.json", "adapter_model.safetensors", "lowrank_dist.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in names)
    with pytest.raises(UserError, match="already exists"):
        export(source, tmp_path / "out")
    with pytest.raises(UserError, match="checkpoints/best or .*checkpoints/last"):
        export(tmp_path / "run", tmp_path / "other")


def test_an_adapter_from_elsewhere(base: Path, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    (source / "lowrank_dist.json").unlink()
    export(source, tmp_path / "out")
    assert not (tmp_path / "out/lowrank_dist.json").exists()
    assert "## Training" not in (tmp_path / "out/README.md").read_text()


def test_vllm_reasons_come_together(base: Path, tmp_path: Path) -> None:
    sizes = random_adapter(base, lambda module: (40, 8.0) if "q_proj" in module else (2, 4.0), dora=True)
    source = save_adapter(tmp_path / "adapter", base, sizes)
    with pytest.raises(UserError) as caught:
        export(source, tmp_path / "out", target=VLLM)
    for part in ("rank, 40 (of", "--max-lora-rank 64", "vLLM does not serve DoRA", "lowrank-dist merge"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="--max-rank 48: not a rank that vLLM accepts; give one of 8, 16"):
        export(source, tmp_path / "out", target=VLLM, max_rank=48)
    assert not (tmp_path / "out").exists()
    alike = save_adapter(tmp_path / "alike", base, random_adapter(base, lambda module: (20, 8.0)))
    export(alike, tmp_path / "out", target=VLLM, max_rank=32)
    assert "--max-lora-rank 32" in (tmp_path / "out/README.md").read_text()


def leaf(module: str) -> str:
    return module.rpartition(".")[2]


# Ranks and alphas that differ by module, and rsLoRA: more than one alpha over one rank can say.
SCALED: Mapping[str, tuple[Size, bool]] = {
    "rslora": (lambda module: (4, 6.0), True),
    "alphas": (lambda module: (4, {"q_proj": 2.0, "down_proj": 48.0}.get(leaf(module), 6.0)), False),
    "ranks": (lambda module: ({"v_proj": 1, "up_proj": 7}.get(leaf(module), 4), 6.0), False),
    "all": (lambda module: ({"k_proj": 2}.get(leaf(module), 4), {"o_proj": 3.0}.get(leaf(module), 8.0)), True),
    "alpha 0": (lambda module: (4, 0.0), False),
}


def read_as(program: str, folder: Path) -> dict[str, torch.Tensor]:
    """Return module → ΔW as a program that ignores patterns reads it: scale from r and lora_alpha, shapes as stored.

    vLLM: `PEFTHelper` with one scale for all; llama.cpp: `llama_adapter_lora_weight::get_scale`.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = load_file(folder / WEIGHTS_FILE)
    updates = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            if program == LLAMA_CPP:
                scale = config["lora_alpha"] / b.size(1) if config["lora_alpha"] else 1.0
            else:
                scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
                assert b.size(1) <= config["r"], "vLLM holds the --max-lora-rank against r alone"
            updates[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = scale * (b @ a)
    return updates


@pytest.mark.parametrize("program", [VLLM, LLAMA_CPP])
@pytest.mark.parametrize("name", SCALED)
def test_one_rank_and_one_alpha_for_who_reads_no_more(base: Path, tmp_path: Path, name: str, program: str) -> None:
    size, rslora = SCALED[name]
    adapter = random_adapter(base, size, rslora=rslora)
    source = save_adapter(tmp_path / "adapter", base, adapter)
    note = export(source, tmp_path / "out", target=program)[0]
    largest = max(factor.rank for factor in adapter.factors.values())
    assert note == f"its scales were multiplied into B, so rank and alpha are now {largest} everywhere"
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    updates = read_as(program, tmp_path / "out")
    assert updates.keys() == adapter.factors.keys()
    errors = {}
    for module, factor in adapter.factors.items():
        expected = factor.scale(rslora) * (factor.b.double() @ factor.a.double())
        torch.testing.assert_close(updates[module], expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        wrong = read_as(program, source)[module] if name != "ranks" or program == LLAMA_CPP else None
        errors[module] = 1.0 if wrong is None else (wrong - expected).abs().max().item()
    # The control: unconverted, the adapter is read wrongly, except where the program knows the feature.
    known = {(VLLM, "rslora"), (VLLM, "alpha 0"), (LLAMA_CPP, "ranks")}
    assert (max(errors.values()) > 1e-2) == ((program, name) not in known)
    assert_peft_reads_both_alike(base, source, tmp_path / "out")


def assert_peft_reads_both_alike(base: Path, source: Path, folder: Path) -> None:
    ids = torch.arange(24).view(2, 12) + 5
    logits = []
    for each in (source, folder):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), each)
        with torch.inference_mode():
            logits.append(model.eval()(input_ids=ids).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


@pytest.mark.parametrize("target", [None, VLLM, LLAMA_CPP])
def test_what_all_read_alike_stays_as_it_is(base: Path, tmp_path: Path, target: str | None) -> None:
    adapter = random_adapter(base, lambda module: None if module == "lm_head" else (4, 6.5))
    source = save_adapter(tmp_path / "adapter", base, replace(adapter, dropout=0.1))
    assert export(source, tmp_path / "out", target=target) == ()
    for name in PUBLISHED:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_without_a_target_nothing_is_folded(base: Path, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", base, random_adapter(base, rslora=True))
    assert export(source, tmp_path / "out") == ()
    assert (tmp_path / "out" / CONFIG_FILE).read_bytes() == (source / CONFIG_FILE).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert "(the folder exported with --for vllm)" in card


def test_narrowing_keys_stay(base: Path, tmp_path: Path) -> None:
    """The exported adapter still adapts the same modules in PEFT."""
    adapter = random_adapter(base, lambda m: (4, 6.0) if "layers.1" in m and "k_proj" not in m else None, rslora=True)
    source = save_adapter(tmp_path / "adapter", base, adapter)
    config = json.loads((source / CONFIG_FILE).read_text())
    narrowed = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    narrowed |= {"layers_to_transform": [1], "exclude_modules": ["k_proj"]}
    (source / CONFIG_FILE).write_text(json.dumps(config | narrowed))
    export(source, tmp_path / "out", target=VLLM)
    written = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert {key: written[key] for key in narrowed} == narrowed
    assert_peft_reads_both_alike(base, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "target", "reason"),
    [
        ("gpt2", VLLM, "vLLM supports no LoRA on GPT-2; merge it"),
        ("gpt2", LLAMA_CPP, "transposes GPT-2's factors"),
        ("opt", LLAMA_CPP, "does not support OPT"),
        ("phi3", LLAMA_CPP, "has not been tried with adapters of a phi3; merge it"),
        ("glm4", LLAMA_CPP, "has not been tried with adapters of a glm4; merge it"),
        ("opt", VLLM, None),
        ("qwen3", LLAMA_CPP, None),
        ("granite", LLAMA_CPP, None),
    ],
)
def test_families_by_name(family: str, target: str, reason: str | None, tmp_path: Path) -> None:
    model = make_tiny(family, tmp_path / "model")
    source = save_adapter(tmp_path / "adapter", model, random_adapter(model))
    if reason is None:
        export(source, tmp_path / "out", target=target)
        return
    with pytest.raises(UserError, match=reason):
        export(source, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()
    export(source, tmp_path / "out")


def test_the_output_layer_alone_is_no_family(base: Path, tmp_path: Path) -> None:
    source = save_adapter(
        tmp_path / "adapter", base, random_adapter(base, lambda m: (2, 4.0) if m == "lm_head" else None)
    )
    assert export(source, tmp_path / "out", target=LLAMA_CPP) == ()
    (note,) = export(source, tmp_path / "vllm", target=VLLM)
    assert note.startswith("vLLM supports factors of lm_head only in some families; if it refuses them, merge it")


def test_no_dora(base: Path, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", base, random_adapter(base, dora=True))
    for target in TARGETS:
        with pytest.raises(UserError, match=f"{target} does not serve DoRA; merge it into the base"):
            export(source, tmp_path / "out", target=target)


def test_a_product_beyond_fp32(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(base, lambda module: (2, 1e29 if "q_proj" in module else 4.0), scale=1e10)
    source = save_adapter(tmp_path / "adapter", base, adapter)
    with pytest.raises(
        UserError, match=r"out: not written, because .*lora_B.weight has NaN or infinity; its scale times B"
    ):
        export(source, tmp_path / "out", target=LLAMA_CPP)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--for", "tgi"], ["--max-rank", "32"], ["--for", "llama.cpp", "--max-rank", "32"]]
)
def test_options_that_make_no_sense(base: Path, tmp_path: Path, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["export", str(base), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2 and "error: --" in result.output
