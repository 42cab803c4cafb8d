"""A link between hosts that flaps, and one that is cut: faults as in test_faults.py, four minutes of them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cluster.faults import CURVES, TIMEOUT, Faults, Stopwatch, culprit, last_words, submit
from tests.cluster.rig import SELDOM, Host, Rig, settled
from tests.cluster.runs import STEPS, Job, losses


def test_a_link_that_flaps_and_one_that_is_cut(
    quiet_rig: Rig, config: Path, expected: CURVES, tmp_path: Path, folder: Path
) -> None:
    """A link that is down for 3 s goes unnoticed; a cut in mid-step ends the job, and Slurm requeues it.

    The link is then cut once more while a checkpoint is written, for which the ranks wait at the end of the last step.
    """
    away = quiet_rig.hosts[1]
    run, faults = tmp_path / "run", Faults("gate:2:2,gate:1:3,save:2:4", folder)
    job = submit(quiet_rig, config, run, faults.environment)
    faults.await_gate(2, job.said)
    with quiet_rig.cut_off(away):
        faults.open_gate(2)
        assert not settled(lambda: (folder / "3.reached").exists(), True, seconds=3), "the link was not down"
    faults.await_gate(3, job.said)
    cut_off(quiet_rig, away, job, run, faults, 3, "step 3 in reduction")
    job.start_now(2)
    faults.await_gate(4, job.said)
    assert settled(lambda: f"step {STEPS}/{STEPS}  eval loss" in job.said(), True, seconds=TIMEOUT - 4), job.said()
    cut_off(quiet_rig, away, job, run, faults, 4, f"step {STEPS} in checkpoint")
    job.start_now(3)
    assert job.finished() == "COMPLETED", job.said()
    assert losses(run) == expected


def cut_off(rig: Rig, host: Host, job: Job, run: Path, faults: Faults, gate: int, where: str) -> None:
    """Open a gate without a link to the host: the other ranks end and name its ranks, and Slurm requeues the job."""
    watch = Stopwatch(rig)
    with rig.cut_off(host):
        faults.open_gate(gate)
        print(f"sbatch, link cut at {where}: ranks ended after {watch.ranks_ended():.1f} s |", culprit(run))
        ended = f"rank [01] on h1 lost the other ranks at {where}, no answer from rank 2 on h2, rank 3 on h2: "
        assert re.match(ended, culprit(run)), job.said()
        assert last_words(job.said()).startswith(culprit(run))
        # Slurm has lost the node as well, and puts the job back into the queue.
        assert settled(lambda: job.field("JobState"), "PENDING", every=SELDOM) == "PENDING", job.said()
