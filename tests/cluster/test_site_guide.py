"""The commands and lines of docs/how-to/adapt-to-your-site.md, each tried in a job of a real Slurm.

A job is two hosts of two ranks in place of two nodes of eight, and a stand-in shows what its ranks have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.rig import Rig
from tests.cluster.runs import Job, write_run
from tests.cluster.test_job_script import STAND_IN
from tests.documented import SHELL, Block, blocks, commands
from tests.integration.launching import ROOT, program

PAGE = ROOT / "docs" / "how-to" / "adapt-to-your-site.md"
TEXT = PAGE.read_text()
BLOCKS = [block for block in blocks(PAGE, TEXT) if block.language == SHELL]
SETUPS = {block.title: block.text for block in BLOCKS if block.title is not None}
TRIED = [block for block in BLOCKS if block.title is None]
SHOWN = "MODULE TMPDIR HF_HOME NCCL_SOCKET_IFNAME FOO MASTER_ADDR LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES"
SHOWN += " SLURM_CPUS_PER_GPU SRUN_CPUS_PER_TASK"
SHOW = f"print('has', {{name: os.environ.get(name) for name in '{SHOWN}'.split()}}, flush=True)"
# From the nodes of the page to the hosts of the rig.
SMALLER = [(r"\b8\b", "2"), (r"=12\b", "=3"), ("tensor=4", "tensor=1")]
# What the ranks of a block's job have, where the block is about it.
EXPECTED = {
    "gres=gpu:h100:8": {"CUDA_VISIBLE_DEVICES": {"0,1"}},
    "gpus-per-node=h100:8": {"CUDA_VISIBLE_DEVICES": {"0,1"}},
    "gpus-per-task=1": {"CUDA_VISIBLE_DEVICES": {"0", "1"}},
    "cpus-per-gpu=8": {"SLURM_CPUS_PER_GPU": {"2"}, "SRUN_CPUS_PER_TASK": {None}, "CUDA_VISIBLE_DEVICES": {"0,1"}},
    "modules.sh": {"MODULE": {"cuda/12.8"}},
    "conda.sh": {"MODULE": {"lowrank"}},
    "variables.sh": {"TMPDIR": {"/var/tmp"}, "NCCL_SOCKET_IFNAME": {"eth0"}, "FOO": {"of my shell"}},
    "export=NONE": {"TMPDIR": {"/var/tmp"}, "HF_HOME": {"/var/tmp/huggingface"}, "FOO": {None}},
    "ntasks=12": {"LOCAL_WORLD_SIZE": {"2", "1"}, "CUDA_VISIBLE_DEVICES": {"0", "1"}},
    "--no-requeue": {"LOCAL_WORLD_SIZE": {"2"}},
    "nice=10": {"LOCAL_WORLD_SIZE": {"2"}},
}


def subject(block: Block) -> str:
    """Return the key of `EXPECTED` that a block is about: the one that it names last."""
    named = {key: block.text.rfind(key) for key in EXPECTED if key in block.text}
    return "export=NONE" if "export=NONE" in named else max(named, key=lambda key: named[key])


def write_script(place: Path, block: Block) -> Path:
    """Run a block's commands as the page has them, but for the sizes of the job and the interpreter of its ranks."""
    config = write_run(place)
    config.write_text(config.read_text().replace("device: cpu", "device: auto"))
    (place / "stand-in").write_text(STAND_IN.format(python=sys.executable))
    (place / "stand-in").chmod(0o755)
    # Stand-ins for the files of a site that make `module` and `conda` known.
    (place / "known.sh").write_text("module() { [ $1 = purge ] || export MODULE=$2; }\nconda() { export MODULE=$2; }\n")
    for name, text in SETUPS.items():
        (place / name).write_text(re.sub(r"(?<=source )\S+", str(place / "known.sh"), text))
    for words in commands(block):
        shorter = words
        for large, small in SMALLER:
            shorter = [re.sub(large, small, word) for word in shorter]
        if words[0] == "lowrank-dist":
            files = {"70b.yaml": config, **{name: place / name for name in SETUPS}}
            shorter = [str(files.get(word, word)) for word in shorter]
            own = ["--python", place / "stand-in", "--out", place / "lowrank.sbatch", f"output.dir={place / 'run'}"]
            done = program([*shorter, *own, "--cpus-per-task", 1, "--time", 30, "--lead", 15])
            assert done.code == 0, done.stderr
        else:
            subprocess.run(shorter, check=True, cwd=place)
    return place / "lowrank.sbatch"


def ranks_of(job: Job) -> list[dict[str, str | None]]:
    assert job.finished() == "COMPLETED", job.said()
    found = [eval(line) for line in re.findall(r"^has (.*)$", job.said(), re.MULTILINE)]  # noqa: S307, our own
    assert found, job.said()
    return found


def submit(rig: Rig, script: Path) -> Job:
    """Submit a script whose ranks show their variables, also where the site passes none on."""
    text = script.read_text().replace("\nset -euo", f'\nexport STAND_IN="{SHOW}"\nset -euo', 1)
    script.write_text(text)
    output = re.search(r"^#SBATCH --output=(\S+)$", text, re.MULTILINE).group(1)
    job = Job.submit(rig, script, {"FOO": "of my shell"})
    return Job(rig, job.number, script.parent / output.replace("%x", "lowrank").replace("%j", str(job.number)))


@pytest.mark.parametrize("block", TRIED, ids=subject)
def test_a_line_of_the_guide(quiet_rig: Rig, block: Block, tmp_path: Path) -> None:
    ranks = ranks_of(submit(quiet_rig, write_script(tmp_path, block)))
    assert len(ranks) == (3 if "ntasks" in block.text else 4)
    for name, values in EXPECTED[subject(block)].items():
        assert {rank[name] for rank in ranks} == values, ranks


def test_ranks_meet_where_the_guide_says(quiet_rig: Rig, tmp_path: Path) -> None:
    (line,) = re.findall(r"^INSIDE=\(.*$", TEXT, re.MULTILINE)
    script = write_script(tmp_path, TRIED[0])
    script.write_text(script.read_text().replace("\nINSIDE=()\n", f"\n{line}\n"))
    assert {rank["MASTER_ADDR"] for rank in ranks_of(submit(quiet_rig, script))} == {"h1i"}


def test_exclusive_alone_gives_no_gpu(quiet_rig: Rig, tmp_path: Path) -> None:
    script = write_script(tmp_path, TRIED[0])
    script.write_text(re.sub(r"(?m)^#SBATCH --gres=.*", "#SBATCH --exclusive", script.read_text()))
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks_of(submit(quiet_rig, script))} <= {None, ""}


def test_every_block_is_about_something() -> None:
    assert sorted(subject(block) for block in TRIED) == sorted(EXPECTED) and os.sep not in "".join(SETUPS)
