"""Training, plans, merges and evaluation where no temporary folder can be written, and doctor's row on it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lowrank_dist.backend import libraries
from lowrank_dist.backend.libraries import allow_no_temporary_folder, stale_build_locks, temporary_folder
from lowrank_dist.doctor import machine

# A mount namespace in which every folder that Python tries is read-only, for root as well.
READ_ONLY = """
for folder in /tmp /var/tmp; do
    mount --bind $folder $folder && mount -o remount,ro,bind $folder || exit 77
done
cd /proc && exec "$@"
"""
NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, "sh"]

# Everything that a rank, `plan --verify`, `evaluate --metric bleu` and `merge --verify` import.
IMPORTS = {
    "rank": "quiet_libraries(); import lowrank_dist.engine.assemble, lowrank_dist.model.load, torch._dynamo",
    "bleu": "quiet_libraries(); import sacrebleu",
    "merge": """
from lowrank_dist.errors import UserError
from lowrank_dist.merging.merge import _verifier
try:
    _verifier(Path("nowhere"), [], print, None)
except UserError as error:
    assert "nowhere" in str(error)
import torch._dynamo
""",
}
BEGIN = """
from pathlib import Path
from lowrank_dist.backend.libraries import quiet_libraries, temporary_folder
assert temporary_folder() is None
"""
END = """
assert temporary_folder() is None
"""
FAILING = "import torch._dynamo", "import sacrebleu"


def run_read_only(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    dropped = ("TMPDIR", "TEMP", "TMP", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = [*NAMESPACE, sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def namespace() -> None:
    try:
        done = run_read_only("import tempfile; tempfile.gettempdir()")
    except FileNotFoundError:
        pytest.skip("no unshare")
    if "No usable temporary directory" not in done.stderr:
        pytest.skip(f"no mount namespace in which /tmp is read-only: {done.stderr[-200:]}")


@pytest.mark.slow
@pytest.mark.parametrize("what", IMPORTS)
def test_no_command_needs_a_temporary_folder(namespace: None, what: str) -> None:
    done = run_read_only(f"{BEGIN}\n{IMPORTS[what]}\n{END}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_compiler_cache_that_cannot_be_created(namespace: None) -> None:
    done = run_read_only(f"{BEGIN}\n{IMPORTS['rank']}", TORCHINDUCTOR_CACHE_DIR="/tmp/none/cache")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("code", FAILING)
def test_the_libraries_alone_need_one(namespace: None, code: str) -> None:
    """The control: without the rule the imports fail."""
    done = run_read_only(code)
    assert done.returncode == 1 and "No usable temporary directory" in done.stderr


def test_where_a_temporary_folder_can_be_written_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    allow_no_temporary_folder()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ and tempfile.gettempdir() == str(tmp_path)
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    allow_no_temporary_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")


def test_doctor_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> tuple[str, str]:
        monkeypatch.setattr(tempfile, "tempdir", None)
        (found,) = machine.temporary_files()
        assert found.what == "temporary folder"
        return found.state, found.detail

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    state, detail = row()
    assert state == "ok" and detail.startswith(f"{tmp_path}: ") and detail.endswith("free")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    state, detail = row()
    assert state == "warning" and f"TMPDIR={tmp_path}/gone is not a folder, so " in detail and "unset it" in detail
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [])
    state, detail = row()
    assert temporary_folder() is None
    assert state == "warning" and "torchrun does not start" in detail and "set TMPDIR to a writable folder" in detail
    monkeypatch.setattr(tempfile, "tempdir", libraries._NOWHERE)
    assert temporary_folder() is None, "after the libraries were imported"


def test_a_user_without_a_home_folder_has_no_stale_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with an unknown user id: a run looks for old build locks at its start."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    monkeypatch.chdir(tmp_path)
    assert os.path.expanduser("~") == "~"
    assert stale_build_locks() == []
