"""Checks and runs the code blocks of the tutorial and the how-to pages. CONTRIBUTING.md has the rules.

A page's blocks share one folder that looks like a clone: it has `configs`, `launch`, and the files that the page asks
for:

    <!-- given: model models/base, samples data/train.jsonl, chats data/chats.jsonl -->
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from lowrank_dist.cli.main import app
from lowrank_dist.config import load_config
from lowrank_dist.config.reference import reference

ROOT = Path(__file__).parents[1]
SHELL, YAML, PYTHON = "sh", "yaml", "python"
# Blocks of output, of files that no run reads, and drawings.
OTHER = {"text", "json", "mermaid"}
# Reasons for not running a block. Its commands must still parse.
NEEDS = {"a cluster", "a GPU", "a download", "minutes", "another program"}
TRAIN = "launch/train.py"
SECONDS = 120
_FENCE = re.compile(r"```(\w*)(?: title=\"([^\"]+)\")?$")
_NEEDS = re.compile(r"<!-- needs (.+) -->")
_GIVEN = re.compile(r"<!-- given: (.+?) -->")
_OVERRIDE = re.compile(r"(?:--)?([a-z_]+(?:\.[a-z_]+)+|method)=")
_OPERATORS = {"|", ">", ">>", "<", "&&", "||", ";", "&"}
_REQUIRED = {"model.path": "MODEL", "data.train": "DATA", "output.dir": "RUN"}
_WORDS = ("cat", "dog", "ant", "hen", "rat", "pig")


@dataclass(frozen=True)
class Block:
    """A code block of a page. title: its file name, for later blocks. needs: why it is not run, or None."""

    page: Path
    line: int
    language: str
    title: str | None
    needs: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    needs: str | None = None
    opened: tuple[int, str, str | None] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if opened is not None:
            if line.strip() == "```":
                start, language, title = opened
                yield Block(page, start, language, title, needs, "\n".join(inside) + "\n")
                opened, needs, inside = None, None, []
            else:
                inside.append(line)
        elif match := _FENCE.match(line):
            opened = number, match[1], match[2]
        elif match := _NEEDS.fullmatch(line.strip()):
            needs = match[1]
        elif line.strip():
            needs = None


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command of a shell block; `_OPERATORS` has those that a shell would interpret."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.commenters, lexer.whitespace_split = "#", True
        words = list(lexer)
        if words:
            found.append(words)
    return found


def mistakes(block: Block) -> list[str]:
    """Return the mistakes in a block that can be found without running it."""
    if block.needs is not None and block.needs not in NEEDS:
        return [f"{block}: a block needs one of {', '.join(sorted(NEEDS))}, not {block.needs}"]
    if block.language == SHELL:
        return [f"{block}: {mistake}" for words in commands(block) for mistake in _in_command(words)]
    if block.language == YAML:
        return [f"{block}: {mistake}" for mistake in _in_config(block)]
    if block.language == PYTHON:
        compile(block.text, str(block), "exec")
        return []
    return [] if block.language in OTHER else [f"{block}: a block is one of {SHELL}, {YAML}, {PYTHON}, {OTHER}"]


def _in_command(words: Sequence[str]) -> list[str]:
    words = [word for word in words[: _end(words)] if not re.match(r"[A-Z_]+=", word)]
    if TRAIN in words:
        arguments = words[words.index(TRAIN) + 1 :]
    elif "lowrank-dist" in words or "lowrank_dist.cli" in words:
        name = "lowrank-dist" if "lowrank-dist" in words else "lowrank_dist.cli"
        arguments = words[words.index(name) + 1 :]
        try:
            _parse(arguments)
        except Exception as error:  # the click that typer brings
            told = error.format_message() if hasattr(error, "format_message") else error
            return [f"{shlex.join(words)}: {told}"]
    else:
        return []
    keys = {key.name for section in reference() for key in section.keys}
    used = [match[1] for word in arguments if (match := _OVERRIDE.match(word))]
    return [f"{shlex.join(words)}: no key {key}" for key in used if key not in keys]


def _end(words: Sequence[str]) -> int:
    return next((number for number, word in enumerate(words) if word in _OPERATORS), len(words))


def _parse(arguments: Sequence[str]) -> None:
    """Parse the arguments of lowrank-dist as the program does. Raises click's UsageError."""
    group: Any = get_command(app)
    if arguments in (["--help"], ["--version"]):
        return
    name, *rest = arguments
    command = group.commands.get(name)
    if command is None:
        raise ValueError(f"no command {name}")
    if rest != ["--help"]:
        command.make_context(name, rest)


def _in_config(block: Block) -> list[str]:
    """Check YAML with the loader of a run's configuration; the missing rest of a partial file is filled in."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(block.text)
        file.flush()
        try:
            values = yaml.safe_load(block.text) or {}
            given = {f"{section}.{key}" for section, keys in values.items() for key in keys or ()}
            load_config(file.name, [f"{key}={value}" for key, value in _REQUIRED.items() if key not in given])
        except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            return [str(error)]
    return []


# --- running ---------------------------------------------------------------------------------------------------------


def make_clone(folder: Path, text: str) -> None:
    """Fill a folder with what a page's blocks need: links into this clone, and the files of its `given` comment."""
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    for comment in _GIVEN.findall(text):
        for entry in comment.split(","):
            kind, place = entry.split()
            path = folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "model":
                from tests.tiny_models import make_tiny

                make_tiny("llama", path)
            else:
                path.write_text("".join(f"{json.dumps(row)}\n" for row in _rows(kind)), encoding="utf-8")


def _rows(kind: str) -> list[dict[str, Any]]:
    pairs = [(f"{_WORDS[i % 6]} {'x' * (i % 5)}:", f"{_WORDS[i % 6]} " * (i % 3 + 1)) for i in range(24)]
    if kind == "samples":
        return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    assert kind == "chats", f"{kind}: a page is given a model, samples or chats"
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": text[:8]} for role, text in zip(roles, pair, strict=True)]}
        for pair in pairs
    ]


def run(block: Block, folder: Path) -> None:
    """Run a block in a page's folder, the working directory. Raises AssertionError with the block's output."""
    if block.title is not None:
        path = folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    elif block.language == SHELL:
        for words in commands(block):
            code, said = _run_command(words)
            assert code == 0, f"{block}: {shlex.join(words)}: exit code {code}\n{said}"
    elif block.language == PYTHON:
        code, said = _program([sys.executable, "-c", block.text])
        assert code == 0, f"{block}: exit code {code}\n{said}"


def _run_command(words: list[str]) -> tuple[int, str]:
    from tests import forked
    from tests.integration.launching import environment, forked_ranks

    settings = dict(word.partition("=")[::2] for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(settings) :]
    if _end(words) < len(words):
        quoted = " ".join(word if word in _OPERATORS else shlex.quote(word) for word in words)
        return _program(["bash", "-ec", quoted])
    if words[0] == "lowrank-dist":
        program = [ROOT / "lowrank_dist" / "cli" / "__main__.py", *words[1:]]
        (ended,) = forked.run_programs(program, [{**environment(), **settings}], seconds=SECONDS)
    elif TRAIN in words:
        place = words.index(TRAIN)
        ended = forked_ranks(_ranks(words[:place]), *words[place + 1 :])
    else:
        return _program(words)
    return ended.code, ended.stdout + ended.stderr


def _ranks(launcher: Sequence[str]) -> int:
    """Return the number of ranks of `deepspeed --num_gpus N` or `torchrun --nproc-per-node N`."""
    for option, value in zip(launcher, launcher[1:], strict=False):
        if option in ("--num_gpus", "--nproc-per-node", "--nproc_per_node"):
            return int(value)
    raise AssertionError(f"{shlex.join(launcher)}: how many ranks?")


def _program(words: Sequence[str]) -> tuple[int, str]:
    from tests.integration.launching import environment

    inherited = environment()
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    done = subprocess.run(words, env=inherited, capture_output=True, text=True, timeout=SECONDS, check=False)
    return done.returncode, done.stdout + done.stderr
