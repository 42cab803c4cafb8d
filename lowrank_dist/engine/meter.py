"""Time by phase, throughput, and the rank that the others wait for."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Protocol

from lowrank_dist.backend.devices import WAITS, Clock, Mark
from lowrank_dist.backend.select import Backend
from lowrank_dist.data.batches import StepBatch
from lowrank_dist.engine.forecast import Forecast
from lowrank_dist.parallel.collectives import every_value
from lowrank_dist.parallel.topology import Topology

# A rank is slow when it was over this many records; one slow step is the machine's affair.
WINDOW = 3
# Of a step; evaluation and checkpoints are no part of the throughput.
STEP_PHASES = ("data", "forward", "backward", "reduction", "optimiser")
# What a rank does by itself, but for what it waits for its tensor-parallel peers meanwhile.
OWN_PHASES = ("data", "forward", "backward")


class Watcher(Protocol):
    """Is told where the rank is (supervision.rank.Supervision)."""

    def enter(self, phase: str, step: int | None = None) -> None: ...


class Phases:
    """The phases of the training loop, one after the other without a gap (supervision.status.TRAINING)."""

    def __init__(self, watcher: Watcher, backend: Backend) -> None:
        self._watcher, self._clock = watcher, Clock(backend.device)
        self._marks: list[tuple[str, Mark]] = []

    def enter(self, phase: str, step: int | None = None) -> None:
        """Leave the phase before. step: the one that begins, counted from 1."""
        self._watcher.enter(phase, step)
        self._marks.append((phase, self._clock.mark()))

    def measure_waits(self, measure: bool) -> None:
        """From now on measure the time spent waiting for tensor-parallel peers, or no longer."""
        WAITS.clock = self._clock if measure else None

    def take(self) -> tuple[defaultdict[str, float], float]:
        """Return the seconds in each phase since the last call, and how many of them were measured to be waits.

        The device must have nothing left to do (`Backend.synchronize`).
        """
        if self._marks:
            self._marks.append((self._marks[-1][0], self._clock.mark()))
        seconds: defaultdict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in pairwise(self._marks):
            seconds[phase] += self._clock.seconds(begin, end)
        self._marks = self._marks[-1:]
        return seconds, WAITS.take()


class Stragglers:
    """Compares what every rank needed for its own work, without what it waited for others."""

    def __init__(self, factor: float, hosts: Sequence[str]) -> None:
        """factor: over the median of all ranks."""
        self._factor, self._hosts = factor, hosts
        self._recent: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named: set[int] = set()

    def observe(self, step: int, seconds: Sequence[float]) -> list[str]:
        """Own seconds of every rank for one record. Returns a line for each new straggler, and each that caught up."""
        self._recent.append(seconds)
        if len(self._recent) < WINDOW:
            return []
        usual = [median(values) for values in zip(*self._recent, strict=True)]
        middle = median(usual)
        slow = {rank for rank, own in enumerate(usual) if own > self._factor * middle}
        lines = [
            f"step {step}: rank {rank} on {self._hosts[rank]} is a straggler: {usual[rank]:.3f} s of its own work "
            f"where the median rank needs {middle:.3f} s; all others wait for it"
            for rank in sorted(slow - self._named)
        ]
        caught_up = sorted(self._named - slow)
        lines += [f"step {step}: rank {rank} on {self._hosts[rank]} has caught up" for rank in caught_up]
        self._named = slow
        return lines


class Meter:
    """Between `begin` and `end` lies one step that is recorded; `count` is told of every step."""

    def __init__(
        self,
        phases: Phases,
        stragglers: Stragglers | None,
        forecast: Forecast,
        topology: Topology,
        backend: Backend,
    ) -> None:
        self._phases, self._stragglers, self._forecast = phases, stragglers, forecast
        self._topology, self._backend = topology, backend
        self._peak = forecast.peak()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens = self._targets = self._squares = 0

    def begin(self) -> None:
        """Begin a step that will be recorded."""
        self._settle(measure_waits=self._stragglers is not None)

    def count(self, batch: StepBatch) -> None:
        """Count a step that is done."""
        self._tokens += batch.global_tokens
        self._targets += batch.global_targets
        self._squares += batch.global_squares

    def end(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return rates and seconds since the last record, and lines to say of stragglers. Collective."""
        seconds, waited = self._settle(measure_waits=False)
        lines = []
        if self._stragglers is not None:
            own = sum(seconds[phase] for phase in OWN_PHASES) - waited
            everyone = every_value(own, self._topology.world_group, self._backend.device)
            lines = self._stragglers.observe(step, everyone)
        busy = sum(self._seconds[phase] for phase in STEP_PHASES)
        ranks = self._topology.world_group.size()
        flops = self._forecast.flops(self._tokens, self._targets, self._squares) / busy / ranks
        values = {
            "tokens_per_second": self._tokens / busy,
            "tokens_per_second_per_rank": self._tokens / busy / ranks,
            "tflops_per_rank": flops / 1e12,
            **({} if self._peak is None else {"mfu_percent": 100 * flops / self._peak}),
            "memory_gib": self._backend.peak_memory_gib(),
            **{f"{phase}_seconds": round(total, 6) for phase, total in sorted(self._seconds.items())},
        }
        self._seconds.clear()
        self._tokens = self._targets = self._squares = 0
        return values, lines

    def summary(self) -> str:
        """Return a line on the whole run: memory needed beside memory planned. Collective."""
        peaks = every_value(self._backend.peak_memory_gib(), self._topology.world_group, self._backend.device)
        return self._forecast.compare(max(peaks))

    def _settle(self, *, measure_waits: bool) -> tuple[defaultdict[str, float], float]:
        """Return the seconds since the last call, which are also added up."""
        self._backend.synchronize()
        seconds, waited = self._phases.take()
        self._phases.measure_waits(measure_waits)
        for phase, value in seconds.items():
            self._seconds[phase] += value
        return seconds, waited
