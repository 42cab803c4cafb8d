"""The base model, built from megatron-core's parts for an Architecture, and the hooks where a method adds to it.

Legend: b rows, s positions (under sequence parallelism a multiple of the tensor-parallel size), H hidden, V vocabulary,
n target positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from lowrank_dist.arch.architecture import Architecture, padded_vocab
from lowrank_dist.arch.rope import RopeParameters
from lowrank_dist.model.attention import KVCache, SequencePlan
from lowrank_dist.model.rope import Frequencies, Rotation
from lowrank_dist.model.spec import layer_specs, transformer_config
from lowrank_dist.ops.linear import linear
from lowrank_dist.parallel.collectives import enter_parallel_region
from lowrank_dist.parallel.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.parallel.vocab import HeadLoss, OutputLayer, gathered_logits

Segments = Sequence[tuple[int, int, int]] | None


class KeysValues(Protocol):
    """The keys and values that attention sees before every sequence.

    A call returns those of L layers and this rank's g key/value heads of width d: [L, 2, g, length, d].
    """

    length: int

    def __call__(self) -> Tensor: ...


class CausalLM(nn.Module):
    """A frozen causal language model, sharded by tensor parallelism.

    It has Megatron's embedding and block of layers and a head of our own. The vocabulary projection runs only on the
    requested positions, so a prompt token costs no logits. A tied model has no `output_layer`.

    prefix: trained keys and values before every sequence, or None. virtual_token_ids: ids of trained embeddings that
    come before every sample (`prepend_virtual_tokens`).
    """

    def __init__(
        self,
        architecture: Architecture,
        topology: Topology,
        *,
        dtype: torch.dtype,
        device: torch.device,
        vocab_multiple: int,
        linears: tuple[type, type] = (LowRankColumnParallelLinear, LowRankRowParallelLinear),
    ) -> None:
        super().__init__()
        configs = {kind: transformer_config(architecture, kind, topology, dtype, device) for kind in architecture.kinds}
        # Embedding and block read nothing that differs between kinds of layers.
        self.config = config = configs[architecture.layers[0]]
        vocab = padded_vocab(architecture.vocab, vocab_multiple, topology.tp_size)
        group = topology.tp_group
        with torch.device(device):
            self.embedding = LanguageModelEmbedding(
                config,
                vocab,
                architecture.max_positions,
                position_embedding_type="learned_absolute" if architecture.positions == "learned" else "none",
                tp_group=group,
            )
            # None stands for a group of one rank: every rank has whole sequences and all layers.
            groups = ProcessGroupCollection(tp=group, cp=None, pp=None)
            spec = layer_specs(architecture, configs, linears, group)
            self.decoder = TransformerBlock(config, spec, pg_collection=groups)
            if not architecture.tied:
                self.output_layer = OutputLayer(vocab // topology.tp_size, architecture.hidden, dtype)
            if architecture.positions == "learned":
                self.embedding.position_embeddings.to(dtype)
        # Not buffers, which a cast of the model would round.
        self.frequencies = {rope: Frequencies(rope, architecture.head_dim, device) for rope in architecture.ropes}
        self.architecture = architecture
        self.topology = topology
        self.prefix: KeysValues | None = None
        self.virtual_token_ids: tuple[int, ...] = ()
        self.requires_grad_(False)

    @property
    def virtual_positions(self) -> int:
        """The number of positions before the first token of every sequence: virtual tokens and prefix."""
        return len(self.virtual_token_ids) + (0 if self.prefix is None else self.prefix.length)

    def prepend_virtual_tokens(self, embeddings: nn.Module, count: int) -> None:
        """Replace the word embeddings by `embeddings`, which has `count` more ids; these come before every sample.

        `embeddings` wraps Megatron's VocabParallelEmbedding, is called like it and has its `weight`.
        """
        self.embedding.word_embeddings = embeddings
        first = self.architecture.vocab
        self.virtual_token_ids = tuple(range(first, first + count))

    def embeddings_of(self, ids: Tensor) -> Tensor:
        """Return the embeddings [n, H] of ids [n], whole on every rank. Collective over the tensor-parallel group.

        They are as trained virtual tokens take their place (`_scaled`).
        """
        with torch.no_grad(), self.without_sequence_parallelism():
            found: Tensor = self.embedding.word_embeddings(ids[None])[0]
        if not self.architecture.rounds_embedding_multiplier:
            return found
        return found * self._embedding_multiplier(found.dtype)

    def set_recompute(self, enabled: bool) -> None:
        """Switch activation recomputation of every layer on or off."""
        for layer in self.decoder.layers:
            layer.recompute = enabled

    def loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        target_index: Tensor,
        target_ids: Tensor,
        segments: Segments = None,
    ) -> Tensor:
        """Return Σ −log p(target) in fp32 over the microbatch, the same on every tensor-parallel rank.

        input_ids, position_ids [b, s]; target_index [n]: the positions whose next token is a target, as indices into
        [s·b] (sequence-major); target_ids [n]. With n = 0 the loss is 0 and every collective still runs.
        """
        hidden_nH = self._hidden(input_ids, position_ids, segments).flatten(0, 1).index_select(0, target_index)
        reduce_dgrad = self.topology.tp_size > 1 and not self.topology.sequence_parallel
        weight, first = self._head()
        padded_rows, group = self._head_weight().size(0), self.topology.tp_group
        return HeadLoss.apply(hidden_nH, weight, target_ids, first, padded_rows, group, reduce_dgrad)

    def logits(self, input_ids: Tensor, position_ids: Tensor, segments: Segments = None) -> Tensor:
        """Return logits [b, s, V] on every rank, vocabulary padding cut off. Not differentiable."""
        with torch.no_grad():
            hidden_sbH = self._hidden(input_ids, position_ids, segments)
            flat = gathered_logits(
                hidden_sbH.flatten(0, 1), self._head_weight(), self.architecture.vocab, self.topology.tp_group
            )
        return flat.unflatten(0, hidden_sbH.shape[:2]).transpose(0, 1)

    @contextmanager
    def without_sequence_parallelism(self) -> Iterator[None]:
        """Switch sequence parallelism off inside the block, as if the model had been built without it.

        A decoding step of one token cannot be cut over ranks. No weight moves; only the modules' flags change.
        """
        topology = self.topology
        if not topology.sequence_parallel:
            yield
            return
        self._set_sequence_parallel(replace(topology, sequence_parallel=False))
        try:
            yield
        finally:
            self._set_sequence_parallel(topology)

    def _set_sequence_parallel(self, topology: Topology) -> None:
        enabled = topology.sequence_parallel
        self.topology, self.config.sequence_parallel = topology, enabled
        # The rule of the modules' constructors: position embeddings are added before tokens are scattered.
        scattered = enabled and not self.embedding.add_position_embedding
        self.embedding.reduce_scatter_embeddings = scattered
        self.embedding.word_embeddings.reduce_scatter_embeddings = scattered
        modules: Iterator[Any] = self.modules()
        for module in modules:
            if hasattr(module, "sequence_parallel"):
                module.sequence_parallel = enabled
            if hasattr(module, "allreduce_dgrad"):
                module.allreduce_dgrad = not enabled

    def new_cache(self, padding: Tensor, columns: int) -> KVCache:
        """Return an empty cache of `columns` columns for `decode`. padding: [b], empty columns left of each row."""
        architecture = self.architecture
        with torch.no_grad():
            prefix = self._prefix()
        return KVCache(
            padding,
            layers=len(architecture.layers),
            # With fewer key/value heads than ranks, every rank has gathered the one it needs.
            kv_heads=max(1, architecture.kv_heads // self.topology.tp_size),
            columns=columns,
            head_dim=architecture.head_dim,
            dtype=self.config.params_dtype,
            prefix=prefix,
        )

    def _prefix(self) -> Tensor | None:
        return None if self.prefix is None else self.prefix().to(self.config.params_dtype)

    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Return logits [b, V_i] of the token after the last column, for the V_i rows of the head on this rank.

        Padded rows of the head have −∞. input_ids [b, s]: the next columns, which are added to the cache. Positions
        count from each row's first column that is not padding, after a prefix. Not differentiable; only without
        sequence parallelism.
        """
        assert not self.topology.sequence_parallel, "decode inside `without_sequence_parallelism`"
        boundaries = [rope.original_max_positions for rope in self.frequencies if rope.type == "longrope"]
        input_ids = cache.append(input_ids, min(boundaries, default=None))
        columns = torch.arange(cache.filled, cache.filled + input_ids.size(1), device=input_ids.device)
        position_ids = (columns - cache.padding[:, None]).clamp_(min=0)
        lengths_sb = (cache.filled + input_ids.size(1) - cache.padding)[None]
        plan = SequencePlan(rotations=self._rotations(position_ids.t(), lengths_sb))
        windows = dict.fromkeys(kind.sliding_window for kind in self.architecture.kinds)
        plan.cache = cache
        plan.visible = {window: cache.visible(input_ids.size(1), window) for window in windows}
        with torch.no_grad():
            hidden_sbH = self._decoded(input_ids, position_ids, plan)
            cache.filled += input_ids.size(1)
            logits = linear(hidden_sbH[-1], self._head_weight())
        kept, _ = self._head()
        logits[:, kept.size(0) :] = -torch.inf
        return logits

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        """Return [s, b, H] after the final norm, whole on every rank (under sequence parallelism dH is scattered)."""
        if self.prefix is not None:
            position_ids = position_ids + self.prefix.length
        if segments is None:
            # Positions of unpacked rows are all 0, 1, 2, …: one column of angles serves them all, padding included.
            first = 0 if self.prefix is None else self.prefix.length
            positions_sb = torch.arange(first, first + position_ids.size(1), device=position_ids.device)[:, None]
            lengths_sb = position_ids.amax(dim=1)[None] + 1  # padding has position 0
        else:
            positions_sb = position_ids.t()
            lengths_sb = torch.empty_like(positions_sb)
            for row, start, end in segments:
                lengths_sb[start:end, row] = end - start + (0 if self.prefix is None else self.prefix.length)
        plan = SequencePlan(rotations=self._rotations(positions_sb, lengths_sb))
        plan.segments, plan.prefix = segments, self._prefix()
        hidden = self._decoded(input_ids, position_ids, plan)
        if not self.topology.sequence_parallel:
            return hidden
        return enter_parallel_region(hidden, self.topology.tp_group, sequence_parallel=True)

    def _rotations(self, positions_sb: Tensor, lengths_sb: Tensor) -> dict[RopeParameters, Rotation]:
        """Return kind of rotary positions → the rotation of each position.

        positions_sb: [s, b or 1]. lengths_sb: length in tokens of the sample at each position; it broadcasts with them.
        """
        dtype = self.config.params_dtype
        return {rope: each.rotation(positions_sb, lengths_sb, dtype) for rope, each in self.frequencies.items()}

    def _decoded(self, input_ids: Tensor, position_ids: Tensor, plan: SequencePlan) -> Tensor:
        """Return [s, b, H] of this rank's positions after the final norm, scaled for the head."""
        divisor, embedded = self.architecture.logits_divisor, self.embedding(input_ids, position_ids)
        if self.architecture.embedding_multiplier != 1:
            embedded = self._scaled(embedded, input_ids)
        hidden: Tensor = self.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=plan)
        # Dividing the hidden states is cheaper than dividing the logits. It is exact for published divisors, which are
        # powers of two.
        return hidden if divisor == 1 else hidden / divisor

    def _scaled(self, embedded: Tensor, input_ids: Tensor) -> Tensor:
        """Return embeddings [s, b, H] of this rank's positions times the multiplier.

        One that is rounded is part of transformers' word embeddings, so trained virtual tokens are not scaled by it.
        """
        scaled = embedded * self._embedding_multiplier(embedded.dtype)
        if not self.virtual_token_ids or not self.architecture.rounds_embedding_multiplier:
            return scaled
        virtual_sb = input_ids.t() >= self.architecture.vocab
        if self.embedding.reduce_scatter_embeddings:
            virtual_sb = virtual_sb.chunk(self.topology.tp_size)[self.topology.tp_rank]
        return torch.where(virtual_sb[..., None], embedded, scaled)

    def _embedding_multiplier(self, dtype: torch.dtype) -> float:
        multiplier = self.architecture.embedding_multiplier
        if not self.architecture.rounds_embedding_multiplier:
            return multiplier
        return torch.tensor(multiplier, dtype=dtype, device="cpu").item()

    def _head_weight(self) -> Tensor:
        return self.embedding.word_embeddings.weight if self.architecture.tied else self.output_layer.weight

    def _head(self) -> tuple[Tensor, int]:
        """Return this rank's rows of the head without vocabulary padding, and the token id of the first."""
        weight = self._head_weight()
        first = self.topology.tp_rank * weight.size(0)
        return weight[: max(0, min(weight.size(0), self.architecture.vocab - first))], first
