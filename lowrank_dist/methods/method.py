"""The interface between engine and method, and the settings that a run passes to any method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.methods.files import TrainedFiles
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.sections.section import MethodName, MethodSection


class Method(Protocol):
    """One fine-tuning method, built from configuration and architecture before the model is loaded.

    virtual_positions: number of virtual positions in every sequence. virtual_token_ids: ids beyond the vocabulary, put
    before every sample, for trained input embeddings. published: files of a checkpoint that make up the adapter; empty
    where the checkpoint is a whole model. summary: one line on what is trained.
    """

    virtual_positions: int
    virtual_token_ids: tuple[int, ...]
    published: tuple[str, ...]

    @property
    def summary(self) -> str: ...

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        """Add the trained parameters to the frozen model and return them as Θ. Collective.

        Initial values are the same at every tensor-parallel size. resumed: a checkpoint will replace them.
        """
        ...

    def files(self, folder: Path, provenance: Provenance, *, trained: bool) -> TrainedFiles:
        """Return the writer of the trained weights into an existing folder.

        trained: a step has been taken, so weights that change nothing are an error.
        """
        ...


@dataclass(frozen=True)
class Setting:
    """The settings of a run that any method gets, in addition to its own section of the config.

    base: folder of the base model. seed: train.seed. max_length: data.max_length. fuse_factors: engine.lanes.
    """

    method: MethodName
    base: Path
    seed: int
    max_length: int
    fuse_factors: Literal["auto", "on", "off"]


class MethodBuilder(Protocol):
    """The functions that the module `method` of every method's folder has."""

    def build(self, section: MethodSection, setting: Setting, architecture: Architecture) -> Method:
        """Return the method for an architecture; the model need not be loaded.

        Raises UserError where virtual positions leave no room for a sample, and as each method documents.
        """
        ...

    def attach_trained(self, model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
        """Attach the trained weights in `folder` to the model, which was loaded from `base`, for decoding.

        Raises UserError for a folder that the reader refuses, for one trained on another base (by fingerprint, where it
        has one), and for modules or shapes that this model does not have.
        """
        ...
