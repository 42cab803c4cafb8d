"""The job scripts of launch/slurm as shipped, filled in and run in a real Slurm over two hosts."""

from __future__ import annotations

import sys
from pathlib import Path

from lowrank_dist.slurm.script import END, fill
from tests.cluster.rig import Rig
from tests.cluster.runs import Job, losses, well_trained, write_job
from tests.integration.launching import ROOT
from tests.tiny_adapters import random_adapter, save_adapter

FOLDER = ROOT / "launch" / "slurm"


def test_the_shipped_template_trains_as_one_host(
    quiet_rig: Rig, config: Path, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    script = write_job(config, tmp_path / "job.sbatch", f"output.dir={run}")
    template = (FOLDER / "train.sbatch").read_text()
    assert script.read_text().partition(END)[2] == template.partition(END)[2]
    job = Job.submit(quiet_rig, script)
    assert job.finished() == "COMPLETED", job.said()
    assert losses(run) == expected
    said = job.said()
    # The script prints its whole configuration first, then the run prints its own.
    order = [f'RUN="{run}"', "max_length: 48", "network card as", "step 1/", "the step ended with code 0"]
    assert sorted(order, key=said.index) == order
    assert job.field("NumNodes") == "2" and not (run / "restarts").exists()


def test_nodes_of_unequal_size_train(quiet_rig: Rig, config: Path, tmp_path: Path) -> None:
    """Slurm counts tasks in place of those of a node: two ranks on one host and one on the other."""
    run = tmp_path / "run"
    script = write_job(
        config, tmp_path / "job.sbatch", f"output.dir={run}", "parallel.tensor=1", "train.global_batch=6"
    )
    script.write_text(script.read_text().replace("#SBATCH --ntasks-per-node=2\n", "#SBATCH --ntasks=3\n"))
    job = Job.submit(quiet_rig, script)
    assert job.finished() == "COMPLETED", job.said()
    assert well_trained(losses(run)) and "tasks of each node: 2,1\n" in job.said()


def test_a_job_trains_from_its_snapshot(
    quiet_rig: Rig, config: Path, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """After the job's setup, each rank imports the package's snapshot, which has a line that the checkout lacks."""
    run, setup = tmp_path / "run", tmp_path / "setup.sh"
    setup.write_text("export FROM=setup$NOT_SET\n")
    script = write_job(config, tmp_path / "job.sbatch", f"output.dir={run}", "--snapshot", f"--setup={setup}")
    (copy,) = tmp_path.glob("run.code-*")
    with (copy / "lowrank_dist" / "__init__.py").open("a") as file:
        file.write(
            "\nimport os, sys\nif 'train.py' in sys.argv[0]: print('the copy, from', os.environ['FROM'], flush=True)\n"
        )
    job = Job.submit(quiet_rig, script)
    assert job.finished() == "COMPLETED", job.said()
    assert job.said().count("the copy, from setup\n") == 4
    assert losses(run) == expected


def test_the_shipped_merge_template(quiet_rig: Rig, config: Path, tmp_path: Path) -> None:
    base, adapter = config.parent / "base", tmp_path / "adapter"
    save_adapter(adapter, base, random_adapter(base))
    script = tmp_path / "job.sbatch"
    values = {"PYTHON": sys.executable, "BASE": str(base), "ADAPTERS": [str(adapter)], "OUT": str(tmp_path / "merged")}
    script.write_text(fill((FOLDER / "merge.sbatch").read_text(), {"cpus-per-task": "1", "time": "30"}, values))
    job = Job.submit(quiet_rig, script)
    assert job.finished() == "COMPLETED", job.said()
    assert f"{tmp_path / 'merged'}: " in job.said() and "verif" in job.said()
    assert (tmp_path / "merged" / "config.json").exists()
    # An --out that exists is the user's mistake, which the job's exit code shows.
    again = Job.submit(quiet_rig, script)
    assert (again.finished(), again.field("ExitCode")) == ("FAILED", "2:0")
