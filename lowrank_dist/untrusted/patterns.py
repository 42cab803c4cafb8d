"""Regular expressions that anyone may have written: Python's own syntax and meaning, in bounded time.

`re` decides what an expression is, as it does for PEFT and transformers; it cannot be stopped once it backtracks, so
`regex` matches, which means the same by all that is let through here and gives up after a time.
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
# The form of an expression for the end of a dotted path, from a dot on.
PATH_END = r"(?:.*\.)?(?:{})"
# A path of a module. No published one has 200 characters.
_LONGEST_TEXT = 2_000
# Characters of an expression whose repetitions are written out, as `regex` does: of so many it makes 100 MB, in 0.2 s.
_MOST_WRITTEN = 1 << 18
# What is counted: after a parenthesis (or the space of a verbose one) a group, whose counts multiply those in it.
_COUNTS = re.compile(r"([)\s]?)\{(\d*)(?:,(\d*))?\}")
# `re` takes a brace that counts nothing as itself, and `regex` for a number of mistakes; [[: begins a class to it.
_BRACE = re.compile(r"(?<!\\)(?:\\\\)*\{(?!\d+(?:,\d*)?\}|,\d+\})")
_CLASS = "[[:"


class Patterns:
    """The regular expressions of one file or section, which together are matched for `seconds` of this thread's time.

    where: for messages, the file or the section.
    """

    # A name against a short expression takes a microsecond or two.
    seconds = 5.0

    def __init__(self, where: object) -> None:
        self._where = where
        self._left = self.seconds
        self._compiled: dict[str, regex.Pattern] = {}

    def require(self, pattern: str, key: str, form: str = "{}") -> None:
        """Raise UserError, naming the key, where the expression cannot be used. form: what it is put into, at {}."""
        try:
            self._compile(pattern, form)
        except UserError:  # of the time, with its place
            raise
        except ValueError as error:
            raise UserError(f"{self._where}: {key}: {brief(pattern)}: {error}") from error

    def fullmatch(self, pattern: str, text: str, form: str = "{}") -> bool:
        """Return whether the whole text is what the expression describes. form: what it is put into, at {}."""
        return self._run(pattern, form, text, "fullmatch") is not None

    def match(self, pattern: str, text: str, form: str = "{}") -> regex.Match | None:
        """Return the match at the beginning of a text. form: what the expression is put into, at {}."""
        return self._run(pattern, form, text, "match")

    def _run(self, pattern: str, form: str, text: str, how: str) -> regex.Match | None:
        if len(text) > _LONGEST_TEXT:
            raise UserError(
                f"{self._where}: a name of {len(text)} characters ({text[:40]!r}…) is no module's: correct it"
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
        """Take the time of the block from what is left; UserError where that is nothing, or it raises TimeoutError."""
        began = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            yield
        except (TimeoutError, MemoryError) as error:
            self._left = 0  # The engine's clock is the process's, which runs ahead of the thread's.
            raise UserError(
                f"{self._where}: {what} the regular expression {brief(pattern)} takes longer than {self.seconds:g} s, "
                "with those before it: it backtracks, or they are too many; write it without a repetition inside a "
                "repetition"
            ) from error
        finally:
            self._left -= time.thread_time() - began


def require_expression(pattern: str, form: str = "{}") -> None:
    """Raise ValueError, saying why, unless `form` with the pattern at {} is a regular expression within the bounds."""
    if len(pattern) > LONGEST:
        raise ValueError(f"a regular expression of {len(pattern)} characters; at most {LONGEST} are taken")
    if _written(pattern) > _MOST_WRITTEN:
        raise ValueError(
            f"has over {_MOST_WRITTEN} characters once its repetitions are written out; use * or + for a count"
        )
    if _BRACE.search(pattern):
        raise ValueError("a brace that counts nothing; write \\{ for a brace itself")
    if _CLASS in pattern:
        raise ValueError(f"'{_CLASS}', which no two engines read alike; write the characters out")
    if re.search(r"\(\?[aLmsux]*i", pattern) and (not pattern.isascii() or re.search(r"\\[xuUN]", pattern)):
        raise ValueError("ignores the case of characters beyond ASCII; no module is named so")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of syntax that may come to mean something else
            # By itself as well: ")(" is one only inside of a form.
            re.compile(pattern)
            re.compile(form.replace("{}", pattern))
        regex.compile(form.replace("{}", pattern), regex.VERSION0, cache_pattern=False)
    except (re.error, regex.error, OverflowError) as error:
        remedy = ""
        if "global flags" in str(error):
            remedy = "; write flags for a part of it, (?i:…)"
        raise ValueError(f"not a regular expression: {error}{remedy}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("a regular expression that is nested too deeply") from error


def _written(pattern: str) -> int:
    """Return how many characters the expression has at most once its counted repetitions are written out."""
    single = groups = 1
    for after, *counts in _COUNTS.findall(pattern):
        # Digits alone are counted before they are converted.
        most = max(1, *(int(count) if len(count) < 7 else _MOST_WRITTEN for count in counts if count), 1)
        if after:
            groups = min(groups * most, _MOST_WRITTEN)
        else:
            single = max(single, most)
    return len(pattern) * single * groups
