"""Untrusted regular expressions, with Python's syntax and meaning, in bounded time.

`re` decides what is a valid expression, as in PEFT and transformers. It cannot be stopped while it backtracks, so
matching is done by `regex`, which has a timeout and agrees with `re` on every expression that is accepted here.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import regex

from lowrank_dist.errors import UserError
from lowrank_dist.untrusted.json import brief

LONGEST = 20_000
# Form for an expression that matches the end of a dotted path, from the path's beginning or from a dot on.
PATH_END = r"(?:.*\.)?(?:{})"
# Longest path of a module, in characters. No published one has 200.
_LONGEST_TEXT = 2_000
# Longest expression, in characters, with its repetitions expanded as `regex` expands them. At this size compiling takes
# 100 MB and 0.2 s.
_MOST_WRITTEN = 1 << 18
# A counted repetition. After a parenthesis (or white space, in a verbose expression) it repeats a group, and multiplies
# the counts inside.
_COUNTS = re.compile(r"([)\s]?)\{(\d*)(?:,(\d*))?\}")
# To `re` a brace without a count is a literal. To `regex` it is fuzzy matching, and [[: begins a POSIX class.
_BRACE = re.compile(r"(?<!\\)(?:\\\\)*\{(?!\d+(?:,\d*)?\}|,\d+\})")
_CLASS = "[[:"


class Patterns:
    """The regular expressions of one file or section, which may take `seconds` of this thread's CPU time together.

    where: the file or the section, for messages.
    """

    # Matching a name with a short expression takes a microsecond or two.
    seconds = 5.0

    def __init__(self, where: object) -> None:
        self._where = where
        self._left = self.seconds
        self._compiled: dict[str, regex.Pattern] = {}

    def require(self, pattern: str, key: str, form: str = "{}") -> None:
        """Raise UserError, naming the key, where the expression cannot be used.

        form: a template, with {} in place of the expression.
        """
        try:
            self._compile(pattern, form)
        except UserError:  # out of time; it names the place already
            raise
        except ValueError as error:
            raise UserError(f"{self._where}: {key}: {brief(pattern)}: {error}") from error

    def fullmatch(self, pattern: str, text: str, form: str = "{}") -> bool:
        """Return whether the expression matches the whole text. form: as in `require`."""
        return self._run(pattern, form, text, "fullmatch") is not None

    def match(self, pattern: str, text: str, form: str = "{}") -> regex.Match | None:
        """Return the match at the beginning of a text. form: as in `require`."""
        return self._run(pattern, form, text, "match")

    def _run(self, pattern: str, form: str, text: str, how: str) -> regex.Match | None:
        if len(text) > _LONGEST_TEXT:
            raise UserError(
                f"{self._where}: {text[:40]!r}… ({len(text)} characters) is too long for a module name; correct it"
            )
        compiled = self._compile(pattern, form)
        with self._timed(pattern, "matching"):
            return getattr(compiled, how)(text, timeout=self._left)

    def _compile(self, pattern: str, form: str) -> regex.Pattern:
        whole = form.replace("{}", pattern)
        if whole not in self._compiled:
            with self._timed(pattern, "reading"):
                require_expression(pattern, form)
                self._compiled[whole] = regex.compile(whole, regex.VERSION0, cache_pattern=False)
        return self._compiled[whole]

    @contextmanager
    def _timed(self, pattern: str, what: str) -> Iterator[None]:
        """Subtract the block's time from what is left; raise UserError where nothing is left or the block times out."""
        began = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            yield
        except (TimeoutError, MemoryError) as error:
            self._left = 0  # `regex` counts process time, which runs ahead of the thread's.
            raise UserError(
                f"{self._where}: {what} the regular expression {brief(pattern)} and those before it take more than "
                f"{self.seconds:g} s in all; use fewer expressions, and no repetition inside a repetition"
            ) from error
        finally:
            self._left -= time.thread_time() - began


def require_expression(pattern: str, form: str = "{}") -> None:
    """Raise ValueError with the reason unless `form` with the pattern at {} is an acceptable regular expression."""
    if len(pattern) > LONGEST:
        raise ValueError(f"a regular expression of {len(pattern)} characters; the limit is {LONGEST}")
    if _written(pattern) > _MOST_WRITTEN:
        raise ValueError(
            f"has more than {_MOST_WRITTEN} characters once its repetitions are written out; use * or + instead of a "
            "count"
        )
    if _BRACE.search(pattern):
        raise ValueError("a brace that is no repetition count; write \\{ for a literal brace")
    if _CLASS in pattern:
        raise ValueError(
            f"'{_CLASS}' has a different meaning in each regular expression engine; write the characters out"
        )
    if re.search(r"\(\?[aLmsux]*i", pattern) and (not pattern.isascii() or re.search(r"\\[xuUN]", pattern)):
        raise ValueError("(?i) together with characters outside ASCII, which no module name has; remove one of the two")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax whose meaning may change
            # The pattern by itself must be valid too: ")(" is valid only inside a form.
            re.compile(pattern)
            re.compile(form.replace("{}", pattern))
        regex.compile(form.replace("{}", pattern), regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, OverflowError) as error:
        remedy = ""
        if "global flags" in str(error):
            remedy = "; limit the flags to a group, (?i:…)"
        raise ValueError(f"not a regular expression: {error}{remedy}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("the regular expression is nested too deeply") from error


def _written(pattern: str) -> int:
    """Return the most characters that the expression has with its counted repetitions expanded."""
    single = groups = 1
    for after, *counts in _COUNTS.findall(pattern):
        # Check the number of digits before converting them.
        most = max(1, *(int(count) if len(count) < 7 else _MOST_WRITTEN for count in counts if count), 1)
        if after:
            groups = min(groups * most, _MOST_WRITTEN)
        else:
            single = max(single, most)
    return len(pattern) * single * groups
