"""A run that is stopped and resumed ends like one that was never stopped, on the same ranks or on others."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lowrank_dist.formats.manifest import OPTIMIZER_FILE, STATE_FILE
from lowrank_dist.formats.provenance import read_provenance
from tests.dist.ranks import close_worlds, run_ranks
from tests.integration.launching import Outcome, samples, snapshot, write_jsonl
from tests.integration.resuming import (
    SAVED,
    STEPS,
    TOLERANCE,
    Layout,
    curve,
    gap,
    make_job,
    stopped_after,
    tensors,
    train,
)

LAYOUTS = {
    "TP1": Layout(1, 1, 1, 4),
    "TP2": Layout(2, 1, 2, 8),
    "TP2xDP2": Layout(2, 2, 1, 2),
    "TP4": Layout(4, 1, 2, 8, sequence=False),
    "DP4": Layout(1, 4, 2, 1),
}


def well(outcomes: list[Outcome]) -> str:
    """Assert that every rank ended with code 0; return rank 0's output."""
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].stderr + outcomes[-1].stderr
    return outcomes[0].stdout


def refused(outcomes: list[Outcome]) -> str:
    """Return the one message of a run that no rank starts."""
    assert {outcome.code for outcome in outcomes} == {2}, [o.stderr for o in outcomes]
    said = "".join(outcome.stderr for outcome in outcomes)
    assert "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def runs(job: Path) -> dict[str, Path]:
    """Return an uninterrupted run of every layout."""
    found = {}
    for name, layout in LAYOUTS.items():
        found[name] = job.parent / name
        well(train(job, found[name], layout))
    return found


@pytest.mark.parametrize("name", ["TP1", "TP2xDP2"])
def test_same_layout_goes_on_bit_by_bit(job: Path, runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    stopped = stopped_after(runs[name], 4, tmp_path / "run")
    said = well(train(job, stopped, LAYOUTS[name]))
    assert f"resumed from {stopped / 'checkpoints' / 'step-4'} at step 4 of {STEPS}" in said
    expected, found = tensors(runs[name]), tensors(stopped)
    assert all(np.array_equal(found[key], expected[key]) for key in expected) and found.keys() == expected.keys()
    assert curve(stopped) == curve(runs[name])
    states = [json.loads((run / "checkpoints/step-6" / STATE_FILE).read_text()) for run in (stopped, runs[name])]
    for state in states:
        state["config"]["output"]["dir"] = ""
    assert states[0] == states[1]
    assert np.any(tensors(stopped, 4)[min(expected)] != expected[min(expected)]), "two steps that change nothing"


@pytest.mark.parametrize(("source", "target"), [*zip(LAYOUTS, [*list(LAYOUTS)[1:], "TP1"], strict=True)])
def test_other_layouts_go_on(job: Path, runs: dict[str, Path], source: str, target: str, tmp_path: Path) -> None:
    """A cycle through all layouts; `make test-all` has every pair at both ZeRO stages."""
    stopped = stopped_after(runs[source], SAVED, tmp_path / "run")
    well(train(job, stopped, LAYOUTS[target]))
    assert gap(tensors(stopped), tensors(runs["TP1"])) < TOLERANCE
    found, expected = curve(stopped), curve(runs["TP1"])
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for name in ("loss", "eval_loss"):
        pairs = [(a[name], b[name]) for a, b in zip(found, expected, strict=True) if name in b]
        assert np.allclose(*zip(*pairs, strict=True), rtol=TOLERANCE)


def test_the_comparison_can_fail(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """Without the moments, or with another order of samples, the final values differ."""
    from safetensors.numpy import load_file, save_file

    from lowrank_dist.formats.manifest import MANIFEST_FILE, write_manifest

    for name, spoil in (("moments", True), ("seed", False)):
        stopped = stopped_after(runs["TP1"], SAVED, tmp_path / name)
        folder = stopped / "checkpoints" / f"step-{SAVED}"
        if spoil:
            held = load_file(folder / OPTIMIZER_FILE)
            save_file({k: v * (0 if "exp_avg" in k else 1) for k, v in held.items()}, folder / OPTIMIZER_FILE)
            (folder / MANIFEST_FILE).unlink()
            write_manifest(folder)
        well(
            train(
                job, stopped, LAYOUTS["TP1"], *([] if spoil else ["train.seed=7", "train.resume_changes=[train.seed]"])
            )
        )
        assert gap(tensors(stopped), tensors(runs["TP1"])) > 100 * TOLERANCE


def test_a_finished_run_is_not_trained_again(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["TP2"], copy, symlinks=True)
    shutil.rmtree(copy / "adapter")  # killed between the last checkpoint and the adapter
    well(train(job, copy, LAYOUTS["TP2"]))
    assert curve(copy) == curve(runs["TP2"])
    before, after = snapshot(runs["TP2"] / "adapter"), snapshot(copy / "adapter")
    assert after["adapter_model.safetensors"] == before["adapter_model.safetensors"]


def test_damaged_checkpoints_are_passed_over(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    stopped = stopped_after(runs["TP2"], 4, tmp_path / "run")
    damaged = stopped / "checkpoints/step-4" / OPTIMIZER_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    (stopped / "checkpoints/.step-6.lowrank_dist-tmp-1-ab").mkdir()
    said = well(train(job, stopped, LAYOUTS["TP2"]))
    assert f"passed over: {damaged}: damaged" in said and "at step 2 of" in said
    assert all(np.array_equal(a, tensors(runs["TP2"])[key]) for key, a in tensors(stopped).items())
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"step-2", "step-4", "step-6", "last", "best"}


def test_nothing_that_verifies_is_no_new_start(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    stopped = stopped_after(runs["TP2"], SAVED, tmp_path / "run")
    (stopped / "checkpoints/step-2/manifest.json").unlink()
    before = snapshot(stopped / "checkpoints")
    said = refused(train(job, stopped, LAYOUTS["TP2"]))
    assert "none of the checkpoints" in said and "manifest.json: missing" in said
    assert snapshot(stopped / "checkpoints") == before


def _emptied(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


def _without_adapter(run: Path) -> None:
    _emptied(run)
    for name in ("adapter", "logs"):
        shutil.rmtree(run / name)


def _only_metrics(run: Path) -> None:
    for name in ("checkpoints", "adapter", "logs"):
        shutil.rmtree(run / name)


def _moved_and_linked(run: Path) -> None:
    for step in (2, 4, 6):
        folder = run / f"checkpoints/step-{step}"
        folder.symlink_to(folder.rename(run / f"moved-{step}"))


@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (_emptied, "has no checkpoint, but other files of a run that saved one remain (adapter, metrics.jsonl)"),
        (_without_adapter, "other files of a run that saved one remain (metrics.jsonl)"),
        (_only_metrics, "other files of a run that saved one remain (metrics.jsonl)"),
        (_moved_and_linked, "step-6 is a link; replace it with its folder"),
    ],
)
def test_a_run_that_lost_its_checkpoints_is_not_started_over(
    job: Path, runs: dict[str, Path], lose: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs["TP1"], tmp_path / "run", symlinks=True))
    lose(run)
    before = snapshot(run)
    said = refused(train(job, run, LAYOUTS["TP1"], "train.seed=7", "train.resume_changes=[train.seed]"))
    assert named in said and "choose another output.dir, or set output.overwrite=true to remove that run" in said
    assert snapshot(run) == before


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_overwrite_starts_over_and_leaves_nothing_of_the_run_before(
    job: Path, runs: dict[str, Path], resume: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs["TP1"], tmp_path / "run", symlinks=True))
    if resume == "auto":
        _moved_and_linked(run)
    arguments = (f"train.resume={resume}", "train.steps=4")
    refused(train(job, run, LAYOUTS["TP1"], *arguments))
    moved = {path.name: snapshot(path) for path in run.glob("moved-*")}
    well(train(job, run, LAYOUTS["TP1"], *arguments, "output.overwrite=true"))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-2", "step-4", "last", "best"}
    assert not any((run / "checkpoints" / f"step-{step}").is_symlink() for step in (2, 4))
    assert {record["step"] for record in curve(run)} == {0, 1, 2, 3, 4}
    assert {path.name: snapshot(path) for path in run.glob("moved-*")} == moved, "what a link led to is not ours"


def test_overwrite_removes_nothing_that_is_resumed_or_of_a_start_that_is_refused(
    job: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    stopped = stopped_after(runs["TP1"], 4, tmp_path / "run")
    before = snapshot(stopped)
    refused(train(job, stopped, LAYOUTS["TP1"], "output.overwrite=true", "lora.rank=8"))
    assert snapshot(stopped) == before
    assert "at step 4 of" in well(train(job, stopped, LAYOUTS["TP1"], "output.overwrite=true"))
    assert curve(stopped) == curve(runs["TP1"])


def test_killed_before_the_first_checkpoint_starts_again(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs["TP2"], folder, ignore=shutil.ignore_patterns("step-*", "last", "best", "adapter", "SAVED"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ti')
    said = well(train(job, folder, LAYOUTS["TP2"]))
    assert f"{folder} has no checkpoint; the run starts from the beginning" in said
    assert curve(folder) == curve(runs["TP2"])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["train.lr=0.02", "train.weight_decay=0"],
            "train.lr was 0.01 and is now 0.02; train.weight_decay was 0.01 and is now 0.0",
        ),
        (["lora.rank=8"], "lora.rank was 4 and is now 8"),
        (["lora.targets=[q_proj]"], "lora.targets was all-linear and is now ['q_proj']"),
        (["train.seed=1"], "train.seed was 42 and is now 1"),
        (["train.steps=8"], "train.steps was 6 and is now 8"),
        (["engine.clip=null"], "engine.clip was 1.0 and is now None"),
        (["data.eval=null"], "data.eval was "),
        (["train.steps=1", "train.resume_changes=[train.steps]"], "is at step 2, but the run ends at step 1"),
        (
            ["lora.rank=8", "train.resume_changes=[lora.rank]"],
            "same sizes of the method (such as lora.rank)",
        ),
    ],
)
def test_another_run_is_refused_by_name(
    job: Path, runs: dict[str, Path], overrides: list[str], named: str, tmp_path: Path
) -> None:
    stopped = stopped_after(runs["TP2"], SAVED, tmp_path / "run")
    shutil.copytree(runs["TP2"] / "adapter", stopped / "adapter")
    before = snapshot(stopped)
    assert named in refused(train(job, stopped, LAYOUTS["TP2"], *overrides))
    assert snapshot(stopped) == before


def test_other_data_and_another_base_are_refused(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    stopped = stopped_after(runs["TP2"], SAVED, tmp_path / "run")
    other = write_jsonl(tmp_path / "other.jsonl", samples(21))
    assert "data.train was " in refused(train(job, stopped, LAYOUTS["TP2"], f"data.train={other}"))
    base = tmp_path / "base"
    shutil.copytree(job.parent / "base", base)
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert "another base than model.path" in refused(train(job, stopped, LAYOUTS["TP2"], f"model.path={base}"))
    # The same files in another place are the same run.
    same = write_jsonl(tmp_path / "same.jsonl", samples(22))
    well(train(job, stopped, LAYOUTS["TP2"], f"data.train={same}"))


def test_an_allowed_change_is_made(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    stopped = stopped_after(runs["TP2"], SAVED, tmp_path / "run")
    well(train(job, stopped, LAYOUTS["TP2"], "train.lr=0.002", "train.resume_changes=[train.lr]"))
    rates = {r["step"]: r["learning_rate"] for r in curve(stopped) if "learning_rate" in r}
    before = {r["step"]: r["learning_rate"] for r in curve(runs["TP2"]) if "learning_rate" in r}
    assert rates[2] == before[2] and rates[3] == pytest.approx(0.2 * before[3])


def test_from_a_named_checkpoint(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = runs["TP2"] / "checkpoints/step-4"
    well(train(job, tmp_path / "new", LAYOUTS["TP2"], f"train.resume={checkpoint}"))
    assert all(np.array_equal(a, tensors(runs["TP2"])[key]) for key, a in tensors(tmp_path / "new").items())
    assert [record["step"] for record in curve(tmp_path / "new")] == [5, 6, 6]
    said = refused(train(job, runs["TP2"], LAYOUTS["TP2"], f"train.resume={checkpoint}"))
    assert "has newer checkpoints" in said and "step-6" in said
    said = refused(train(job, tmp_path / "other", LAYOUTS["TP2"], f"train.resume={tmp_path / 'nothing'}"))
    assert "nothing: no such folder" in said and not (tmp_path / "other").exists()
    assert "already has a run" in refused(train(job, runs["TP2"], LAYOUTS["TP2"], "train.resume=never"))


def test_old_checkpoints_go_and_the_best_stays(job: Path, tmp_path: Path) -> None:
    # The eval loss rises after the first evaluation: the rate is much too high afterwards.
    arguments = ["output.save_every=1", "output.keep_last=2", "eval.every=1", "train.lr=0.5", "train.warmup_steps=6"]
    well(train(job, tmp_path / "run", LAYOUTS["TP1"], *arguments))
    losses = {r["step"]: r["eval_loss"] for r in curve(tmp_path / "run") if r.get("eval_loss") and r["step"]}
    best = min(losses, key=losses.__getitem__)
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {"last", "best", "step-5", "step-6", f"step-{best}"}
    assert (tmp_path / "run/checkpoints/best").resolve().name == f"step-{best}"
    assert (tmp_path / "run/checkpoints/last").resolve().name == "step-6"


def test_a_run_by_epochs_ends_with_what_is_left_and_goes_on_by_samples(job: Path, tmp_path: Path) -> None:
    """22 samples: the last batch has 2, so two of four data-parallel ranks have none."""
    epoch = ("train.steps=null", "train.epochs=1", "train.global_batch=4")
    for name in ("TP1", "DP4"):
        well(train(job, tmp_path / name, LAYOUTS[name], *epoch))
    assert gap(tensors(tmp_path / "DP4"), tensors(tmp_path / "TP1")) < TOLERANCE
    targets = [record["target_tokens"] for record in curve(tmp_path / "DP4") if "target_tokens" in record]
    state = json.loads((tmp_path / "DP4/checkpoints/step-6" / STATE_FILE).read_text())
    assert (state["step"], state["samples"], state["epoch"], state["target_tokens"]) == (6, 22, 1.0, sum(targets))
    stopped = stopped_after(tmp_path / "DP4", 4, tmp_path / "run")
    well(train(job, stopped, LAYOUTS["DP4"], *epoch))
    assert all(np.array_equal(a, tensors(tmp_path / "DP4")[key]) for key, a in tensors(stopped).items())
    assert curve(stopped) == curve(tmp_path / "DP4")
    # Six samples are left and the batch changes to three: counting by steps would give one step fewer.
    stopped = stopped_after(tmp_path / "DP4", 4, tmp_path / "other")
    changed = (*epoch[:2], "train.global_batch=3", "train.resume_changes=[train.global_batch]")
    said = well(train(job, stopped, LAYOUTS["DP4"], *changed))
    assert "at step 4 of 6\ntrain.global_batch was 4 up to step 4: the data continues after 0.73 passes" in said
    again = [record["target_tokens"] for record in curve(stopped) if "target_tokens" in record]
    assert again[:4] == targets[:4] and len(again) == 6 and sum(again) == sum(targets)


def _with_small_files(arguments: list[str], largest: int) -> Outcome:
    """On one rank: run where no file may grow beyond `largest` bytes, like a full disk that still takes short texts."""
    import resource

    from tests.integration.launching import _main

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        return _main(arguments, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_ends_no_training_in_silence(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [str(job), f"output.dir={folder}", *LAYOUTS["TP2xDP2"].overrides]
    close_worlds()  # the ranks' own store is a file as well, and has grown with every earlier run
    outcomes = run_ranks(4, _with_small_files, arguments, 60_000)
    said = refused(outcomes)
    assert "the last checkpoint was not written" in said
    assert "step 2: NO CHECKPOINT WAS WRITTEN" in outcomes[0].stdout and "step 4: NO CHECK" in outcomes[0].stdout
    assert curve(folder) == curve(runs["TP2xDP2"]), "training went on to its end"
    assert list((folder / "checkpoints").iterdir()) == [], "and left nothing half written"
    # With room it continues: here from the start, since nothing was saved.
    well(train(job, folder, LAYOUTS["TP2xDP2"]))
    assert all(np.array_equal(a, tensors(runs["TP2xDP2"])[key]) for key, a in tensors(folder).items())


def _with_full_sinks(arguments: list[str]) -> Outcome:
    """On one rank: run where the disk takes neither metrics records, TensorBoard's files, nor the picture."""
    import errno
    from unittest import mock

    from lowrank_dist.engine import reporter
    from tests.integration.launching import _main

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        mock.patch.object(reporter.MetricsFile, "record", full),
        mock.patch.object(reporter.TensorBoard, "record", full),
        mock.patch.object(reporter.LossPicture, "close", full),
    ):
        return _main(arguments, True)


def test_a_run_that_can_report_nothing_trains_on(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    folder, sinks = tmp_path / "run", ("output.plot=true", "output.tensorboard=true")
    arguments = [str(job), f"output.dir={folder}", *LAYOUTS["TP2"].overrides, *sinks]
    said = well(run_ranks(2, _with_full_sinks, arguments))
    for name in ("metrics.jsonl", "tensorboard", "loss.png"):
        assert said.count(f"{name} could not be written: [Errno 28] No space left on device. The run continues") == 1
    assert not (folder / "FAILED").exists() and (folder / "adapter").is_dir()
    assert all(np.array_equal(a, tensors(runs["TP2"])[key]) for key, a in tensors(folder).items())


def _with_a_skewed_replica(arguments: list[str]) -> Outcome:
    """On one rank: run where tensor-parallel rank 1 has other values in the masters of replicated factors."""
    from unittest import mock

    import torch.distributed as dist

    from lowrank_dist.engine.zero import ZeroOptimiser
    from tests.integration.launching import _main

    taken = ZeroOptimiser.snapshot

    def skewed(self: ZeroOptimiser) -> object:
        return taken(self) * (1 + dist.get_rank())

    with mock.patch.object(ZeroOptimiser, "snapshot", skewed):
        return _main(arguments, True)


def test_replicas_that_differ_are_not_saved(job: Path, tmp_path: Path) -> None:
    arguments = [str(job), f"output.dir={tmp_path / 'run'}", *LAYOUTS["TP2"].overrides]
    said = refused(run_ranks(2, _with_a_skewed_replica, arguments))
    assert "replicated parameters differ" in said
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


@pytest.mark.parametrize("layout", ["TP1", "TP2"])
def test_two_runs_in_one_folder_are_refused(job: Path, runs: dict[str, Path], layout: str, tmp_path: Path) -> None:
    """No rank of the second run changes the first's folder: a run with FAILED would not be requeued."""
    import fcntl

    stopped = stopped_after(runs[layout], SAVED, tmp_path / "run")
    (stopped / "FAILED").write_text("rank 7 failed first, before the last start")
    before = snapshot(stopped)
    with (stopped / "logs/rank-0.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "another process trains" in refused(train(job, stopped, LAYOUTS[layout]))
    assert snapshot(stopped) == before
    os.utime(stopped / "FAILED", (time.time() + 3600, time.time() + 3600))
    well(train(job, stopped, LAYOUTS[layout]))
    assert not (stopped / "FAILED").exists() and len(list(stopped.glob("FAILED.*"))) == 1


def test_a_rank_that_cannot_write_there_ends_the_start_on_all(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    stopped = stopped_after(runs["TP2"], SAVED, tmp_path / "run")
    (stopped / "logs/rank-1.log").unlink()
    (stopped / "logs/rank-1.log").mkdir()
    before = snapshot(stopped)
    assert "output.dir: cannot write" in refused(train(job, stopped, LAYOUTS["TP2"], "output.overwrite=true"))
    after = snapshot(stopped)
    assert {name for name in after if after[name] != before.get(name)} == {"logs/rank-0.log"}


def test_init_from_and_on(job: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """Start from an adapter, stop, delete the adapter, resume: the checkpoint has all that is needed."""
    adapter = shutil.copytree(runs["TP1"] / "adapter", tmp_path / "adapter")
    arguments = (f"lora.init_from={adapter}",)
    plain = make_job(tmp_path, rank=4, alpha=8)
    text = plain.read_text().replace("  rank: 4\n", "").replace("  alpha: 8\n", "")
    plain.write_text(text.replace(str(tmp_path / "train.jsonl"), str(job.parent / "train.jsonl")))
    well(train(plain, tmp_path / "whole", LAYOUTS["TP2"], *arguments))
    stopped = stopped_after(tmp_path / "whole", SAVED, tmp_path / "run")
    shutil.rmtree(adapter)
    well(train(plain, stopped, LAYOUTS["TP2"], *arguments))
    assert all(np.array_equal(a, tensors(tmp_path / "whole")[key]) for key, a in tensors(stopped).items())
    first = next(r["loss"] for r in curve(tmp_path / "whole") if "loss" in r)
    assert first < 0.9 * next(r["loss"] for r in curve(runs["TP1"]) if "loss" in r), "it did start from the adapter"


# Its texts change every second.
CLOCK = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ '<|im_end|>' }}"
    "{% else %}{{ strftime_now('%H%M%S') }}{% endif %}{% endfor %}"
)


def test_a_template_that_reads_the_clock_is_told_when_the_run_began(tmp_path: Path) -> None:
    from lowrank_dist.formats.manifest import MANIFEST_FILE, write_manifest

    config = make_job(tmp_path)
    settings = tmp_path / "base/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": CLOCK}))
    for name in ("train", "eval"):
        turns = [("user", "the cat"), ("assistant", "the hen")]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        write_jsonl(tmp_path / f"{name}.jsonl", [row] * 9)
    whole = tmp_path / "run"
    said = well(train(config, whole, LAYOUTS["DP4"]))
    stopped = stopped_after(whole, SAVED, tmp_path / "stopped")
    state = stopped / f"checkpoints/step-{SAVED}" / STATE_FILE
    begun = json.loads(state.read_text())["begun"].replace("T", " ")
    note = f"the chat template reads the clock, which stays at {begun}, the start of this run"
    assert note in said
    assert note in well(train(config, stopped, LAYOUTS["DP4"]))
    assert all(np.array_equal(a, tensors(whole)[key]) for key, a in tensors(stopped).items())
    # Control: a checkpoint without the start time gets another one, and its data differ.
    old = stopped_after(whole, SAVED, tmp_path / "old")
    state = old / f"checkpoints/step-{SAVED}" / STATE_FILE
    state.write_text(json.dumps({**json.loads(state.read_text()), "begun": None}))
    (state.parent / MANIFEST_FILE).unlink()
    write_manifest(state.parent)
    assert "data.train was" in refused(train(config, old, LAYOUTS["DP4"]))
    # The stop tokens of the texts are saved with the adapter.
    settings = json.loads((whole / "adapter/generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 4] and (whole / "adapter/tokenizer.json").is_file()
    provenance = read_provenance(whole / "adapter")
    assert provenance is not None and provenance.trained_on_chats
