"""The job that is planned: a model, a parallel layout, the sizes of a step, and the footprint of its method.

Legend: T tokens of a microbatch, T_j those on a rank outside attention and MLP, H hidden, Φ the base's weights, Θ the
trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.arch.architecture import padded_vocab as padded_rows
from lowrank_dist.arch.rows import Linear
from lowrank_dist.planner.factors import Factor, Layer, Placement

ITEMSIZE = {"fp32": 4, "bf16": 2}
# A collective's kind and the bytes of its whole message, as planner/traffic.py has them.
Call = tuple[str, int]


@dataclass(frozen=True)
class Layout:
    """A layout of tensor × data ranks. micro_batch: rows per rank and microbatch; recompute: in all layers."""

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
    """The decoding of an evaluation (eval.generate): prompts decoded together on a rank, and new tokens per prompt."""

    batch: int
    new_tokens: int


@dataclass(frozen=True)
class Parameters:
    """|Θ|, unsharded. trained: elements while training; stored: elements of the adapter that others load."""

    trained: int
    stored: int


@dataclass(frozen=True)
class Parameter:
    """One trained parameter on a rank. partial: its gradient is summed over tensor-parallel ranks at the step's end."""

    elements: int
    partial: bool


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs that a method adds to those of the frozen base and the factors in a layer, over all ranks.

    again: the part of `forward` that recomputation repeats. replicated: without sequence parallelism every
    tensor-parallel rank computes all of them.
    """

    forward: int = 0
    backward: int = 0
    again: int = 0
    replicated: bool = False


@dataclass(frozen=True)
class LayerCalls:
    """Messages that a method adds to those of the frozen base in a layer, forward and backward.

    last_again: recomputation repeats the layer's last call, because the method saves tensors computed after it.
    """

    behind_attention: tuple[Call, ...] = ()
    behind_mlp: tuple[Call, ...] = ()
    backward: tuple[Call, ...] = ()
    last_again: bool = False


@dataclass(frozen=True)
class Moment:
    """The bytes that exist at one moment, beyond those that exist for the whole run. parts: keyed by memory.PARTS."""

    name: str
    parts: dict[str, int]


@dataclass(frozen=True)
class Footprint:
    """The cost of a method, as a plan needs it. The base class: a frozen base with the placement's factors only.

    A method overrides what it adds (methods/<name>/footprint.py). name: the method's name. placement: its factors, and
    how the gradient flows. virtual_positions: positions that the method takes from every row.
    """

    # The base's weights Φ are trained: they are fp32, and each has a gradient, a master and moments.
    trains_base: ClassVar[bool] = False
    # A scale is trained for each row that factors cover: one parameter per linear, after B, sharded as B's rows are.
    trains_row_scales: ClassVar[bool] = False

    name: str
    placement: Placement
    virtual_positions: int = 0

    @property
    def outside_row(self) -> int:
        """Number of virtual positions before a row that attention sees but that are not tokens of the row."""
        return 0

    @property
    def residual_passes(self) -> int:
        """Number of reads and writes of the residual stream [T_j, H] that the method adds to a layer's forward."""
        return 0

    @property
    def output_passes(self) -> int:
        """Number of reads and writes of an adapted linear's output, forward and backward, beyond those of factors."""
        return 0

    def step_passes(self, job: Job) -> int:
        """Return the bytes that a rank reads and writes once per optimizer step, beyond those of AdamW."""
        return 0

    def label(self, job: Job) -> str:
        """Return how the method is placed on the ranks, such as "sharded", or "" if it has only one placement."""
        return ""

    def reason_not_shardable(self, tensor: int) -> str | None:
        """Return why the method cannot be sharded over `tensor` ranks, with the remedy; None if it can."""
        return None

    def placed_otherwise(self, tensor: int) -> tuple[Footprint, ...]:
        """Return the same method with each of its other placements on `tensor` ranks."""
        return ()

    # What is trained

    def parameters(self, architecture: Architecture) -> Parameters:
        """Return |Θ|."""
        return Parameters(self.placement.elements, self.placement.elements)

    def parts(self, architecture: Architecture) -> dict[str, int]:
        """Return the number of trained elements of each part, by its name."""
        return {self.name: self.parameters(architecture).trained}

    def on_rank(self, job: Job) -> Sequence[Parameter]:
        """Return the trained parameters other than factors, in the optimizer's order; the same on every rank."""
        return ()

    # Memory, in bytes on a rank

    def buffers(self, job: Job, rows: int) -> int:
        """Return the method's buffers. rows: the number of the rank's output rows that factors cover."""
        return 0

    def saved_behind_linear(self, job: Job, linear: Linear, factors: Sequence[Factor]) -> int:
        """Return the bytes of a linear's product that the method saves for backward. factors: those of the linear."""
        return 0

    def saved_by_layer(self, job: Job, input_requires_grad: bool) -> int:
        """Return what the method adds to the saved activations of a layer."""
        return 0

    def saved_by_attention(self, job: Job, kind: LayerKind, input_requires_grad: bool, without_method: int) -> int:
        """Return what attention saves. without_method: what it saves without the method."""
        return without_method

    def saved_by_model(self, job: Job, recompute: bool) -> int:
        """Return what the method saves once for the whole model."""
        return 0

    def saved_behind_mlp(self, job: Job) -> int:
        """Return the part of `saved_by_layer` that is freed before the MLP's backward begins."""
        return 0

    def backward_moments(self, job: Job, top: Layer, kept: int) -> Sequence[Moment]:
        """Return the method's moments in the backward of `top`, the topmost layer of its kind.

        kept: bytes of activations that exist then.
        """
        return ()

    def evaluation_working(self, job: Job, residual: int) -> int:
        """Return the working memory of a layer in evaluation. residual: bytes of the residual stream."""
        return 0

    # FLOPs

    def layer_flops(self, architecture: Architecture, tokens: int, input_requires_grad: bool) -> LayerFlops:
        """Return the FLOPs that the method adds to a layer for `tokens` tokens."""
        return LayerFlops()

    def microbatch_flops(self, architecture: Architecture) -> tuple[int, int]:
        """Return the FLOPs of a microbatch that do not depend on its tokens: repeated by every rank, and shared."""
        return 0, 0

    # Messages over tensor parallelism, and tokens

    def layer_calls(self, job: Job, input_requires_grad: bool) -> LayerCalls:
        """Return the messages that the method adds to a layer."""
        return LayerCalls()

    def step_calls(self, job: Job) -> Sequence[Call]:
        """Return the method's messages once per optimizer step, other than the sum of partial gradients."""
        return ()

    def gathers_embedding_gradient(self, job: Job) -> bool:
        """Return whether the gradient of the embeddings' output is gathered, under sequence parallelism."""
        return False

    def virtual_tokens_on_rank(self, job: Job, tp_rank: int) -> int:
        """Return how many of a microbatch's tokens on a rank are virtual positions."""
        return 0


@dataclass(frozen=True)
class Job:
    """One optimizer step to be planned. Every row is taken to be `length` positions long, virtual ones included.

    name: the model's. stored_dtype: the dtype of its weights in the files; dtype: the dtype in which they run.
    target_share: the share of the tokens that is trained on, and hence reaches the vocabulary projection.
    reduce_bucket: elements, None for |Θ| on the rank (at most 5·10⁸). device: the device whose operators run.
    fuse_factors: factors are stored beside the weights (parallel/frozen.py). packing: several samples per row.
    footprint: the method's. decoding: what evaluations generate, or None.
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
    fuse_factors: bool
    packing: bool
    footprint: Footprint
    decoding: Decoding | None = None

    @property
    def placement(self) -> Placement:
        """The method's factors, and how the gradient flows through the frozen base."""
        return self.footprint.placement

    @property
    def sequence_parallel(self) -> bool:
        """True where ranks share the tokens outside attention and MLP."""
        return self.layout.sequence and self.layout.tensor > 1

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def row(self) -> int:
        """Positions of a row before padding, with those of a trained prompt but without those of a trained prefix."""
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
        """n of a microbatch: positions whose next token is trained on, never virtual ones or the last of a row."""
        return self.layout.micro_batch * int(self.target_share * (self.length - self.footprint.virtual_positions - 1))

    @property
    def microbatches(self) -> int:
        """Microbatches of one rank in one optimizer step."""
        return math.ceil(self.global_batch / (self.layout.micro_batch * self.layout.data))


def padded_vocab(job: Job) -> int:
    """Return the embedding rows over all ranks, as Megatron pads them."""
    return padded_rows(job.architecture.vocab, job.vocab_multiple, job.layout.tensor)


def head_rows(job: Job) -> int:
    """Return the rows of the vocabulary projection that the fullest rank multiplies with (padding is cut off)."""
    return min(padded_vocab(job) // job.layout.tensor, job.architecture.vocab)
