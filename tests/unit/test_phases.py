"""Time by phase, throughput and a rank's own work, with a clock that the test moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lowrank_dist.backend import devices
from lowrank_dist.backend.devices import WAIT_TIMER
from lowrank_dist.backend.select import Backend
from lowrank_dist.engine import meter as meter_module
from lowrank_dist.engine.meter import Meter, Phases, Stragglers

CPU = Backend(torch.device("cpu"), "gloo", "cpu")


class Time:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    moved = Time()
    monkeypatch.setattr(devices, "time", moved)
    return moved


class RecordingWatchdog:
    """Records the calls that a watchdog would get."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []

    def enter(self, phase: str, step: int | None = None) -> None:
        self.phases.append((phase, step))


def test_seconds_of_phases_without_a_gap(time: Time) -> None:
    told = RecordingWatchdog()
    phases = Phases(told, CPU)
    for phase, seconds in (("data", 1), ("forward", 2), ("backward", 4), ("forward", 8), ("backward", 16)):
        phases.enter(phase, 7 if phase == "data" else None)
        time.now += seconds
    assert phases.take() == ({"data": 1, "forward": 10, "backward": 20}, 0)
    # The current phase continues after take().
    time.now += 32
    phases.enter("reduction")
    assert phases.take() == ({"backward": 32, "reduction": 0}, 0)
    assert told.phases[:2] == [("data", 7), ("forward", None)]


def test_waits_are_measured_while_asked_for(time: Time) -> None:
    phases = Phases(RecordingWatchdog(), CPU)

    def wait(seconds: float) -> None:
        with WAIT_TIMER.measure():
            time.now += seconds

    phases.enter("forward")
    wait(1)
    phases.measure_waits(True)
    try:
        wait(2)
        time.now += 4
        wait(8)
        assert phases.take() == ({"forward": 15}, 10)
    finally:
        phases.measure_waits(False)
    wait(16)
    assert phases.take() == ({"forward": 16}, 0)


def test_rates_and_own_work(time: Time) -> None:
    """Two ranks; the other one's own work comes from a replaced gather."""
    topology: Any = SimpleNamespace(world_group=SimpleNamespace(size=lambda: 2))
    phases = Phases(RecordingWatchdog(), CPU)
    # 7 FLOPs a token, 11 a target token, 13 per squared length; a device of 1000 FLOP/s.
    forecast: Any = SimpleNamespace(
        flops=lambda t, n, s: 7 * t + 11 * n + 13 * sum(length**2 * many for length, many in s.items()),
        peak=lambda: 1000.0,
    )
    meter = Meter(phases, Stragglers(1.5, ("h1", "h2")), forecast, topology, CPU)
    owns = []

    def everyone(own: float, *_: object) -> list[float]:
        owns.append(own)
        return [own, own]

    def step(recorded: bool) -> None:
        if recorded:
            meter.begin()
        for phase, seconds in (("data", 1), ("forward", 2), ("backward", 4), ("reduction", 8), ("optimiser", 16)):
            phases.enter(phase)
            if phase == "backward":
                with WAIT_TIMER.measure():
                    time.now += 3
                seconds -= 3
            time.now += seconds
        meter.count(SimpleNamespace(global_tokens=310, global_targets=31, lengths=np.array([5, 6, 1])))

    with mock.patch.object(meter_module, "gather_values", everyone):
        step(recorded=False)
        phases.enter("checkpoint")
        time.now += 100
        step(recorded=True)
        values, lines = meter.end(2)
        # Of the recorded step only: data 1, forward 2, backward 4, of which 3 were a wait.
        assert owns == [4] and lines == []
        assert values["tokens_per_second"] == 2 * 310 / (2 * 31)
        assert values["tokens_per_second_per_rank"] == 5
        flops = (7 * 310 + 11 * 31 + 13 * 62) / 31 / 2
        assert values["tflops_per_rank"] == pytest.approx(flops / 1e12)
        assert values["mfu_percent"] == pytest.approx(100 * flops / 1000)
        assert values["checkpoint_seconds"] == 100 and values["backward_seconds"] == 8
        step(recorded=True)
        assert meter.end(3)[0]["tokens_per_second"] == 10 and WAIT_TIMER.clock is None
