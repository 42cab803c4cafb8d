"""The processes that are let into a run when those of two runs meet at one port."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lowrank_dist.backend import launchers
from lowrank_dist.backend.launchers import run_token
from tests import forked
from tests.forked import Outcome
from tests.integration.launching import environment, free_port

# A rank that prints whom it met, and stays until TOO_MANY others were turned away.
RANK = """
import os, sys, tempfile, time
from pathlib import Path
import torch
import torch.distributed as dist
from lowrank_dist.backend.select import Backend, init_process_group, shutdown
from lowrank_dist.errors import UserError
try:
    init_process_group(Backend(torch.device("cpu"), "gloo", "cpu"), 15)
except UserError as error:
    print(error)
    tempfile.mkstemp(dir=os.environ["TURNED_AWAY"])
    sys.exit(2)
met = [None] * dist.get_world_size()
dist.all_gather_object(met, os.environ["NAME"])
print(*met)
end = time.monotonic() + 30
while len(list(Path(os.environ["TURNED_AWAY"]).iterdir())) < int(os.environ["TOO_MANY"]) and time.monotonic() < end:
    time.sleep(0.05)
shutdown(clean=True)
"""


def step(number: int, rank: int, size: int = 2) -> dict[str, str]:
    """Return the environment of a task in a step of job 7."""
    place = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "RANK": str(rank), "WORLD_SIZE": str(size)}
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(number), "NAME": f"{number}.{rank}", **place}


def meet(place: Path, ranks: Sequence[Mapping[str, str]]) -> list[Outcome]:
    """Start the ranks of several runs of two at the same time, all of which use the same port."""
    script = place / "rank.py"
    script.write_text(RANK)
    turned_away = place / "turned away"
    turned_away.mkdir()
    shared = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"TURNED_AWAY": str(turned_away), "TOO_MANY": str(len(ranks) - 2)}
    return forked.run_programs([script], [{**shared, **rank} for rank in ranks], seconds=60)


@pytest.mark.slow
def test_of_two_steps_at_one_port_one_runs_alone(tmp_path: Path) -> None:
    ended = meet(tmp_path, [step(number, rank) for number in (0, 1) for rank in (0, 1)])
    runs = ended[:2], ended[2:]
    (winner,) = (number for number, run in enumerate(runs) if [one.code for one in run] == [0, 0])
    assert {one.stdout for one in runs[winner]} == {f"{winner}.0 {winner}.1\n"}
    others = runs[1 - winner]
    assert [one.code for one in others] == [2, 2]
    assert "which is already in use; give each run its own MASTER_PORT" in others[0].stdout
    steps = [f"Slurm's job 7, step {number}, restart 0, 2 ranks" for number in (1 - winner, winner)]
    assert "rank 1 met another run at 127.0.0.1, port" in others[1].stdout
    assert f"this rank belongs to {steps[0]}, and the run there is {steps[1]}" in others[1].stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stranger", "named"),
    [
        ({"RANK": "1", "WORLD_SIZE": "3"}, "this rank belongs to 3 ranks, and the run there is 2 ranks"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "is also rank 1; give every rank its own RANK"),
    ],
    ids=["another world size", "a rank twice"],
)
def test_a_stranger_is_turned_away_and_the_run_goes_on(tmp_path: Path, stranger: dict[str, str], named: str) -> None:
    """Ranks started by hand: only their number is known of the run."""
    ours = [{"RANK": str(rank), "WORLD_SIZE": "2", "NAME": "ours"} for rank in range(2)]
    ended = meet(tmp_path, [*ours, {**stranger, "NAME": "ours"}])
    assert sorted(one.code for one in ended) == [0, 0, 2] and ended[0].stdout == "ours ours\n", ended
    (said,) = (one.stdout for one in ended if one.code)
    assert named in said


TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (step(0, 0), step(1, 0)),
        (step(0, 0), {**step(0, 0), "SLURM_JOB_ID": "8"}),
        (step(0, 0), {**step(0, 0), "SLURM_RESTART_COUNT": "1"}),
        (step(0, 0), step(0, 0, size=3)),
        (TORCHRUN, {**TORCHRUN, "TORCHELASTIC_RUN_ID": "b"}),
        ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "4"}),
    ],
    ids=["step", "job", "requeue", "tasks", "torchrun", "size"],
)
def test_runs_differ(one: dict[str, str], other: dict[str, str]) -> None:
    assert run_token(one) != run_token(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (step(0, 0), {**step(0, 1), "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}),
        # torchrun: under srun on one node, by ssh on the other.
        ({**step(0, 0), **TORCHRUN}, TORCHRUN),
        # Ranks started by hand: one in its own interactive step, one by ssh without Slurm's variables.
        ({**BY_HAND, "SLURM_STEP_ID": "4294967290"}, {"RANK": "3", "WORLD_SIZE": "4"}),
        (BY_HAND, {"RANK": "3", "WORLD_SIZE": "4"}),
    ],
    ids=["tasks of a step", "torchrun in Slurm", "interactive step", "batch script"],
)
def test_ranks_of_one_run_agree(one: dict[str, str], other: dict[str, str]) -> None:
    assert run_token(one) == run_token(other)


def test_deepspeed_is_known_by_its_hosts_and_alone_by_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def token(hosts: object, pid: int) -> str:
        world = base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
        command = ["python", "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "train.py"]
        monkeypatch.setattr(launchers, "ancestors", lambda: iter([Path("/proc/1"), Path(f"/proc/{pid}")]))
        monkeypatch.setattr(
            launchers, "command_line", lambda process: command if process.name == str(pid) else ["bash"]
        )
        return run_token({"CROSS_RANK": "0", "WORLD_SIZE": "2"})

    here, parent = os.getpid(), os.getppid()
    assert token({"localhost": [0, 1]}, here) == token({"localhost": [0, 1]}, here)
    assert token({"localhost": [0, 1]}, here) != token({"localhost": [0, 1]}, parent)
    # With several hosts each has its own launcher process.
    assert token({"h1": [0], "h2": [0]}, here) == token({"h1": [0], "h2": [0]}, parent)
    assert token({"h1": [0], "h2": [0]}, here) != token({"h1": [0], "h3": [0]}, here)
    assert token("what is this", here).startswith("deepspeed on ")
