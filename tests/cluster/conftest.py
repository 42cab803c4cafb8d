"""One rig of two hosts for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.cluster.rig import Rig
from tests.cluster.runs import ENVIRONMENT, losses, well_trained, write_run

# xdist gives each file to one worker; the longest files are started first.
LONGEST = ("test_preemption", "test_faults", "test_launchers", "test_links")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the gate files of planted faults."""
    path = tmp_path / "faults"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """Two hosts with ssh and Slurm. An error, not a skip, where they cannot be set up."""
    with Rig(2) as started:
        yield started


@pytest.fixture
def quiet_rig(rig: Rig) -> Iterator[Rig]:
    """The rig; the test fails if it leaves a process running on a host."""
    yield rig
    assert rig.idle() == []


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the configuration that every launcher trains."""
    return write_run(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="session")
def expected(rig: Rig, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The loss curves of the run on one host, under `deepspeed --num_gpus 4`; one pytest worker trains it for all."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    shared = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    run = shared / "one host"
    with FileLock(shared / "one host.lock"):
        if not run.exists():
            command = ["deepspeed", "--num_gpus", 4, "launch/train.py", config, f"output.dir={run}"]
            done = rig.hosts[0].run(command, environment=ENVIRONMENT)
            assert done.code == 0, done.stderr
    curves = losses(run)
    assert well_trained(curves), curves
    return curves
