"""The text of a job script: a template of launch/slurm with its blocks filled in.

Values written into a script are plain text to bash and sbatch, never evaluated.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import lowrank_dist
from lowrank_dist.errors import UserError
from lowrank_dist.slurm.directives import plain
from lowrank_dist.terminal import escape_all

BEGIN, END = "# ==== EDIT: begin ====", "# ==== EDIT: end ===="
# Option → the option of the template whose line it replaces, where that is another one.
_REPLACES = {"no-requeue": "requeue"}


def checkout() -> Path:
    """Return the folder that launch/ lies in. Raises UserError where the package is installed without it."""
    root = Path(lowrank_dist.__file__).resolve().parents[1]
    if not (root / "launch" / "slurm").is_dir():
        raise UserError(
            f"{root / 'launch' / 'slurm'} is missing, and job scripts need a checkout; install from one with "
            "`pip install --no-build-isolation -e .`"
        )
    return root


def fill(template: str, directives: Mapping[str, str | None], variables: Mapping[str, str | Sequence[str]]) -> str:
    """Return `template` with its EDIT block filled in.

    directives: option of sbatch → its value, or None to comment its line out. variables: name → value; a sequence
    becomes a bash array. Each must have a line in the block. Raises UserError for a directive that sbatch could
    misread.
    """
    head, _, rest = template.partition(BEGIN)
    block, marker, tail = rest.partition(END)
    assert marker, "the template has no EDIT block"
    lines = block.split("\n")
    for option, value in directives.items():
        at = _only_line(lines, rf"#?#SBATCH --{re.escape(option)}=")
        lines[at] = f"##{lines[at].lstrip('#')}" if value is None else f"#SBATCH --{option}={plain(option, value)}"
    for name, content in variables.items():
        at = _only_line(lines, rf"{re.escape(name)}=")
        lines[at] = f"{name}={shlex.quote(content) if isinstance(content, str) else array(content)}"
    return f"{head}{BEGIN}{chr(10).join(lines)}{END}{tail}"


def array(words: Iterable[str]) -> str:
    """Return a bash array of the words. One with a comma is quoted, since it looks like a mistake (SC2054)."""
    quoted = (f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)
    return f"({' '.join(quoted)})"


def with_directives(script: str, directives: Mapping[str, str | None]) -> str:
    """Return `script` with more #SBATCH lines.

    directives: option → value, or None for an option without one. A line of the same option in the EDIT block is
    replaced; others follow the last one.
    """
    head, begin, rest = script.partition(BEGIN)
    block, end, tail = rest.partition(END)
    lines = block.split("\n")
    for option, value in directives.items():
        line = f"#SBATCH --{option}" + ("" if value is None else f"={value}")
        start = rf"#?#SBATCH --{_REPLACES.get(option, re.escape(option))}(=|$)"
        there = [number for number, old in enumerate(lines) if re.match(start, old)]
        if there:
            lines[there[0]] = line
        else:
            last = max(number for number, old in enumerate(lines) if re.match("#?#SBATCH ", old))
            lines.insert(last + 1, line)
    return f"{head}{begin}{chr(10).join(lines)}{end}{tail}"


def with_header(script: str, lines: Iterable[str]) -> str:
    """Return `script` with the comment at its top replaced by these lines."""
    first, _, _ = script.partition("\n")
    _, begin, rest = script.partition(BEGIN)
    comment = "\n".join(f"# {escape_all(line)}".rstrip() for line in lines)
    return f"{first}\n{comment}\n\n{begin}{rest}"


def _only_line(lines: Sequence[str], start: str) -> int:
    (at,) = (number for number, line in enumerate(lines) if re.match(start, line))
    return at
