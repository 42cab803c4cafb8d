"""The sizes, options and tensor tables of a model, in the terms of Hugging Face, Megatron and the plan."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from lowrank_dist.arch.rope import RopeParameters
from lowrank_dist.arch.rows import Linear
from lowrank_dist.errors import UserError

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
# Under a sliding window, attention computes this many queries at a time.
WINDOW_BLOCK = 512
# Megatron's modules of the norms over all heads.
QUERY_NORM, KEY_NORM = "self_attention.heads_norm.query", "self_attention.heads_norm.key"
# The attention sinks of a layer's query heads.
SINKS = "self_attention.core_attention.sinks"


def padded_vocab(vocab: int, multiple: int, tp_size: int) -> int:
    """Return the embedding rows over all ranks: `vocab` rounded up to multiple × tp_size, as Megatron pads."""
    step = multiple * tp_size
    return -(-vocab // step) * step


@dataclass(frozen=True)
class TensorRule:
    """One tensor outside the linears: its Megatron name and its Hugging Face name.

    Both names have a `{layer}` field where the tensor belongs to a layer.
    shape: the Hugging Face shape in terms of `Architecture.size`.
    sharding: "replicated", or the rows are split into tp_size equal blocks: "vocab" those of the padded vocabulary,
    "heads" and "kv_heads" those of the query and of the key/value heads. Fewer key/value heads than ranks stay whole.
    row_offset: Megatron's row i is Hugging Face's row i + row_offset (OPT never uses its first two position rows).
    """

    megatron: str
    hf: str
    shape: tuple[str, ...]
    sharding: Literal["replicated", "vocab", "heads", "kv_heads"] = "replicated"
    row_offset: int = 0


@dataclass(frozen=True)
class LayerKind:
    """The linears and other tensors of identical layers.

    linears: by Megatron's name ("linear_qkv"), in the order of execution.
    tensors: the layer's other tensors.
    sliding_window: query i sees keys j with i - sliding_window < j <= i; None = plain causal.
    rope: the rotary positions of queries and keys; None = these layers rotate nothing.
    """

    linears: Mapping[str, Linear] = field(hash=False)
    tensors: tuple[TensorRule, ...]
    sliding_window: int | None
    rope: RopeParameters | None

    def has(self, module: str) -> bool:
        """Return whether the layers have a weight of this Megatron module ("pre_mlp_layernorm")."""
        return any(rule.megatron == f"decoder.layers.{{layer}}.{module}.weight" for rule in self.tensors)

    @property
    def has_sinks(self) -> bool:
        """Return whether each query head has an attention sink: a learned score that joins its softmax (gpt-oss)."""
        return any(rule.megatron == f"decoder.layers.{{layer}}.{SINKS}" for rule in self.tensors)

    @property
    def norms_all_heads(self) -> bool:
        """Return whether queries and keys are normed over all heads (OLMo 2), and not head by head."""
        return self.has(QUERY_NORM)

    @property
    def ffn(self) -> int:
        """Width of the MLP; in a gated MLP gate and up each have this width."""
        return self.linears["linear_fc2"].in_features

    @property
    def weights(self) -> int:
        """Elements of the weight matrices of a layer's GEMMs."""
        return sum(linear.weights for linear in self.linears.values())


@dataclass(frozen=True)
class Architecture:
    """Sizes, options and tensor tables of one decoder-only model.

    layers: the kind of each layer, lowest first; identical layers share one object.
    prefix: base-model prefix of the Hugging Face names ("model."); some published checkpoints leave it out.
    head_dim: width of a head; heads × head_dim need not be `hidden`.
    activation: "gelu" is the exact GELU, "gelu_tanh" its tanh approximation.
    qkv_bias: linear_qkv has a bias. proj_bias: linear_proj has one. mlp_bias: both linears of the MLP have one.
    position_offset: rows of the Hugging Face position table before position 0 (OPT: 2). The row_offset of the table's
    TensorRule already skips them.
    conv1d: linear weights are stored [in, out] (GPT-2).
    zero_centered_norm: norms multiply by 1 + weight. qk_norm: the queries and keys of each head are normed.
    embedding_multiplier: scales the embeddings before the first layer; with rounds_embedding_multiplier it is first
    rounded to the model's dtype. attention_multiplier: scales the attention scores; None = 1/√head_dim.
    residual_multiplier: scales the outputs of attention and MLP before they are added. logits_divisor: divides the
    logits.
    tensors: tensors outside the layers. ignored: patterns for names of tensors in the files that are no weights.
    published_names: beginning of a Hugging Face name → the one that it has in some files (models of images and text).
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
    proj_bias: bool
    mlp_bias: bool
    tied: bool
    positions: Literal["rope", "learned"]
    position_offset: int
    qk_norm: bool
    conv1d: bool
    tensors: tuple[TensorRule, ...]
    ignored: tuple[str, ...]
    zero_centered_norm: bool = False
    embedding_multiplier: float = 1.0
    rounds_embedding_multiplier: bool = False
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    published_names: tuple[tuple[str, str], ...] = ()

    def size(self, dimension: str) -> int:
        """Return the size of a dimension of `TensorRule.shape`.

        dimension: hidden, vocab, head_dim, heads (number of query heads), queries or keys (the features of all their
        heads), or positions (rows of the position table).
        """
        return {
            "heads": self.heads,
            "hidden": self.hidden,
            "vocab": self.vocab,
            "head_dim": self.head_dim,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "positions": self.max_positions + self.position_offset,
        }[dimension]

    def is_cut(self, rule: TensorRule, tp_size: int) -> bool:
        """Return whether tensor parallelism shards a tensor; otherwise every rank has a copy."""
        return rule.sharding in ("vocab", "heads") or (rule.sharding == "kv_heads" and self.kv_heads % tp_size == 0)

    @property
    def reads_images(self) -> bool:
        """Return whether the model has a part for images, which is not read here."""
        return bool(self.published_names)

    @property
    def position_rows(self) -> int:
        """Rows of the learned position table from position 0 on; 0 with rotary positions."""
        return self.max_positions if self.positions == "learned" else 0

    @cached_property
    def kinds(self) -> Mapping[LayerKind, int]:
        """Each distinct kind of layer, in order of first occurrence → its number of layers."""
        return Counter(self.layers)

    @property
    def ropes(self) -> tuple[RopeParameters, ...]:
        """The distinct rotary positions of the layers, in order of first occurrence; empty with learned positions."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds if kind.rope is not None))

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the word embeddings."""
        return next(rule.hf for rule in self.tensors if rule.megatron == WORD_EMBEDDINGS)

    def linear_modules(self) -> set[str]:
        """Return the Hugging Face path of every linear in the layers, the modules that can have factors.

        The output layer is not among them.
        """
        return {
            part.path.format(layer=layer)
            for layer, kind in enumerate(self.layers)
            for linear in kind.linears.values()
            for part in linear.parts
        }

    def find(self, name: str, names: Container[str]) -> str | None:
        """Return the name that tensor (or module) `name` has among a checkpoint's `names`, or None.

        Names in the checkpoint may lack the base-model prefix ("h.0.ln_1.weight" for "transformer.h.0.ln_1.weight").
        """
        if name in names:
            return name
        others = [
            published + name.removeprefix(ours) for ours, published in self.published_names if name.startswith(ours)
        ]
        return next((other for other in (name.removeprefix(self.prefix), *others) if other in names), None)

    def legal_tp_sizes(self, world_max: int | None = None) -> tuple[int, ...]:
        """Return the tensor-parallel sizes that divide this model, up to `world_max` ranks."""
        largest = self.heads if world_max is None else min(world_max, self.heads)
        return tuple(size for size in range(1, largest + 1) if self.indivisible_by(size) is None)

    def check_tp(self, tp_size: int, ranks: int = 0) -> None:
        """Raise UserError where `tp_size` does not divide the model; the message lists the sizes that do.

        ranks: number of ranks of the job, which the listed sizes divide as well; 0 where it is not known.
        """
        if tp_size >= 1 and self.indivisible_by(tp_size) is None:
            return
        legal = ", ".join(str(size) for size in self.legal_tp_sizes() if ranks % size == 0)
        legal += f" on {ranks} ranks" if ranks else ""
        raise UserError(
            f"parallel.tensor={tp_size} does not divide this {self.family} model ({self.heads} attention heads, "
            f"{self.kv_heads} key/value heads, {self._ffn}); use one of {legal}"
        )

    def indivisible_by(self, tp_size: int) -> str | None:
        """Return the size that `tp_size` does not divide ("32 attention heads"), or None where it divides the model."""
        if self.heads % tp_size:
            return f"{self.heads} attention heads"
        if any(kind.ffn % tp_size for kind in self.kinds):
            return self._ffn
        # With fewer key/value heads than ranks, Megatron splits the fused rows evenly and gathers them in attention.
        whole = self.kv_heads % tp_size == 0
        cut = tp_size % self.kv_heads == 0 and ((self.heads + 2 * self.kv_heads) * self.head_dim) % tp_size == 0
        return None if whole or cut else f"{self.kv_heads} key/value heads"

    @property
    def _ffn(self) -> str:
        return f"ffn {' and '.join(str(width) for width in sorted({kind.ffn for kind in self.kinds}))}"
