"""The arguments of the commands that take a run's config as training does, and their end by a launcher."""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer

from lowrank_dist.errors import UserError

Words = TypeVar("Words", str, list[str] | None)
# Settings of a command: a word that is none of its options is an argument, which `keys_as_options` checks.
KEYS_AS_OPTIONS: dict[str, Any] = {"ignore_unknown_options": True}


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return "did you mean X?" with the word among `known` that is most like `word`, or None."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else None


def keys_as_options(ctx: typer.Context, words: Words) -> Words:
    """Return the arguments. Raises UserError for an unknown option.

    A key of the config may be written as an option, as in training: --lora.rank 8.
    """
    for word in [words] if isinstance(words, str) else words or []:
        name = word.removeprefix("--").partition("=")[0]
        if not word.startswith("-") or (word.startswith("--") and ("." in name or _is_field(name))):
            continue
        options = [option for each in ctx.command.params for option in each.opts if option.startswith("--")]
        meant = did_you_mean(f"--{name}", options) or "--help lists the options."
        raise UserError(
            f"{word}: no such option: {meant} A key of the config is given as section.key=value: lora.rank=8"
        )
    return words


def _is_field(name: str) -> bool:
    """Return whether a run's config has the name at its top level."""
    from lowrank_dist.config import Config  # only for an option: doctor works without what reads configs

    return name in Config.model_fields


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM, by which a launcher ends its ranks, into an exit that removes temporary files."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
