"""The plan's memory against a training step's: peak anonymous memory of fresh ranks on a CPU.

Pages of mapped files do not count. The baseline is a rank that has trained a model of almost no size. malloc returns
freed memory to the system (MALLOC_MMAP_THRESHOLD_); otherwise the peak would include what it keeps.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.config import Config
from lowrank_dist.engine.planning import Request, job_of, read_request
from lowrank_dist.planner.job import Layout
from lowrank_dist.planner.memory import Memory, memory
from tests.dist.ranks import World

INTERVAL = 0.003
ROWS, LENGTH, RANK = 4, 258, 8
NEW = 2  # tokens after each prompt; cache memory for further ones is not resident before it is written
TOLERANCE = 0.10


@dataclass(frozen=True)
class Case:
    tensor: int
    recompute: bool
    microbatches: int = 2
    method: str = "lora"
    dora: bool = False
    decoded: int = 0  # prompts that an evaluation after the step decodes together
    length: int = LENGTH


def resident(pid: int | str = "self") -> int:
    """Return the current anonymous resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def ready(folder: str, case: Case) -> int:
    """On one rank: import and run everything once, with a tiny model. Returns the baseline."""
    step(folder, case)
    gc.collect()
    return resident()


def built(folder: str, case: Case) -> tuple[Any, Any, Any]:
    """Inside a rank: return the model with Θ attached, Θ, and its optimiser; libraries are set as in every program."""
    import torch

    from lowrank_dist.backend.libraries import quiet_libraries
    from lowrank_dist.engine.run_method import build_method
    from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
    from lowrank_dist.model.load import check_model, load_model
    from tests.dist import ranks

    quiet_libraries()
    topology = ranks.topology(case.tensor, True)
    model = load_model(
        Path(folder),
        check_model(Path(folder), topology.tp_size, LENGTH),
        topology,
        device=torch.device("cpu"),
        dtype="auto",
        vocab_multiple=128,
        broadcast=False,
    )
    model.set_recompute(case.recompute)
    theta = build_method(config(folder, case), model.architecture).attach(model, topology, resumed=False)
    rules = OptimiserRules(1, 1.0, None, 0.0, (0.9, 0.999), 1e-8)
    return model, theta, ZeroOptimiser(theta.parameters, topology, rules)


def step(folder: str, case: Case) -> int:
    """On one rank: load, attach, run two microbatches, an update and an evaluation's prompts, as the trainer does.

    Returns the target tokens.
    """
    import torch

    model, theta, optimiser = built(folder, case)
    generator = torch.Generator().manual_seed(1)
    # Sequence-major: every position but a row's last is a target.
    chosen = torch.arange(ROWS * (LENGTH - 1))
    for index in range(case.microbatches):
        ids = torch.randint(5, 1000, (ROWS, LENGTH), generator=generator)
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
        targets = ids[:, 1:].t().flatten()
        optimiser.accumulate(
            partial(model.loss, ids, positions, chosen, targets),
            1 / targets.numel(),
            index + 1 == case.microbatches,
        )
    optimiser.step(1e-3)
    theta.refresh()
    if case.decoded:
        with model.without_sequence_parallelism():
            cache = model.new_cache(torch.zeros(case.decoded, dtype=torch.int64), LENGTH + NEW - 1)
            model.decode(torch.randint(5, 1000, (case.decoded, LENGTH), generator=generator), cache)
    return targets.numel()


@contextmanager
def malloc_gives_back() -> Iterator[None]:
    wanted = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def sampled(world: World, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    """Call a function on every rank. Returns its results, and the peak anonymous bytes of each rank during the call."""
    found, done = [0 for _ in world.processes], threading.Event()

    def sample() -> None:
        while not done.is_set():
            found[:] = [max(peak, resident(p.pid)) for peak, p in zip(found, world.processes, strict=True)]
            time.sleep(INTERVAL)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        return world.run(function, arguments, seconds=900), found
    finally:
        done.set()
        sampler.join()


def peaks(folder: str, tiny: str, case: Case) -> list[int]:
    """Return the peak anonymous bytes of every rank, above the baseline that a step of a `tiny` model leaves."""
    with malloc_gives_back():
        world = World(case.tensor, fresh=True)
    try:
        baselines = world.run(ready, (tiny, case))
        targets, found = sampled(world, step, (folder, case))
        assert set(targets) == {ROWS * (LENGTH - 1)}
        return [peak - baseline for peak, baseline in zip(found, baselines, strict=True)]
    finally:
        world.close()


def config(folder: str, case: Case) -> Config:
    return request(folder, case).config


def request(folder: str, case: Case) -> Request:
    own = {
        "lora": [f"lora.rank={RANK}", f"lora.dora={str(case.dora).lower()}"],
        "adapter_h": ["adapter.bottleneck=48"],
    }.get(case.method, [])
    if case.decoded:
        own += ["data.eval=none", f"eval.generate={{batch: {case.decoded}, max_new_tokens: {NEW}}}"]
    found = read_request(
        folder,
        [
            f"method={case.method}",
            *own,
            f"data.max_length={case.length}",
            f"train.global_batch={ROWS * case.microbatches}",
            f"train.micro_batch={ROWS}",
            "model.device=cpu",
        ],
    )
    model = found.config.model.model_copy(update={"path": Path(folder)})
    return replace(found, config=found.config.model_copy(update={"model": model}))


def planned(folder: str, case: Case) -> Memory:
    layout = Layout(case.tensor, 1, case.tensor > 1, ROWS, case.recompute)
    return memory(replace(job_of(request(folder, case), 1.0), layout=layout), 0)


def write_smollm2(folder: Path, **changes: Any) -> str:
    """SmolLM2-135M's shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**keys | changes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    changes = {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 3, "vocab_size": 1000}
    return write_smollm2(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A third of SmolLM2's depth, which exercises the same formulas."""
    return write_smollm2(tmp_path_factory.mktemp("smollm2"), num_hidden_layers=10)


def test_measured_peak(folder: str, tiny: str) -> None:
    """The other cases: tests/long."""
    compare(folder, tiny, Case(1, recompute=True))


def test_measured_peak_of_dora(folder: str, tiny: str) -> None:
    """Without the tensors saved at every linear the plan would be off."""
    case = Case(1, recompute=False, dora=True)
    lora = planned(folder, replace(case, dora=False)).parts["activations"]
    expected = planned(folder, case)
    assert expected.parts["activations"] - lora > TOLERANCE / (1 - TOLERANCE) * expected.total
    compare(folder, tiny, case)


def compare(folder: str, tiny: str, case: Case) -> None:
    """Hold the plan to within 10 % of every rank's peak. Controls: it fails without its largest item, or with it twice.

    The largest item is mostly Φ; in full fine-tuning it is Adam's state. It is more than twice the tolerance, so the
    controls hold wherever the peak lies within the tolerance.
    """
    expected = planned(folder, case)
    control = max(expected.parts.values())
    assert control > 2 * TOLERANCE / (1 - TOLERANCE) * expected.total
    for found in peaks(folder, tiny, case):
        assert abs(expected.total / found - 1) < TOLERANCE, (expected, found)
        assert abs((expected.total - control) / found - 1) > TOLERANCE
        assert abs((expected.total + control) / found - 1) > TOLERANCE
