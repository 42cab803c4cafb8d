"""The generators of this process, for a checkpoint. Training draws from none of them: order, initial factors and
dropout are functions of seed, step and name. What a user's tokenizer or template draws goes on where it stopped.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, and of the GPU's where there is one, as JSON."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # a tuple, as restored below
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return states


def restore(states: dict[str, Any], device: torch.device) -> None:
    """Set what `capture` returned. Raises ValueError, TypeError or KeyError for anything else."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_bytes(states["torch"]))
    if device.type == "cuda" and "cuda" in states:  # saved on a CPU, there is none
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
