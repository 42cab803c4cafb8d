"""The section `prompt` of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lowrank_dist.sections.section import MethodSection


class PromptConfig(MethodSection):
    """A prompt: trained embeddings at virtual positions before every sample."""

    shaping = frozenset({"length"})

    length: int = Field(16, ge=1, le=65536, description="number of virtual positions, an integer of at least 1")
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="vocabulary (the embeddings of tokens drawn by train.seed) or random"
    )

    @property
    def virtual_positions(self) -> int:
        return self.length
