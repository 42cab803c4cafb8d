"""One tokenised training sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """tokens [n] int32; target [n] bool, False at position 0 (nothing predicts it); `line` of the file, from 1."""

    tokens: np.ndarray
    target: np.ndarray
    line: int
