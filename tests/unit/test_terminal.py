"""Text from files reaches the terminal, the log and rich as plain text: no control sequence takes effect."""

from __future__ import annotations

import io
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowrank_dist.cli.main import app
from lowrank_dist.engine.reporter import ConsoleProgress
from lowrank_dist.supervision.failure import Failure, read, record
from lowrank_dist.terminal import LogFormatter, ProgressLines, escape_all, escape_control, open_console, put, say
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import make_tiny

# These set the title, clear the screen (also in C1's form), overwrite the line and reverse the text.
HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "C1": "\x9b2J",
    "carriage return": "error: x\rall is well",
    "backspace": "evil\b\b\b\bgood",
    "DEL": "a\x7fb",
    "override": "\u202egnp.exe",
    "isolate": "\u2067abc\u2069",
    "NUL": "a\0b",
    "bytes of a path": "caf\udce9",
}
MARKUP = ["[/b]", "[bold red]x[/]", "[link=file:///etc/passwd]x[/link]", "a[/]b", ":smile:"]


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_stream_that_lacks_a_character_gets_it_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="iso-8859-1"))
    say("1 × 8 of Θ")
    assert written.getvalue() == b"1 \xd7 8 of \\u0398\n"


def is_safe(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t\u200c\u200d\xa0\u3000" for c in text)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_terminal_would_obey_is_spelled_out(name: str) -> None:
    text = f"before {HOSTILE[name]} after"
    assert not is_safe(text), "a control: the text is hostile"
    assert (
        is_safe(escape_control(text))
        and escape_control(text).startswith("before ")
        and escape_control(text).endswith(" after")
    )
    assert escape_control(escape_control(text)) == escape_control(text)
    assert is_safe(escape_all(text)) and len(escape_all(text).splitlines()) == 1
    escape_control(text).encode()


@pytest.mark.parametrize(
    "text", ["line\nand\ttab", "می\u200cخواهم", "👩\u200d👩\u200d👧", "10\xa0%", "全角\u3000", "עברית", "[/b]", "\\x1b"]
)
def test_what_is_harmless_stays(text: str) -> None:
    assert escape_control(text) == text


def test_a_message_is_safe_everywhere_and_a_result_exact_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\x1b[31m[/b]\r"
    say(text)
    say(text, err=True)
    put(text, end="")
    assert capsys.readouterr() == (f"\\x1b[31m[/b]\\r\n{text}", "\\x1b[31m[/b]\\r\n")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    put(text)
    assert terminal.getvalue() == "\\x1b[31m[/b]\\r\n"


@pytest.mark.parametrize("text", [*MARKUP, *HOSTILE.values()])
def test_rich_draws_text_as_it_is(text: str) -> None:
    """In a line, in a table's cells and title, in a Text, and under a progress bar."""
    console = open_console(file=(file := io.StringIO()), width=200)
    table = Table("head", title=text)
    table.add_row(text)
    progress = Progress(TextColumn("{task.description}", markup=False), console=console)
    progress.add_task(text)
    for drawn in (text, Text(text), table):
        file.seek(0)
        file.truncate()
        console.print(drawn)
        # rich itself removes BEL, backspace and carriage return from its Text.
        assert {escape_control(text), escape_control(Text(text).plain)} & set(
            re.split(r"\s*\n\s*|│ | +│", file.getvalue().strip())
        )
        assert is_safe(file.getvalue())
    console.print(progress.get_renderable())
    assert is_safe(file.getvalue())


@pytest.mark.parametrize("text", [*MARKUP, HOSTILE["clear"]])
def test_a_run_says_a_key_of_its_data(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    sink = ConsoleProgress(10, 0)
    assert sink._bar is not None
    sink._bar.console.width = 200
    sink.say(f"train.jsonl: key {text} is not read")
    sink.close()
    assert f"key {escape_control(text)} is not read" in terminal.getvalue() and "\x1b[2J" not in terminal.getvalue()


def test_a_log_and_the_record_of_a_failure_are_safe(tmp_path: Path) -> None:
    try:
        raise ValueError("\x1b[2J in a name")
    except ValueError as error:
        failure = Failure(0, "host", 1, "data", str(error), f"ValueError: {error}", True)
        logged = logging.LogRecord("n", logging.ERROR, "p", 1, "%s", ("\x1b]0;t\x07",), (ValueError, error, None))
    text = LogFormatter("%(levelname)s: %(message)s").format(logged)
    assert "ERROR: \\x1b]0;t\\x07\n" in text and "\\x1b[2J in a name" in text and is_safe(text)
    record(tmp_path, failure)
    said = read(tmp_path)
    assert said is not None and "\\x1b[2J in a name" in said and is_safe(said)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def _with_odd_tensor(model: Path) -> Path:
    path = model / "model.safetensors"
    save_file(load_file(path) | {f"{HOSTILE['title']}[/b]": torch.ones(1)}, path, {"format": "pt"})
    return model


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_errors_of_commands(base: Path, tmp_path: Path, command: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, random_adapter(base))
    odd = _with_odd_tensor(Path(shutil.copytree(base, tmp_path / "odd")))
    arguments = {
        "inspect": [str(odd)],
        "merge": ["--base", str(odd), "--adapter", str(adapter), "--out", str(tmp_path / "out")],
    }[command]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code in (1, 2) and "tensor \\x1b]0;owned\\x07[/b] does not exist in a" in result.output
    assert is_safe(result.output)


def test_inspect_on_a_terminal(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = _with_odd_tensor(Path(shutil.copytree(base, tmp_path / "[/b]")))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "500")
    result = CliRunner().invoke(app, ["inspect", str(odd)])
    assert result.exit_code == 1, result.exception
    assert "\x1b[31m" in result.output and HOSTILE["title"] not in result.output
    assert f"{tmp_path}/[/b]" in result.output and "\\x07[/b] does not exist in a" in result.output


def test_a_long_task_says_how_far_it_is_and_a_short_one_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [100.0], list[str]()
    monkeypatch.setattr("lowrank_dist.terminal.time.monotonic", lambda: now[0])
    progress = ProgressLines("loading", "GB", 10**9, lines.append)
    counted = ProgressLines("evaluation", "samples", tell=lines.append)
    for second in range(0, 61):
        now[0] = 100.0 + second
        progress(second * 10**9, 60 * 10**9)
        if second <= 9:
            counted(second, 10)
    assert lines == [
        f"loading: {done}.0 of 60.0 GB, about {60 - done} s left" for done in (10, 20, 30, 40, 50)
    ]  # the output that follows shows the end
    now[0] = 200.0
    counted(3000, 12000)
    assert lines[-1] == "evaluation: 3,000 of 12,000 samples, about 300 s left"
