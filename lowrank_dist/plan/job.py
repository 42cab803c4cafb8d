"""What is planned: a model, its factors, a parallel layout and the sizes of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.architecture import padded_vocab as padded_rows
from lowrank_dist.plan.factors import Placement

ITEMSIZE = {"fp32": 4, "bf16": 2}
MethodName = Literal["lora", "full", "adapter_h", "adapter_l", "prefix", "prompt"]
_BOTTLENECKS = {"adapter_h": 2, "adapter_l": 1}


@dataclass(frozen=True)
class Tuning:
    """How the model is fine-tuned, and what a method has of sizes; the factors of low-rank updates are a Placement.

    bottleneck: width m of an adapter layer, and whether it is cut over tensor parallelism (`sharded`) or a copy on
    every rank. virtual: positions l of a prefix or prompt. width: of the MLP that makes a prefix, None for none.
    """

    method: MethodName = "lora"
    bottleneck: int = 0
    sharded: bool = False
    virtual: int = 0
    width: int | None = None

    @property
    def bottlenecks(self) -> int:
        """Of a layer."""
        return _BOTTLENECKS.get(self.method, 0)

    @property
    def prefix(self) -> int:
        """Positions that attention sees before a row, and that are in no row."""
        return self.virtual if self.method == "prefix" else 0

    def why_uncut(self, tensor: int) -> str | None:
        """Why its adapter layers cannot lie on `tensor` ranks, with the remedy, or None."""
        if not self.sharded or self.bottleneck % tensor == 0:
            return None
        return (
            f"adapter.bottleneck={self.bottleneck} cannot be cut over parallel.tensor={tensor}: give a multiple of it, "
            "or adapter.placement=replicated"
        )


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
class Job:
    """One optimizer step to be planned. Every row is taken as long as `length` allows, virtual positions included.

    name, stored_dtype: of the model, and the element type of its weights in the files; dtype: that in which they run.
    target_share: the part of the tokens that is trained on, and hence reaches the vocabulary. reduce_bucket: elements,
    None for |Θ| on the rank. device: whose operators run. lanes: factors beside the weights (parallel/factors.py).
    packing: several samples a row. decoding: what evaluations generate, or None.
    """

    architecture: Architecture
    name: str
    stored_dtype: Literal["fp32", "bf16"]
    placement: Placement
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
    tuning: Tuning = Tuning()
    decoding: Decoding | None = None

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def row(self) -> int:
        """Positions of a row before padding: a prompt's are among them, a prefix' are not."""
        return self.length - self.tuning.prefix

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
        return self.layout.micro_batch * int(self.target_share * (self.length - self.tuning.virtual - 1))

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
