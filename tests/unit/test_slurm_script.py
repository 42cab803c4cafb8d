"""The scripts of `lowrank-dist slurm`: header, setup, container and snapshot of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from lowrank_dist.arch.model_files import built_in_config
from lowrank_dist.cli.main import app
from lowrank_dist.errors import UserError
from lowrank_dist.slurm.containers import Mount, mounts_of
from lowrank_dist.slurm.script import BEGIN
from lowrank_dist.slurm.snapshot import Snapshot

ROOT = Path(__file__).parents[2]
runner = CliRunner()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(built_in_config("llama-3-8b")))
    (tmp_path / "train.jsonl").touch()
    sections = {"model": {"path": "base"}, "data": {"train": "train.jsonl"}, "output": {"dir": "runs/first"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def slurm(config: Path, *words: object) -> Result:
    size = ["--nodes", "2", "--gpus-per-node", "8", "--gpu", "h100"]
    return runner.invoke(app, ["slurm", str(config), *size, *(str(word) for word in words)])


def script(config: Path, *words: object) -> str:
    done = slurm(config, *words, "--dry-run")
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(done: Result, *words: str) -> None:
    assert done.exit_code == 2, done.output
    assert [word for word in words if word not in done.stderr] == [], done.stderr


def shell_words(text: str, name: str) -> list[str]:
    """Return the words of an array in a script, as bash reads them."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name}=("))
    shown = subprocess.run(["bash", "-c", f'{line}; printf "%s\\0" "${{{name}[@]}}"'], capture_output=True, text=True)
    return shown.stdout.split("\0")[:-1]


# --- the header ------------------------------------------------------------------------------------------------------


def test_the_header_is_about_this_job(config: Path, tmp_path: Path) -> None:
    header = script(config, "--out", "my job.sbatch", "--job-name", "mine").partition(BEGIN)[0]
    run = tmp_path / "runs" / "first"
    said = [
        "Trains base by lora on 2 × 8 h100: TP ",
        f"from {config}.",
        "sbatch 'my job.sbatch'",
        "tail -F mine-JOB.out",
    ]
    said += ["scancel JOB    # ranks that have not saved after Slurm's KillWait"]
    said += [f"touch {run}/STOP; scancel --batch --signal=USR1 JOB", "requeues itself, at most 20 times"]
    said += [f"Code:    {ROOT}", f"Result:  {run}/adapter", "300 s before its limit of 24:00:00"]
    assert [words for words in said if words not in header] == []
    assert "EDIT block" not in header and "lowrank-dist slurm" not in header
    assert all(line.startswith("#") for line in header.splitlines() if line)
    other = script(config, "--no-requeue", "--sbatch", "output=/logs/%x.%j", "train.resume=never").partition(BEGIN)[0]
    assert "ends (REQUEUE=no)" in other and "tail -F /logs/lowrank.JOB " in other and "train.resume=never" in other


def test_a_name_cannot_leave_the_header(config: Path) -> None:
    text = script(config, "--out", "a\ntouch made #")
    assert not any(line.startswith("touch") for line in text.splitlines()[:20])


def test_a_change_with_hyphens_is_refused(config: Path) -> None:
    """The script's own train.resume=auto would win over it."""
    refused(slurm(config, "--", "--train.resume=never"), "--train.resume=never: write the change as section.key=value")


# --- the setup -------------------------------------------------------------------------------------------------------


def test_a_setup_runs_before_strictness(config: Path, tmp_path: Path) -> None:
    commands = "# our modules\nmodule load cuda/12.4\nsource /opt/conda.sh\nconda activate $WHICH\necho \\"
    (tmp_path / "setup.sh").write_text(commands)
    text = script(config, "--setup", "setup.sh")
    assert text.index(BEGIN) < text.index(commands) < text.index("\nset -euo pipefail\n")
    block = text[text.index("# ==== SETUP: begin") : text.index("# ==== SETUP: end")]
    ready = 'module() { echo "loads $2"; }; source() { :; }; conda() { echo "env ${2-none}"; }\n'
    done = subprocess.run(["bash", "-c", ready + block], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "loads cuda/12.4\nenv none\n\n", "")
    failing = ready.replace("env", "fails").replace("; }\n", '; }; echo() { builtin echo "$@"; false; }\n')
    done = subprocess.run(["bash", "-c", f"{failing}{block}\nprintf trains"], capture_output=True, text=True)
    assert done.returncode == 1 and "trains" not in done.stdout
    assert "the last command of the setup failed (--setup setup.sh)" in done.stderr
    for first, code in (("", 0), ("set -e\n", 1)):
        (tmp_path / "setup.sh").write_text(f"{first}false\ntrue\n")
        text = script(config, "--setup", "setup.sh")
        block = text[text.index("# ==== SETUP: begin") : text.index("# ==== SETUP: end")]
        assert subprocess.run(["bash", "-c", f"{block}\ntrue"]).returncode == code


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"module load x\n#SBATCH --mem=0\n", ["line 2", "--sbatch"]),
        (b"module load x\r\n", ["line 1", "carriage return"]),
        (b"if true; then\n", ["bash does not accept it", "syntax error"]),
        (b"}\n{\n", ["bash does not accept it"]),
        (b"cat <<E\nfoo\n", ["bash does not accept it", "here-document"]),
        (b"# nothing\n\n", ["no command"]),
        (b"\xff\n", ["no UTF-8"]),
        (b"true #" + b"x" * 2**16, ["bytes"]),
        (None, ["cannot read", "No such file"]),
    ],
    ids=repr,
)
def test_setups_that_are_refused(config: Path, tmp_path: Path, content: bytes | None, said: list[str]) -> None:
    if content is not None:
        (tmp_path / "setup.sh").write_bytes(content)
    refused(slurm(config, "--setup", "setup.sh"), "--setup: ", *said)
    assert not (tmp_path / "lowrank.sbatch").exists()


def test_a_setup_that_is_a_pipe_is_not_waited_for(config: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "setup.sh")
    refused(slurm(config, "--setup", "setup.sh"), "--setup: setup.sh is no regular file")


def test_a_locale_that_is_not_installed_refuses_no_setup(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "xx_YY.UTF-8")
    Path("setup.sh").write_text("module load ü\n")
    assert "\nmodule load ü\n" in script(config, "--setup", "setup.sh")


# --- containers ------------------------------------------------------------------------------------------------------


def test_a_container_sees_all_that_the_run_reads(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each path is mounted under its own name, with Pyxis's options and with Apptainer's."""
    elsewhere = tmp_path.parent / f"{tmp_path.name}, elsewhere"
    image = tmp_path / "image.sqsh"
    image.touch()
    (tmp_path / "work").mkdir()
    shutil.copytree("base", tmp_path / "model")
    monkeypatch.chdir(tmp_path / "work")
    inputs = ["model.path=../model", f"data.train={tmp_path / 'train.jsonl'}", f"output.dir={tmp_path / 'out' / 'run'}"]
    text = script(config, *inputs, "--container-image", "../image.sqsh")
    options = dict(word.partition("=")[::2] for word in shell_words(text, "SRUN_OPTIONS"))
    assert options.keys() == {"--container-image", "--container-mounts", "--container-workdir"}
    assert Path(options["--container-image"]).samefile(image) and Path(options["--container-image"]).is_absolute()
    mounts = [mount.split(":") for mount in options["--container-mounts"].split(",")]
    assert all(outside == inside for outside, inside in mounts)
    names = ["config.yaml", "model", "out/run", "train.jsonl", "work"]
    assert {outside for outside, _ in mounts} == {str(ROOT), *(str(tmp_path / name) for name in names)}
    assert options["--container-workdir"] == str(tmp_path / "work")
    assert "\nPYTHON=python3\n" in text and "\nINSIDE=()\n" in text
    other = script(config, *inputs, "--container-image", "docker://x/y", "--container-runtime", "apptainer")
    words = shell_words(other, "INSIDE")
    assert words[:3] == ["apptainer", "exec", "--nv"] and words[-1] == "docker://x/y"
    assert words[words.index("--bind") + 1] == options["--container-mounts"]
    assert words[words.index("--pwd") + 1] == str(tmp_path / "work") and "\nSRUN_OPTIONS=()\n" in other
    # Extensions are built per version of torch.
    built = {re.search("^EXTENSIONS=(.*)$", each, re.MULTILINE)[1] for each in (text, other, script(config, *inputs))}
    assert len(built) == 3
    for given in ("nvcr.io/nvidia/pytorch:1", "nvcr.io#nvidia/pytorch:1", "docker://nvcr.io/nvidia/pytorch:1"):
        words = shell_words(script(config, *inputs, "--container-image", given), "SRUN_OPTIONS")
        assert words[0] == "--container-image=nvcr.io#nvidia/pytorch:1"  # as Enroot names it
    assert "--container-image=x/y:1" in script(config, *inputs, "--container-image", "x/y:1")
    mine = script(config, *inputs, "--container-image", "x/y", "--python", "/venv/bin/python")
    assert "\nPYTHON=/venv/bin/python\n" in mine
    refused(slurm(config, *inputs, "--container-image", "no.sqsh"), "--container-image: no.sqsh is not there")
    refused(slurm(config, *inputs, "--container-image", ""), "--container-image is empty")
    refused(slurm(config, *inputs, "--container-runtime", "apptainer"), "--container-runtime: apptainer has no")
    refused(
        slurm(config, *inputs, "--container-image", "x/y", "data.train=no.jsonl"), "data.train: no.jsonl is not there"
    )
    shutil.copytree(tmp_path / "model", elsewhere)
    refused(slurm(config, *inputs, "--container-image", "x/y", f"model.path='{elsewhere}'"), "comma or a colon")


def test_links_are_mounted_with_what_they_lead_to(tmp_path: Path) -> None:
    """A snapshot in the Hub's cache: its files are links into the folder `blobs`."""
    cache = tmp_path / "hub" / "models--a--b"
    snapshot, blobs, disk = cache / "snapshots" / "1", cache / "blobs", tmp_path / "disk"
    for folder in (snapshot, blobs, disk):
        folder.mkdir(parents=True)
    (disk / "weights").touch()
    (blobs / "aa").symlink_to(disk / "weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/aa")
    everything = [Mount(path, path) for path in sorted([blobs, snapshot, disk])]
    assert mounts_of({"model.path": snapshot}, []) == everything
    assert mounts_of({"model.path": snapshot}, [tmp_path]) == [Mount(tmp_path, tmp_path)]
    # A link to the folder becomes a folder in the container, where its relative links lead elsewhere.
    (tmp_path / "work").mkdir()
    linked = tmp_path / "work" / "model"
    linked.symlink_to(snapshot)
    found = mounts_of({"model.path": linked}, [])
    assert set(found) == {*everything, Mount(linked, linked), Mount(blobs, tmp_path / "blobs")}
    # A link inside a mounted folder stays a link.
    found = mounts_of({"model.path": linked}, [linked.parent])
    assert set(found) == {*everything, Mount(linked.parent, linked.parent)}
    (disk / "round").symlink_to(disk / "round")
    assert mounts_of({"data": disk}, []) == [Mount(disk, disk)]


# --- snapshots -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a checkout with little code: a program that prints its module's constant."""
    root = tmp_path / "checkout"
    files = {"launch/train.py": "import lowrank_dist; print(lowrank_dist.SAYS)\n"}
    files |= {"lowrank_dist/__init__.py": "SAYS = 1\n", "README.md": "read me\n", ".gitignore": "*.so\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copytree(ROOT / "launch" / "slurm", root / "launch" / "slurm")
    (root / "lowrank_dist" / "ops").mkdir()
    (root / "lowrank_dist" / "ops" / "_C.abi3.so").write_bytes(b"compiled")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=first")
    return root


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_a_snapshot_does_not_follow_the_checkout(project: Path, config: Path, tmp_path: Path) -> None:
    """The snapshot has the tracked files as they are now, uncommitted changes included, and the compiled operators."""
    run = tmp_path / "runs" / "first"
    (project / "lowrank_dist" / "__init__.py").write_text("SAYS = 2\n")
    taken = Snapshot.of(project, config, run)
    assert taken.commit == f"{git(project, 'rev-parse', '--short', 'HEAD')}-dirty"
    taken.write()
    assert taken.folder.parent == run.parent and taken.folder.name.startswith("first.code-") and not run.exists()
    text = config.read_text()
    (project / "lowrank_dist" / "__init__.py").write_text("SAYS = 3\n")
    (project / "lowrank_dist" / "ops" / "_C.abi3.so").write_bytes(b"compiled again")
    config.write_text("changed")
    environment = {**os.environ, "PYTHONPATH": str(taken.folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["python", str(taken.folder / "launch" / "train.py")]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "2\n"
    assert taken.config.read_text() == text
    assert (taken.folder / "lowrank_dist" / "ops" / "_C.abi3.so").read_bytes() == b"compiled"
    assert not (taken.folder / "README.md").exists() and len(list(run.parent.iterdir())) == 1
    # The name comes from the content: the same code gives the same folder, other code one beside it.
    later = Snapshot.of(project, config, run)
    later.write()
    taken.write()
    assert later.folder != taken.folder and len(list(run.parent.iterdir())) == 2
    (taken.folder / "launch" / "train.py").write_text("")
    with pytest.raises(UserError, match="train.py has changed since it was written"):
        taken.write()


def test_a_snapshot_has_the_modes_of_umask(project: Path, config: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        taken = Snapshot.of(project, config, tmp_path / "runs" / "first")
        taken.write()
    finally:
        os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in (taken.folder, taken.folder / "launch")} == {"0o750"}
    assert oct((taken.config).stat().st_mode & 0o777) == "0o640"


def test_snapshots_that_are_refused(project: Path, config: Path, tmp_path: Path) -> None:
    (project / "lowrank_dist" / "new.py").touch()
    with pytest.raises(UserError, match="git does not track lowrank_dist/new.py"):
        Snapshot.of(project, config, tmp_path / "run")
    git(project, "add", ".")
    Snapshot.of(project, config, tmp_path / "run")
    with pytest.raises(UserError, match="contains a colon.*; rename output.dir"):
        Snapshot.of(project, config, tmp_path / "12:30")
    shutil.rmtree(project / ".git")
    with pytest.raises(UserError, match="is no checkout that git reads"):
        Snapshot.of(project, config, tmp_path / "run")


def test_a_job_runs_its_snapshot(project: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_dist.slurm.script.checkout", lambda: project)
    unwritten = script(config, "--snapshot")
    assert not (tmp_path / "runs").exists()
    done = slurm(config, "--snapshot")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "lowrank.sbatch").read_text()
    assert text == unwritten
    code = Path(shlex.split(re.search("^PROJECT=(.*)$", text, re.MULTILINE)[1])[0])
    assert code.parent == tmp_path / "runs" and f"\nCONFIG={code}/config.yaml\n" in text
    for name in ("launch/train.py", "launch/slurm/job.sh", "launch/slurm/task.sh", "lowrank_dist/__init__.py"):
        assert (code / name).read_bytes() == (project / name).read_bytes()
    assert f"snapshot of {project} at " in done.stdout and "Code:    a snapshot of" in text
