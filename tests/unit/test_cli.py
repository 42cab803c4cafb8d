"""`lowrank-dist` is thin and starts quickly; every user error is a message with exit code 2."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lowrank_dist import __version__
from lowrank_dist.cli.main import app
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny

runner = CliRunner()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    queries = random_adapter(base, lambda module: (2, 4.0) if module.endswith("q_proj") else None)
    return save_adapter(base.parent / "adapter", base, queries)


def merge(base: Path, adapter: Path, out: Path, *more: str):
    return runner.invoke(app, ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), *more])


def test_version_and_help() -> None:
    version = runner.invoke(app, ["--version"])
    assert version.exit_code == 0 and version.output.split() == ["lowrank-dist", __version__]
    assert "merge" in runner.invoke(app, ["--help"]).output
    text = runner.invoke(app, ["merge", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert all(option in text for option in ("--base", "--adapter", "--out", "--force-mismatch"))


def test_help_shows_no_value_of_a_flag() -> None:
    names = typer.main.get_command(app).commands
    pages = {name: runner.invoke(app, [*([name] if name else []), "--help"]).output for name in ("", *names)}
    assert [name for name, text in pages.items() if "<bool>" in text or "--help" not in text] == []


def test_training_is_no_command() -> None:
    done = runner.invoke(app, ["train", "run.yaml"])
    assert done.exit_code == 2 and "deepspeed launch/train.py CONFIG" in done.stderr
    for word, said in (
        ("traim", "traim: no such command: a launcher starts training once for each GPU"),
        ("meger", "meger: no such command: did you mean merge?"),
        ("xyzzy", "xyzzy: no such command: the commands are merge, config, data, doctor"),
    ):
        done = runner.invoke(app, [word])
        assert done.exit_code == 2 and said in done.stderr
    assert runner.invoke(app, ["--no-such-option"]).exit_code == 2


def test_an_option_given_twice_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Its first value would be dropped in silence. Options of several values, and flags, may be repeated."""
    done = merge(base, adapter, tmp_path / "out", "--base", str(base))
    assert done.exit_code == 2 and done.stderr == "error: --base: given 2 times, but it takes one value; give it once\n"
    done = runner.invoke(app, ["generate", "--model", "a", "--prompt", "x", "--prompt", "y", "--seed", "1", "--seed=2"])
    assert done.exit_code == 2 and "--seed: given 2 times" in done.stderr
    done = merge(base, adapter, tmp_path / "out", "--adapter", str(adapter), "--force-mismatch", "--force-mismatch")
    assert "given twice as adapter" in done.stderr


def test_keys_of_the_config_are_options_as_in_training(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: /nowhere}\ndata: {train: t.jsonl}\noutput: {dir: run}\n")
    for command in ("data", "plan", "doctor"):
        # The value arrives, and is what is wrong.
        for words in ((config, "--lora.rank", "0"), ("--lora.rank", "0", config), (config, "--lora.rank=0")):
            if command != "plan" or words[0] == config:
                done = runner.invoke(app, [command, *map(str, words)])
                assert done.exit_code == 2 and "command line: lora.rank: 0 is not valid" in done.stderr, done.output
        done = runner.invoke(app, [command, str(config), "train.lr", "1e-3"])
        assert (
            done.exit_code == 2 and done.stderr == "error: command line: train.lr has no value; write train.lr=1e-3\n"
        )
        done = runner.invoke(app, [command, str(config), "--jsn"])
        assert done.exit_code == 2 and "--jsn: no such option: did you mean --json?" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lowrank_dist.cli.main import app\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'megatron', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_may_not_be_read_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def refuse(path, *arguments, **options):
        if "closed" in os.fspath(path):  # root may read everything
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    done = runner.invoke(app, ["inspect", str(tmp_path / "closed" / "adapter")])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.exception
    assert "closed/adapter: Permission denied: give a path that you may read" in done.stderr


def test_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = merge(base, adapter, tmp_path / "out")
    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout.startswith(str(tmp_path / "out")) and "2 changed" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_warnings_are_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other", seed=1)
    done = merge(other, adapter, tmp_path / "out", "--force-mismatch")
    assert done.exit_code == 0 and done.stderr.startswith("warning: ") and "another base" in done.stderr


def test_a_users_error_is_a_message_and_exit_code_2(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, told in (
        ((tmp_path / "none", adapter, tmp_path / "out"), "none"),
        ((base, tmp_path / "empty", tmp_path / "out"), "adapter_config.json"),
        ((base, base, tmp_path / "out"), "a whole model, not an adapter"),
        ((base, adapter, base / "out"), "outside"),
        ((base, adapter, tmp_path / "empty"), "already exists"),
    ):
        done = merge(*arguments)
        assert done.exit_code == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and told in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["empty"]


def test_a_missing_option_is_exit_code_2(base: Path) -> None:
    done = runner.invoke(app, ["merge", "--base", str(base)])
    assert done.exit_code == 2 and "--adapter" in done.stderr


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, base: Path, adapter: Path, tmp_path: Path) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("lowrank_dist.merging.merge.merge", bug)
    done = merge(base, adapter, tmp_path / "out")
    assert done.exit_code == 1 and isinstance(done.exception, ValueError)


@pytest.mark.slow
def test_as_a_program(base: Path, adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from lowrank_dist.cli.main import app; app()", "merge", "--base", str(base)]
    done = subprocess.run(
        [*command, "--adapter", str(adapter), "--out", str(base)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
