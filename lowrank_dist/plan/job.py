"""The job that is planned: a model, a parallel layout, the sizes of a step, and the footprint of its method.

Legend: T tokens of a microbatch, H hidden, N tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.arch.architecture import padded_vocab as padded_rows
from lowrank_dist.arch.rows import Linear
from lowrank_dist.plan.factors import Factor, Layer, Placement

ITEMSIZE = {"fp32": 4, "bf16": 2}
# A collective's kind and the bytes of its whole message, as plan/traffic.py has them.
Call = tuple[str, int]


@dataclass(frozen=True)
class Layout:
    """How tensor × data ranks share the work. micro_batch: rows a rank and microbatch; recompute: of all layers."""

    tensor: int
    data: int
    sequence: bool
    micro_batch: int
    recompute: bool

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    def __str__(self) -> str:
        words = [f"TP {self.tensor}", f"DP {self.data}", f"microbatch {self.micro_batch}"]
        words += ["sequence parallel"] * self.sequence + ["recompute"] * self.recompute
        return ", ".join(words)


@dataclass(frozen=True)
class Decoding:
    """What an evaluation decodes (eval.generate): prompts together on a rank, and tokens that may follow each."""

    batch: int
    new_tokens: int


@dataclass(frozen=True)
class Parameters:
    """|Θ|, unsharded: while it is trained, and as others load it."""

    trained: int
    stored: int


@dataclass(frozen=True)
class Parameter:
    """Elements on a rank. partial: the gradient is summed over tensor parallelism at the end of the step."""

    elements: int
    partial: bool


@dataclass(frozen=True)
class LayerFlops:
    """What a method computes in a layer beside the frozen base and the factors, over all ranks.

    again: the part of `forward` that recomputation repeats. replicated: without sequence parallelism every
    tensor-parallel rank computes all of it.
    """

    forward: int = 0
    backward: int = 0
    again: int = 0
    replicated: bool = False


@dataclass(frozen=True)
class LayerCalls:
    """What a method sends in a layer beside the frozen base's messages, forward and backward.

    last_again: it saves tensors behind the layer's last call, so that recomputation issues that call as well.
    """

    behind_attention: tuple[Call, ...] = ()
    behind_mlp: tuple[Call, ...] = ()
    backward: tuple[Call, ...] = ()
    last_again: bool = False


@dataclass(frozen=True)
class Moment:
    """What exists at one moment, in bytes, beside what is always there; the keys are of memory.PARTS."""

    name: str
    parts: dict[str, int]


@dataclass(frozen=True)
class Footprint:
    """What a plan asks of a method. As it stands: a frozen base with the placement's factors, and nothing beside.

    A method overrides what it adds (methods/<name>/footprint.py). name: the method's. placement: its factors, and how
    the gradient flows. virtual: positions that it takes from every row.
    """

    # Φ itself is trained: it is fp32, and every weight has a gradient, masters and moments.
    trains_base: ClassVar[bool] = False
    # A scale is trained of each row that factors are on: one parameter a linear, behind B, which lies as B's rows do.
    trains_row_scales: ClassVar[bool] = False

    name: str
    placement: Placement
    virtual: int = 0

    @property
    def outside_row(self) -> int:
        """Virtual positions that attention sees before a row and that are no tokens of it."""
        return 0

    @property
    def residual_passes(self) -> int:
        """Reads and writes of the residual stream in a layer's forward, in elements a token and feature."""
        return 0

    @property
    def output_passes(self) -> int:
        """Reads and writes of an adapted linear's output beside the factors' own, forward and backward."""
        return 0

    def step_passes(self, job: Job) -> int:
        """Return bytes that a rank reads and writes once in an optimizer step, beside AdamW's."""
        return 0

    def label(self, job: Job) -> str:
        """Return how it lies on the ranks, where there is something to say."""
        return ""

    def reason_not_shardable(self, tensor: int) -> str | None:
        """Return why it cannot lie on `tensor` ranks, with the remedy, or None."""
        return None

    def placed_otherwise(self, tensor: int) -> tuple[Footprint, ...]:
        """Return the same method in the other ways in which it may lie on `tensor` ranks."""
        return ()

    # What is trained

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return |Θ|."""
        return Parameters(self.placement.elements, self.placement.elements)

    def parts(self, architecture: Architecture) -> dict[str, int]:
        """Return trained elements by what has them."""
        return {self.name: self.parameters(architecture).trained}

    def on_rank(self, job: Job) -> Sequence[Parameter]:
        """Return what it trains beside factors on any rank, which are alike, in the optimiser's order."""
        return ()

    # Memory, in bytes on a rank

    def buffers(self, job: Job, rows: int) -> int:
        """Return what it holds beside parameters, where factors are on `rows` of the rank's outputs."""
        return 0

    def saved_behind_linear(self, job: Job, linear: Linear, factors: Sequence[Factor]) -> int:
        """Return what a linear of a layer, with its factors, saves of its product before anything follows it."""
        return 0

    def saved_by_layer(self, job: Job, stream: bool) -> int:
        """Return what a layer saves more for backward. stream: its input requires a gradient."""
        return 0

    def saved_by_attention(self, job: Job, kind: LayerKind, stream: bool, alone: int) -> int:
        """Return what attention saves where it does. kind: of the layer. alone: what it saves without the method."""
        return alone

    def saved_by_model(self, job: Job, recompute: bool) -> int:
        """Return what is saved once for the whole model."""
        return 0

    def saved_behind_mlp(self, job: Job) -> int:
        """Return the part of `saved_by_layer` that is free before the MLP's backward begins."""
        return 0

    def backward_moments(self, job: Job, top: Layer, kept: int) -> Sequence[Moment]:
        """Return moments of its own in a layer's backward, the topmost of its kind. kept: activations at that time."""
        return ()

    def evaluation_working(self, job: Job, residual: int) -> int:
        """Return the working memory of a layer without backward. residual: bytes of the residual stream."""
        return 0

    # FLOPs

    def layer_flops(self, architecture: Architecture, tokens: int, stream: bool) -> LayerFlops:
        """Return what `tokens` tokens cost in a layer. stream: its input requires a gradient."""
        return LayerFlops()

    def microbatch_flops(self, architecture: Architecture) -> tuple[int, int]:
        """Return what a microbatch costs whatever its tokens: what every rank repeats, and what they share."""
        return 0, 0

    # Messages over tensor parallelism, and tokens

    def layer_calls(self, job: Job, stream: bool) -> LayerCalls:
        """Return what a layer sends more. stream: its input requires a gradient."""
        return LayerCalls()

    def step_calls(self, job: Job) -> Sequence[Call]:
        """Return what it sends once in an optimizer step, beside the sum of partial gradients."""
        return ()

    def gathers_embedding_gradient(self, job: Job) -> bool:
        """Return whether under sequence parallelism the gradient of the embeddings' output is gathered."""
        return False

    def virtual_in_rows(self, job: Job, tp_rank: int) -> int:
        """Return how many of a microbatch's tokens on a rank are virtual positions."""
        return 0


@dataclass(frozen=True)
class Job:
    """One optimizer step to be planned. Every row is taken as long as `length` allows, virtual positions included.

    name, stored_dtype: of the model, and the element type of its weights in the files; dtype: that in which they run.
    target_share: the part of the tokens that is trained on, and hence reaches the vocabulary. reduce_bucket: elements,
    None for |Θ| on the rank. device: whose operators run. lanes: factors beside the weights (parallel/frozen.py).
    packing: several samples a row. footprint: of the method. decoding: what evaluations generate, or None.
    """

    architecture: Architecture
    name: str
    stored_dtype: Literal["fp32", "bf16"]
    layout: Layout
    global_batch: int
    length: int
    target_share: float
    dtype: Literal["fp32", "bf16"]
    vocab_multiple: int
    zero_stage: Literal[1, 2]
    reduce_bucket: int | None
    device: Literal["cpu", "cuda"]
    lanes: bool
    packing: bool
    footprint: Footprint
    decoding: Decoding | None = None

    @property
    def placement(self) -> Placement:
        """The method's factors, and how the gradient flows through the frozen base."""
        return self.footprint.placement

    @property
    def sequence_parallel(self) -> bool:
        """Return whether ranks share the tokens outside attention and MLP."""
        return self.layout.sequence and self.layout.tensor > 1

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def row(self) -> int:
        """Positions of a row before padding: a prompt's are among them, a prefix' are not."""
        return self.length - self.footprint.outside_row

    @property
    def sequence_length(self) -> int:
        """Positions of a row, padded so that every rank's token shard is of one size."""
        step = self.layout.tensor if self.layout.sequence else 1
        return math.ceil(self.row / step) * step

    @property
    def tokens(self) -> int:
        """T of a microbatch: rows × positions, padding included."""
        return self.layout.micro_batch * self.sequence_length

    @property
    def shard_tokens(self) -> int:
        """T_j: tokens on a rank outside attention and MLP."""
        return self.tokens // self.layout.tensor if self.layout.sequence else self.tokens

    @property
    def targets(self) -> int:
        """n of a microbatch: positions whose next token is trained on; the last of a row has none, nor have virtual."""
        return self.layout.micro_batch * int(self.target_share * (self.length - self.footprint.virtual - 1))

    @property
    def microbatches(self) -> int:
        """Of one rank in one optimizer step."""
        return math.ceil(self.global_batch / (self.layout.micro_batch * self.layout.data))


def padded_vocab(job: Job) -> int:
    """Embedding rows over all ranks, as Megatron pads them."""
    return padded_rows(job.architecture.vocab, job.vocab_multiple, job.layout.tensor)


def head_rows(job: Job) -> int:
    """Rows of the vocabulary projection that the fullest rank multiplies with (padding is cut off)."""
    return min(padded_vocab(job) // job.layout.tensor, job.architecture.vocab)
