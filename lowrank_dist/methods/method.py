"""What the engine asks of a method."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.formats.trained_files import TrainedFiles
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology


class Method(Protocol):
    """One way to fine-tune, known from configuration and architecture before anything is loaded.

    virtual: positions that it takes from every sequence. lead: ids put before every sample, beyond the vocabulary, for
    trained input embeddings. published: files of a checkpoint that are what others load; none where the checkpoint
    itself is a model. summary: one line on what is trained.
    """

    virtual: int
    lead: tuple[int, ...]
    published: tuple[str, ...]

    @property
    def summary(self) -> str: ...

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        """Give the frozen model what is trained, initialised alike at every tensor-parallel size.

        resumed: the values will come from a checkpoint. Collective.
        """
        ...

    def files(self, folder: Path, provenance: Provenance) -> TrainedFiles:
        """Writes what was trained into a folder that exists."""
        ...
