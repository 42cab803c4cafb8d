"""benchmarks/same_bits.py: a comparison that passes has seen every bit, and one with exceptions gives their reasons."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import fork_server  # noqa: E402
import run_bits  # noqa: E402
import same_bits  # noqa: E402
from run_bits import compare, folder_values, mask_values  # noqa: E402

from lowrank_dist.ops.mask import Mask  # noqa: E402

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Return two run folders with the same content."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    (ours / "adapter").mkdir(parents=True)
    (ours / "logs").mkdir()
    (ours / "logs" / "rank-0.log").write_text("12:00 step 1\n")
    save_file({"a": torch.arange(8.0), "b": torch.ones(2, 3)}, ours / WEIGHTS, {"format": "pt"})
    (ours / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 4, "base": str(tmp_path / "base_1")}))
    records = [{"step": 1, "loss": 0.1 + 0.2, "step_seconds": 1.0}, {"step": 2, "grad_norm": 1.5, "time": 2.0}]
    (ours / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (ours / "config.yaml").write_text("lora:\n  rank: 4\n")
    (ours / "last").symlink_to("step-2")
    shutil.copytree(ours, theirs, symlinks=True)
    return ours, theirs


def differing(runs: tuple[Path, Path], **allowed: str) -> list[str]:
    ours, theirs = ({"run": folder_values(run, {})} for run in runs)
    count, found = compare(ours, theirs, {pattern.replace("__", "/"): why for pattern, why in allowed.items()})
    assert count == len(ours["run"].keys() | theirs["run"].keys())
    return [difference.name for difference in found if not difference.reason]


def test_equal_folders_have_no_difference(runs: tuple[Path, Path]) -> None:
    assert differing(runs) == []
    values = folder_values(runs[0], {})
    assert values["metrics.jsonl[0].loss"] == "0.30000000000000004"
    assert values[f"{WEIGHTS}:b"].startswith("F32 [2, 3] ") and values["last"] == "-> step-2"
    assert not any("log" in name or "seconds" in name or name.endswith(".time") for name in values)


def test_one_flipped_bit_of_a_tensor_is_found(runs: tuple[Path, Path]) -> None:
    tensors = load_file(runs[0] / WEIGHTS)
    tensors["a"].view(torch.int32)[5] ^= 1
    save_file(tensors, runs[0] / WEIGHTS, {"format": "pt"})
    assert differing(runs) == [f"run/{WEIGHTS}:a", f"run/{WEIGHTS}:file"]


def test_the_last_bit_of_a_loss_is_found(runs: tuple[Path, Path]) -> None:
    metrics = runs[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.30000000000000004", "0.3"))
    assert differing(runs) == ["run/metrics.jsonl[0].loss"]


def test_what_a_clock_says_may_differ(runs: tuple[Path, Path]) -> None:
    metrics = runs[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step_seconds": 1.0', '"step_seconds": 3.0'))
    (runs[0] / "logs" / "rank-0.log").write_text("13:00 step 1\n")
    assert differing(runs) == []


def test_missing_files_keys_and_links_are_found(runs: tuple[Path, Path]) -> None:
    ours, theirs = runs
    (ours / "config.yaml").unlink()
    (theirs / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    (theirs / "last").unlink()
    (theirs / "last").symlink_to("step-1")
    (theirs / "empty.json").write_text("{}")
    assert differing(runs) == [
        "run/adapter/adapter_config.json.base",
        "run/config.yaml.lora.rank",
        "run/empty.json",
        "run/last",
    ]


def test_metadata_and_order_of_tensors_are_found(runs: tuple[Path, Path]) -> None:
    save_file(load_file(runs[0] / WEIGHTS), runs[0] / WEIGHTS, {"format": "np"})
    assert differing(runs) == [f"run/{WEIGHTS}:file", f"run/{WEIGHTS}:metadata.format"]


def test_places_are_replaced_longest_first() -> None:
    places = {"/a_b": "TREE", "/a_b/build/ours": "FOLDER"}
    assert run_bits.replaced("/a_b/build/ours/x /a_b/y /a\\_b/z", places) == "FOLDER/x TREE/y TREE/z"


def test_a_difference_is_allowed_by_its_pattern_alone(runs: tuple[Path, Path]) -> None:
    (runs[0] / "config.yaml").write_text("lora:\n  rank: 5\n")
    assert differing(runs, **{"run__config.yaml*": "a key was renamed"}) == []
    assert differing(runs, **{"run__adapter*": "a key was renamed"}) == ["run/config.yaml.lora.rank"]


def test_an_allowance_without_a_reason_is_refused() -> None:
    assert same_bits.allowances(["train/*=why: a=b"]) == {"train/*": "why: a=b"}
    for text in ("train/*", "train/*=", "=why", "train/*= "):
        with pytest.raises(argparse.ArgumentTypeError, match="reason"):
            same_bits.allowances([text])


def test_masks_that_differ_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mask, "__init__", Mask.__init__)  # restored after the test
    files = (tmp_path / "ours", tmp_path / "theirs")
    for file, step in zip(files, (7, 8), strict=True):
        with monkeypatch.context() as patched:
            patched.setattr(Mask, "__init__", Mask.__init__)
            fork_server.watch_masks(str(file))
            for _ in range(2):  # the same mask twice gives one line
                Mask(torch.arange(4), torch.tensor([11, step]), 3, 6554, 0)
    ours, theirs = (mask_values([file]) for file in files)
    assert len(ours) == len(theirs) == 1 and all("stream 3 threshold 6554" in name for name in ours)
    count, found = compare({"run": ours}, {"run": theirs}, {})
    assert count == len(found) == 2
    line = files[0].read_text()
    files[1].write_text(line[:-2] + ("0" if line[-2] != "0" else "1") + "\n")
    [difference] = compare({"run": ours}, {"run": mask_values([files[1]])}, {})[1]
    assert difference.ours is not None and difference.theirs is not None


def test_runs_that_fail_alike_are_not_the_same() -> None:
    assert same_bits.unmet({"exit code 0": "2", "trained": "no: exit codes [2]"})
    assert not same_bits.unmet({"exit code 0": "0"})


def test_the_grid_is_every_family_method_and_layout(tmp_path: Path) -> None:
    from tests.tiny_models import FAMILY_NAMES

    assert sorted(same_bits.FAMILIES) == sorted(FAMILY_NAMES)
    options = argparse.Namespace(
        families=same_bits.FAMILIES, methods=list(same_bits.METHODS), layouts=list(same_bits.LAYOUTS), dtype="fp32"
    )
    options.parts = ["train"]
    names = [case.name for case in same_bits.cases(options, None, None)]  # type: ignore[arg-type]
    assert len(names) == len(set(names)) == len(FAMILY_NAMES) * 6 * 3
    options.parts = ["plan"]
    names = [case.name for case in same_bits.cases(options, None, None)]  # type: ignore[arg-type]
    assert len(names) == len(set(names)) == len(FAMILY_NAMES) * 6 * 3 + len(same_bits.SHAPES) * 6
