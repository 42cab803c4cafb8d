"""A live run moves its link `last` and retires checkpoints while others read them; they read one whole or report it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.checkpoint.folder import export
from lowrank_dist.checkpoint.inspection import inspect_folder
from lowrank_dist.errors import UserError
from lowrank_dist.formats.paths import FolderRemoved, detect_removal, resolve_link
from lowrank_dist.methods.files import PUBLISHED
from lowrank_dist.methods.lora.files import read_adapter
from lowrank_dist.methods.registry import method_package_reading
from tests.unit.test_checkpoint_folder import write

# The order of engine/saving.py: write, move the link, retire. Every 4 ms, until stdin is closed.
RUN = """
import itertools, os, select, shutil, sys
made, checkpoints = sys.argv[1:]
for step in itertools.count(1):
    shutil.copytree(f"{made}/{step % 4}", f"{checkpoints}/.new")
    os.rename(f"{checkpoints}/.new", f"{checkpoints}/step-{step}")
    os.symlink(f"step-{step}", f"{checkpoints}/.link")
    os.rename(f"{checkpoints}/.link", f"{checkpoints}/last")
    if step > 2:
        os.rename(f"{checkpoints}/step-{step - 2}", f"{checkpoints}/.old")
        shutil.rmtree(f"{checkpoints}/.old")
    if step == 3:
        print("runs", flush=True)
    if select.select([sys.stdin], [], [], 0.004)[0]:
        break
"""
SECONDS = 2.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four checkpoints with different weights and states."""
    folder = tmp_path_factory.mktemp("made")
    for step in range(1, 5):
        write(folder / f"step-{step}", step).rename(folder / str(step % 4))
    return folder


@pytest.fixture
def last(made: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield checkpoints/last of a run that saves every 4 ms."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    command = [sys.executable, "-c", RUN, str(made), str(checkpoints)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdin is not None and run.stdout is not None
        assert run.stdout.readline() == b"runs\n"
        yield checkpoints / "last"
        assert run.poll() is None, "it saved until the end"
        run.stdin.close()


def former_export(source: Path, out: Path) -> None:
    """Export as former versions did: read through the link, file by file."""
    published = method_package_reading(source).files.publish(source, out.name, target=None, max_rank=None)
    out.mkdir()
    for name in published.files:
        shutil.copyfile(source / name, out / name)


def exported(how: Callable[[Path, Path], None], last: Path, made: Path, out: Path) -> dict[str, int]:
    """Return how many exports were whole, mixed from two steps, refused because removed, and failed otherwise."""
    whole = [{name: (folder / name).read_bytes() for name in PUBLISHED} for folder in sorted(made.iterdir())]
    counts = dict.fromkeys(("whole", "mixed", "removed", "failed"), 0)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            how(last, out)
        except FolderRemoved:
            counts["removed"] += 1
        except (UserError, OSError):
            counts["failed"] += 1
        else:
            found = {name: (out / name).read_bytes() for name in PUBLISHED}
            counts["whole" if found in whole else "mixed"] += 1
        shutil.rmtree(out, ignore_errors=True)
    return counts


def test_export_takes_one_step_whole_or_says_that_it_is_gone(last: Path, made: Path, tmp_path: Path) -> None:
    counts = exported(export, last, made, tmp_path / "out")
    assert counts["mixed"] == counts["failed"] == 0 and counts["whole"] + counts["removed"] > 20, counts


def test_the_former_way_mixes_steps(last: Path, made: Path, tmp_path: Path) -> None:
    counts = exported(former_export, last, made, tmp_path / "out")
    assert counts["mixed"] + counts["failed"] > 0, counts


def inspected(folder: Path, look: Callable[..., Any] = inspect_folder) -> tuple[int, int, set[str]]:
    """Return the number of inspections, the number that found the folder removed, and the problems reported."""
    seen, gone, broken = 0, 0, set[str]()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            broken.update(look(folder, read_config=lambda path: {"method": "lora"}).problems)
        except FolderRemoved:
            gone += 1
        seen += 1
    return seen, gone, broken


def test_inspect_of_the_link_calls_nothing_broken(last: Path) -> None:
    seen, gone, broken = inspected(last)
    assert broken == set() and gone < seen, (seen, gone, broken)


def test_inspect_of_the_run_calls_nothing_broken(last: Path) -> None:
    seen, gone, broken = inspected(last.parent.parent)
    assert broken == set() and gone == 0 and seen > 0, (seen, gone, broken)


def test_the_folder_of_a_link_is_settled_once(made: Path, tmp_path: Path) -> None:
    for name in "12":
        shutil.copytree(made / name, tmp_path / name)
    (tmp_path / "last").symlink_to("1")
    with detect_removal(tmp_path / "last") as folder:
        (tmp_path / "last").unlink()
        (tmp_path / "last").symlink_to("2")
        assert folder == tmp_path / "1" and read_adapter(folder).factors
    assert resolve_link(tmp_path / "last") == tmp_path / "2" and resolve_link(tmp_path / "2") == tmp_path / "2"


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_folder_that_goes_while_it_is_read_is_named(made: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(made / "1", tmp_path / "1")
    (tmp_path / "last").symlink_to("1")
    for raised in (None, OSError("no such file"), UserError("manifest.json is missing")):
        with pytest.raises(FolderRemoved, match=r"/1, the target of .*/last, was removed or replaced") as caught:
            with detect_removal(tmp_path / "last"):
                (tmp_path / "1").rename(tmp_path / "gone")
                if how == "replaced":
                    shutil.copytree(made / "2", tmp_path / "1")
                if raised is not None:
                    raise raised
        assert caught.value.__cause__ is raised
        shutil.rmtree(tmp_path / "1", ignore_errors=True)
        (tmp_path / "gone").rename(tmp_path / "1")


def test_what_stays_fails_as_it_did(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^mine$"), detect_removal(made / "1"):
        raise UserError("mine")
    (tmp_path / "last").symlink_to("nowhere")
    with pytest.raises(UserError, match="nowhere"):
        export(tmp_path / "last", tmp_path / "out")
    with pytest.raises(UserError, match="No such file"):
        inspect_folder(tmp_path / "last", read_config=lambda path: {})
    damaged = Path(shutil.copytree(made / "1", tmp_path / "step-1"))
    (damaged / "lowrank_dist.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="lowrank_dist.json"):
        export(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
