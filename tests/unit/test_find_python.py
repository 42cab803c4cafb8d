"""`.ci/find-python`: finds the Python of `make test-next`. Version 3.99 exists on no machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / ".ci/find-python"


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


def find(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}:/usr/bin:/bin"}
    return subprocess.run([SCRIPT, "3.99"], env=environment, capture_output=True, text=True, timeout=60)


def test_on_path(tmp_path: Path) -> None:
    program(tmp_path / "bin/python3.99", "echo /opt/base")  # stands for a Python that is asked for sys.base_prefix
    assert find(tmp_path / "bin").stdout == "/opt/base/bin/python3.99\n"


def test_by_pyenv_behind_a_shim_that_fails(tmp_path: Path) -> None:
    program(tmp_path / "bin/python3.99", "echo 'pyenv: python3.99: command not found' >&2; exit 127")
    program(tmp_path / "bin/pyenv", f"echo {tmp_path}/root")
    program(tmp_path / "root/versions/3.99.1/bin/python3.99", "echo /root/of/it")
    done = find(tmp_path / "bin")
    assert (done.returncode, done.stdout, done.stderr) == (0, "/root/of/it/bin/python3.99\n", "")


def test_nowhere_says_the_remedy(tmp_path: Path) -> None:
    program(tmp_path / "bin/pyenv", f"echo {tmp_path}/root")
    done = find(tmp_path / "bin")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("no Python 3.99: ") and "pyenv install 3.99" in done.stderr
