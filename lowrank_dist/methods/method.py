"""The method as the engine asks for it, and the setting that a run gives to it."""

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

    def files(self, folder: Path, provenance: Provenance, *, trained: bool) -> TrainedFiles:
        """Writes what was trained into a folder that exists.

        trained: a step has changed Θ, so that values that change nothing are an error.
        """
        ...


@dataclass(frozen=True)
class Setting:
    """The setting that a run gives to any method, beside the method's own section of its config.

    base: folder of the base model. seed: train.seed. max_length: data.max_length. lanes: engine.lanes.
    """

    method: MethodName
    base: Path
    seed: int
    max_length: int
    lanes: Literal["auto", "on", "off"]


class Tuner(Protocol):
    """The functions of the module `method` of every home."""

    def build(self, section: MethodSection, setting: Setting, architecture: Architecture) -> Method:
        """Return the method for a model, which need not be loaded.

        Raises UserError where it leaves no room for a sample, and as each method does.
        """
        ...

    def attach_trained(self, model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
        """Give the model in `base` what the method trained into `folder`, for decoding.

        Raises UserError for what the reader refuses, for something that was trained on another base (by fingerprint,
        where it has one), and for modules or shapes that this model does not have.
        """
        ...
