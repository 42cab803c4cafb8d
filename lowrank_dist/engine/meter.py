"""Seconds by phase, throughput, and stragglers: ranks that the others wait for."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Protocol

from lowrank_dist.backend.devices import WAIT_TIMER, Clock, Mark
from lowrank_dist.backend.select import Backend
from lowrank_dist.data.batches import StepBatch
from lowrank_dist.engine.forecast import Forecast
from lowrank_dist.parallel.collectives import gather_values
from lowrank_dist.parallel.topology import Topology

# Records whose median decides that a rank is slow; a single slow step is not reported.
WINDOW = 3
# The phases of a step. Throughput does not count evaluation and checkpoints.
STEP_PHASES = ("data", "forward", "backward", "reduction", "optimiser")
# The phases of a rank's own work; its waits for tensor-parallel peers in them are subtracted.
OWN_PHASES = ("data", "forward", "backward")


class Watcher(Protocol):
    """Receives the phase and step that the rank is in (supervision.rank.Supervision)."""

    def enter(self, phase: str, step: int | None = None) -> None: ...


class Phases:
    """Times the phases of the training loop (supervision.status.TRAINING), which follow each other without a gap."""

    def __init__(self, watcher: Watcher, backend: Backend) -> None:
        self._watcher, self._clock = watcher, Clock(backend.device)
        self._marks: list[tuple[str, Mark]] = []

    def enter(self, phase: str, step: int | None = None) -> None:
        """End the phase before and begin `phase`. step: the step that begins, counted from 1."""
        self._watcher.enter(phase, step)
        self._marks.append((phase, self._clock.mark()))

    def measure_waits(self, measure: bool) -> None:
        """Start or stop measuring the time spent waiting for tensor-parallel peers."""
        WAIT_TIMER.clock = self._clock if measure else None

    def take(self) -> tuple[defaultdict[str, float], float]:
        """Return the seconds in each phase since the last call, and how many of all these seconds were waits.

        The device must have nothing left to do (`Backend.synchronize`).
        """
        if self._marks:
            self._marks.append((self._marks[-1][0], self._clock.mark()))
        seconds: defaultdict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in pairwise(self._marks):
            seconds[phase] += self._clock.seconds(begin, end)
        self._marks = self._marks[-1:]
        return seconds, WAIT_TIMER.take()


class Stragglers:
    """Compares the seconds that every rank needed for its own work, without its waits for others."""

    def __init__(self, factor: float, hosts: Sequence[str]) -> None:
        """factor: a rank that needs more than this times the median of all ranks is a straggler."""
        self._factor, self._hosts = factor, hosts
        self._recent: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named: set[int] = set()

    def observe(self, step: int, seconds: Sequence[float]) -> list[str]:
        """Add a record and return a line for each new straggler and each that caught up.

        seconds: of every rank's own work.
        """
        self._recent.append(seconds)
        if len(self._recent) < WINDOW:
            return []
        usual = [median(values) for values in zip(*self._recent, strict=True)]
        middle = median(usual)
        slow = {rank for rank, own in enumerate(usual) if own > self._factor * middle}
        lines = [
            f"step {step}: rank {rank} on {self._hosts[rank]} is a straggler: its own work takes {usual[rank]:.3f} s "
            f"a step and the median rank's {middle:.3f} s, so all others wait for it"
            for rank in sorted(slow - self._named)
        ]
        caught_up = sorted(self._named - slow)
        lines += [f"step {step}: rank {rank} on {self._hosts[rank]} has caught up" for rank in caught_up]
        self._named = slow
        return lines


class Meter:
    """Measures throughput: `begin` and `end` enclose a step that is recorded; `count` is called for every step."""

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
        self._tokens = self._targets = 0
        self._lengths: Counter[int] = Counter()

    def begin(self) -> None:
        """Begin a step that will be recorded."""
        self._settle(measure_waits=self._stragglers is not None)

    def count(self, batch: StepBatch) -> None:
        """Count the tokens of a finished step."""
        self._tokens += batch.global_tokens
        self._targets += batch.global_targets
        self._lengths.update(batch.lengths.tolist())

    def end(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Return rates and seconds since the last record, and lines on stragglers. Collective."""
        seconds, waited = self._settle(measure_waits=False)
        lines = []
        if self._stragglers is not None:
            own = sum(seconds[phase] for phase in OWN_PHASES) - waited
            everyone = gather_values(own, self._topology.world_group, self._backend.device)
            lines = self._stragglers.observe(step, everyone)
        busy = sum(self._seconds[phase] for phase in STEP_PHASES)
        ranks = self._topology.world_group.size()
        flops = self._forecast.flops(self._tokens, self._targets, self._lengths) / busy / ranks
        values = {
            "tokens_per_second": self._tokens / busy,
            "tokens_per_second_per_rank": self._tokens / busy / ranks,
            "tflops_per_rank": flops / 1e12,
            **({} if self._peak is None else {"mfu_percent": 100 * flops / self._peak}),
            "memory_gib": self._backend.peak_memory_gib(),
            **{f"{phase}_seconds": round(total, 6) for phase, total in sorted(self._seconds.items())},
        }
        self._seconds.clear()
        self._tokens = self._targets = 0
        self._lengths.clear()
        return values, lines

    def summary(self) -> str:
        """Return a line on the whole run: peak memory of the fullest rank beside the planned. Collective."""
        peaks = gather_values(self._backend.peak_memory_gib(), self._topology.world_group, self._backend.device)
        return self._forecast.compare(max(peaks))

    def _settle(self, *, measure_waits: bool) -> tuple[defaultdict[str, float], float]:
        """Return the seconds in each phase and those of waits since the last call; add the phases to the record."""
        self._backend.synchronize()
        seconds, waited = self._phases.take()
        self._phases.measure_waits(measure_waits)
        for phase, value in seconds.items():
            self._seconds[phase] += value
        return seconds, waited
