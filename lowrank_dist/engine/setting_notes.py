"""Lines at the start of a run on settings that have no effect or an unexpected one."""

from __future__ import annotations

import math

from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.config import Config
from lowrank_dist.engine.evaluator import label, outdated_values


def notes_on_settings(config: Config, steps: int) -> list[str]:
    """Return a line for each setting of warmup, checkpoints or evaluations without its usual effect in this run.

    steps: optimizer steps of the whole run.
    """
    return [*_on_warmup(config, steps), *_on_checkpoints(config, steps), *_on_evaluations(config, steps)]


def _on_warmup(config: Config, steps: int) -> list[str]:
    train = config.train
    if not train.warmup_steps or train.warmup_steps < steps:
        return []
    reached = train.lr * steps / train.warmup_steps
    return [
        f"train.warmup_steps is {train.warmup_steps}, but the run has {steps} steps, so the learning rate rises "
        f"until the end and reaches {reached:.3g}"
    ]


def _on_checkpoints(config: Config, steps: int) -> list[str]:
    every = config.output.save_every
    if every is not None and every < steps:
        return []
    return [
        f"output.save_every is {_beyond(every, steps)}: the only checkpoint is that of the last step, so a run that "
        "is killed has to start from the beginning"
    ]


def _on_evaluations(config: Config, steps: int) -> list[str]:
    evaluation = config.eval
    every, patience = evaluation.every, evaluation.patience
    if config.data.eval is None:
        return [] if every is None else [f"eval.every is {every}, but data.eval is null, so nothing is evaluated"]
    lines = []
    if every is None or every >= steps:
        start = "before the first step and " if evaluation.at_start else ""
        lines.append(f"eval.every is {_beyond(every, steps)}: data.eval is evaluated only {start}after the last step")
    if every is not None and patience is not None:
        # The first of them can only be the best so far, and the last step ends the run anyway.
        before_last = (steps - 1) // every + evaluation.at_start
        if before_last <= patience:
            count = f"only {before_last} evaluation{'s come' if before_last != 1 else ' comes'} before the last step"
            lines.append(f"eval.patience is {patience} and has no effect: {count}")
    return lines


def _beyond(every: int | None, steps: int) -> str:
    return "null" if every is None else f"{every} and the run has {steps} steps"


def notes_on_best(config: Config, state: TrainingState | None, held_out: DataState | None) -> list[str]:
    """Return a line for each thing that limits the choice of the best step.

    state: that the run resumes from, or None. held_out: the eval set.
    """
    evaluation, save_every, lines = config.eval, config.output.save_every, []
    if config.data.eval is not None and evaluation.every is not None:
        both = None if save_every is None else math.lcm(evaluation.every, save_every)
        if both != evaluation.every:
            steps = "the last" if both is None else f"one of {both}, {2 * both}, … and the last"
            lines.append(
                f"checkpoints/best can only be a step that is both evaluated and saved, {steps}, since eval.every is "
                f"{evaluation.every} and output.save_every is {save_every or 'null'}"
            )
    if state is None:
        return lines
    if not state.evaluations.get(evaluation.best) and any(state.evaluations.values()):
        lines.append(
            f"eval.best is {label(evaluation.best)}, which was not measured up to step {state.step}; "
            "checkpoints/best and eval.patience start from the next evaluation"
        )
    outdated = outdated_values(config, state, held_out)
    for reason in dict.fromkeys(outdated.values()):
        names = [label(name) for name in outdated if outdated[name] == reason]
        begin = "; checkpoints/best and eval.patience start from the next evaluation"
        lines.append(
            f"{', '.join(names)} up to step {state.step} no longer count, since they were measured "
            f"{reason}{begin if evaluation.best in outdated else ''}"
        )
    return lines
