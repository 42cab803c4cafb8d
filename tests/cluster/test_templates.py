"""Tests of the job scripts that need no Slurm: bash and shellcheck accept them, and their directives are sound."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lowrank_dist.slurm.script import BEGIN, END
from tests.cluster.runs import write_job, write_run
from tests.integration.launching import ROOT

FOLDER = ROOT / "launch" / "slurm"
TEMPLATES = sorted(FOLDER.glob("*.sbatch"))
SCRIPTS = [*TEMPLATES, *sorted(FOLDER.glob("*.sh")), *sorted((ROOT / "tests" / "cluster").glob("*.sh"))]
TRAINING = [path for path in TEMPLATES if path.name.startswith("train")]
SHELLCHECK = ["shellcheck", "--external-sources", "--enable=quote-safe-variables"]

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
each_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
each_training = pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)


def directives(path: Path) -> list[str]:
    return re.findall(r"^#+SBATCH\b.*$", path.read_text(), re.MULTILINE)


def test_all_templates_are_here() -> None:
    assert {path.name for path in TEMPLATES} == {"train.sbatch", "train_array.sbatch", "merge.sbatch"}


@each_script
def test_bash_and_shellcheck(path: Path) -> None:
    for command in (["bash", "-n"], SHELLCHECK):
        done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    "options", [[], ["--container-image=x/y"], ["--container-image=a://b", "--container-runtime=apptainer"]], ids=str
)
def test_shellcheck_takes_what_the_command_writes(tmp_path: Path, options: list[str]) -> None:
    """Also with a setup file that shellcheck would criticise, and lists in overrides and mounts."""
    config = write_run(tmp_path)
    setup = tmp_path / "setup.sh"
    setup.write_text("source /etc/modules.sh\nmodule load $CUDA\ncd $HOME\n")
    script = write_job(config, tmp_path / "job.sbatch", f"--setup={setup}", *options, "lora.targets=[q_proj,v_proj]")
    done = subprocess.run([*SHELLCHECK, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stdout + done.stderr


@each_template
def test_no_variable_in_a_directive(path: Path) -> None:
    """sbatch does not expand variables in these lines: one would become a file or partition of that name."""
    assert len(directives(path)) >= 10
    assert [line for line in directives(path) if re.search(r"[$`~]", line)] == []


@each_template
def test_directives_come_before_the_first_command(path: Path) -> None:
    """sbatch stops looking for directives at the first command."""
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(re.match("#+SBATCH", line) for line in lines[first:])


@each_script
def test_nobody_meets_on_the_loopback(path: Path) -> None:
    if path.name == "rig.sh":  # every host has its own /etc/hosts
        return
    assert not re.search(r"127\.\d|localhost|::1|0\.0\.0\.0", path.read_text())


@each_template
def test_blocks_and_strictness(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n# ") and text.count(BEGIN) == text.count(END) == 1
    order = [END, "CONTAINER: begin", "CONTAINER: end", "\nset -euo pipefail\n"]
    assert sorted(order, key=text.index) == order
    assert "Pyxis" in text and "Apptainer" in text


@each_training
def test_what_a_training_job_needs_of_slurm(path: Path) -> None:
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --open-mode=append", "#SBATCH --requeue"} <= set(directives(path))
