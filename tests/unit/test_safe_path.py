"""Programs that the product starts import nothing from their working directory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank_dist.slurm.script import fill
from lowrank_dist.supervision.rank import Supervision

ROOT = Path(__file__).parents[2]
PLANTED = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that appears when a module of the working directory is imported."""
    marker, work = tmp_path / "imported", tmp_path / "work"
    work.mkdir()
    for name in ("json", "resource", "typer", "lowrank_dist"):
        (work / f"{name}.py").write_text(PLANTED.format(marker=str(marker)))
    monkeypatch.chdir(work)
    return marker


def test_the_watchdog(marker: Path) -> None:
    with Supervision(60) as entered:
        time.sleep(1)  # its imports take a tenth of that
        assert entered._watchdog.poll() is None
    assert not marker.exists()


def test_the_merge_script(marker: Path, tmp_path: Path) -> None:
    template = (ROOT / "launch/slurm/merge.sbatch").read_text()
    options = {"BASE": "base", "ADAPTERS": ["adapter"], "OUT": "out", "OPTIONS": ["--help"]}
    script = fill(template, {}, {"PYTHON": sys.executable, **options})
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--adapter" in done.stdout, done.stderr
    assert not marker.exists()


def test_the_control(marker: Path) -> None:
    """`python -m` and `python -c` without -P import from the working directory."""
    subprocess.run([sys.executable, "-c", "import json"], check=True)
    assert marker.exists()
