"""A run on exFAT, which has no symbolic or hard links and no exchange of folders: trained, resumed, read and merged."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import write_run
from tests.integration.launching import Outcome, program, torchrun


@pytest.fixture
def exfat(tmp_path: Path) -> Iterator[Path]:
    """The folder in which an exFAT file system in an image is mounted."""
    image, folder = tmp_path / "exfat.img", tmp_path / "exfat"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    try:
        _system("mkfs.exfat", image)
        device = _system("losetup", "--find", "--show", image)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no exFAT image can be attached here: {error}")
    try:
        try:
            _system("mount.exfat-fuse", device, folder)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no exFAT can be mounted here: {error}")
        try:
            yield folder
        finally:
            _system("umount", folder)
    finally:
        _system("losetup", "--detach", device)


def _system(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def command(*words: object) -> Outcome:
    done = program(["lowrank-dist", *words])
    assert done.code == 0, done.stdout + done.stderr
    return done


def test_a_run_on_exfat(exfat: Path, tmp_path: Path) -> None:
    config, run = write_run(tmp_path), exfat / "run"
    with pytest.raises(OSError):
        (exfat / "link").symlink_to("target")
    settings = ["parallel.tensor=1", f"output.dir={run}", "output.save_every=2", "output.keep_last=1"]
    rows = {row["what"]: row for row in json.loads(command("doctor", config, *settings, "--json").stdout)["rows"]}
    assert rows["file system"]["state"] == "warning" and "symbolic links" in rows["file system"]["detail"]
    trained = torchrun(1, config, *settings)
    assert trained.code == 0, trained.stderr
    assert "NO CHECKPOINT" not in trained.stdout
    assert trained.stdout.count("this file system has no symbolic links") == 1
    last = run / "checkpoints" / "last"
    assert last.read_text() == "step-5\n"
    facts = json.loads(command("inspect", run, "--json").stdout)["facts"]
    assert facts["last"] == "step-5"
    command("export", last, "--out", exfat / "exported")
    command("merge", "--base", tmp_path / "base", "--adapter", last, "--out", exfat / "merged")
    for more in (["train.resume=auto"], [f"train.resume={last}"], [f"lora.init_from={last}", f"output.dir={run}-2"]):
        assert torchrun(1, config, *settings, *more).code == 0, more
