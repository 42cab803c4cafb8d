"""The SETUP block of a job script: commands of a user's file, such as `module load cuda`."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.terminal import escape_all

_BEGIN, _END = "# ==== SETUP: begin ====", "# ==== SETUP: end ===="
_LARGEST = 2**16  # bytes


def with_setup(script: str, file: Path) -> str:
    """Return `script` with the commands of a file in its SETUP block.

    The job ends if the last of them fails; after a `set -e` among them, if any fails. They are copied, so a later
    change of the file does not reach the job. Raises UserError for a file that cannot be read, that bash does
    not accept, or that sets options of sbatch.
    """
    head, begin, rest = script.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    assert end, "the template has no SETUP block"
    failed = shlex.quote(f"error: the last command of the setup failed (--setup {escape_all(str(file))})")
    # The blank line ends a last line that is continued by a backslash.
    block = f"""
# The commands of {escape_all(str(file.absolute()))} at the time when this script was written.
# shellcheck disable=all
{{
{_commands(file)}

}}
# Not `{{ … }} || …`, in which bash ignores `set -e`.
case $? in
0) ;;
*)
    echo {failed} >&2
    exit 1
    ;;
esac
"""
    return f"{head}{begin}{block}{end}{tail}"


def _commands(file: Path) -> str:
    if file.exists() and not file.is_file() and not file.is_dir():  # opening a pipe would wait for its writer
        raise UserError(f"--setup: {file} is no regular file; give a file of shell commands")
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
        text = content.decode()
    except OSError as error:
        raise UserError(f"--setup: cannot read {file}: {error.strerror}; give a file of shell commands") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--setup: {file} is no UTF-8 text; give a file of shell commands") from error
    if len(content) > _LARGEST:
        raise UserError(
            f"--setup: {file} has more than {_LARGEST} bytes; move commands into another file and source that one"
        )
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"--setup: {file}, line {number}"
        if line.startswith("#SBATCH"):
            raise UserError(f"{where}: sbatch does not read directives after the first command; use --sbatch")
        if "\r" in line or "\0" in line:
            raise UserError(f"{where}: has a carriage return or a NUL; save the file with Unix line ends")
    if not any(line.strip() and not line.lstrip().startswith("#") for line in text.split("\n")):
        raise UserError(f"--setup: {file} has no command; leave --setup out")
    # bash would warn of a locale that is not installed, such as one that ssh passes on.
    environment = {**os.environ, "LC_ALL": "C"}
    checked = subprocess.run(["bash", "-n"], input=content, capture_output=True, env=environment)
    if checked.returncode or checked.stderr:  # bash only warns of an open here-document
        reason = escape_all(checked.stderr.decode(errors="replace").partition("\n")[0].removeprefix("bash: "))
        raise UserError(f"--setup: {file}: bash does not accept it: {reason}; correct the file")
    return text
