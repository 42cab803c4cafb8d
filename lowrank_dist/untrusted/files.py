"""Reading of untrusted files, whole or line by line, in bounded memory, and checks of path names.

Bounds are checked before the data is in memory, since a file may be an endless device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lowrank_dist.errors import UserError
from lowrank_dist.terminal import escape_all

MIB = 1 << 20
# Largest line of metrics.jsonl in bytes; a usual line has some three hundred.
LONGEST_RECORD = MIB
# Linux: NAME_MAX and PATH_MAX, the latter with its closing zero byte.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
# The links of a run in its folder of checkpoints, and the names of the folders that they point to.
LINKS = ("last", "best")
STEP_NAME = re.compile(r"step-([1-9]\d*)", re.ASCII)
_LONGEST_LINK = 64


def read_bytes(path: Path, remedy: str, *, largest: int) -> bytes:
    """Return the content of a regular file of at most `largest` bytes; raise UserError for anything else."""
    try:
        # Before opening: opening a pipe would wait for its writer.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{short_path(path)}: not a regular file; {remedy}")
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise UserError(f"{short_path(path)}: cannot be read ({error.strerror}); {remedy}") from error
    if len(content) > largest:
        raise UserError(f"{short_path(path)}: larger than {sized(largest)}, the limit for such a file; {remedy}")
    return content


def require_size(path: Path, remedy: str, *, largest: int) -> None:
    """Raise UserError for a file of more than `largest` bytes. For files that a library will read."""
    if path.is_file() and path.stat().st_size > largest:
        raise UserError(f"{short_path(path)}: larger than {sized(largest)}, the limit for such a file; {remedy}")


def read_text(path: Path, remedy: str, *, largest: int) -> str:
    """Return the text of a UTF-8 file; raise UserError as `read_bytes` does, and where it is not UTF-8."""
    try:
        return read_bytes(path, remedy, largest=largest).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{short_path(path)}: not UTF-8 (byte {error.start}: {error.reason}); {remedy}") from error


def follow_file(path: Path) -> Path:
    """Return the folder that a file in place of a run's link leads to; any other path is returned unchanged.

    Where the file system has no symbolic links, checkpoints/last and best are files with the name of the folder.
    """
    if path.name in LINKS and path.is_file():
        with suppress(UserError):  # a file of another origin
            name = read_text(path, "remove it", largest=_LONGEST_LINK).removesuffix("\n")
            return path.with_name(name) if STEP_NAME.fullmatch(name) else path
    return path


def read_lines(path: Path, remedy: str, *, longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line's number, from 1, and its bytes, with the newline where it has one.

    Lines end only at newlines: in some readers text mode also splits at U+2028 or \\x0c, and the numbers would differ
    from an editor's. Raises UserError for a line over `longest` bytes, before all of it is read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(longest + 1):
                number += 1
                if len(line) > longest:
                    raise UserError(f"{short_path(path)}:{number}: the line is longer than {sized(longest)}; {remedy}")
                yield number, line
    except OSError as error:
        raise UserError(f"{short_path(path)}: cannot be read ({error.strerror}); {remedy}") from error


def require_valid_path(text: str) -> str:
    """Return the text; raise ValueError where it cannot be a path on Linux."""
    if "\0" in text:
        raise ValueError("a path cannot hold a zero byte")
    size = len(os.fsencode(text))
    if size > _LONGEST_PATH:
        raise ValueError(f"a path has at most {_LONGEST_PATH} bytes; this one has {size}")
    longest = max((len(os.fsencode(name)) for name in text.split("/")), default=0)
    if longest > _LONGEST_NAME:
        raise ValueError(f"a name in a path has at most {_LONGEST_NAME} bytes; one in this path has {longest}")
    return text


def is_valid_path(text: str) -> bool:
    """Return whether the text can be a path on Linux."""
    try:
        require_valid_path(text)
    except ValueError:  # UnicodeEncodeError as well
        return False
    return True


def short_path(path: Path | str) -> str:
    """Return a path on one line, for a message; a very long one loses its middle."""
    text = escape_all(str(path))
    return text if len(text) <= 500 else f"{text[:240]}…{text[-240:]}"


def sized(count: int) -> str:
    return f"{count >> 20} MiB" if count >= MIB else f"{count} bytes"
