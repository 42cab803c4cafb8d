"""Job scripts for Slurm: checks of layout and time limit, and the EDIT block of a script in launch/slurm.

Values written into a script are plain text to bash and sbatch, never evaluated.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import lowrank_dist
from lowrank_dist.errors import UserError

# Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds.
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d{1,2}){0,2})")
_ENDLESS = ("UNLIMITED", "INFINITE")
BEGIN, END = "# ==== EDIT: begin ====", "# ==== EDIT: end ===="
# sbatch splits #SBATCH lines by rules of its own, so only values that need no quoting are allowed there.
_PLAIN = re.compile(r"[A-Za-z0-9._,:@%+/=\[\]-]+")


def check_layout(
    nodes: int, ranks_per_node: int, *, tensor: int, data: int | None = None, across_nodes: bool = False
) -> None:
    """Raise UserError where TP × DP is not the number of ranks, or where TP crosses nodes without `across_nodes`.

    tensor, data, across_nodes: as in the section `parallel` of a run's config.

    Tensor-parallel ranks are consecutive and Slurm fills one node after another, so groups stay inside nodes exactly
    where parallel.tensor divides the ranks of a node.
    """
    ranks = nodes * ranks_per_node
    job = f"{nodes} nodes × {ranks_per_node} = {ranks} ranks"
    if ranks % tensor:
        raise UserError(f"parallel.tensor: {tensor} does not divide {job}; it may be {_divisors(ranks, ranks)}")
    if ranks_per_node % tensor and not across_nodes:
        raise UserError(
            f"parallel.tensor: with {tensor} a tensor-parallel group would cross nodes ({job}), where every "
            f"layer waits for the network; it may be {_divisors(ranks_per_node, ranks_per_node)}, or set "
            "parallel.across_nodes=true"
        )
    if data is not None and data * tensor != ranks:
        raise UserError(
            f"parallel.data: {tensor} tensor × {data} data parallel is not {job}; leave it null, "
            f"or write {ranks // tensor}"
        )


def check_time(time: str, lead: int) -> None:
    """Raise UserError where `time` is not a time limit of sbatch, or is not longer than `lead` seconds."""
    if time in _ENDLESS:
        return
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time: {time!r} is not a time limit; give minutes, H:MM:SS or D-HH:MM:SS")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [int(match["days"]) * 24 + parts[0], *parts[1:], 0, 0][:3]
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
    total = hours * 3600 + minutes * 60 + seconds
    if total <= lead:
        raise UserError(
            f"--lead: a job of --time {time} would be told to stop when it starts ({lead} s of {total} s); "
            "give a longer --time or a shorter --lead"
        )


def _divisors(number: int, largest: int) -> str:
    return ", ".join(str(size) for size in range(1, largest + 1) if number % size == 0)


def checkout() -> Path:
    """Return the folder that launch/ lies in. Raises UserError where the package is installed without it."""
    root = Path(lowrank_dist.__file__).resolve().parents[1]
    if not (root / "launch" / "slurm").is_dir():
        raise UserError(
            f"{root / 'launch' / 'slurm'} is not there: job scripts need a checkout; install from it with "
            "`pip install --no-build-isolation -e .`"
        )
    return root


def fill(template: str, directives: Mapping[str, str | None], variables: Mapping[str, str | Sequence[str]]) -> str:
    """Return `template` with its EDIT block filled in.

    directives: option of sbatch → its value, or None to comment its line out. variables: name → value, a sequence for
    an array. Each must have a line in the block. Raises UserError for a directive that sbatch could misread.
    """
    head, _, rest = template.partition(BEGIN)
    block, marker, tail = rest.partition(END)
    assert marker, "the template has no EDIT block"
    lines = block.split("\n")
    for option, value in directives.items():
        at = _only_line(lines, rf"#?#SBATCH --{re.escape(option)}=")
        lines[at] = f"##{lines[at].lstrip('#')}" if value is None else f"#SBATCH --{option}={_directive(option, value)}"
    for name, content in variables.items():
        at = _only_line(lines, rf"{re.escape(name)}=")
        lines[at] = f"{name}={shlex.quote(content) if isinstance(content, str) else f'({shlex.join(content)})'}"
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
