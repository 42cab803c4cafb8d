"""How far a run has come, what every evaluation so far found, and which of them was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowrank_dist.checkpoint.training_state import LOSS, TrainingState
from lowrank_dist.config import Config
from lowrank_dist.data.loader import StepBatch


@dataclass(frozen=True)
class Progress:
    """After `step` optimizer steps; the rest as in checkpoint.training_state.TrainingState."""

    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    loss: float = math.nan

    @classmethod
    def of(cls, state: TrainingState | None) -> Progress:
        """Where a checkpoint stands; the beginning without one."""
        if state is None:
            return cls()
        return cls(**{name: getattr(state, name) for name in cls.__dataclass_fields__})

    def after(self, batch: StepBatch, samples: int, loss: float) -> Progress:
        """One step of `samples` samples later."""
        return replace(
            self,
            step=self.step + 1,
            epoch=batch.epoch,
            samples=self.samples + samples,
            tokens=self.tokens + batch.global_tokens,
            target_tokens=self.target_tokens + batch.global_targets,
            loss=loss,
        )


def best_first(values: Mapping[int, float], name: str) -> list[int]:
    """The steps, best value first: the lowest eval loss (`LOSS`), the highest of a metric of generated texts.

    Of equals the earlier step, which has drifted less from the base for the same result.
    """
    sign = 1 if name == LOSS else -1
    return sorted(values, key=lambda step: (sign * values[step], step))


def label(name: str) -> str:
    """How a value is called in messages."""
    return "eval loss" if name == LOSS else name


class History:
    """Values of all evaluations of a run, those before it was resumed included. The same on every rank.

    best: the name of what decides, `LOSS` or one of generate.metrics.METRICS. values: name → step → value.
    """

    def __init__(self, best: str, resumed: TrainingState | None) -> None:
        self.best = best
        self.values: dict[str, dict[int, float]] = {LOSS: {}}
        if resumed is not None:
            self.values = {name: dict(values) for name, values in resumed.evaluations.items()}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Remember what an evaluation found."""
        for name, value in values.items():
            self.values.setdefault(name, {})[step] = value

    @property
    def best_step(self) -> int | None:
        """None before the first evaluation that measured what decides."""
        return next(iter(best_first(self._deciding, self.best)), None)

    @property
    def without_better(self) -> int:
        """Evaluations since the best one. They are counted anew each time, so a resumed run counts as if it had not
        stopped."""
        best = self.best_step
        return 0 if best is None else sum(step > best for step in self._deciding)

    def describe_best(self) -> str:
        """The best value and its step, where there is one."""
        return f"{label(self.best)} {self._deciding[self.best_step]:.4f} of step {self.best_step}"

    @property
    def _deciding(self) -> Mapping[int, float]:
        return self.values.get(self.best, {})


def notes_on_best(config: Config, state: TrainingState | None) -> list[str]:
    """What limits the choice of the best step, a line each. state: of the run that goes on, or None."""
    evaluation, save_every, lines = config.eval, config.output.save_every, []
    if config.data.eval is not None and evaluation.every is not None:
        both = None if save_every is None else math.lcm(evaluation.every, save_every)
        if both != evaluation.every:
            steps = "the last" if both is None else f"one of {both}, {2 * both}, … and the last"
            lines.append(
                f"checkpoints/best can only be a step that is both evaluated and saved, {steps}: eval.every is "
                f"{evaluation.every}, output.save_every {save_every or 'null'}"
            )
    if state is None:
        return lines
    if not state.evaluations.get(evaluation.best) and any(state.evaluations.values()):
        lines.append(
            f"eval.best is {label(evaluation.best)}, which was not measured up to step {state.step}: checkpoints/best "
            "and eval.patience begin with the next evaluation"
        )
    before, now = (state.config.get("eval") or {}).get("generate"), config.model_dump(mode="json")["eval"]["generate"]
    if before and now and any(before.get(key) != now[key] for key in ("max_new_tokens", "stop", "samples")):
        lines.append(
            f"eval.generate was {before} up to step {state.step}: what was measured until then counts on, though other "
            "texts were generated"
        )
    return lines
