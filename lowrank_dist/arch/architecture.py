"""The make-up of a model, in the terms that Hugging Face, Megatron and the plan need."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from lowrank_dist.arch.rows import Linear
from lowrank_dist.errors import UserError

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding: base `theta` and the scaling of its frequencies.

    "linear" uses `factor`; "llama3" all four numbers (`original_max_positions` in tokens).
    """

    theta: float
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def padded_vocab(vocab: int, multiple: int, tp_size: int) -> int:
    """Embedding rows over all ranks: `vocab` rounded up to a multiple of multiple × tp_size, as Megatron pads."""
    step = multiple * tp_size
    return -(-vocab // step) * step


@dataclass(frozen=True)
class TensorRule:
    """One tensor outside the linears: its Megatron name, its Hugging Face name (with a `{layer}` field if a layer's).

    shape: the Hugging Face shape in terms of `Architecture.size`.
    sharding: "replicated", or "vocab" = rows over the padded vocabulary are cut evenly into tp_size blocks.
    row_offset: Megatron's row i is Hugging Face's row i + row_offset (OPT never uses its first two position rows).
    """

    megatron: str
    hf: str
    shape: tuple[str, ...]
    sharding: Literal["replicated", "vocab"] = "replicated"
    row_offset: int = 0


@dataclass(frozen=True)
class LayerKind:
    """The make-up of layers that are alike.

    linears: by Megatron's name ("linear_qkv"), in the order of execution.
    tensors: the layer's other tensors.
    sliding_window: query i sees keys j with i - sliding_window < j <= i; None = plain causal.
    """

    linears: Mapping[str, Linear] = field(hash=False)
    tensors: tuple[TensorRule, ...]
    sliding_window: int | None

    @property
    def ffn(self) -> int:
        """Width of the MLP (of gate and of up each, where it is gated)."""
        return self.linears["linear_fc2"].in_features

    @property
    def weights(self) -> int:
        """Elements of the weight matrices: what a layer's GEMMs multiply with."""
        return sum(linear.weights for linear in self.linears.values())


@dataclass(frozen=True)
class Architecture:
    """Sizes, options and tensor tables of one decoder-only model.

    layers: the kind of each, from the lowest up; layers that are alike share one object.
    prefix: base-model prefix of the Hugging Face names ("model."), which some published checkpoints leave out.
    head_dim: width of a head; heads × head_dim need not be `hidden`.
    activation: "gelu" is the exact one, "gelu_tanh" the tanh approximation.
    qkv_bias / linear_bias: linear_qkv has a bias / every linear has one.
    position_offset: rows of the Hugging Face position table before position 0 (OPT: 2), already cut off by its rule.
    conv1d: linear weights are stored [in, out] (GPT-2).
    embedding_multiplier: of the embeddings, before the first layer. attention_multiplier: of the attention scores, None
    for 1/√head_dim. residual_multiplier: of the output of attention and of MLP, before each is added.
    logits_divisor: what logits are divided by.
    tensors: those outside the layers. ignored: patterns of file tensors that carry no weights of this model.
    """

    family: str
    prefix: str
    hidden: int
    layers: tuple[LayerKind, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm: Literal["RMSNorm", "LayerNorm"]
    norm_eps: float
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"]
    gated: bool
    qkv_bias: bool
    linear_bias: bool
    tied: bool
    positions: Literal["rope", "learned"]
    position_offset: int
    qk_norm: bool
    rope: RopeParameters | None
    conv1d: bool
    tensors: tuple[TensorRule, ...]
    ignored: tuple[str, ...]
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0

    def size(self, dimension: str) -> int:
        """A dimension named in `TensorRule.shape`: hidden, vocab, head_dim, positions (rows of the position table)."""
        if dimension == "positions":
            return self.max_positions + self.position_offset
        return {"hidden": self.hidden, "vocab": self.vocab, "head_dim": self.head_dim}[dimension]

    @property
    def position_rows(self) -> int:
        """Rows of the learned position table without those before position 0; 0 with rotary positions."""
        return self.max_positions if self.positions == "learned" else 0

    @cached_property
    def kinds(self) -> Mapping[LayerKind, int]:
        """Every distinct kind of layer, in the order in which they first occur → the number of layers of it."""
        return Counter(self.layers)

    @property
    def sliding_window(self) -> int | None:
        """The narrowest window of any layer; None where every layer is plain causal."""
        return min((kind.sliding_window for kind in self.kinds if kind.sliding_window is not None), default=None)

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the word embeddings."""
        return next(rule.hf for rule in self.tensors if rule.megatron == WORD_EMBEDDINGS)

    def linear_modules(self) -> set[str]:
        """Hugging Face path of every linear in the layers: what factors can be on, the output layer aside."""
        return {
            part.path.format(layer=layer)
            for layer, kind in enumerate(self.layers)
            for linear in kind.linears.values()
            for part in linear.parts
        }

    def find(self, name: str, names: Container[str]) -> str | None:
        """The name under which tensor (or module) `name` lies among a checkpoint's `names`, or None.

        Accepts names without the base-model prefix ("h.0.ln_1.weight" for "transformer.h.0.ln_1.weight").
        """
        if name in names:
            return name
        bare = name.removeprefix(self.prefix)
        return bare if bare in names else None

    def legal_tp_sizes(self, world_max: int | None = None) -> tuple[int, ...]:
        """Tensor-parallel sizes that divide this model, up to `world_max` ranks."""
        largest = self.heads if world_max is None else min(world_max, self.heads)
        return tuple(size for size in range(1, largest + 1) if self.indivisible_by(size) is None)

    def check_tp(self, tp_size: int) -> None:
        """Raise UserError naming the sizes that do divide when `tp_size` does not."""
        if tp_size >= 1 and self.indivisible_by(tp_size) is None:
            return
        legal = ", ".join(str(size) for size in self.legal_tp_sizes())
        raise UserError(
            f"parallel.tensor={tp_size} does not divide this {self.family} model "
            f"({self.heads} attention heads, {self.kv_heads} key/value heads, {self._ffn}): use one of {legal}"
        )

    def indivisible_by(self, tp_size: int) -> str | None:
        """The size that `tp_size` ranks cannot share ("32 attention heads"), or None where they can share the model."""
        if self.heads % tp_size:
            return f"{self.heads} attention heads"
        if any(kind.ffn % tp_size for kind in self.kinds):
            return self._ffn
        # With fewer key/value heads than ranks Megatron cuts the fused rows evenly and gathers them in attention.
        whole = self.kv_heads % tp_size == 0
        cut = tp_size % self.kv_heads == 0 and ((self.heads + 2 * self.kv_heads) * self.head_dim) % tp_size == 0
        return None if whole or cut else f"{self.kv_heads} key/value heads"

    @property
    def _ffn(self) -> str:
        return f"ffn {' and '.join(str(width) for width in sorted({kind.ffn for kind in self.kinds}))}"
