"""docs/SCALE.md is up to date with its command, and its figures on other implementations follow from their counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import scale  # noqa: E402

from lowrank_dist.planner.job import Layout  # noqa: E402
from lowrank_dist.planner.layouts import Candidate  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def document() -> str:
    return scale.document()


def test_the_document_is_what_the_command_writes(document: str) -> None:
    assert scale.OUT.read_text(encoding="utf-8") == document, "run `python benchmarks/scale.py`"


def test_every_model_on_every_number_of_nodes(document: str) -> None:
    for model in scale.MODELS:
        section = document.split(f"## {model}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()]
        assert [int(row.split("|")[1]) for row in rows] == list(scale.NODES)
    assert "modelled" in document and "published counts" in document


def test_added_calls_cost_latency_and_bytes() -> None:
    """No added call costs nothing, a wide message costs more than a thin one, and more across nodes than inside."""
    job = scale.job_for("llama-3-70b")
    inside = Candidate(replace(job, layout=Layout(8, 1, True, 1, True)), scale.cluster_of(1))
    across = Candidate(replace(job, layout=Layout(16, 1, True, 1, True)), scale.cluster_of(2))
    none = scale.with_added_calls(inside, 0)
    assert none.thin == none.wide == none.ours
    few, many = scale.with_added_calls(inside, 4), scale.with_added_calls(inside, 10)
    assert few.ours < few.thin < few.wide and many.thin - many.ours == pytest.approx(2.5 * (few.thin - few.ours))
    far = scale.with_added_calls(across, 4)
    assert far.thin - far.ours > few.thin - few.ours
