"""The progress lines of decoding where no progress bar can be drawn."""

from __future__ import annotations

import time

import pytest

from lowrank_dist.cli import decode


def test_lines_are_seconds_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    advance = decode._lines(40)
    for batch in range(5):
        now = 100.0 + 10 * (batch + 1)
        advance(8)
    said = capsys.readouterr()
    # At 50 s all prompts are decoded.
    assert said.out == "" and said.err.splitlines() == [
        "decoding: 8 of 40 prompts, about 40 s left",
        "decoding: 16 of 40 prompts, about 30 s left",
        "decoding: 24 of 40 prompts, about 20 s left",
        "decoding: 32 of 40 prompts, about 10 s left",
    ]
