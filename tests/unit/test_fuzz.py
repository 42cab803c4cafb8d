"""A slice of the mutated files for each reader, and faults planted in readers: the driver finds every kind of fault."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.errors import UserError
from tests.fuzz import driver
from tests.fuzz.driver import fuzz, inputs, table
from tests.fuzz.readers import READERS, Built, build, tree_judge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("fuzz"))


def test_a_slice_of_every_reader(built: Built) -> None:
    results = [fuzz(reader, built, 20, 6) for reader in READERS]
    assert [f"{each.name}: {line}" for each in results for line in each.failures] == []
    # Every reader that can refuse refuses some of its files; some others are accepted.
    assert all(each.refused for each in results if each.name not in ("metrics", "inspect", "deepspeed's words"))
    assert sum(each.accepted for each in results) > 100 and table(results)


def test_the_same_numbers_give_the_same_files(built: Built) -> None:
    for reader in READERS:
        assert list(inputs(reader, built, 5, 5)) == list(inputs(reader, built, 5, 5))


def _recurse(content: bytes) -> None:
    json.loads("[" * 100_000)


def _abort(content: bytes) -> None:
    os.abort()


def _panic(content: bytes) -> None:
    raise type("PanicException", (BaseException,), {})("index out of bounds")


def _turn(content: bytes) -> None:
    while True:
        time.process_time()


def _hold(content: bytes) -> None:
    b"x" * int(len(content) > 0 and 300 << 20)


def _take_all(content: bytes) -> None:
    bytearray(3 << 30)


def _mute(content: bytes) -> None:
    raise UserError("")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (_recurse, "RecursionError"),
        (_abort, "died or was ended (signal 6)"),
        (_panic, "PanicException"),
        (_turn, "over 1 s"),
        (_hold, "MiB"),
        (_take_all, "MemoryError"),
        (_mute, "an error without a message"),
    ],
)
def test_a_planted_fault_is_found(
    built: Built, fault: Callable[[bytes], None], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "SECONDS", 1.0)
    monkeypatch.setattr(driver, "MEMORY", 256 << 20)
    reader = next(reader for reader in READERS if reader.name == "config.json llama")

    def read(built: Built) -> Any:
        content = reader.file(built).read_bytes()
        if len(content) % 5 == 0:
            fault(content)
        return reader.read(built)

    planted = list(inputs(reader, built, 10, 0))
    expected = [label for label, content in planted if len(content) % 5 == 0]
    result = fuzz(replace(reader, read=read), built, 10, 0)
    assert len(expected) and [line.partition(": ")[0] for line in result.failures] == expected
    assert all(found in line for line in result.failures)


def _loose(path: Path) -> Any:
    return {key: str(value) for key, value in json.loads(path.read_bytes()).items()}


def _deaf(path: Path) -> Any:
    return json.loads(path.read_bytes()).keys()


@pytest.mark.parametrize(("read", "found"), [(_loose, "became"), (_deaf, "changes nothing")])
def test_what_is_taken_wrongly_is_found(built: Built, read: Callable[[Path], Any], found: str) -> None:
    def careless(built: Built) -> Any:
        try:
            return read(reader.file(built))
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError("no object") from error

    reader = next(reader for reader in READERS if reader.name == "provenance")
    judged = replace(reader, read=careless, judge=tree_judge(reader.file, careless, frozenset(), frozenset()))
    result = fuzz(judged, built, 60, 0)
    assert result.failures and any(found in line for line in result.failures)


@pytest.mark.parametrize("name", ["config.json llama", "run.yaml"])
def test_branches_are_counted(built: Built, name: str) -> None:
    reader = next(reader for reader in READERS if reader.name == name)
    few, more = (fuzz(reader, built, number, 0, branches=True).branches for number in (10, 60))
    assert 0 < few[0] < more[0] < more[1]
