"""A missing hostfile, about which the launcher only warns, is an error in the rank."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_dist.backend.launchers import named_hostfile, refuse_missing_hostfile

RANK = "from lowrank_dist.backend.launchers import refuse_missing_hostfile; refuse_missing_hostfile()"
# Like deepspeed, with a process between the runner and the rank.
RUNNER = (
    f"import subprocess, sys; sys.exit(subprocess.call(['sh', '-c', '\"$0\" -c \"$1\"', sys.executable, {RANK!r}]))"
)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("python /v/bin/deepspeed --hostfile hosts launch/train.py c.yaml", "hosts"),
        ("/v/bin/deepspeed --num_gpus 2 -H hosts train.py", "hosts"),
        ("python -m deepspeed.launcher.runner --hostfile=a=b train.py", "a=b"),
        ("deepspeed --num_gpus 2 train.py --hostfile other", None),
        ("deepspeed --hostfile", None),
        ("torchrun --hostfile hosts train.py", None),
        ("python -m deepspeed.launcher.launch --world_info=x train.py", None),
        ("", None),
    ],
)
def test_command_lines(command: str, found: str | None) -> None:
    assert named_hostfile(command.split()) == found


@pytest.mark.parametrize("name", ["hosts", "sub/hosts"])
def test_only_a_hostfile_that_is_there_passes(tmp_path: Path, name: str) -> None:
    """The path is relative to the directory that the launcher was started in."""
    (tmp_path / "deepspeed").write_text(RUNNER)
    (tmp_path / "sub").mkdir()
    command = [sys.executable, "deepspeed", "--hostfile", name, "launch/train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"UserError: deepspeed --hostfile: {tmp_path / name} is not a file" in done.stderr
    (tmp_path / name).write_text("h1 slots=2\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_launcher_nothing_is_refused() -> None:
    refuse_missing_hostfile()


def test_a_script_whose_name_the_kernel_cuts_inside_a_character(tmp_path: Path) -> None:
    """Linux keeps 15 bytes of a program's name, here inside the fifth Chinese character."""
    script = tmp_path / "1训练大模型.sh"
    script.write_text(f"#!/bin/bash\n{sys.executable} -c '{RANK}'\nexit $?\n")
    script.chmod(0o755)
    done = subprocess.run([str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
