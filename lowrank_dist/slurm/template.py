"""Fills the EDIT block of a job script. What is written is text to bash and to sbatch, never evaluated."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import lowrank_dist
from lowrank_dist.errors import UserError

BEGIN, END = "# ==== EDIT: begin ====", "# ==== EDIT: end ===="
# sbatch splits these lines itself, by rules of its own: only what needs no quoting anywhere goes there.
_PLAIN = re.compile(r"[A-Za-z0-9._,:@%+/=\[\]-]+")


def checkout() -> Path:
    """The folder that launch/ lies in. Raises UserError where the package is installed without it."""
    root = Path(lowrank_dist.__file__).resolve().parents[1]
    if not (root / "launch" / "slurm").is_dir():
        raise UserError(
            f"{root / 'launch' / 'slurm'} is not there: job scripts need a checkout; install from it with "
            "`pip install --no-build-isolation -e .`"
        )
    return root


def fill(template: str, directives: Mapping[str, str | None], variables: Mapping[str, str | Sequence[str]]) -> str:
    """`template` with its EDIT block filled in.

    directives: option of sbatch → its value, or None to switch its line off. variables: name → value, a sequence for
    an array. Each must have a line in the block. Raises UserError for a directive that sbatch could read as something
    else.
    """
    head, _, rest = template.partition(BEGIN)
    block, marker, tail = rest.partition(END)
    assert marker, "the template has no EDIT block"
    lines = block.split("\n")
    for option, value in directives.items():
        at = _only_line(lines, rf"#?#SBATCH --{re.escape(option)}=")
        lines[at] = f"##{lines[at].lstrip('#')}" if value is None else f"#SBATCH --{option}={_directive(option, value)}"
    for name, value in variables.items():
        at = _only_line(lines, rf"{re.escape(name)}=")
        lines[at] = f"{name}={shlex.quote(value) if isinstance(value, str) else f'({shlex.join(value)})'}"
    return f"{head}{BEGIN}{chr(10).join(lines)}{END}{tail}"


def _only_line(lines: Sequence[str], start: str) -> int:
    (at,) = (number for number, line in enumerate(lines) if re.match(start, line))
    return at


def _directive(option: str, value: str) -> str:
    if not _PLAIN.fullmatch(value):
        raise UserError(
            f"--{option}: {value!r} cannot go on an #SBATCH line; give letters, digits and ._,:@%+/=[]- only"
        )
    return value
