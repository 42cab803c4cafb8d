"""The footprint of a prompt: one trained embedding for each of l virtual positions of the input. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.registry import Sizes
from lowrank_dist.planner.factors import placement_without_factors
from lowrank_dist.planner.job import Footprint, Job, Parameter, Parameters
from lowrank_dist.sections.section import MethodName


@dataclass(frozen=True)
class PromptFootprint(Footprint):
    """The footprint of embeddings [l, H], replicated. Virtual positions are tokens of a row like all others."""

    def label(self, job: Job) -> str:
        return "replicated"

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return l·H."""
        count = self.virtual_positions * architecture.hidden
        return Parameters(count, count)

    def on_rank(self, job: Job) -> Sequence[Parameter]:
        return [Parameter(self.virtual_positions * job.architecture.hidden, _after_the_cut(job))]

    def gathers_embedding_gradient(self, job: Job) -> bool:
        """Return True if the prompt is inserted before the tokens are sharded, so that its gradient is gathered."""
        return not _after_the_cut(job)

    def virtual_tokens_on_rank(self, job: Job, tp_rank: int) -> int:
        """Return how many of a rank's tokens are virtual. With sharded tokens the rank has a part of each row.

        A packed row is assumed to hold two samples.
        """
        cut, length = _after_the_cut(job), job.sequence_length
        samples = (0, length // 2) if job.packing else (0,)
        chunk = length // job.layout.tensor if cut else length
        first = tp_rank * chunk if cut else 0
        inside = (min(first + chunk, start + self.virtual_positions) - max(first, start) for start in samples)
        return job.layout.micro_batch * sum(max(0, count) for count in inside)


def footprint_of(method: MethodName, section: PromptConfig, architecture: Architecture) -> PromptFootprint:
    return PromptFootprint(method, placement_without_factors(architecture, None), section.length)


def footprints_of_size(
    method: MethodName, sizes: Sizes, architecture: Architecture, tensor: int
) -> list[PromptFootprint]:
    """Return the footprint of a prompt with `sizes.virtual_positions` positions."""
    return [PromptFootprint(method, placement_without_factors(architecture, None), sizes.virtual_positions)]


def _after_the_cut(job: Job) -> bool:
    """Return whether the tokens are sharded over the ranks before the prompt is inserted.

    Learned positions are added to whole rows, so with them the tokens are sharded afterwards.
    """
    return job.sequence_parallel and not job.architecture.position_rows
