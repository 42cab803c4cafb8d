"""`lowrank-dist slurm` writes only jobs that fit, and bash reads exactly the values that were given."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import lowrank_dist
from lowrank_dist.arch.model_files import built_in_config
from lowrank_dist.cli.main import app
from lowrank_dist.config import load_config
from lowrank_dist.errors import UserError
from lowrank_dist.slurm.directives import check_time
from lowrank_dist.slurm.script import BEGIN, END, checkout, fill

ROOT = Path(__file__).parents[2]
SHIPPED = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
runner = CliRunner()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    write_model(tmp_path, "llama-3-8b")
    sections = {"model": {"path": "base"}, "data": {"train": "train.jsonl"}, "output": {"dir": "runs/first"}}
    path.write_text(yaml.safe_dump({**sections, "parallel": {"tensor": 4}}))
    return path


def write_model(place: Path, shape: str) -> None:
    (place / "base").mkdir(exist_ok=True)
    (place / "base" / "config.json").write_text(json.dumps(built_in_config(shape)))


def slurm(*words: object, nodes: int = 2, gpus: int = 8, gpu: str | None = "h100") -> Result:
    size = ["--nodes", str(nodes), "--gpus-per-node", str(gpus), *(["--gpu", gpu] if gpu else [])]
    return runner.invoke(app, ["slurm", *size, *(str(word) for word in words)])


def variables(script: str) -> dict[str, str]:
    """Return the variables that bash has after the EDIT block."""
    block = script.partition(BEGIN)[2].partition(END)[0]
    show = f'{block}\nprintf \'%s\\0\' "$PROJECT" "$PYTHON" "$WORKDIR" "$CONFIG" "$RUN" "$RESUME" "${{OVERRIDES[@]}}"'
    done = subprocess.run(["bash", "-euo", "pipefail"], input=show.encode(), capture_output=True, check=True)
    assert done.stderr == b""
    *fixed, overrides = ["PROJECT", "PYTHON", "WORKDIR", "CONFIG", "RUN", "RESUME", "OVERRIDES"]
    values = done.stdout.decode().split("\0")[:-1]
    return {**dict(zip(fixed, values, strict=False)), overrides: json.dumps(values[len(fixed) :])}


def written(place: Path) -> set[str]:
    """Return the files beside the config and its model."""
    return {path.name for path in place.iterdir()} - {"config.yaml", "base"}


def refused(done: Result, *words: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr


def test_dry_run_prints_a_script_and_writes_nothing(config: Path, tmp_path: Path) -> None:
    done = slurm(config, "--partition", "gpu", "--account", "a-1", "--qos", "high", "--time", "1-12", "--dry-run")
    assert done.exit_code == 0 and done.stderr.startswith("layout: TP 4, DP 4, ")
    assert written(tmp_path) == set()
    expected = ["nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "account=a-1", "qos=high"]
    expected += ["job-name=lowrank", "time=1-12", "signal=B:USR1@300", "cpus-per-task=8"]
    lines = done.stdout.splitlines()
    assert [word for word in expected if f"#SBATCH --{word}" not in lines] == []
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0


def test_sections_of_another_method_are_said_to_be_passed_over_once(config: Path) -> None:
    config.write_text(config.read_text() + "lora: {rank: 4}\n")
    done = slurm(config, "method=full", "parallel.tensor=8", "--dry-run")
    assert done.stderr.count("config.yaml: passed over, since method=full does not read it: lora (rank)") == 1


def test_only_header_and_edit_block_differ_from_the_template(config: Path) -> None:
    script = slurm(config, "--dry-run").stdout
    assert script.partition(END)[2] == SHIPPED.partition(END)[2]
    assert "/path/to" not in script


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mail-user", "me@x.org"], "--mail-user: no such option: An option of sbatch is given as --sbatch mail"),
        (["--mail-user=me@x.org"], "--sbatch mail-user=me@x.org"),
        (["--partitoin", "gpu"], "did you mean --partition?"),
        (["-N", "2"], "--sbatch NAME=VALUE, with its long name"),
        (["--lora.rank", "4"], "--lora.rank: write the change as section.key=value"),
        (["--method=full"], "--method=full: write the change as section.key=value"),
    ],
)
def test_an_option_that_there_is_not(config: Path, words: list[str], said: str) -> None:
    refused(slurm(config, *words), said)
    refused(slurm(*words, config), said)


def test_file_is_written_once(config: Path, tmp_path: Path) -> None:
    done = slurm(config, "--job-name", "mine")
    assert done.exit_code == 0 and "sbatch mine.sbatch" in done.stdout
    text = (tmp_path / "mine.sbatch").read_text()
    assert text == slurm(config, "--job-name", "mine", "--dry-run").stdout
    (tmp_path / "mine.sbatch").write_text("edited")
    refused(slurm(config, "--job-name", "mine"), "--out", "mine.sbatch exists already", "another name")
    assert (tmp_path / "mine.sbatch").read_text() == "edited"
    refused(slurm(config, "--out", tmp_path / "no" / "folder"), "cannot write", "No such file")


def test_what_the_job_gets(config: Path, tmp_path: Path) -> None:
    layout = ["train.micro_batch=1", "engine.recompute=none"]
    words = ["train.lr=1e-3", "output.dir=other run", "data.train=$(touch made) `touch made` \"'.jsonl"]
    script = slurm(config.name, *words, *layout, "--dry-run").stdout
    found = variables(script)
    assert json.loads(found["OVERRIDES"]) == [words[0], words[2], *layout]
    assert (found["WORKDIR"], found["CONFIG"]) == (str(tmp_path), str(config))
    assert (found["RUN"], found["RESUME"]) == (str(tmp_path / "other run"), "auto")
    assert Path(found["PROJECT"]) == ROOT and Path(found["PYTHON"]).exists()
    assert not (tmp_path / "made").exists()
    # The job's config is the one that was checked.
    job = load_config(found["CONFIG"], [*json.loads(found["OVERRIDES"]), f"output.dir={found['RUN']}"])
    given_config = load_config(config, [*words[:1], words[2], *layout, f"output.dir={tmp_path / 'other run'}"])
    assert job == given_config


def test_resume_is_passed_as_it_was_written(config: Path) -> None:
    """./auto is a folder of that name; auto is not."""
    found = variables(slurm(config, "train.resume=never", "train.resume=./auto", "--dry-run").stdout)
    assert found["RESUME"] == "./auto" and "train.resume" not in found["OVERRIDES"]


def test_cpu_runs_ask_for_no_gpus(config: Path) -> None:
    script = slurm(config, "model.device=cpu", "--dry-run", gpu=None).stdout
    assert json.loads(variables(script)["OVERRIDES"]) == ["model.device=cpu"]
    assert "##SBATCH --gpus-per-node=" in script and "\n#SBATCH --gpus-per-node" not in script
    assert "#SBATCH --ntasks-per-node=8" in script


@pytest.mark.parametrize(
    ("words", "size", "said"),
    [
        (["parallel.tensor=3"], {}, ["parallel.tensor=3 does not divide", "these nodes with parallel.tensor="]),
        (["parallel.tensor=32"], {}, ["parallel.tensor: 32", "2 × 8 = 16 GPUs", "nodes with parallel.tensor="]),
        (["parallel.tensor=16"], {}, ["parallel.across_nodes is false", "TP 16", "nodes with parallel.tensor="]),
        (["parallel.tensor=4"], {"gpus": 6}, ["parallel.across_nodes is false", "nodes with parallel.tensor=2"]),
        (["parallel.data=2"], {}, ["parallel.data", "4 tensor × 2 data parallel", "parallel.data=null"]),
        (["parallel.tensor=3", "model.device=cpu"], {"gpu": None}, ["parallel.tensor=3 does not divide"]),
        (["parallel.tensor=16", "model.device=cpu"], {"gpu": None}, ["parallel.across_nodes is false"]),
        (["model.device=cpu"], {}, ["--gpu: model.device is cpu"]),
        ([], {"gpu": None}, ["--gpu is missing", "h100", "model.device=cpu"]),
        (["--gpu-memory", "80"], {}, ["--gpu-memory: '80' has no unit"]),
        (["model.path=nowhere"], {}, ["model.path: nowhere is no folder here", "hf download"]),
        (["model.path=llama-3-8b"], {}, ["model.path: llama-3-8b is no folder here"]),
        (["train.lrr=1"], {}, ["train.lrr: unknown key", "train.lr"]),
        (["train.lr"], {}, ["train.lr has no value; write train.lr=VALUE"]),
        (["output.dir=a: b"], {}, ["output.dir"]),
        (["--partition", "a b"], {}, ["--partition: 'a b'"]),
        (["--account", "x\n#SBATCH --nodes=9"], {}, ["--account"]),
        (["--job-name", "a;rm"], {}, ["--job-name"]),
        (["--partition", ""], {}, ["--partition: ''"]),
        (["--time", "a day"], {}, ["--time: 'a day'", "D-HH:MM:SS"]),
        (["--time", "5"], {}, ["--lead", "300 s of 300 s"]),
    ],
    ids=str,
)
def test_bad_input(config: Path, tmp_path: Path, words: list[str], size: dict[str, Any], said: list[str]) -> None:
    refused(slurm(config, *words, **size), *said)
    assert written(tmp_path) == set()


def directives(script: str) -> list[str]:
    """Return the lines that sbatch reads, without the disabled ones."""
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]


def test_requeues(config: Path) -> None:
    usual = slurm(config, "--dry-run").stdout
    assert "requeue" in directives(usual) and "\nREQUEUE=yes\n" in usual and "\nMAX_REQUEUES=20\n" in usual
    none = slurm(config, "--no-requeue", "--max-requeues", "3", "--dry-run").stdout
    assert "no-requeue" in directives(none) and "requeue" not in directives(none)
    assert "\nREQUEUE=no\n" in none and "\nMAX_REQUEUES=3\n" in none
    assert slurm(config, "--max-requeues", "0").exit_code == 2


def test_a_run_without_checkpoints_is_a_warning(config: Path) -> None:
    assert "warning: output.save_every is null" in slurm(config, "--dry-run").stderr
    assert "save_every" not in slurm(config, "output.save_every=100", "--dry-run").stderr


def test_a_model_without_weights_is_a_warning(config: Path, tmp_path: Path) -> None:
    assert "warning: model.path: base has no weights (*.safetensors)" in slurm(config, "--dry-run").stderr
    (tmp_path / "base" / "model.safetensors").touch()
    assert "no weights" not in slurm(config, "--dry-run").stderr


def test_the_script_says_how_much_memory_a_node_needs(config: Path) -> None:
    lines = slurm(config, "--dry-run").stdout.splitlines()
    files = json.loads(runner.invoke(app, ["plan", str(config), "--nodes", "2", "--json"]).output)["files"]
    loading, saving = (math.ceil(files[f"host_memory_{when}"] / 2**30) for when in ("loading", "saving"))
    said = (
        f"A node needs {loading} GiB while it loads, by the plan, and the first one {saving} GiB more while it saves."
    )
    assert lines[lines.index("##SBATCH --mem=0") - 1] == f"# Host memory of a node; 0 is all of it. {said}"


def test_a_start_that_is_repeated_is_a_warning(config: Path, tmp_path: Path) -> None:
    """A checkpoint named in CONFIG is also the job's start, to which each requeue returns."""
    config.write_text(config.read_text() + "train: {resume: old/checkpoints/step-8}\n")
    done = slurm(config, "--dry-run")
    checkpoint = str(tmp_path / "old/checkpoints/step-8")
    assert variables(done.stdout)["RESUME"] == checkpoint
    assert f"warning: each requeue starts with train.resume={checkpoint} again" in done.stderr
    assert "each requeue" not in slurm(config, "--no-requeue", "--dry-run").stderr
    assert "each requeue" not in slurm(config, "train.resume=auto", "--dry-run").stderr


def test_any_directive_is_passed_on(config: Path) -> None:
    """A directive of the template is replaced in place; new ones follow the last."""
    words = ["gres=gpu:h100:8,nvme:1", "--exclusive", "mem=0", "comment=my job # 3", "constraint=[a|b]*2"]
    script = slurm(config, *(f"--sbatch={word}" for word in words), "--dry-run").stdout
    usual = directives(slurm(config, "--dry-run").stdout)
    usual.remove("gpus-per-node=8")  # gres asks for them
    usual.insert(usual.index("time=24:00:00") + 1, "mem=0")
    added = ["gres=gpu:h100:8,nvme:1", "exclusive", 'comment="my job # 3"', 'constraint="[a|b]*2"']
    assert directives(script) == usual + added
    commands = re.split(r"^[^#\n]", script, maxsplit=1, flags=re.MULTILINE)[0]
    assert directives(commands) == usual + added, "sbatch reads no directive after the first command"
    for word in ("constraint=gpu", "gpu-bind=none", "gres=nvme:1"):
        assert "gpus-per-node=8" in directives(slurm(config, "--sbatch", word, "--dry-run").stdout), word
    for word in ("gpus-per-node=h100:8", "gpus-per-task=1", "gpus-per-task=h100:1", "tres-per-task=gres/gpu:1"):
        typed = directives(slurm(config, "--sbatch", word, "--dry-run").stdout)
        assert word in typed and "gpus-per-node=8" not in typed


@pytest.mark.parametrize("word", ["cpus-per-gpu=6", "tres-per-task=cpu=6,gres/gpu=1", "tres-per-task=cpu:6"])
def test_cpus_are_counted_in_one_way(config: Path, word: str) -> None:
    """Slurm refuses two numbers of CPUs: of a task twice (23.11), or of a task and of a GPU."""
    assert "cpus-per-task=8" in directives(slurm(config, "--sbatch=tres-per-task=gres/gpu=1", "--dry-run").stdout)
    by_other = directives(slurm(config, f"--sbatch={word}", "--cpus-per-task=4", "--dry-run").stdout)
    assert word in by_other and not any(each.startswith("cpus-per-task=") for each in by_other)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gres=gpu:4", ["gres=gpu:4 asks for 4 GPUs", "2 nodes of 8 ranks need 8"]),
        ("gres=gpu:a100:4,gpu:h100:2", ["asks for 6 GPUs"]),
        ("gpus=8", ["asks for 8 GPUs", "need 16"]),
        ("gpus-per-node=h100:1", ["asks for 1 GPUs"]),
        (f"gres=gpu:{'8' * 5000}", ["asks for 888888888 GPUs"]),
        ("gpus-per-task=8", ["asks for 8 GPUs", "need 1 for each"]),
        ("tres-per-task=gres/gpu:h100:2", ["asks for 2 GPUs"]),
        ("nodes=4", ["nodes is set by --nodes"]),
        ("--time=4", ["time is set by --time"]),
        ("array=0-3", ["train_array.sbatch"]),
        ("-p=x", ["'-p=x' is no long option"]),
        ("mem", ["mem is given twice"]),
        ("comment=it's", ["of comment cannot go on"]),
        ("comment=a\n#SBATCH --nodes=9", ["of comment cannot go on"]),
        ("comment=", ["of comment cannot go on"]),
    ],
    ids=repr,
)
def test_directives_that_are_refused(config: Path, tmp_path: Path, word: str, said: list[str]) -> None:
    refused(slurm(config, "--sbatch", "mem=0", f"--sbatch={word}"), "--sbatch: ", *said)
    assert written(tmp_path) == set()


def test_bad_numbers_and_files(config: Path, tmp_path: Path) -> None:
    refused(slurm(tmp_path / "no.yaml"), "no.yaml: cannot be read")
    for words in ({"nodes": 0}, {"gpus": 0}, {"gpus": -1}):
        assert slurm(config, **words).exit_code == 2
    assert runner.invoke(app, ["slurm", str(config)]).exit_code == 2


def test_a_folder_that_yaml_would_read_otherwise(config: Path, tmp_path: Path) -> None:
    refused(slurm(config, "output.dir='a #b'"), "would be read as another value by YAML", "rename")


def test_tensor_groups_across_nodes_when_allowed(config: Path) -> None:
    across = ["parallel.tensor=16", "parallel.across_nodes=true"]
    script = slurm(config, *across, "model.device=cpu", "--dry-run", gpu=None).stdout
    assert json.loads(variables(script)["OVERRIDES"]) == [*across, "model.device=cpu"]
    refused(slurm(config, "parallel.tensor=5", "parallel.across_nodes=true"), "parallel.tensor=5 does not divide")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("10", 600), ("10:30", 630), ("1:00:05", 3605), ("1-0", 86400), ("0-1:30", 5400), ("0-0:1:1", 61)],
)
def test_times_as_sbatch_reads_them(time: str, seconds: int) -> None:
    check_time(time, seconds - 1)
    with pytest.raises(UserError, match="--lead"):
        check_time(time, seconds)


def test_endless_times() -> None:
    check_time("UNLIMITED", 300)
    for wrong in ("", "1:2:3:4", "-5", "1d", "10:000", "UNLIMITED ", "9" * 5000, "9" * 5000 + "-0:00"):
        with pytest.raises(UserError, match="--time"):
            check_time(wrong, 300)


@settings(max_examples=25)
@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
def test_any_text_comes_back_from_bash(value: str) -> None:
    script = fill(SHIPPED, {}, {"RUN": value, "OVERRIDES": [value, "x"]})
    found = variables(script)
    assert found["RUN"] == value and json.loads(found["OVERRIDES"]) == [value, "x"]


def test_a_template_without_the_line_is_a_bug() -> None:
    for directives, names in (({"colour": "red"}, {}), ({}, {"COLOUR": "red"})):
        with pytest.raises(ValueError):
            fill(SHIPPED, directives, names)
    with pytest.raises(AssertionError):
        fill("#!/bin/bash\n", {}, {})


def test_package_without_its_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checkout() == ROOT
    monkeypatch.setattr(lowrank_dist, "__file__", str(tmp_path / "site-packages/lowrank_dist/__init__.py"))
    with pytest.raises(UserError, match="need a checkout"):
        checkout()


def test_words_of_the_shipped_block_are_plain() -> None:
    """The values that the command leaves unchanged mean to bash what they say."""
    for line in SHIPPED.partition(BEGIN)[2].partition(END)[0].splitlines():
        if line and not line.startswith("#") and "=(" not in line:
            assert shlex.split(line) == [line]


@pytest.fixture
def large(config: Path, tmp_path: Path) -> Path:
    """Return the same run on Llama-3-70B, without a layout."""
    write_model(tmp_path, "llama-3-70b")
    sections = yaml.safe_load(config.read_text())
    del sections["parallel"]
    config.write_text(yaml.safe_dump({**sections, "data": {"train": "train.jsonl", "max_length": 2048}}))
    return config


def test_the_plan_lays_out_what_is_left_open(large: Path) -> None:
    """A node of 8 GPUs holds the model at TP 8 or so; given keys stay."""
    done = slurm(large, "train.global_batch=16", "--dry-run")
    assert done.exit_code == 0, done.output
    planned = dict(change.split("=") for change in json.loads(variables(done.stdout)["OVERRIDES"]))
    assert planned.pop("train.global_batch") == "16"
    assert planned.keys() == {"parallel.tensor", "train.micro_batch", "engine.recompute"}
    tensor = planned["parallel.tensor"]
    assert tensor in ("2", "4", "8") and f"layout: TP {tensor}, DP {16 // int(tensor)}, " in done.stderr
    assert f"chosen by the plan: parallel.tensor={tensor} " in done.stderr
    fixed = slurm(large, "train.global_batch=16", "parallel.tensor=8", "--dry-run")
    assert json.loads(variables(fixed.stdout)["OVERRIDES"]).count("parallel.tensor=8") == 1


def test_the_configuration_of_the_how_to_page_fits_its_nodes(large: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "run-on-slurm.md").read_text()
    large.write_text(re.search(r'```yaml title="70b.yaml"\n(.*?)```', page, re.DOTALL)[1])
    planned = runner.invoke(app, ["plan", str(large), "model.path=base", "--nodes", "2"])
    assert planned.exit_code == 0 and "FITS 2 × 8 h100" in planned.output
    written = slurm(large, "model.path=base", "--dry-run")
    shown = re.search(r"^layout: TP.*\n.*", page, re.MULTILINE)[0]
    assert written.exit_code == 0 and shown in written.stderr


def test_a_layout_that_does_not_fit_names_the_one_that_does(large: Path, tmp_path: Path) -> None:
    """The keys of the remedy can be passed as they are."""
    done = slurm(large, "parallel.tensor=1", "train.global_batch=16")
    refused(done, "does not fit 2 × 8 h100 as TP 1, DP 16", "a GPU lacks")
    remedy = done.stderr.partition("the job fits these nodes with ")[2].split()
    # The keys that were left to the plan still are.
    assert [word.partition("=")[0] for word in remedy] == ["parallel.tensor"]
    assert written(tmp_path) == set()
    assert slurm(large, "train.global_batch=16", *remedy, "--dry-run").exit_code == 0
    ignored = slurm(large, "parallel.tensor=1", "train.global_batch=16", "train.ignore_plan=true", "--dry-run")
    assert ignored.exit_code == 0 and "warning: by the plan each GPU" in ignored.stderr


def test_tensor_groups_never_cross_nodes_unasked(large: Path) -> None:
    """A 70B model on nodes of one GPU fits only with groups across nodes, which the user must allow."""
    done = slurm(large, nodes=8, gpus=1)
    refused(done, "parallel.across_nodes is false", "8 × 1 h100", "parallel.across_nodes=true")
    remedy = done.stderr.partition("the job fits these nodes with ")[2].split()
    assert slurm(large, *remedy, "--dry-run", nodes=8, gpus=1).exit_code == 0


def test_the_plan_says_where_nothing_fits(large: Path) -> None:
    said = ["does not fit 1 × 1 h100 as TP 1", "a GPU lacks", "it fits with --nodes 2", ", or --gpu b200"]
    refused(slurm(large, nodes=1, gpus=1), *said)
    refused(slurm(large, gpu="h1000"), "--gpu: 'h1000' is not known: did you mean h100?")
    assert slurm(large, "--gpu-memory", "400GB", "--dry-run", nodes=1, gpus=1).exit_code == 0


def test_a_tight_fit_is_a_warning(large: Path) -> None:
    done = slurm(large, "parallel.tensor=8", "train.micro_batch=1", "--dry-run")
    needed = float(re.search(r"; ([\d.]+) of [\d.]+ usable GiB", done.stderr)[1])
    assert "memory is tight" not in done.stderr
    # 2 GB and 3 % of a GPU's memory are not usable.
    memory = f"{2 / 1.074 + 1.02 * needed / 0.97:.2f}GiB"
    tight = slurm(large, "parallel.tensor=8", "train.micro_batch=1", "engine.recompute=none", "--gpu-memory", memory)
    assert tight.exit_code == 0 and "warning: memory is tight" in tight.stderr
