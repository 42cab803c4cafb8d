"""The merged folder: bit for bit an independent fp32 sum, and the model of plain transformers and PEFT."""

import ctypes
import errno
import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import (
    PROVENANCE_FILE,
    Provenance,
    fingerprint,
    read_provenance,
    trained_on_chats,
)
from lowrank_dist.formats.safetensors_file import chunks
from lowrank_dist.merging import merge as merge_module
from lowrank_dist.merging.merge import Update, merge
from lowrank_dist.merging.options import OutputFormat, WeightedAdapter
from lowrank_dist.merging.update import Term
from lowrank_dist.methods.lora.files import LowRankFactor, read_adapter
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny

TARGETS = re.compile(r".*(q_proj|v_proj|down_proj|c_attn|attn\.c_proj|fc2)")


def make_adapter(
    base: Path, folder: Path, *, rslora: bool = False, scale: float = 0.1, targets: re.Pattern[str] = TARGETS
) -> Path:
    """Save a random adapter on `targets` as the trainer writes it; ranks and alphas differ from module to module."""

    def size(module: str) -> tuple[int, float] | None:
        return (2 + len(module) % 3, 6.5 + len(module) % 3) if targets.fullmatch(module) else None

    return save_adapter(folder, base, random_adapter(base, size, rslora=rslora, scale=scale), trained=scale != 0)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def reference(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return (W.float() + s·(B·A)).to(W.dtype) over whole tensors, from PEFT's own files."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    merged = tensors_of(base)
    for key in (key for key in factors if ".lora_A." in key):
        a, b = factors[key], factors[key.replace("lora_A", "lora_B")]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next(
            (v for k, v in config["alpha_pattern"].items() if re.fullmatch(rf"(.*\.)?{k}", module)),
            config["lora_alpha"],
        )
        scale = alpha / (a.size(0) ** 0.5 if config["use_rslora"] else a.size(0))
        name = f"{module}.weight" if f"{module}.weight" in merged else f"{module.removeprefix('transformer.')}.weight"
        delta = (b @ a).T if config["fan_in_fan_out"] else b @ a
        merged[name] = (merged[name].float() + scale * delta).to(merged[name].dtype)
    return merged


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


def load(folder: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_merged_is_the_reference_bit_for_bit(tmp_path: Path, family: str, sharded: bool, dtype: torch.dtype) -> None:
    base = make_tiny(family, tmp_path / "base", dtype=dtype, max_shard_size="60KB" if sharded else "5GB")
    adapter = make_adapter(base, tmp_path / "adapter", rslora=sharded)
    seen = []
    report = merge(base, adapter, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    out = tmp_path / "out"

    found, expected, before = tensors_of(out), reference(base, adapter), tensors_of(base)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {name for name in found if TARGETS.fullmatch(name.removesuffix(".weight"))}
    assert report.warnings == () and (report.tensors, report.adapted, report.changed) == (
        len(found),
        len(changed),
        len(changed),
    )

    assert (
        sorted(os.listdir(out)) == sorted([*os.listdir(base), PROVENANCE_FILE])
        and (len(list(out.glob("model-*"))) > 1) == sharded
    )
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            assert path.stat().st_size == (out / path.name).stat().st_size
            with safe_open(out / path.name, "pt") as ours, safe_open(path, "pt") as theirs:
                assert ours.metadata() == {"format": "pt"} and list(ours.keys()) == list(theirs.keys())
        else:
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert seen[-1] == (total, total) and seen == sorted(seen) and report.nbytes == total


def test_the_record_of_the_training_data_is_merged(tmp_path: Path) -> None:
    """One adapter's record, the common one of several, the base's where no adapter has one, and none where they differ.

    PEFT's adapters have no lowrank_dist.json, and then the merged model has none either.
    """
    base = make_tiny("llama", tmp_path / "base")

    def adapter(name: str, **training: object) -> Path:
        folder = make_adapter(base, tmp_path / name, scale=0.1 + 0.1 * len(name))
        found = read_provenance(folder)
        assert found is not None
        (folder / PROVENANCE_FILE).write_text(replace(found, training=training).to_json())
        return folder

    def merged(*adapters: Path) -> Provenance | None:
        merge(base, adapters, out := tmp_path / "out")
        found = read_provenance(out)
        shutil.rmtree(out)
        return found

    chats, chats_too = adapter("chats", data_format="messages"), adapter("chats-2", data_format="messages")
    prompts, silent = adapter("prompts", data_format="completion"), adapter("silent", data_format=["messages"])
    bare = make_adapter(base, tmp_path / "bare")
    (bare / PROVENANCE_FILE).unlink()
    assert merged(bare) is None
    for adapters, expected in (
        ((chats,), "messages"),
        ((chats, chats_too), "messages"),
        ((chats, bare), "messages"),
        ((prompts,), "completion"),
        ((chats, prompts), None),
        ((silent,), None),
    ):
        record = merged(*adapters)
        assert record is not None and record.training.get("data_format") == expected
    assert record is not None and record.base_fingerprint == fingerprint(base)
    assert record.config["merged"][0]["adapter"] == str(silent)
    (base / PROVENANCE_FILE).write_text(replace(record, training={"data_format": "messages"}).to_json())
    for adapters, chat in (((silent,), True), ((prompts,), False), ((bare,), True)):
        record = merged(*adapters)
        assert record is not None and record.trained_on_chats is chat is trained_on_chats(*adapters, base)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_transformers_and_peft_agree_with_it(tmp_path: Path, family: str) -> None:
    base = make_tiny(family, tmp_path / "base", max_shard_size="60KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    merged = load(tmp_path / "out")
    by_peft = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert torch.equal(logits(merged), logits(by_peft))
    plain = logits(load(base))
    assert (logits(merged) - plain).abs().max() > 0.01 * plain.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True).chat_template


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_dora_is_merged_as_peft_does(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged in chunks of a few rows, except for GPT-2, whose outputs are columns."""
    base = make_tiny(family, tmp_path / "base", max_shard_size="60KB")

    def size(module: str) -> tuple[int, float] | None:
        return (3, 6.0) if TARGETS.fullmatch(module) else None

    decomposed = random_adapter(base, size, dora=True)
    adapter = save_adapter(tmp_path / "adapter", base, decomposed)
    monkeypatch.setattr(merge_module, "_CHUNK_ELEMENTS", 200)
    report = merge(base, adapter, tmp_path / "out")
    by_peft = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    expected, found = by_peft.state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7) for name in expected)
    assert report.adapted == report.changed == len(decomposed.factors)
    # The control: without its magnitudes the adapter gives another result.
    plain = replace(decomposed, factors={name: replace(f, magnitude=None) for name, f in decomposed.factors.items()})
    merge(base, save_adapter(tmp_path / "plain", base, plain), tmp_path / "other")
    other = load(tmp_path / "other").state_dict()
    assert not all(torch.allclose(other[name], expected[name], rtol=1e-2, atol=1e-3) for name in expected)


def test_a_dora_adapter_is_no_term_of_a_sum(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    one = save_adapter(tmp_path / "a", base, random_adapter(base, dora=True))
    other = save_adapter(tmp_path / "b", base, random_adapter(base))
    for adapters in ((WeightedAdapter(one, 0.5),), (WeightedAdapter(one), WeightedAdapter(other))):
        with pytest.raises(UserError, match=r"a: a DoRA adapter.* merge it alone, with weight 1"):
            merge(base, adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_magnitudes_alone_are_a_change(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, random_adapter(base, scale=0.0, dora=True), trained=False)
    report = merge(base, adapter, tmp_path / "out")
    assert report.changed == report.adapted


def test_gpt2_without_the_prefix(tmp_path: Path) -> None:
    """Published GPT-2 files say "h.0.…" where transformers says "transformer.h.0.…"."""
    base = make_tiny("gpt2", tmp_path / "base")
    path = base / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"}
    )
    adapter = make_adapter(base, tmp_path / "adapter")
    assert all(module.startswith("transformer.h.") for module in read_adapter(adapter).factors)
    merge(base, adapter, tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), reference(base, adapter)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and "h.0.attn.c_attn.weight" in found
    by_peft = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert torch.equal(logits(load(tmp_path / "out")), logits(by_peft))


def test_an_untied_output_layer_can_be_merged_a_tied_one_not(tmp_path: Path) -> None:
    lm_head = re.compile("lm_head")
    base = make_tiny("llama", tmp_path / "base")
    merge(base, make_adapter(base, tmp_path / "adapter", targets=lm_head), tmp_path / "out")
    assert torch.equal(
        logits(load(tmp_path / "out")),
        logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()),
    )
    tied = make_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    (tmp_path / "adapter" / "lowrank_dist.json").unlink()
    with pytest.raises(UserError, match="lm_head is not a linear of the base that can be updated by itself"):
        merge(tied, tmp_path / "adapter", tmp_path / "tied-out")


@pytest.mark.parametrize("transposed", [False, True])
def test_chunks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 700, generator=generator), torch.randn(900, 16, generator=generator)
    update = Update((Term(LowRankFactor(a, b, 24.0), 1.5),), transposed)
    for dtype, tolerance in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float64, 1e-14)):
        weight = torch.randn((700, 900) if transposed else (900, 700), generator=generator, dtype=torch.float64).to(
            dtype
        )
        compute = torch.promote_types(dtype, torch.float32)
        delta = b.to(compute) @ a.to(compute)
        expected = (weight.to(compute) + 1.5 * (delta.T if transposed else delta)).to(dtype)
        pieces = [update.apply(slice(i, j), weight[i:j]) for i, j in chunks(weight.size(0), 130)]
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=tolerance, atol=tolerance)
        assert len(pieces) > 4

    family = "gpt2" if transposed else "llama"
    base = make_tiny(family, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(merge_module, "_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(merge_module, "_COPY_BYTES", 1000)
    merge(base, adapter, tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), reference(base, adapter)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)


def test_wrong_scale_and_swapped_factors_show(tmp_path: Path) -> None:
    """Negative control of the comparison with PEFT's merge."""
    base = make_tiny("llama", tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    right = read_adapter(tmp_path / "adapter")
    square = "model.layers.0.self_attn.q_proj"
    factor = right.factors[square]
    flipped = LowRankFactor(factor.b.T.contiguous(), factor.a.T.contiguous(), factor.alpha)
    wrongs = {
        "scale": replace(right, rslora=True),
        "swapped": replace(right, factors={**right.factors, square: flipped}),
    }
    expected = logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload())
    for name, adapter in wrongs.items():
        save_adapter(tmp_path / name, base, adapter)
        merge(base, tmp_path / name, tmp_path / f"{name}-out")
        assert not torch.allclose(logits(load(tmp_path / f"{name}-out")), expected, rtol=1e-3)


class TestBase:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return make_tiny("llama", tmp_path / "base", max_shard_size="60KB")

    @pytest.fixture
    def adapter(self, base: Path, tmp_path: Path) -> Path:
        return make_adapter(base, tmp_path / "adapter")

    def test_another_base_is_refused_unless_forced(self, adapter: Path, tmp_path: Path) -> None:
        other = make_tiny("llama", tmp_path / "other", seed=1)
        with pytest.raises(UserError, match="trained on another base"):
            merge(other, adapter, tmp_path / "out")
        report = merge(other, adapter, tmp_path / "out", force_mismatch=True)
        assert len(report.warnings) == 1 and "another base" in report.warnings[0]

    def test_no_provenance_is_a_warning(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        (adapter / "lowrank_dist.json").unlink()
        (warning,) = merge(base, adapter, tmp_path / "out").warnings
        assert "lowrank_dist.json" in warning

    @pytest.mark.parametrize("where", ["", "sub", "sub/deep"])
    def test_output_in_the_base_is_refused(self, base: Path, adapter: Path, where: str, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(base)
        for out in (base / where, link / where, base / ".." / "base" / where):
            before = sorted(base.rglob("*"))
            with pytest.raises(UserError, match="lies in the base folder"):
                merge(base, adapter, out)
            assert sorted(base.rglob("*")) == before

    def test_an_existing_output_is_kept(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").touch()
        with pytest.raises(UserError, match="already exists"):
            merge(base, adapter, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["x"]

    def test_a_broken_base_is_refused(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        shard = next(base.glob("model-00002-of-*"))
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-4])
        with pytest.raises(UserError, match="model-00002-of"):
            merge(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_every_other_file_is_copied_and_no_stale_weights(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        (base / "original").mkdir()
        (base / ".cache").mkdir()
        for name in (
            "original/params.json",
            "original/consolidated.00.pth",
            ".cache/x",
            "pytorch_model.bin",
            "README.md",
        ):
            (base / name).write_text(name)
        (base / "pytorch_model.bin.index.json").write_text("{}")
        (base / "LICENSE").symlink_to("README.md")
        merge(base, adapter, tmp_path / "out")
        names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert {"original/params.json", "README.md", "LICENSE", "tokenizer.json", "generation_config.json"} <= names
        assert not names & {
            "original/consolidated.00.pth",
            ".cache/x",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        }
        assert not (tmp_path / "out" / "LICENSE").is_symlink()
        (base / "gone").symlink_to(base / "nowhere")
        with pytest.raises(UserError, match="gone"):
            merge(base, adapter, tmp_path / "out2")

    def test_an_error_in_a_copied_file_names_the_base_s(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        file = base / "generation_config.json"
        file.write_text(f'{{"eos_token_id": 1{"0" * 4300}}}')
        with pytest.raises(UserError, match=re.escape(f"{file}:1: key 'eos_token_id' holds an integer of 4301 digits")):
            merge(base, adapter, tmp_path / "out")

    def test_an_untrained_adapter_is_refused(self, base: Path, tmp_path: Path) -> None:
        adapter = make_adapter(base, tmp_path / "adapter", scale=0.0)
        with pytest.raises(UserError, match="changes nothing"):
            merge(base, adapter, tmp_path / "out")

    def test_an_update_below_the_rounding_is_refused_or_told(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
        adapter = make_adapter(base, tmp_path / "adapter", scale=1e-12)
        with pytest.raises(UserError, match="lost in the rounding to the base's dtype"):
            merge(base, adapter, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
        weights = adapter / "adapter_model.safetensors"
        tensors = load_file(weights)
        first = next(name for name in tensors if "lora_B" in name)
        save_file({**tensors, first: tensors[first] * 1e11}, weights)
        report = merge(base, adapter, tmp_path / "out")
        assert report.changed == 1 and f"{report.adapted - 1} of {report.adapted}" in report.warnings[0]

    def test_an_overflow_is_refused(self, tmp_path: Path) -> None:
        base = make_tiny("llama", tmp_path / "base", dtype=torch.float16)
        with pytest.raises(UserError, match=r"(q|v|down)_proj\.weight would have NaN or infinity"):
            merge(base, make_adapter(base, tmp_path / "adapter", scale=1e5), tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]

    def test_factors_that_do_not_fit_are_all_named(self, adapter: Path, tmp_path: Path) -> None:
        narrow = make_tiny("llama", tmp_path / "narrow", intermediate_size=80, num_hidden_layers=1)
        (adapter / "lowrank_dist.json").unlink()
        with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj.*model\.layers\.1\.") as caught:
            merge(narrow, adapter, tmp_path / "out")
        assert "[64, 96]" in str(caught.value) and "[64, 80]" in str(caught.value)

    def test_an_adapter_for_another_family_is_refused(self, adapter: Path, tmp_path: Path) -> None:
        (adapter / "lowrank_dist.json").unlink()
        with pytest.raises(UserError, match="none of its modules, .*, is in the base, a gpt2 model"):
            merge(make_tiny("gpt2", tmp_path / "gpt2"), adapter, tmp_path / "out")

    def test_a_failing_disk_leaves_nothing(
        self, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left, write = 100_000, merge_module.SafetensorsWriter.write

        def limited(self: merge_module.SafetensorsWriter, data: bytes) -> None:
            nonlocal left
            left -= memoryview(data).nbytes
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(merge_module.SafetensorsWriter, "write", limited)
            with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'out'))}.*No space left"):
                merge(base, adapter, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match="0 MiB free"):
            merge(base, adapter, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]

    def test_an_interrupt_leaves_nothing(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        def interrupt(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, tmp_path / "out", progress=interrupt)
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_an_odd_header_is_read_and_written_as_transformers_wants_it(tmp_path: Path) -> None:
    """The header has no metadata, names in another order than the bytes, and a length that is no multiple of eight."""
    base = make_tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    path = base / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"]
    odd = json.dumps(dict(sorted(header.items(), reverse=True))).encode()
    odd += b" " * ((5 - len(odd)) % 8)
    path.write_bytes(len(odd).to_bytes(8, "little") + odd + whole[8 + length :])
    merge(base, adapter, tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out"), reference(base, adapter)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of_merge(base: Path, adapter: Path, out: Path, **options: Any) -> int:
    """Return the peak growth of anonymous memory during a merge, in bytes, seen every millisecond and after each chunk.

    A chunk reports while its memory is still allocated, so that a busy machine, whose thread samples seldom, sees it
    too. Large blocks are mapped one by one: a heap that keeps freed blocks would hide later ones.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    libc.malloc_trim(0)
    peak, done = 0, threading.Event()

    def look(*_: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())

    def watch() -> None:
        while not done.is_set():
            look()
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    before = anonymous_bytes()
    watcher.start()
    try:
        merge(base, adapter, out, progress=look, **options)
    finally:
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor is 16 MB, the model 130 MB: anonymous memory grows by 10 MB with chunks of 2 MB, and by 36 MB without.

    On a busy machine 19 MB was seen once.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    base = make_tiny("llama", tmp_path / "base", **sizes)
    adapter = make_adapter(base, tmp_path / "adapter", targets=re.compile(r".*_proj"))
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 120e6
    bound = (adapter / "adapter_model.safetensors").stat().st_size + 24e6
    monkeypatch.setattr(merge_module, "_CHUNK_ELEMENTS", 1 << 19)
    monkeypatch.setattr(merge_module, "_COPY_BYTES", 1 << 21)
    assert peak_of_merge(base, adapter, tmp_path / "out") < bound
    assert peak_of_merge(base, adapter, tmp_path / "options", output_format=OutputFormat(40_000_000, "BF16")) < bound
    assert len(list((tmp_path / "options").glob("model-*"))) == 2
    monkeypatch.setattr(merge_module, "_CHUNK_ELEMENTS", 1 << 30)
    assert peak_of_merge(base, adapter, tmp_path / "whole") > bound


def test_a_folder_that_is_no_adapter_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder; give a PEFT adapter folder"):
        read_adapter(tmp_path / "nowhere")
    base = make_tiny("llama", tmp_path / "base")
    run = save_adapter(tmp_path / "run/adapter", base, random_adapter(base)).parent
    with pytest.raises(UserError, match="run: a run, not an adapter; give .*run/adapter, or one of its checkpoints"):
        read_adapter(run)
    (run / "adapter").rename(run / "other")
    with pytest.raises(UserError, match="run/adapter_config.json: missing"):
        read_adapter(run)
