"""A link between hosts that flaps, and one that is cut: faults as in test_faults.py, four minutes of them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cluster.faults import CURVES, Faults, Stopwatch, culprit, last_words, submit
from tests.cluster.rig import Rig, settled
from tests.cluster.runs import losses


def test_a_link_that_flaps_and_one_that_is_cut(
    quiet_rig: Rig, config: Path, expected: CURVES, tmp_path: Path, folder: Path
) -> None:
    """Down for 3 s the job does not notice. Cut in mid-step the job ends, and Slurm has it go on by itself; then it is
    cut during a checkpoint.
    """
    away = quiet_rig.hosts[1]
    run, faults = tmp_path / "run", Faults("gate:2:2,gate:1:3,save:2:4", folder)
    job = submit(quiet_rig, config, run, faults.environment)
    faults.await_gate(2, job.said)
    with quiet_rig.cut_off(away):
        faults.open_gate(2)
        assert not settled(lambda: (folder / "3.reached").exists(), True, seconds=3), "the link was not down"
    for step in (3, 4):
        faults.await_gate(step, job.said)
        watch = Stopwatch(quiet_rig)
        with quiet_rig.cut_off(away):
            faults.open_gate(step)
            print(f"sbatch, link cut at step {step}: ranks ended after {watch.ranks_ended():.1f} s |", culprit(run))
            assert re.match(
                r"rank [01] on h1 was left behind at step \d .* by rank 2 on h2, rank 3 on h2: ", culprit(run)
            )
            assert last_words(job.said()).startswith(culprit(run))
            # Slurm has lost the node as well, and puts the job back into the queue.
            assert settled(lambda: job.field("JobState"), "PENDING") == "PENDING", job.said()
        job.start_now(step - 1)
    assert job.finished() == "COMPLETED", job.said()
    assert losses(run) == expected
