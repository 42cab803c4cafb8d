"""Runs launch/train.py in this process, with random weights drawn on the device and one step under the profiler.

    python benchmarks/training_run.py CONFIG STEP FILE

benchmarks/training.py starts this program. The run is launch/train.py's own except for two things. The frozen weights
are drawn on the device instead of being read: reading 16 GB would take longer than the measured steps, and the base's
file holds only its header. Step STEP, counted from 1, runs under torch.profiler, whose figures go to FILE. GEMMs on
zeros run faster than on weights, so zeros would not do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timeline import Trace, record, start_profiler
from torch import Tensor

ROOT = Path(__file__).parents[1]
# The spread that the models' own configurations initialise with (initializer_range).
SPREAD = 0.02


@torch.no_grad()
def draw_weights(parameters: Mapping[str, Tensor], *_: Any, **__: Any) -> None:
    """Replace `load_weights`: matrices are normal and norm weights 1, as at an initialisation."""
    for parameter in parameters.values():
        if parameter.dim() > 1:
            parameter.normal_(0.0, SPREAD)
        else:
            parameter.fill_(1.0)


def traced(step: Callable[[Any, int], None], number: int, keep: Callable[[Trace], None]) -> Callable[[Any, int], None]:
    """Return `Trainer._step` with step `number` recorded."""

    def stepping(trainer: Any, done: int) -> None:
        if done + 1 != number:
            return step(trainer, done)
        start_profiler(trainer.run.backend.device)
        return keep(record(lambda: step(trainer, done), trainer.run.backend.device))

    return stepping


def main() -> int:
    config, number, file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    sys.path.insert(0, str(ROOT / "launch"))
    import train

    from lowrank_dist.backend.libraries import quiet_libraries

    quiet_libraries()  # as launch/train.py does before the same imports
    from lowrank_dist.engine.trainer import Trainer
    from lowrank_dist.model import load

    def keep(trace: Trace) -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(trace.figures()), encoding="utf-8")
        part.replace(file)

    load.load_weights = draw_weights
    Trainer._step = traced(Trainer._step, number, keep)
    return train.start([config])


if __name__ == "__main__":
    sys.exit(main())
