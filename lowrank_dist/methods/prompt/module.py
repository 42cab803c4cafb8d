"""Trained input embeddings: ids beyond the vocabulary, beside Megatron's frozen word embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.theta import mark


class WithVirtualTokens(nn.Module):
    """The word embeddings, where id `first_id` + j is row j of `rows`; in the place of Megatron's module.

    Output as Megatron's: [b, s, H], or [s / N, b, H] where it scatters.
    """

    def __init__(self, words: nn.Module, rows: Tensor, first_id: int, *, sequence_parallel: bool) -> None:
        """words: Megatron's VocabParallelEmbedding. rows: [l, H] fp32, the same on every rank."""
        super().__init__()
        self.words, self._first_id = words, first_id
        # Without sequence parallelism every rank has the gradient at all positions, with it at its own.
        partial = sequence_parallel and words.tp_group.size() > 1 and words.reduce_scatter_embeddings
        self.rows = mark(nn.Parameter(rows), sharded=False, partial=partial)

    @property
    def weight(self) -> Tensor:
        """The frozen embeddings, to which the head may be tied."""
        return self.words.weight

    @property
    def reduce_scatter_embeddings(self) -> bool:
        return self.words.reduce_scatter_embeddings

    @reduce_scatter_embeddings.setter
    def reduce_scatter_embeddings(self, enabled: bool) -> None:
        self.words.reduce_scatter_embeddings = enabled

    def forward(self, input_ids: Tensor) -> Tensor:
        virtual = input_ids - self._first_id
        embedded = self.words(torch.where(virtual >= 0, 0, input_ids))
        if self.reduce_scatter_embeddings:
            group = self.words.tp_group
            virtual = virtual.t().chunk(group.size())[group.rank()]
        there = virtual >= 0
        # Looked up, not indexed: the gradient of indexing is summed in whatever order the threads of a CPU come.
        rows = F.embedding(virtual[there], self.rows).to(embedded.dtype)
        # Written where they are, so that no tensor as large as the embeddings is made for a few of them.
        return embedded.index_put(there.nonzero(as_tuple=True), rows)


def add_virtual_tokens(model: CausalLM, rows: Tensor) -> nn.Parameter:
    """Put trained embeddings before every sample of `model`, starting from `rows` [l, H] in fp32; returns them."""
    words, sequence_parallel = model.embedding.word_embeddings, model.topology.sequence_parallel
    embeddings = WithVirtualTokens(words, rows, model.architecture.vocab, sequence_parallel=sequence_parallel)
    model.lead_with(embeddings, rows.size(0))
    return embeddings.rows
