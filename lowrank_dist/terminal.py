"""The only printer: text on its way to a terminal, without what a terminal or rich would obey.

Names of tensors and keys, paths, errors of templates and tokenizers, generated text: all of it comes out of files that
are anyone's. A terminal obeys escape sequences in it (move the cursor, rewrite the title, type an answer), text that
runs from right to left hides what stands before it, and rich takes [brackets] for its markup.

Imports nothing of ours, and rich only where something is drawn with it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

# C0 but for tab and line feed, DEL, C1; embeddings, overrides and isolates of direction; halves of surrogate pairs, as
# which Python has the bytes of a path that are no UTF-8, and which no stream takes. Joiners and non-breaking spaces are
# left: scripts and emoji are written with them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return the text in one line, with everything that a terminal would obey, or cannot show, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """Return the text, its lines and tabs kept, with what a terminal would obey spelled out: ESC becomes \\x1b."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(message: str, *, err: bool = False) -> None:
    """Print a message for a person, safe wherever it ends up: a log of a job is looked at in a terminal as well."""
    print(shown(message), file=sys.stderr if err else sys.stdout, flush=True)


def put(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print a result: exact into a file or a pipe, safe on a terminal."""
    stream = sys.stderr if err else sys.stdout
    print(shown(text) if stream.isatty() else text, end=end, file=stream, flush=True)


class LogFormatter(logging.Formatter):
    """Formats records of a log, which is looked at in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def open_console(*, err: bool = False, width: int | None = None, file: TextIO | None = None) -> Console:
    """Return a console of rich that shows all text as it is: in lines, cells and progress bars alike.

    file: where to draw, in place of stdout or (err) stderr. width: of what is drawn, that of the terminal if not given.
    """
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(shown(text), **how)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            # Below everything else that is drawn, but after its widths were computed. Control segments are rich's own.
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(shown(segment.text), segment.style)

    return SafeConsole(file=file, stderr=err, width=width, markup=False, emoji=False, highlight=False)
