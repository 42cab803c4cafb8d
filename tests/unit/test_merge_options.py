"""Merging with several weighted adapters, other file sizes, another dtype, and verification against plain PEFT."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.formats.layout import pack, shard_names
from lowrank_dist.merging import merge as merge_module
from lowrank_dist.merging.merge import MergeReport, merge
from lowrank_dist.merging.options import OutputFormat, WeightedAdapter, parse_adapter, parse_dtype, parse_shard_size
from lowrank_dist.merging.verify import TOLERANCES, Verification, Verifier
from lowrank_dist.methods.lora.files import read_adapter
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny

SIZES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Ranks, alphas and targets differ; some modules have factors of both adapters.
FIRST = re.compile(r".*(q_proj|down_proj|c_attn|fc2)")
SECOND = re.compile(r".*(q_proj|v_proj|c_attn|attn\.c_proj)")


def adapters_of(base: Path, folder: Path, *, scale: float = 0.02, weights: tuple[float, float] = (0.7, -1.3)):
    first = random_adapter(base, lambda module: (3, 6.0) if FIRST.fullmatch(module) else None, scale=scale)
    second = random_adapter(
        base, lambda module: (5, 8.0) if SECOND.fullmatch(module) else None, rslora=True, seed=1, scale=scale
    )
    return (
        WeightedAdapter(save_adapter(folder / "first", base, first), weights[0]),
        WeightedAdapter(save_adapter(folder / "second", base, second), weights[1]),
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def in_float64(base: Path, adapters: tuple[WeightedAdapter, ...]) -> dict[str, torch.Tensor]:
    """Return W + Σ w·s·B·A in float64, over whole tensors, from PEFT's own files and config."""
    merged = {name: tensor.double() for name, tensor in tensors_of(base).items()}
    for adapter in adapters:
        config = json.loads((adapter.path / "adapter_config.json").read_text())
        factors = load_file(adapter.path / "adapter_model.safetensors")
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        for key in (key for key in factors if ".lora_A." in key):
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            delta = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
            merged[name] += adapter.weight * scale * (delta.T if config["fan_in_fan_out"] else delta)
    return merged


def load(folder: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a sharded bf16 base, two adapters and their plain merge."""
    folder = tmp_path_factory.mktemp("place")
    base = make_tiny("llama", folder / "base", max_shard_size="60KB", dtype=torch.bfloat16)
    merge(base, adapters_of(base, folder), folder / "plain")
    return folder


class TestSeveralAdapters:
    @pytest.mark.parametrize("dtype", SIZES)
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_the_sum_is_rounded_once(self, tmp_path: Path, family: str, dtype: str) -> None:
        base = make_tiny(family, tmp_path / "base", dtype=SIZES[dtype])
        adapters = adapters_of(base, tmp_path, scale=0.1)
        report = merge(base, adapters, tmp_path / "out")
        found, exact, before = tensors_of(tmp_path / "out"), in_float64(base, adapters), tensors_of(base)
        half_ulp = torch.finfo(SIZES[dtype]).eps / 2
        for name, tensor in found.items():
            assert tensor.dtype == SIZES[dtype]
            # One rounding to the dtype after fp32 sums; two roundings would exceed this somewhere.
            error = (tensor.double() - exact[name]).abs()
            slack = 0 if torch.equal(exact[name], before[name].double()) else 2e-6
            assert (error <= half_ulp * exact[name].abs() * (1 + 1e-6) + slack).all(), name
        assert report.warnings == () and [part.adapter for part in report.adapters] == list(adapters)
        assert all(
            part.changed == part.adapted == len(read_adapter(part.adapter.path).factors) for part in report.adapters
        )
        assert report.adapted < sum(part.adapted for part in report.adapters), "no module has both"

    @pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
    def test_peft_side_by_side_agrees(self, tmp_path: Path, family: str) -> None:
        base = make_tiny(family, tmp_path / "base")
        adapters = adapters_of(base, tmp_path)
        merge(base, adapters, tmp_path / "out")

        def by_peft(weights: list[float]) -> torch.Tensor:
            model = PeftModel.from_pretrained(load(base), adapters[0].path, adapter_name="a")
            model.load_adapter(adapters[1].path, adapter_name="b")
            model.base_model.set_adapter(["a", "b"])
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    for name, weight in zip("ab", weights, strict=True):
                        if name in module.scaling:
                            module.scaling[name] *= weight
            return logits(model)

        found, expected = logits(load(tmp_path / "out")), by_peft([0.7, -1.3])
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        for wrong in ([1.0, 1.0], [0.7, 1.3], [-1.3, 0.7]):
            assert (found - by_peft(wrong)).abs().max() > 1e-3 * expected.abs().max()

    def test_one_with_a_weight_is_the_adapter_at_that_scale(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base")
        (first, _) = adapters_of(base, tmp_path)
        read = read_adapter(first.path)
        halved = {module: replace(factor, alpha=factor.alpha / 2) for module, factor in read.factors.items()}
        save_adapter(tmp_path / "halved", base, replace(read, factors=halved))
        merge(base, [replace(first, weight=0.5)], tmp_path / "weighted")
        merge(base, tmp_path / "halved", tmp_path / "out")
        found, expected = tensors_of(tmp_path / "weighted"), tensors_of(tmp_path / "out")
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_one_that_changes_nothing_is_named(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
        first, second = adapters_of(base, tmp_path, weights=(1.0, 1.0))
        zero = random_adapter(base, lambda module: (2, 4.0) if SECOND.fullmatch(module) else None, scale=0.0)
        untrained = WeightedAdapter(save_adapter(tmp_path / "untrained", base, zero, trained=False))
        report = merge(base, [first, untrained], tmp_path / "out")
        assert len(report.warnings) == 1 and report.warnings[0].startswith(f"{untrained.path}: changes nothing")
        assert [part.changed for part in report.adapters] == [4, 0]
        # The weight makes the update too small for bf16; without a message it would be lost silently.
        report = merge(base, [first, replace(second, weight=1e-9)], tmp_path / "lost")
        assert [part.changed for part in report.adapters] == [4, 0] and str(second.path) in report.warnings[0]
        with pytest.raises(UserError, match="changes nothing"):
            merge(base, [replace(first, weight=1e-9), untrained], tmp_path / "none")
        assert not (tmp_path / "none").exists()

    def test_two_that_cancel_are_refused(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base")
        first, _ = adapters_of(base, tmp_path)
        copy = save_adapter(tmp_path / "copy", base, read_adapter(first.path))
        with pytest.raises(UserError, match="changes nothing"):
            merge(base, [replace(first, weight=1.0), WeightedAdapter(copy, -1.0)], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_each_is_checked_against_the_base(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base")
        first, second = adapters_of(base, tmp_path)
        other = make_tiny("llama", tmp_path / "other", seed=1)
        save_adapter(tmp_path / "foreign", other, read_adapter(second.path))
        foreign = WeightedAdapter(tmp_path / "foreign")
        with pytest.raises(UserError, match=r"foreign: trained on another base"):
            merge(base, [first, foreign], tmp_path / "out")
        report = merge(base, [first, foreign], tmp_path / "out", force_mismatch=True)
        assert len(report.warnings) == 1 and str(foreign.path) in report.warnings[0]
        wide = make_tiny("llama", tmp_path / "wide", intermediate_size=80)
        misfit = WeightedAdapter(save_adapter(tmp_path / "misfit", wide, random_adapter(wide)))
        with pytest.raises(UserError, match="misfit: does not fit the base"):
            merge(base, [first, misfit], tmp_path / "out2")
        with pytest.raises(UserError, match="given twice"):
            merge(base, [first, second, WeightedAdapter(tmp_path / "misfit" / ".." / "first")], tmp_path / "out2")
        with pytest.raises(UserError, match="at least one"):
            merge(base, [], tmp_path / "out2")


class TestText:
    def test_adapters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "lr=0.1").mkdir()
        for text, path, weight in (
            ("run/adapter", "run/adapter", 1.0),
            ("run/adapter=0.7", "run/adapter", 0.7),
            ("run/adapter=-2", "run/adapter", -2.0),
            ("lr=0.1", "lr=0.1", 1.0),
            ("lr=0.1=0.5", "lr=0.1", 0.5),
            ("lr=0.2", "lr", 0.2),
        ):
            assert parse_adapter(text) == WeightedAdapter(Path(path), weight)
        for text in ("a=0", "a=-0.0", "a=nan", "a=inf", "a=-inf", "a=1e999"):
            with pytest.raises(UserError, match="adapter a: weight"):
                parse_adapter(text)
        for text in ("a=", "a=b", "lr=0.3/adapter", "=0.5", "x" * 300, "x" * 300 + "=1", "a\0b"):
            with pytest.raises(UserError, match=r"DIR=WEIGHT"):
                parse_adapter(text)

    def test_sizes(self) -> None:
        for text, size in (
            ("5GB", 5 * 10**9),
            ("200MB", 2 * 10**8),
            ("1.5GB", 15 * 10**8),
            ("2GiB", 2 << 30),
            ("64MiB", 64 << 20),
            ("3KB", 3000),
            ("1TB", 10**12),
        ):
            assert parse_shard_size(text) == size
        for text in (
            "5",
            "GB",
            "5Gb",
            "5 PB",
            "-1GB",
            "0GB",
            "0.0001KB",
            "1e3MB",
            "",
            "nanGB",
            "5GB5GB",
            "9" * 400 + "GB",
        ):
            with pytest.raises(UserError, match="KB, KiB, MB, MiB, GB, GiB"):
                parse_shard_size(text)

    def test_types(self) -> None:
        assert [parse_dtype(text) for text in ("auto", "fp32", "bf16", "fp16")] == [None, "F32", "BF16", "F16"]
        with pytest.raises(UserError, match="auto, fp32, bf16, fp16"):
            parse_dtype("float32")


# From 1: empty tensors have no storage of their own, and Hugging Face treats them as copies of one another.
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40), limit=st.integers(1, 100))
def test_tensors_are_packed_as_hugging_face_packs_them(sizes: list[int], limit: int) -> None:
    state = {f"t{index:02d}": torch.zeros(size, dtype=torch.uint8) for index, size in enumerate(sizes)}
    shards = pack(sizes, limit)
    assert sorted(index for shard in shards for index in shard) == list(range(len(sizes)))
    assert all(shard and (len(shard) == 1 or sum(sizes[index] for index in shard) <= limit) for shard in shards)
    theirs = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    ours = {
        name: [f"t{index:02d}" for index in shard] for name, shard in zip(shard_names(len(shards)), shards, strict=True)
    }
    assert ours == {name: list(tensors) for name, tensors in theirs.filename_to_tensors.items()}


class TestShards:
    @settings(max_examples=12, deadline=None)
    @given(limit=st.integers(1, 200_000), dtype=st.sampled_from([None, "F32", "F16"]))
    def test_any_size_holds_the_same_tensors(
        self, place: Path, tmp_path_factory, limit: int, dtype: str | None
    ) -> None:
        out = tmp_path_factory.mktemp("any") / "out"
        seen = []
        adapters = [WeightedAdapter(place / "first", 0.7), WeightedAdapter(place / "second", -1.3)]
        options = {"output_format": OutputFormat(limit, dtype), "progress": lambda *numbers: seen.append(numbers)}
        report = merge(place / "base", adapters, out, **options)
        if dtype is None:
            found, expected = tensors_of(out), tensors_of(place / "plain")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        files = sorted(out.glob("*.safetensors"))
        assert report.nbytes == sum(path.stat().st_size for path in files) and seen[-1][0] == seen[-1][1]
        weight_map, total = {}, 0
        for path in files:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                assert file.metadata() == {"format": "pt"}
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            assert nbytes <= limit or len(tensors) == 1
            total += nbytes
            weight_map |= dict.fromkeys(tensors, path.name)
        index = out / "model.safetensors.index.json"
        if len(files) == 1:
            assert files[0].name == "model.safetensors" and not index.exists()
        else:
            assert [path.name for path in files] == shard_names(len(files))
            content = json.loads(index.read_text())
            assert content["weight_map"] == weight_map and content["metadata"]["total_size"] == total
        assert torch.isfinite(logits(load(out))).all()

    def test_the_index_is_transformers_own(self, place: Path, tmp_path: Path) -> None:
        adapters = [WeightedAdapter(place / "first")]
        merge(place / "base", adapters, tmp_path / "out", output_format=OutputFormat(shard_size=50_000))
        load(tmp_path / "out", dtype="auto").save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
        ours, theirs = (
            json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("out", "theirs")
        )
        assert ours["metadata"] == theirs["metadata"] and ours["weight_map"].keys() == theirs["weight_map"].keys()

    def test_one_file_leaves_nothing_of_the_old_ones(self, place: Path, tmp_path: Path) -> None:
        merge(place / "base", place / "first", tmp_path / "out", output_format=OutputFormat(shard_size=10**9))
        assert [path.name for path in tmp_path.glob("out/*.safetensors*")] == ["model.safetensors"]
        merge(place / "base", place / "first", tmp_path / "own")
        found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "own")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

    def test_a_stale_copy_in_another_file_is_not_the_tensor(self, place: Path, tmp_path: Path) -> None:
        """The index says which of two files counts. With new files the other copy would overwrite the tensor."""
        base = tmp_path / "base"
        make_tiny("llama", base, max_shard_size="60KB")
        index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
        name = "model.norm.weight"
        other = next(file for file in sorted(index.values(), reverse=True) if file != index[name])
        save_file({**load_file(base / other), name: torch.full((64,), 9.0)}, base / other, {"format": "pt"})
        right = load_file(base / index[name])[name]
        adapters = adapters_of(base, tmp_path)
        for limit in (30_000, 10**9):
            merge(base, adapters, tmp_path / f"out{limit}", output_format=OutputFormat(shard_size=limit))
            assert torch.equal(tensors_of(tmp_path / f"out{limit}")[name], right)


class TestTypes:
    @pytest.mark.parametrize("target", SIZES)
    @pytest.mark.parametrize("stored", SIZES)
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_every_tensor_is_converted_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, stored: str, target: str
    ) -> None:
        monkeypatch.setattr(merge_module, "_CHUNK_ELEMENTS", 1000)
        base = make_tiny(family, tmp_path / "base", dtype=SIZES[stored], max_shard_size="60KB")
        adapters = adapters_of(base, tmp_path, scale=0.1)
        merge(base, adapters, tmp_path / "out", output_format=OutputFormat(dtype=target))
        found, exact, before = tensors_of(tmp_path / "out"), in_float64(base, adapters), tensors_of(base)
        half_ulp = torch.finfo(SIZES[target]).eps / 2
        # Below its smallest normal number fp16 has a fixed step.
        step = torch.finfo(SIZES[target]).smallest_normal * half_ulp
        for name, tensor in found.items():
            assert tensor.dtype == SIZES[target]
            if torch.equal(exact[name], before[name].double()):
                assert torch.equal(tensor, before[name].to(SIZES[target])), name
            error = (tensor.double() - exact[name]).abs()
            assert (error <= half_ulp * exact[name].abs() * (1 + 1e-6) + step + 2e-6).all(), name
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["dtype"] == str(SIZES[target]).removeprefix("torch.")
        assert config == {**json.loads((base / "config.json").read_text()), "dtype": config["dtype"]}
        assert load(tmp_path / "out", dtype="auto").dtype == SIZES[target]
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())

    def test_integers_stay_and_an_old_config_keeps_its_key(self, tmp_path: Path) -> None:
        base = make_tiny("gpt2", tmp_path / "base")
        path, config = base / "model.safetensors", base / "config.json"
        mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
        save_file({**load_file(path), "transformer.h.0.attn.bias": mask}, path, {"format": "pt"})
        content = json.loads(config.read_text())
        content["torch_dtype"] = content.pop("dtype")
        config.write_text(json.dumps(content))
        adapters = adapters_of(base, tmp_path)
        merge(base, adapters, tmp_path / "out", output_format=OutputFormat(dtype="BF16"))
        assert torch.equal(tensors_of(tmp_path / "out")["transformer.h.0.attn.bias"], mask)
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        assert found == {**content, "torch_dtype": "bfloat16"}
        merge(base, adapters, tmp_path / "auto")
        assert (tmp_path / "auto" / "config.json").read_bytes() == config.read_bytes()

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
    def test_what_fp16_cannot_hold_is_named(self, tmp_path: Path, name: str) -> None:
        base = make_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
        path = base / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1)[7] = 1e5
        save_file(tensors, path, {"format": "pt"})
        adapters = adapters_of(base, tmp_path)
        merge(base, adapters, tmp_path / "wide", output_format=OutputFormat(dtype="F32"))
        with pytest.raises(UserError, match=rf"{re.escape(name)} would have .*infinity as F16"):
            merge(base, adapters, tmp_path / "out", output_format=OutputFormat(dtype="F16"))
        assert sorted(os.listdir(tmp_path)) == ["base", "first", "second", "wide"]


class TestVerify:
    @pytest.mark.parametrize("dtype", SIZES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_right_merge_passes(self, tmp_path: Path, family: str, dtype: str) -> None:
        base = make_tiny(family, tmp_path / "base", dtype=SIZES[dtype])
        _, result = merge_verified(base, adapters_of(base, tmp_path), tmp_path / "out")
        assert result.tolerance == TOLERANCES[dtype] and result.difference <= result.tolerance < result.effect
        assert result.positions > 100 and result.agreement > 0.95 and "built-in text" in str(result)
        assert (tmp_path / "out" / "config.json").is_file()

    @pytest.mark.parametrize("dtype", [None, "BF16"])
    @pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"])
    def test_a_corrupted_tensor_fails_and_leaves_nothing(self, tmp_path: Path, name: str, dtype: str | None) -> None:
        base = make_tiny("llama", tmp_path / "base")
        adapters = adapters_of(base, tmp_path)

        def corrupt(folder: Path) -> None:
            tensors = load_file(folder / "model.safetensors")
            tensors[name] = tensors[name].roll(1, 0)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})

        with pytest.raises(UserError, match=r"differs from base \+ adapter: its logits differ"):
            merge_verified(base, adapters, tmp_path / "out", before=corrupt, output_format=OutputFormat(dtype=dtype))
        assert sorted(os.listdir(tmp_path)) == ["base", "first", "second"]

    def test_wrong_weights_and_the_base_itself_fail(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base")
        adapters = adapters_of(base, tmp_path)
        merge(base, adapters, tmp_path / "out")
        first, second = adapters
        for wrong in ([first], [first, replace(second, weight=1.0)], [replace(first, weight=0.71), second]):
            with pytest.raises(UserError, match=r"differs from base \+ adapter"):
                Verifier(base, wrong)(tmp_path / "out")
        with pytest.raises(UserError, match="logits equal the base's"):
            Verifier(base, adapters)(base)

    def test_an_adapter_lost_in_rounding_fails_although_within_tolerance(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base")
        adapters = adapters_of(base, tmp_path, scale=1e-5)
        with pytest.raises(UserError, match="as much as the adapter does"):
            merge_verified(base, adapters, tmp_path / "out", output_format=OutputFormat(dtype="BF16"))
        assert (
            merge_verified(base, adapters, tmp_path / "out", output_format=OutputFormat(dtype="F32"))[1].difference
            < 1e-5
        )

    def test_samples(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base")
        adapters = adapters_of(base, tmp_path)
        text = tmp_path / "text.txt"
        text.write_text("\n" + "one two three\n\n" * 20 + "x" * 500)
        _, result = merge_verified(base, adapters, tmp_path / "out", text=text)
        assert result.source == str(text) and 8 * 9 <= result.positions <= 8 * 13
        text.write_text("x" * 500)
        assert merge_verified(base, adapters, tmp_path / "long", text=text)[1].positions == 64, "model's positions"
        for content in (b" \n", b"\xff\xfe"):
            text.write_bytes(content)
            with pytest.raises(UserError, match="--verify-text .*text.txt"):
                Verifier(base, adapters, text)
        with pytest.raises(UserError, match="nowhere"):
            Verifier(base, adapters, tmp_path / "nowhere")
        with pytest.raises(UserError, match="no such folder"):
            Verifier(tmp_path / "nowhere", adapters)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (base / name).unlink()
        report, result = merge_verified(base, adapters, tmp_path / "random")
        assert "random tokens (the base has no tokenizer)" in str(result)
        assert [said.partition(", so")[0].partition(": ")[2] for said in report.warnings] == [
            "has no tokenizer, and the adapter brings none"
        ]
        assert result.positions == 128
        text.write_text("text")
        with pytest.raises(UserError, match="has no tokenizer"):
            Verifier(base, adapters, text)

    def test_without_peft_it_says_so_before_merging(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = make_tiny("llama", tmp_path / "base")
        adapters = adapters_of(base, tmp_path)
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(UserError, match="pip install peft"):
            Verifier(base, adapters)

    @pytest.mark.slow
    def test_merging_does_not_import_it(self) -> None:
        code = (
            "import sys; import lowrank_dist.merging.merge\n"
            "sys.exit(', '.join({'peft', 'lowrank_dist.merging.verify'} & set(sys.modules)) or 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def merge_verified(
    base: Path, adapters: tuple[WeightedAdapter, ...], out: Path, *, before=None, text: Path | None = None, **options
) -> tuple[MergeReport, Verification]:
    """Merge and verify; `before` is called with the complete folder ahead of the verification."""
    stages: list[str] = []

    def verified(verifier: Verifier, folder: Path, right=Verifier.__call__) -> Verification:
        assert folder != out and not out.exists() and len(stages) == 1, "verified under its final name"
        if before is not None:
            before(folder)
        return right(verifier, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verifier, "__call__", verified)
        report = merge(base, adapters, out, verify=stages.append, verify_text=text, **options)
    assert report.verification is not None
    return report, report.verification


class TestCommand:
    def run(self, place: Path, *more: str):
        return CliRunner().invoke(app, ["merge", "--base", str(place / "base"), *more])

    def test_everything_together(self, place: Path, tmp_path: Path) -> None:
        adapters = ["--adapter", f"{place / 'first'}=0.7", "--adapter", f"{place / 'second'}=-1.3"]
        done = self.run(
            place, *adapters, "--out", str(tmp_path / "out"), "--shard-size", "20KB", "--dtype", "bf16", "--verify"
        )
        assert done.exit_code == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith(str(tmp_path / "out")) and "6 changed" in lines[0]
        assert lines[1].split() == [str(place / "first"), "×", "0.7:", "4", "of", "4", "tensors", "changed"]
        assert "second × -1.3: 4 of 4" in lines[2] and lines[3].startswith("verified on built-in text")
        assert load(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
        assert len(list((tmp_path / "out").glob("model-*"))) > 3

    def test_mistakes(self, place: Path, tmp_path: Path) -> None:
        first = str(place / "first")
        for more, told in (
            (["--adapter", f"{first}=0"], "weight 0"),
            (["--adapter", f"{first}=nan"], "weight nan"),
            (["--adapter", f"{first}=much"], "'much'"),
            (["--adapter", first, "--adapter", f"{first}=2"], "given twice"),
            (["--adapter", first, "--shard-size", "5 bananas"], "GiB"),
            (["--adapter", first, "--dtype", "int8"], "bf16"),
            (["--adapter", first, "--verify-text", "x"], "--verify"),
            (["--adapter", first, "--verify", "--verify-text", "nowhere"], "nowhere"),
        ):
            done = self.run(place, *more, "--out", str(tmp_path / "out"))
            assert done.exit_code == 2 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
        assert os.listdir(tmp_path) == []

    def test_a_failed_verification_leaves_nothing(
        self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = merge_module.Update.apply

        def twice(self, rows, weight, dtype=None, without=None):
            return (2 * right(self, rows, weight, dtype, without) - weight).contiguous()

        monkeypatch.setattr(merge_module.Update, "apply", twice)
        arguments = ["--adapter", str(place / "first"), "--out", str(tmp_path / "out")]
        done = self.run(place, *arguments, "--verify")
        assert done.exit_code == 2 and "differs from base + adapter" in done.stderr and done.stdout == ""
        assert os.listdir(tmp_path) == []
        assert self.run(place, *arguments).exit_code == 0, "without --verify the bug passes"
