"""Prompt tuning: trained embeddings at l positions before the input (Lester et al. 2021).

Their ids lie beyond the vocabulary; Megatron's word embeddings stay frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.provenance import Provenance, refuse_another_base
from lowrank_dist.methods.files import Collected
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.prompt_files import (
    PROMPT,
    PromptLearning,
    read_prompt_learning,
    require_fit,
    write_prompt_learning,
)
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import LocalShard, Theta, TrainedParameter, mark, whole_tensor
from lowrank_dist.parallel.topology import Topology


class _WordEmbeddings(Protocol):
    """The part of Megatron's VocabParallelEmbedding that is used here."""

    weight: Tensor
    tp_group: ProcessGroup
    reduce_scatter_embeddings: bool

    def __call__(self, input_ids: Tensor) -> Tensor: ...


class WithVirtualTokens(nn.Module):
    """Word embeddings that map id `first_id` + j to row j of `rows`; they replace Megatron's module.

    The output is as Megatron's: [b, s, H], or [s / N, b, H] with reduce_scatter_embeddings.
    """

    def __init__(self, words: _WordEmbeddings, rows: Tensor, first_id: int, *, sequence_parallel: bool) -> None:
        """rows: [l, H] fp32, the same on every rank."""
        super().__init__()
        self.words, self._first_id = words, first_id
        # With sequence parallelism a rank has the gradient at its own positions only; without it, at all positions.
        partial = sequence_parallel and words.tp_group.size() > 1 and words.reduce_scatter_embeddings
        self.rows = mark(nn.Parameter(rows), sharded=False, partial=partial)

    @property
    def weight(self) -> Tensor:
        """The frozen embeddings; the output layer may be tied to them."""
        return self.words.weight

    @property
    def reduce_scatter_embeddings(self) -> bool:
        return self.words.reduce_scatter_embeddings

    @reduce_scatter_embeddings.setter
    def reduce_scatter_embeddings(self, enabled: bool) -> None:
        self.words.reduce_scatter_embeddings = enabled

    def forward(self, input_ids: Tensor) -> Tensor:
        virtual_ids = input_ids - self._first_id
        embedded = self.words(torch.where(virtual_ids >= 0, 0, input_ids))
        if self.reduce_scatter_embeddings:
            group = self.words.tp_group
            virtual_ids = virtual_ids.t().chunk(group.size())[group.rank()]
        there = virtual_ids >= 0
        # F.embedding, not indexing: on a CPU the order of the sums in the gradient of indexing varies with the threads.
        rows = F.embedding(virtual_ids[there], self.rows).to(embedded.dtype)
        # index_put writes only these rows, so that no second tensor of the size of the embeddings is built for them.
        return embedded.index_put(there.nonzero(as_tuple=True), rows)


def add_virtual_tokens(model: CausalLM, rows: Tensor) -> nn.Parameter:
    """Put trained embeddings, initially `rows` [l, H] in fp32, before every sample of `model`. Return the parameter."""
    words, sequence_parallel = model.embedding.word_embeddings, model.topology.sequence_parallel
    embeddings = WithVirtualTokens(words, rows, model.architecture.vocab, sequence_parallel=sequence_parallel)
    model.prepend_virtual_tokens(embeddings, rows.size(0))
    return embeddings.rows


EMBEDDINGS = "prompt.embeddings"
_SPREAD = 0.02


class PromptTuning:
    """The `Method` of prompt tuning. init: "vocabulary" (embeddings of tokens drawn by the seed) or "random"."""

    published = PROMPT.published

    def __init__(
        self, length: int, init: Literal["vocabulary", "random"], architecture: Architecture, base: str, seed: int
    ) -> None:
        self.virtual_positions, self._init = length, init
        self.virtual_token_ids = tuple(range(architecture.vocab, architecture.vocab + length))
        self._architecture, self._base, self._seed = architecture, base, seed

    @property
    def summary(self) -> str:
        return f"prompt tuning: embeddings at {self.virtual_positions} positions before every sample"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        rows = add_virtual_tokens(model, self._initial(model))
        shape = (self.virtual_positions, self._architecture.hidden)
        shard = LocalShard(shape, (whole_tensor(EMBEDDINGS),))
        return Theta(
            (TrainedParameter(rows, {EMBEDDINGS: shape}, lambda coordinates: shard),), MaskSource(self._seed, 0)
        )

    def _initial(self, model: CausalLM) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        device = next(model.parameters()).device
        if self._init == "random":
            shape = (self.virtual_positions, self._architecture.hidden)
            return torch.empty(shape).normal_(0, _SPREAD, generator=generator).to(device)
        drawn = torch.randint(self._architecture.vocab, (self.virtual_positions,), generator=generator)
        return model.embeddings_of(drawn.to(device)).float()

    def files(self, folder: Path, provenance: Provenance, *, trained: bool) -> Collected:
        def write(tensors: Mapping[str, Tensor]) -> None:
            architecture = self._architecture
            learned = PromptLearning(
                PROMPT.kind,
                tensors[EMBEDDINGS],
                len(architecture.layers),
                architecture.heads,
                architecture.hidden,
                self._base,
            )
            write_prompt_learning(folder, learned, provenance)

        return Collected(write)


def build(section: PromptConfig, setting: Setting, architecture: Architecture) -> PromptTuning:
    """See `method.MethodBuilder`."""
    if reason := section.reason_without_room(setting.method, setting.max_length):
        raise UserError(reason)
    return PromptTuning(section.length, section.init, architecture, str(setting.base), setting.seed)


def attach_trained(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """See `method.MethodBuilder`."""
    refuse_another_base(folder, base)
    found = read_prompt_learning(folder)
    require_fit(folder, found, model.architecture)
    add_virtual_tokens(model, found.embeddings.to(next(model.parameters()).device))
