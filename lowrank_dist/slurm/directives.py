"""Directives of sbatch (#SBATCH lines): their syntax, options that a user passes on, GPUs and the time limit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.files import short_path
from lowrank_dist.untrusted.json import brief

_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# Values that sbatch takes without quotes.
_PLAIN = re.compile(r"[A-Za-z0-9._,:@%+/=\[\]-]+")
# Options that the command sets itself, since they depend on one another, and what sets them.
_OWN = {
    "job-name": "--job-name",
    "nodes": "--nodes",
    "ntasks": "--nodes and --gpus-per-node",
    "ntasks-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-task",
    "time": "--time",
    "signal": "--lead",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "requeue": "--requeue",
    "no-requeue": "--no-requeue",
    "array": "the template of a sweep, launch/slurm/train_array.sbatch",
}
# Options whose value may ask for GPUs.
_ASKS = re.compile(r"gres|tres-per-(?:node|socket|task)|gpus(?:-per-(?:node|socket|task))?")
# One GPU resource in a list such as gpu:h100:8,nvme:1.
_GPU = re.compile(r"(?:gres/|gres:)?gpu(?::[A-Za-z_][\w.-]*)?(?:[:=](?P<count>\d+))?")
# Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds.
_TIME = re.compile(r"(?:(?P<days>\d{1,9})-)?(?P<parts>\d{1,9}(?::\d{1,2}){0,2})")
_ENDLESS = ("UNLIMITED", "INFINITE")


def plain(option: str, value: str) -> str:
    """Return a value that goes on an #SBATCH line without quotes; UserError where sbatch could misread it."""
    if not _PLAIN.fullmatch(value):
        raise UserError(
            f"--{option}: {value!r} cannot go on an #SBATCH line; give letters, digits and ._,:@%+/=[]- only"
        )
    return value


def passed_on(words: Sequence[str]) -> dict[str, str | None]:
    """Return the options of --sbatch: name → value as on an #SBATCH line, None for an option without a value.

    words: as in "gres=gpu:8" or "exclusive", with or without leading hyphens. Raises UserError for an option that the
    command sets itself, an option given twice, and a value that sbatch could misread.
    """
    found: dict[str, str | None] = {}
    for word in words:
        option, equals, value = word.removeprefix("--").partition("=")
        if not _OPTION.fullmatch(option):
            raise UserError(
                f"--sbatch: {word!r} is no long option of sbatch; write it as in 'gres=gpu:8' or 'exclusive'"
            )
        if option in _OWN:
            raise UserError(f"--sbatch: {option} is set by {_OWN[option]}; use that instead")
        if option in found:
            raise UserError(f"--sbatch: {option} is given twice; leave one of them out")
        found[option] = _quoted(option, value) if equals else None
    return found


def _quoted(option: str, value: str) -> str:
    if _PLAIN.fullmatch(value):
        return value
    if not value.strip() or not value.isprintable() or set(value) & set("\"'\\"):
        raise UserError(
            f"--sbatch: the value {value!r} of {option} cannot go on an #SBATCH line; give one line of text without "
            "quotes and backslashes"
        )
    return f'"{value}"'


def ask_for_gpus(directives: Mapping[str, str | None], nodes: int, gpus_per_node: int) -> bool:
    """Return whether directives that a user passes on ask for GPUs, in place of --gpus-per-node.

    Raises UserError where they ask for another number of GPUs than the job has ranks.
    """
    expected = {"gres": gpus_per_node, "gpus-per-node": gpus_per_node, "gpus": nodes * gpus_per_node}
    expected |= dict.fromkeys(("gpus-per-task", "tres-per-task"), 1)
    asked = False
    for option, value in directives.items():
        if not _ASKS.fullmatch(option):
            continue
        listed = (value or "").strip('"').split(",")
        if option.startswith("gpus"):
            listed = [f"gpu:{item}" for item in listed]
        gpus = [match for item in listed if (match := _GPU.fullmatch(item)) is not None]
        asked |= bool(gpus)
        # Python converts at most 4,300 digits. Nine are more than a number of GPUs has.
        count = sum(int((match["count"] or "1")[:9]) for match in gpus)
        if gpus and count != expected.get(option, count):
            need = "1 for each" if option.endswith("-task") else str(expected[option])
            raise UserError(
                f"--sbatch: {option}={short_path(value or '')} asks for {count} GPUs, but {nodes} nodes of "
                f"{gpus_per_node} ranks need {need}; make it agree with --nodes and --gpus-per-node"
            )
    return asked


def check_time(time: str, lead: int) -> None:
    """Raise UserError where `time` is not a time limit of sbatch, or is not longer than `lead` seconds."""
    if time in _ENDLESS:
        return
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time: {brief(time)} is not a time limit; give minutes, H:MM:SS or D-HH:MM:SS")
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
