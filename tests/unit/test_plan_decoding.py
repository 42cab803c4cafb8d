"""The plan's memory of an evaluation that generates, against the project's decoding on fake tensors."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_dist.backend.libraries import quiet_libraries
from lowrank_dist.engine.dry_run import _build, _fake_ranks, _KnownPositions, _Live
from lowrank_dist.engine.planning import job_of, read_request
from lowrank_dist.planner.job import Job, Layout
from lowrank_dist.planner.memory import ACCURACY, moments

pytestmark = pytest.mark.slow

BATCH, NEW = 64, 5
Case = tuple[str, int, str, tuple[str, ...]]  # shape, tensor-parallel size, method, overrides
CASES: list[Case] = [  # the other cases: tests/long
    ("llama-3-8b", 2, "lora", ("model.dtype=bf16",)),
    ("gpt2-medium", 4, "adapter_l", ()),
    ("llama-3-8b", 1, "full", ("model.dtype=bf16", "data.max_length=65")),
]


def planned(shape: str, tensor: int, method: str, overrides: tuple[str, ...]) -> tuple[Job, tuple[int, int]]:
    """Return the job, and the executed bytes of keys and values and of decoding's peak, both beside the model."""
    generate = f"eval.generate={{batch: {BATCH}, max_new_tokens: {NEW}}}"
    fixed = ["data.max_length=257", "data.eval=none", generate, "model.device=cpu", "model.dtype=fp32"]
    request = read_request(shape, [f"method={method}", *fixed, *overrides])
    job = replace(job_of(request, 1.0), layout=Layout(tensor, 1, tensor > 1, 1, False))
    quiet_libraries()
    with (
        _fake_ranks(job, 0) as topology,
        FakeTensorMode(allow_non_fake_inputs=True),
        _Live() as live,
        _KnownPositions(job, 0),
        # The rows are taken to have no padding: a fake tensor has no values.
        mock.patch.object(torch.Tensor, "__bool__", lambda tensor: False),
    ):
        model, *_ = _build(job, request.config, topology)
        ids = torch.zeros(BATCH, job.row, dtype=torch.int64)
        model.eval()
        with model.without_sequence_parallelism():
            built = live.now
            columns = len(model.virtual_token_ids) + job.length - job.footprint.virtual_positions + NEW - 1
            cache = model.new_cache(torch.zeros(BATCH, dtype=torch.int64), columns)
            kept, live.peak = live.now - built, live.now
            model.decode(ids, cache)
    return job, (kept, live.peak - built)


@pytest.mark.parametrize("case", CASES)
def test_prompts_of_an_evaluation(case: Case) -> None:
    compare(case)


def compare(case: Case) -> None:
    job, (kept, peak) = planned(*case)
    moment = moments(job, 0)[-1]
    assert moment.name == "prompts of an evaluation"
    keys, working = moment.parts["keys and values"], moment.parts["working memory"]
    assert keys == pytest.approx(kept, rel=1e-3)  # each row also has a few numbers of its own
    assert abs((keys + working) / peak - 1) < ACCURACY
    # The control: neither part is negligible.
    assert keys / peak < 1 - ACCURACY and working / peak < 1 - ACCURACY
