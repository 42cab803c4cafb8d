"""The only printer: prints text without the control characters and markup that a terminal or rich would act on.

Names of tensors and keys, paths, errors of templates and tokenizers, and generated text all come from untrusted files.
A terminal acts on escape sequences in them (move the cursor, rewrite the title, type an answer), right-to-left text
hides the text before it, and rich takes [brackets] for markup.

Imports nothing from this package, and rich only where something is drawn with it.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

# C0 except tab and line feed, DEL, C1; directional embeddings, overrides and isolates; unpaired surrogates, which stand
# in Python for bytes of a path that are not UTF-8, and which no stream takes. Joiners and non-breaking spaces are kept:
# scripts and emoji need them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_all(text: str) -> str:
    """Return the text on one line, with all characters that are not printable escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_control(text: str) -> str:
    """Return the text with control characters escaped (ESC becomes \\x1b); line feeds and tabs are kept."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(message: str, *, err: bool = False) -> None:
    """Print a message for a person. It is always escaped, because a job's log is viewed in a terminal as well.

    Characters that the stream's encoding lacks are escaped too: in a locale such as ISO-8859-1 they would end a run.
    """
    stream = sys.stderr if err else sys.stdout
    encoding = stream.encoding or "utf-8"  # io.StringIO has none
    text = escape_control(message).encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream, flush=True)


def put(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print a result, escaped if the stream is a terminal and unchanged if it is a file or a pipe."""
    stream = sys.stderr if err else sys.stdout
    print(escape_control(text) if stream.isatty() else text, end=end, file=stream, flush=True)


class ProgressLines:
    """Prints the progress of a long task, at most once in `INTERVAL` seconds. A task that ends sooner prints nothing.

    It prints lines even on a terminal: a bar would have to know what else is printed.
    """

    INTERVAL = 10.0

    def __init__(self, task: str, unit: str, scale: int = 1, tell: Callable[[str], None] = say) -> None:
        """unit, scale: what is counted, and how many of it make up one unit. tell: prints a line."""
        self._task, self._unit, self._scale, self._tell = task, unit, scale, tell
        self._begun = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say how many are done of how many, unless the last line is too recent or nothing is left to do."""
        now = time.monotonic()
        if now - self._said < self.INTERVAL or not 0 < done < total:
            return
        self._said = now
        left = (now - self._begun) / done * (total - done)
        digits = 0 if self._scale == 1 else 1
        counts = f"{done / self._scale:,.{digits}f} of {total / self._scale:,.{digits}f} {self._unit}"
        self._tell(f"{self._task}: {counts}, about {left:.0f} s left")


class LogFormatter(logging.Formatter):
    """Formats log records with control characters escaped, since a log is viewed in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control(super().format(record))


def open_console(*, err: bool = False, width: int | None = None, file: TextIO | None = None) -> Console:
    """Return a rich console that shows all text literally, in lines, cells and progress bars alike.

    file: where to draw, in place of stdout or (err) stderr. width: of what is drawn, by default the terminal's.
    """
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(escape_control(text), **how)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            # Everything that is drawn passes here, after its widths were computed. Control segments are rich's own.
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(escape_control(segment.text), segment.style)

    return SafeConsole(file=file, stderr=err, width=width, markup=False, emoji=False, highlight=False)
