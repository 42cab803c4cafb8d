"""`lowrank-dist doctor CONFIG`, alone and as ranks of a job on this machine: a run's inputs and its output folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from lowrank_dist.backend import devices
from lowrank_dist.backend.select import Backend
from lowrank_dist.cli.main import app
from lowrank_dist.config import load_config
from lowrank_dist.data.formats import read_jsonl
from lowrank_dist.doctor import inputs, start, storage
from lowrank_dist.doctor.start import Met
from lowrank_dist.doctor.storage import Probe, unseen_probes
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import OPTIMIZER_FILE, STATE_FILE
from lowrank_dist.formats.provenance import fingerprint
from lowrank_dist.ops import extension
from tests.integration.launching import (
    LAUNCHER_VARIABLES,
    ROOT,
    free_port,
    samples,
    snapshot,
    write_config,
    write_jsonl,
)
from tests.tiny_models import make_tiny
from tests.unit.test_checkpoint_folder import state_of

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Path:
    sections = {
        "model": {"path": make_tiny("llama", tmp_path / "base", max_shard_size="100KB"), "device": "cpu"},
        "lora": {"rank": 4, "targets": ["q_proj", "down_proj"]},
        "data": {
            "train": write_jsonl(tmp_path / "train.jsonl", samples(8)),
            "eval": write_jsonl(tmp_path / "eval.jsonl", samples(2)),
            "max_length": 64,
        },
        "output": {"dir": tmp_path / "runs" / "first"},
    }
    return write_config(tmp_path / "config.yaml", sections)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *(str(argument) for argument in arguments)])


def rows(*arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
    done = run(*arguments, "--json")
    assert done.exit_code == code, done.output
    return {row["what"]: row for row in json.loads(done.stdout)["rows"]}


def test_a_run_that_can_begin(config: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    found = rows(config)
    for what in ("configuration", "model folder", "tokenizer", "trained parameters", "data.train", "data.eval"):
        assert found[what]["state"] == "ok", what
    # A [4, 64] and B [64, 4] of q, A [4, 96] and B [64, 4] of down, in two layers.
    assert inputs.parameters(load_config(config)).trained == 2 * 4 * (64 + 64 + 96 + 64)
    assert found["trained parameters"]["detail"] == "lora: 2,304 trainable numbers"
    assert found["run folder"]["state"] == "ok" and f"{tmp_path}, the folder for" in found["run folder"]["detail"]
    assert found["free disk"]["state"] == "ok" and "5 checkpoints of 36.0 KiB" in found["free disk"]["detail"]
    assert "rendezvous" not in found and "all-reduce" not in found
    assert snapshot(tmp_path) == before, "doctor left something behind, or made the run folder"


@pytest.mark.parametrize(
    ("method", "trained", "stored"),
    [
        # H 64, two layers, two key/value heads of 16; m 8, l 5, w 12.
        (["adapter_h", "adapter.bottleneck=8"], 4 * (2 * 64 * 8 + 8 + 64), None),
        (["adapter_l", "adapter.bottleneck=8"], 2 * (2 * 64 * 8 + 8 + 64 + 2 * 64), None),
        (["prefix", "prefix.length=5", "prefix.width=null"], 5 * 2 * 2 * 32, None),
        (["prefix", "prefix.length=5", "prefix.width=12"], 5 * 64 + 65 * 12 + 13 * 128, 5 * 128),
        (["prompt", "prompt.length=5"], 5 * 64, None),
        (["full"], 75_456, 0),
    ],
)
def test_theta_of_each_method(config: Path, method: list[str], trained: int, stored: int | None) -> None:
    """|Θ| of each method, and the checkpoint's size: 12 bytes per element beside the stored tensors."""
    text = yaml.safe_load(config.read_text())
    del text["lora"]
    config.write_text(yaml.safe_dump(text))
    found = rows(config, f"method={method[0]}", *method[1:])
    assert found["trained parameters"]["detail"] == f"{method[0]}: {trained:,} trainable numbers"
    beside = trained if not stored else stored
    told = load_config(config, [f"method={method[0]}", *method[1:]])
    one, final = inputs.checkpoint_bytes(told)
    assert (one, final) == (12 * trained + 4 * beside, 0 if stored == 0 else 4 * beside)
    (space,) = storage.space(told, writes=True)
    assert space.figures["checkpoint_bytes"] == one and space.figures["needed_bytes"] == 5 * one + final + storage.ROOM


def test_adapter_layers_that_the_ranks_cannot_share(config: Path) -> None:
    text = yaml.safe_load(config.read_text())
    del text["lora"]
    config.write_text(yaml.safe_dump(text))
    for bottleneck, placement, fits in ((6, "sharded", True), (7, "sharded", False), (7, "replicated", True)):
        words = [f"adapter.bottleneck={bottleneck}", f"adapter.placement={placement}", "parallel.tensor=2"]
        found = rows(config, "method=adapter_h", *words, code=0 if fits else 1)["trained parameters"]
        assert (found["state"] == "ok") == fits
        assert fits or "adapter.bottleneck=7 is not a multiple of parallel.tensor=2" in found["detail"]


def test_the_run_folder_itself_once_it_is_there(config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    before = snapshot(tmp_path)
    detail = rows(config)["run folder"]["detail"]
    assert detail.startswith(f"{tmp_path / 'runs' / 'first'}: 1.0 MiB written, synced, renamed and read back")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["{config}", "train.speed=1"], "train.speed: unknown key"),
        (["{config}", "more.yaml"], "second config file"),
    ],
)
def test_bad_input(config: Path, arguments: list[str], said: str) -> None:
    done = run(*(argument.format(config=config) for argument in arguments))
    assert done.exit_code == 2 and said in done.stderr and done.stdout == "" and "Traceback" not in done.output


def remove_shard(place: Path) -> None:
    sorted((place / "base").glob("model-*.safetensors"))[1].unlink()


def cut_shard(place: Path) -> None:
    shard = sorted((place / "base").glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


def other_family(place: Path) -> None:
    (place / "base" / "config.json").write_text('{"model_type": "mamba"}')


def no_tokenizer(place: Path) -> None:
    (place / "base" / "tokenizer.json").unlink()


def empty_data(place: Path) -> None:
    (place / "train.jsonl").write_text("")


def sharegpt(place: Path) -> None:
    write_jsonl(place / "train.jsonl", [{"conversations": [{"from": "human", "value": "Hi"}]}])


def parquet(place: Path) -> None:
    (place / "eval.jsonl").write_bytes(b"PAR1\x15\x04\x15\x10" + bytes(range(256)))


def no_template(place: Path) -> None:
    settings = json.loads((place / "base/tokenizer_config.json").read_text())
    del settings["chat_template"]
    (place / "base/tokenizer_config.json").write_text(json.dumps(settings))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write_jsonl(place / "train.jsonl", [{"messages": turns}])


def a_run(place: Path) -> None:
    (place / "runs/first/checkpoints").mkdir(parents=True)


def nothing(place: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("plant", "change", "what", "state", "said"),
    [
        (remove_shard, None, "model folder", "broken", "missing; download the model completely"),
        (cut_shard, None, "model folder", "broken", "truncated or not a safetensors file"),
        (other_family, None, "model folder", "unsupported", "'mamba' is not supported"),
        (nothing, "model.path=/no/model", "model folder", "broken", "no such folder"),
        (nothing, "parallel.tensor=3", "parallel.tensor", "broken", "set it to one of 1, 2, 4"),
        (no_tokenizer, None, "tokenizer", "broken", "has neither tokenizer.json nor"),
        (nothing, "lora.targets=[qproj]", "trained parameters", "broken", "matches no linear"),
        (nothing, "data.train=/no/data.jsonl", "data.train", "missing", "No such file"),
        (nothing, "data.eval=/tmp", "data.eval", "broken", "Is a directory"),
        (empty_data, None, "data.train", "broken", "the file has no samples; write one JSON object per line"),
        (sharegpt, None, "data.train", "broken", "train.jsonl:1: no key 'prompt', 'completion' or 'messages'"),
        (parquet, None, "data.eval", "broken", "eval.jsonl: a Parquet file"),
        (no_template, None, "data.train", "broken", "has no chat template"),
        (nothing, "data.max_length=65", "data.max_length", "broken", "longer than the model's 64 positions"),
        (nothing, "data.max_length=3", "data.train", "broken", "No sample is left to train on; raise data.max_length"),
        (a_run, None, "output.dir", "broken", "already has a run (checkpoints)"),
        (nothing, "train.resume=/no/step-2", "train.resume", "broken", "/no/step-2: no such folder; give a checkpoint"),
        (nothing, "output.dir={config}/run", "run folder", "broken", "is a file; choose a folder"),
    ],
)
def test_a_planted_fault_is_found(
    config: Path, tmp_path: Path, plant: Callable[[Path], None], change: str | None, what: str, state: str, said: str
) -> None:
    unseen_before = {"parallel.tensor": "configuration", "train.resume": "output.dir"}
    assert rows(config)[unseen_before.get(what, what)]["state"] == "ok"
    plant(tmp_path)
    before = snapshot(tmp_path)
    found = rows(config, *([change.format(config=config)] if change else []), code=1)
    assert found[what]["state"] == state and said in found[what]["detail"]
    assert snapshot(tmp_path) == before


def test_a_run_that_cannot_be_resumed_is_refused_as_training_refuses_it(config: Path, tmp_path: Path) -> None:
    """Only the state of the checkpoint is read: its tensors are empty files here."""
    told = load_config(config)
    step = tmp_path / "runs" / "first" / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    settings = {"config": told.read_keys(), "base_fingerprint": fingerprint(told.model.path)}
    (step / STATE_FILE).write_text(state_of(2).model_copy(update=settings).to_json())
    (step / OPTIMIZER_FILE).touch()
    (tmp_path / "runs" / "first" / "config.yaml").write_text(told.to_yaml())
    before = snapshot(tmp_path)
    resumed = rows(config, "train.resume=auto")["train.resume"]
    assert resumed["state"] == "ok" and resumed["detail"].startswith(f"{step}: step 2; ")
    for changes, said in (
        (["train.lr=5e-4"], "allow the change with 'train.resume_changes=[train.lr]'"),
        (["method=prefix"], "method cannot change, since the checkpoint's tensors would not fit"),
        (["train.steps=1"], "It is at step 2, but the run ends at step 1; raise train.steps"),
    ):
        for resume in ("auto", step):
            found = rows(config, f"train.resume={resume}", *changes, code=1)
            assert found["train.resume"]["state"] == "broken" and said in found["train.resume"]["detail"]
            assert found["output.dir"]["state"] == "ok"
    allowed = ["train.lr=5e-4", "train.resume_changes=[train.lr]"]
    assert rows(config, "train.resume=auto", *allowed)["train.resume"]["state"] == "ok"
    assert "already has a run" in rows(config, code=1)["output.dir"]["detail"]
    assert snapshot(tmp_path) == before
    (step / OPTIMIZER_FILE).unlink()
    found = rows(config, "train.resume=auto", code=1)["train.resume"]["detail"]
    assert "none of the checkpoints in" in found and f"{OPTIMIZER_FILE}: missing" in found


def test_data_that_were_not_read_are_not_ok(config: Path) -> None:
    for change, fault in (
        ("model.path=org/name", "model folder"),
        ("data.tokenizer=/no/tokenizer", "tokenizer"),
        ("lora.targets=[qproj]", "trained parameters"),
    ):
        found = rows(config, change, code=1)
        assert found[fault]["state"] == "broken"
        for what in ("data.train", "data.eval"):
            assert found[what]["state"] == "warning" and "its samples were not read" in found[what]["detail"]


def test_faults_of_lines_are_those_of_the_run(config: Path, tmp_path: Path) -> None:
    rows_of_file: list[Any] = [{"prompt": "a", "completion": 1}, *samples(3), {"messages": []}]
    path = write_jsonl(tmp_path / "train.jsonl", rows_of_file)
    with pytest.raises(UserError) as refusal:
        read_jsonl(path)
    table = json.loads(run(config, "--json").stdout)["rows"]
    assert [row["detail"] for row in table if row["what"] == "data.train"] == str(refusal.value).splitlines()
    assert len(str(refusal.value).splitlines()) == 2


def test_of_a_large_file_the_first_samples_are_read(config: Path, tmp_path: Path) -> None:
    large = [*samples(start.SAMPLES), {"prompt": 1}]
    write_jsonl(tmp_path / "train.jsonl", large)
    assert f"of the first {start.SAMPLES} samples: {start.SAMPLES} fit" in rows(config)["data.train"]["detail"]
    # None of the first samples fits, but a later one may.
    long = [{"prompt": "x" * 80, "completion": "y"}] * start.SAMPLES
    write_jsonl(tmp_path / "train.jsonl", [*long, *samples(1)])
    row = rows(config)["data.train"]
    assert row["state"] == "warning" and f"0 fit and have targets, {start.SAMPLES} are over 64" in row["detail"]
    # Control: a file no longer than the sample is read whole.
    write_jsonl(tmp_path / "train.jsonl", long)
    assert rows(config, code=1)["data.train"]["state"] == "broken"


def test_what_eval_generate_refuses(config: Path, tmp_path: Path) -> None:
    asked = "eval.generate={metrics: [rouge_l]}"
    assert rows(config, asked)["eval.generate"]["detail"] == "the first 2 prompts can be completed"
    assert "eval.generate" not in rows(config)
    write_jsonl(tmp_path / "eval.jsonl", [*samples(1), {"prompt": "x" * 70, "completion": "y"}])
    assert "eval.jsonl:2 (70 tokens)" in rows(config, asked, code=1)["eval.generate"]["detail"]


def test_a_run_that_does_not_fit(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_config = load_config(config, ["parallel.tensor=2"])
    here = Met(("here",) * 4, Backend(torch.device("cpu"), "gloo", "cpu", ranks_per_device=4))
    for ranks in (None, here):
        (row,) = start.memory(run_config, ranks)
        assert row.state == "ok" and row.detail.startswith("planned memory 0.00 GiB a rank")
    monkeypatch.setattr(Backend, "memory_for_a_rank", lambda self: 1000)
    (row,) = start.memory(run_config, None)
    assert row.state == "warning" and row.detail.startswith("with 2 ranks on this machine: planned memory 0.00 GiB")
    with pytest.raises(UserError, match="it does not fit. "):
        start.memory(run_config, here)
    assert start.memory(load_config(config, ["parallel.tensor=auto"]), here) == []
    assert start.memory(load_config(config, ["model.path=/no/model"]), here) == []


def test_compiled_kernels_that_are_demanded(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = load_config(config, ["engine.kernels=compiled"])
    monkeypatch.setattr(extension, "reason_not_loaded_on", lambda device: None)
    assert start.kernels(asked)[0].state == "ok" and start.kernels(load_config(config)) == []
    monkeypatch.setattr(extension, "reason_not_loaded_on", lambda device: f"none for {device}")
    with pytest.raises(UserError, match="engine.kernels: compiled operators for cpu are required, but none for cpu"):
        start.kernels(asked)


def test_a_gpu_that_is_asked_for_and_not_there(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[devices.Gpu]:
        raise RuntimeError("the driver is too old")

    asked = load_config(config, ["model.device=cuda"])
    monkeypatch.setattr(devices, "gpus", none)
    (row,) = inputs.device(asked)
    assert row.state == "missing" and "the driver is too old; use model.device=cpu or auto" in row.detail
    assert inputs.device(load_config(config))[0].state == "ok"
    monkeypatch.setattr(devices, "gpus", lambda: [devices.Gpu("NVIDIA H200", 1, 1, "sm_90")])
    assert inputs.device(asked)[0].state == "ok"


def test_every_missing_shard_is_named(config: Path, tmp_path: Path) -> None:
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    for shard in shards[:2]:
        shard.unlink()
    lines = [line for line in run(config).stdout.splitlines() if line.startswith("model folder")]
    assert len(lines) == 2 and all(str(shard) in line for shard, line in zip(shards, lines, strict=False))


def disk(free: float, inodes: int = 100) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=int(free) // 4096, f_frsize=4096, f_favail=inodes, f_files=1000)


def test_room_for_the_checkpoints(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes an element, times the most checkpoints that exist at once, and 64 MiB for everything else."""
    run_config = load_config(config, ["lora.rank=1024"])  # |Θ| = 589,824
    needed = 5 * 16 * 589_824 + 4 * 589_824 + 64 * 2**20
    for free, state in ((needed + 4096, "ok"), (needed - 4096, "broken")):
        monkeypatch.setattr(os, "statvfs", lambda path, free=free: disk(free))
        (row,) = storage.space(run_config, writes=True)
        assert row.state == state and row.figures["needed_bytes"] == needed
    assert "keep fewer checkpoints (output.keep_last)" in row.detail
    # A node without rank 0 writes no checkpoint.
    (row,) = storage.space(run_config, writes=False)
    assert row.state == "ok"
    monkeypatch.setattr(os, "statvfs", lambda path: disk(1e12, inodes=0))
    (row,) = storage.space(run_config, writes=True)
    assert row.state == "broken" and "no inode is left" in row.detail
    monkeypatch.setattr(os, "statvfs", lambda path: disk(1e12))
    everything = load_config(config, ["output.keep_last=null", "data.eval=null"])
    (row,) = storage.space(everything, writes=True)
    assert row.state == "ok" and "2 checkpoints" in row.detail and "every further one adds to it" in row.detail


def test_a_disk_that_gives_back_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"something else")
    (row,) = probe.write()
    assert row.state == "broken" and "read back changed" in row.detail
    probe.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_named_and_not_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError) as refusal:
        Probe(tmp_path).write()
    assert str(refusal.value).startswith(f"{tmp_path}: a checkpoint cannot be written (No space left on device); ")
    assert "tmp-" not in str(refusal.value) and "probe" not in str(refusal.value)


def test_what_one_node_writes_another_looks_for(tmp_path: Path) -> None:
    probe = Probe(tmp_path / "run")
    assert probe.written is None
    probe.write()
    written = probe.written
    assert written is not None and unseen_probes({"h2": written}) == []
    other = {**written, "mark": "00" * 32}
    elsewhere = {**written, "path": str(tmp_path / "elsewhere")}
    start = time.monotonic()
    assert unseen_probes({"h1": other, "h2": written, "h3": elsewhere}, seconds=0.3) == ["h1", "h3"]
    assert time.monotonic() - start >= 0.3, "a slow file system was not waited for"
    probe.remove()
    assert probe.written is None and unseen_probes({"h2": written}, seconds=0) == ["h2"]


def test_a_probe_is_removed_when_the_launcher_ends_its_rank(config: Path, tmp_path: Path) -> None:
    """If it stayed, the run folder's next owner would recognise it as a leftover."""
    code = """
import time
from lowrank_dist.cli.main import app
from lowrank_dist.doctor import machine
machine.apex = lambda: time.sleep(60)
app()
"""
    process = subprocess.Popen([sys.executable, "-c", code, "doctor", str(config)], cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not (left := [*tmp_path.glob(".doctor.lowrank_dist-tmp-*/probe")]) and time.monotonic() < end:
            time.sleep(0.05)
        assert left, "the probe that is to vanish was not there"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not [*tmp_path.glob(".*")]


class Job:
    """Ranks of a job on this machine, each started as deepspeed starts a module."""

    def __init__(self, size: int, local_size: int | None = None) -> None:
        self.shared = {
            **{name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES},
            **{"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local_size or size)},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
        }

    def start(self, rank: int, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lowrank_dist.cli", f"--local_rank={rank}", "doctor", *map(str, arguments)]
        environment = {**self.shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, ranks: list[int], *arguments: object) -> list[tuple[int, str, str]]:
        """Run the ranks; return exit code, stdout and stderr of each."""
        processes = [self.start(rank, *arguments) for rank in ranks]
        said = [process.communicate(timeout=120) for process in processes]
        return [(process.returncode, *both) for process, both in zip(processes, said, strict=True)]


def test_ranks_of_one_node(config: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    (code, stdout, _), (other, nothing, _) = Job(2).run([0, 1], config, "parallel.tensor=2", "--json")
    assert (code, other, nothing) == (0, 0, "")
    report = json.loads(stdout)
    found = {row["what"]: row for row in report["rows"]}
    assert report["can_train"] and report["size"] == 2
    assert found["parallel layout"]["detail"] == "2 tensor × 1 data parallel"
    assert "over 2 ranks by gloo" in found["all-reduce"]["detail"] and "all-reduce in a node" not in found
    assert snapshot(tmp_path) == before


def test_a_layout_that_does_not_fit_the_nodes(config: Path) -> None:
    four, nodes = load_config(config, ["parallel.tensor=4"]), ("h1", "h1", "h2", "h2") * 2
    assert inputs.layout(four, 8, sorted(nodes))[0].detail == "4 tensor × 2 data parallel"
    with pytest.raises(UserError, match="ranks 0 to 3 of one tensor-parallel group are on h1 and h2"):
        inputs.layout(four, 8, nodes)
    assert inputs.layout(load_config(config, ["parallel.tensor=4", "parallel.across_nodes=true"]), 8, nodes)
    for some in (nodes[:6], ()):  # without all ranks their nodes are not known
        with pytest.raises(UserError, match="parallel.tensor=4 does not fit 6 ranks"):
            inputs.layout(four, 6, some)
    assert inputs.layout(four, 8, ())


def test_nodes_of_unequal_size_can_train(config: Path) -> None:
    """Nodes of 4 and 2 ranks. A launcher that sets no LOCAL_WORLD_SIZE is another case: every node seemed to be one."""
    hosts = ("h1",) * 4 + ("h2",) * 2
    for change in ("parallel.data=3", "parallel.data=null"):
        two = load_config(config, ["parallel.tensor=2", change])
        assert inputs.layout(two, 6, hosts)[0].detail == "2 tensor × 3 data parallel"
    with pytest.raises(UserError, match="ranks 3 to 5 .* are on h1 and h2, .* set it to 1, 2, or set"):
        inputs.layout(load_config(config, ["parallel.tensor=3"]), 6, hosts)


def test_bad_input_in_a_job_is_one_message(config: Path) -> None:
    outcomes = Job(2).run([0, 1], config, "train.speed=1")
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert "".join(stderr for _, _, stderr in outcomes).count("train.speed: unknown key") == 1
    assert all("Traceback" not in stderr for _, _, stderr in outcomes)


def test_a_rank_that_does_not_come() -> None:
    start = time.monotonic()
    ((code, stdout, _),) = Job(3).run([0], "--timeout", 3)
    assert code == 1 and time.monotonic() - start < 60
    assert "ranks 1, 2 of 3 did not connect to localhost:" in stdout and "connected: rank 0 on " in stdout
    assert "not checked, since not every rank has connected" in stdout and "launcher deepspeed" in stdout


def test_rank_0_that_is_not_there() -> None:
    ((code, stdout, stderr),) = Job(2).run([1], "--timeout", 1)
    assert code == 1 and stdout == "", "a rank other than 0 prints on stdout"
    assert "rank 1 does not reach the others at localhost:" not in stderr, "it is not its node's first rank"
    job = Job(2, local_size=1)
    job.shared["LOCAL_RANK"] = "0"
    command = [sys.executable, "-m", "lowrank_dist.cli", "doctor", "--timeout", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env={**job.shared, "RANK": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "rank 1 does not reach the others at localhost:" in done.stderr
    assert "within 1 s: nothing listens at localhost, port" in done.stderr
    assert "launcher deepspeed" in done.stderr and "Traceback" not in done.stderr


# Two nodes on one machine: each rank has its own host name. The second reads a file that never answers.
NODE = """
import os, socket
from functools import partial
socket.gethostname = lambda: "n" + os.environ["RANK"]
from lowrank_dist.cli.main import app
from lowrank_dist.doctor import local, machine, member
member.TimeLimit = partial(local.TimeLimit, seconds=8)
if os.environ["RANK"] == "1":
    os.mkfifo(os.environ["FIFO"])
    machine.memory = lambda: open(os.environ["FIFO"])
app()
"""


def test_a_node_that_hangs_is_named_and_waited_for_no_longer(tmp_path: Path) -> None:
    job = Job(2, local_size=1)
    processes = []
    for rank in range(2):
        environment = {**job.shared, "RANK": str(rank), "LOCAL_RANK": "0", "FIFO": str(tmp_path / "fifo")}
        command = [sys.executable, "-c", NODE, "doctor", "--json"]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert said[1][0] == ""
    report = json.loads(said[0][0])
    (row,) = [row for row in report["rows"] if row["what"] == "host memory" and row["state"] == "broken"]
    assert row["nodes"] == ["n1"] and "hangs, no answer within 8 s" in row["detail"]
    assert {node: of["ranks"] for node, of in report["nodes"].items()} == {"n0": [0], "n1": [1]}
    (row,) = [row for row in report["rows"] if row["what"] == "all-reduce"]
    assert row["detail"] == "not checked, since not every rank has connected"
    # The rows that both ranks found before are there, and those that the other one found afterwards.
    (row,) = [row for row in report["rows"] if row["what"] == "torch"]
    assert row["state"] == "ok" and row["nodes"] == ["n0", "n1"]
    (row,) = [row for row in report["rows"] if row["what"] == "MASTER_ADDR"]
    assert row["state"] == "broken" and row["nodes"] == ["n0"]


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    """deepspeed would continue on this machine alone, and doctor would report that as in order."""
    launcher = tmp_path / "deepspeed"
    rank = "subprocess.run([sys.executable, '-m', 'lowrank_dist.cli', 'doctor'])"
    launcher.write_text(f"import subprocess, sys\nsys.exit({rank}.returncode)\n")
    command = [sys.executable, str(launcher), "--hostfile", "nowhere", "--module", "lowrank_dist.cli", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"deepspeed --hostfile: {ROOT / 'nowhere'} is not a file" in done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "h1", "MASTER_PORT": "1"}, "RANK: 'x' is not a number"),
    ],
)
def test_half_a_launcher(environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = run()
    assert done.exit_code == 2 and said in done.stderr
