"""Every reader of user-supplied files, against all mutations; prints the table of `python -m tests.fuzz`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.driver import fuzz, table
from tests.fuzz.readers import READERS, build


def test_all_mutations_of_every_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = build(tmp_path)
    results = [fuzz(reader, built, 500, 100, branches=True) for reader in READERS]
    with capsys.disabled():
        print(f"\n{table(results)}")
    assert [f"{each.name}: {line}" for each in results for line in each.failures] == []
    assert all(each.structured >= 500 for each in results) and sum(each.inputs for each in results) >= 10_000
