"""`lowrank-dist doctor`: its findings, its advice on what is missing or broken, and that it always answers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from lowrank_dist.backend import apex
from lowrank_dist.cli.main import app
from lowrank_dist.doctor import local, machine, software
from lowrank_dist.doctor.rows import PASSING, Row
from lowrank_dist.doctor.software import Declared
from lowrank_dist.ops import extension
from lowrank_dist.ops.extension import cpu_capability

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WANTED = Declared(">=3.11", ("torch>=2.11", "deepspeed>=0.19.8,<0.20"), ("peft>=0.17",))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def states(rows: list[Row]) -> dict[str, str]:
    return {row.what: row.state for row in rows}


def versions(**known: str | None) -> Callable[[str], str | None]:
    def version(name: str) -> str | None:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    return version


def test_training_can_run_here() -> None:
    done = run()
    assert done.exit_code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "training can run here"
    for what in (
        "Python",
        *("torch", "deepspeed", "megatron-core", "transformers", "peft"),
        *("PyTorch", "GPU", "NCCL", "compiled CPU operators", "compiled CUDA operators", "CPU instruction set"),
        *("frozen fp32 GEMM on CPU", "apex", "C++ compiler", "nvcc", "ninja"),
        *("launcher deepspeed", "launcher srun", "launcher pdsh"),
    ):
        assert any(line.startswith(what) for line in lines), what


def test_json_says_the_same() -> None:
    """Except for free memory, which another program may take between the two calls."""

    def lasting(text: str) -> str:
        return re.sub(r"[\d.]+ GiB", "GiB", text)

    report = json.loads(run("--json").stdout)
    lines = run().stdout.splitlines()
    assert report["can_train"] is True and len(report["rows"]) == len(lines) - 1
    for row, line in zip(report["rows"], lines, strict=False):
        assert line.startswith(row["what"]) and lasting(line).endswith(lasting(row["detail"])) and row["state"] in line


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        (versions(torch="2.13.0+cpu", deepspeed="0.19.8", peft="0.21.2"), ("ok", "ok", "ok"), "supported: >=2.11"),
        (versions(torch="2.12.0a0+7a1b", deepspeed="0.19.9", peft="0.17"), ("ok", "ok", "ok"), "2.12.0a0+7a1b"),
        (versions(deepspeed="0.19.8"), ("missing", "ok", "off"), "pip install 'torch>=2.11'"),
        (versions(torch="2.10", deepspeed="0.20.0"), ("unsupported", "unsupported", "off"), "0.20.0 is not >=0.19.8"),
        (versions(torch="2.11", deepspeed=None, peft="0.1"), ("ok", "broken", "off"), "installs it again"),
        (versions(torch="2.11", deepspeed="0.19.8", peft=None), ("ok", "ok", "off"), "installs it again"),
    ],
)
def test_packages_against_their_ranges(found: Callable, expected: tuple[str, ...], said: str) -> None:
    rows = list(software.packages(WANTED, found))
    assert states(rows) == dict(zip(("Python", "torch", "deepspeed", "peft"), ("ok", *expected), strict=True))
    assert any(said in row.detail for row in rows)


def test_an_old_python_is_named() -> None:
    row = next(software.packages(Declared(">=9", (), ()), versions()))
    assert row.state == "unsupported" and "Python >=9" in row.detail


def test_the_ranges_are_those_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = software.declared()
    assert declared.python == ">=3.11" and declared.optional == ("peft>=0.17",)
    assert {"torch>=2.11", "deepspeed>=0.19.8,<0.20", "megatron-core>=0.16", "transformers>=5,<6"} <= {
        *declared.required
    }
    # Without pyproject.toml, as beside an installed wheel, they come from the package's own metadata.
    metadata = Message()
    metadata["Requires-Python"] = declared.python
    for text in (*declared.required, "pytest>=8; extra == 'test'", "peft>=0.17; extra == 'test'"):
        metadata["Requires-Dist"] = text
    monkeypatch.setattr(importlib.metadata, "metadata", {"lowrank-dist": metadata}.__getitem__)
    assert software.declared(tmp_path / "pyproject.toml") == declared


def test_what_is_required_and_missing_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "declared", lambda: Declared(">=3.11", ("torch>=2.11", "no-such-package>=1"), ()))
    done = run()
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert done.stdout.splitlines()[-1] == "training cannot run here: no-such-package"
    assert "pip install 'no-such-package>=1'" in done.stdout
    report = json.loads(run("--json").stdout)
    assert report["can_train"] is False


def test_a_broken_concern_is_a_row_and_the_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Row]:
        raise OSError("libcudart.so.13:\n cannot open shared object file")

    whole, replaced = states(local.diagnose()), states(machine.operators())
    monkeypatch.setattr(machine, "operators", broken)
    rows = local.diagnose()
    (row,) = [row for row in rows if row.state == "broken"]
    assert row == Row("compiled operators", "broken", "OSError: libcudart.so.13: cannot open shared object file")
    kept = {what: state for what, state in whole.items() if what not in replaced}
    assert {what: state for what, state in states(rows).items() if what != row.what} == kept
    # A broken package that training can do without does not stop it.
    monkeypatch.undo()
    monkeypatch.setattr(machine, "apex", broken)
    assert states(local.diagnose())["apex"] == "off" and run().exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_without_torch(arguments: list[str]) -> None:
    code = "import sys; sys.modules['torch'] = None; from lowrank_dist.cli.main import app; app()"
    command = [sys.executable, "-c", code, "doctor", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    if arguments:
        report = json.loads(done.stdout)
        (row,) = [row for row in report["rows"] if row["state"] not in PASSING]
        assert row["what"] == "PyTorch" and "pytorch.org" in row["detail"]
    else:
        assert done.stdout.splitlines()[-1] == "training cannot run here: PyTorch"
        assert "launcher deepspeed" in done.stdout and "compiled CPU operators" not in done.stdout


def test_without_what_reads_configs() -> None:
    """doctor answers without yaml, which only the config package needs."""
    code = "import sys; sys.modules['yaml'] = None; from lowrank_dist.cli.main import app; app()"
    command = [sys.executable, "-c", code, "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "launcher deepspeed" in done.stdout


def test_a_torch_that_does_not_load_is_named() -> None:
    def load(name: str) -> object:
        raise ImportError("libtorch_cpu.so: undefined symbol")

    (row,) = software.pytorch(load)
    assert row.state == "missing" and "undefined symbol" in row.detail


def test_missing_operators_come_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert states(machine.operators())["compiled CPU operators"] == "ok"
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    for reason in (extension.reason_not_loaded, extension.reason_not_loaded_cuda):
        reason.cache_clear()
    try:
        rows = {row.what: row for row in machine.operators()}
        assert run().exit_code == 0, "plain PyTorch trains too"
    finally:
        monkeypatch.undo()
        for reason in (extension.reason_not_loaded, extension.reason_not_loaded_cuda):
            reason.cache_clear()
    row = rows["compiled CPU operators"]
    assert row.state == "off" and extension.INSTALL in row.detail and "was not built" in row.detail


@pytest.mark.parametrize(("asked", "said"), [("default", "baseline"), ("avx2", "AVX2"), (None, "")])
def test_the_instruction_set_is_the_one_that_runs(asked: str | None, said: str) -> None:
    """Run in a new process, since the set is chosen once. By default it must be the one that the operators report."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    if asked is not None:
        environment["ATEN_CPU_CAPABILITY"] = asked
    code = "from lowrank_dist.doctor.machine import operators; print([*operators()][-1].detail)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (f"{said}, as ATEN_CPU_CAPABILITY={asked} asks" if asked else cpu_capability())


def test_the_frozen_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert machine.products() == [Row("frozen fp32 GEMM on CPU", "ok", "oneDNN")]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    (row,) = machine.products()
    assert row.state == "off" and "torch.mm" in row.detail


@pytest.mark.parametrize(
    "found",
    [
        apex.Apex("none", None, False, "apex is not installed"),
        apex.Apex("unrelated", "0.9.10", False, "another package; `pip uninstall apex`"),
        apex.Apex("nvidia", "0.1", True, "NVIDIA's apex 0.1"),
    ],
)
def test_apex_is_named_once_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, found: apex.Apex) -> None:
    monkeypatch.setattr(apex, "find_apex", lambda: found)
    done = run()
    assert done.exit_code == 0 and done.stdout.count(found.reason) == 1
    assert machine.apex() == [Row("apex", "ok" if found.usable else "off", found.reason)]


def test_gpus_are_listed_or_missed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_dist.backend import devices

    def none() -> list[str]:
        raise RuntimeError("The NVIDIA driver is too old\n(found version 11040)")

    total = 139 * 2**30
    free, taken = (devices.Gpu("NVIDIA H200", total, left, "sm_90") for left in (total - 2**29, total // 2))
    monkeypatch.setattr(devices, "nccl", lambda: "2.28.9")
    monkeypatch.setattr(devices, "driver", lambda: "570.86.15")
    monkeypatch.setattr(devices, "gpus", lambda: [free, taken])
    found = {row.what: row for row in machine.devices()}
    assert states(list(found.values())) == {
        **{"GPUs": "ok", "GPU 0": "ok", "GPU 1": "warning", "GPU driver": "ok", "NCCL": "ok"}
    }
    assert found["GPU 0"].detail == "NVIDIA H200, 139.0 GiB, sm_90, 138.5 GiB free"
    assert "only 69.5 GiB free" in found["GPU 1"].detail and "nvidia-smi" in found["GPU 1"].detail
    # All nodes must have the same device; its free memory may differ.
    assert found["GPU 0"].alike == found["GPU 1"].alike
    monkeypatch.setattr(devices, "gpus", none)
    monkeypatch.setattr(devices, "nccl", lambda: None)
    monkeypatch.setattr(devices, "driver", lambda: None)
    gpus, nccl = machine.devices()
    assert (gpus.state, nccl.state) == ("off", "off") and "too old (found version 11040)" in gpus.detail


def test_the_drivers_complaint_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from lowrank_dist.backend.devices import gpus

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="not a CUDA build"):
        gpus()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn("driver\n too old", stacklevel=1)))
    with pytest.raises(RuntimeError, match="^driver too old$"):
        gpus()


def test_tools_that_are_not_there_or_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++-99 -v")
    rows = software.build_tools(lambda program: None)
    assert set(states(rows).values()) == {"off"} and "clang++-99 not found" in rows[0].detail
    assert set(states(software.launchers(lambda program: None)).values()) == {"off"}
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho made by\necho 'tools, release 13.0'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    row = software.build_tools()[1]
    assert row == Row("nvcc", "ok", f"{nvcc}: tools, release 13.0")
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    row = software.build_tools()[1]
    assert row.state == "off" and "exit status 3" in row.detail
