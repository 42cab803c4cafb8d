"""Evaluation during training: loss, metrics of generated texts, and the choice of the best evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.checkpoint.training_state import LOSS, DataState, TrainingState
from lowrank_dist.config import Config
from lowrank_dist.data.batches import StepBatch
from lowrank_dist.engine.datasets import Data
from lowrank_dist.engine.reporter import Reporter
from lowrank_dist.engine.run import Run
from lowrank_dist.engine.zero import Engine
from lowrank_dist.errors import UserError
from lowrank_dist.generate.metrics import DEFINITION, METRICS
from lowrank_dist.terminal import ProgressLines

# End of the error for a number that is not finite: consequence and remedy.
STOPS = "training stops on every rank. Lower train.lr, add train.warmup_steps, or look at the samples of this step"


def best_first(values: Mapping[int, float], name: str) -> list[int]:
    """Return the steps, best value first: lowest for the eval loss (`LOSS`), highest for a metric of generated texts.

    Among equals the earlier step comes first: it has drifted less from the base for the same result.
    """
    sign = 1 if name == LOSS else -1
    return sorted(values, key=lambda step: (sign * values[step], step))


def label(name: str) -> str:
    """Return the name of a value in messages."""
    return "eval loss" if name == LOSS else name


class History:
    """Values of all evaluations of a run, including those before it was resumed. The same on every rank.

    best: name of the value that decides, `LOSS` or one of generate.metrics.METRICS. values: name → step → value.
    outdated: names whose values from before the resume are left out (`outdated_values`).
    """

    def __init__(self, best: str, resumed: TrainingState | None, outdated: Collection[str] = ()) -> None:
        self.best = best
        self.values: dict[str, dict[int, float]] = {LOSS: {}}
        if resumed is not None:
            self.values |= {name: dict(values) for name, values in resumed.evaluations.items() if name not in outdated}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Store the values of one evaluation."""
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation; None before the first one that measured the deciding value."""
        return next(iter(best_first(self._deciding, self.best)), None)

    @property
    def without_better(self) -> int:
        """The number of evaluations since the best one. Computed from the values, so resuming does not change it."""
        best = self.best_step
        return 0 if best is None else sum(step > best for step in self._deciding)

    def describe_best(self) -> str:
        """Return the best value and its step as text. There must be a `best_step`."""
        step = self.best_step
        assert step is not None
        return f"{label(self.best)} {self._deciding[step]:.4f} of step {step}"

    @property
    def _deciding(self) -> Mapping[int, float]:
        return self.values.get(self.best, {})


class Evaluator:
    """Evaluates on the eval set, if there is one, and stores the values of every evaluation in `history`."""

    def __init__(self, run: Run, engine: Engine, data: Data, reporter: Reporter) -> None:
        self._run, self._engine, self._data, self._reporter = run, engine, data, reporter
        outdated = outdated_values(run.config, run.state, data.held_out_state)
        self.history = History(run.config.eval.best, run.state, outdated)

    def evaluate(self, step: int) -> None:
        """Report the mean loss over the eval set's target tokens and the metrics of generated texts. Collective.

        Raises UserError, on every rank, for a loss that is not finite.
        """
        batches, phases, held_out = self._data.evaluation, self._run.phases, self._data.held_out
        if batches is None or held_out is None:
            return
        phases.enter("evaluation")
        self._engine.model.eval()
        task = f"evaluation at step {step}"
        lines = ProgressLines(task, "samples", tell=self._reporter.say)
        found = {LOSS: self._mean_loss(batches(), lambda done: lines(done, len(held_out)))}
        # Every rank holds the same value, so every rank stops at the same step.
        if not math.isfinite(found[LOSS]):
            raise UserError(f"step {step}: the eval loss is {found[LOSS]}; {STOPS}")
        if self._data.generation is not None:
            phases.enter("evaluation")
            texts = ProgressLines(task, "generated texts", tell=self._reporter.say)

            def generated(done: int, total: int) -> None:
                phases.enter("evaluation")
                texts(done, total)

            found |= self._data.generation(self._engine.model, generated)
        self._reporter.record(step, {f"eval_{name}": value for name, value in found.items()})
        self.history.add(step, {name: value for name, value in found.items() if name in (LOSS, *METRICS)})

    def probe(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return the token ids of a few rows, of the eval set if there is one, and the trained model's logits on them.

        Adapter and merged model can be compared with these logits. Each row is run as one sample, packed or not,
        because a comparison has only the tokens and not the borders of samples.
        """
        self._engine.model.eval()
        return self._engine.logits(self._data.first_batch().microbatches[0].input_ids[:rows])

    @torch.no_grad()
    def _mean_loss(self, batches: Iterable[StepBatch], progress: Callable[[int], None]) -> float:
        """Return the mean loss over target tokens. progress: called with the samples done after each microbatch."""
        total = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        before = 0
        for batch in batches:
            for number, microbatch in enumerate(batch.microbatches, 1):
                self._run.phases.enter("evaluation")
                total[0] += self._engine.loss(microbatch)
                total[1] += microbatch.target_ids.numel()
                progress(before + batch.samples * number // len(batch.microbatches))
            before += batch.samples
        topology = self._run.topology
        dist.all_reduce(total, group=topology.dp_group)
        # Broadcast, since tensor-parallel ranks may round differently and all must stop early at the same step.
        dist.broadcast(total, group=topology.world_group, group_src=0)
        return (total[0] / total[1]).item()


def outdated_values(config: Config, state: TrainingState | None, held_out: DataState | None) -> dict[str, str]:
    """Return name → how it was measured, for the values in `state` that cannot be compared with those of this run.

    held_out: the eval set of this run, which resumes from `state`.
    """
    if state is None:
        return {}
    measured = [name for name, values in state.evaluations.items() if values]
    if state.held_out is not None and held_out is not None and state.held_out.sha256 != held_out.sha256:
        return dict.fromkeys(measured, f"on the former data.eval {state.held_out.path}")
    generated = [name for name in measured if name != LOSS]
    before, now = (state.config.get("eval") or {}).get("generate"), config.model_dump(mode="json")["eval"]["generate"]
    if before and now and any(before.get(key) != now[key] for key in ("max_new_tokens", "stop", "samples")):
        return dict.fromkeys(generated, f"with eval.generate {before}")
    if state.metric_definition != DEFINITION:
        return dict.fromkeys(generated, "by an earlier version of lowrank_dist, which counted differently")
    return {}
