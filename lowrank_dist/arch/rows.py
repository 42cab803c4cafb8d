"""The one map from Megatron's fused rows to Hugging Face projections.

Megatron fuses q, k, v (and gate, up) into one linear. Loading, sharding of the low-rank factors, export and tests take
the order of its rows from here. Pure Python: no torch, no megatron.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Part:
    """One Hugging Face projection inside a (possibly fused) linear.

    name: the last part of the module path, as users write it in targets ("q_proj").
    path: Hugging Face module path with a `{layer}` field ("model.layers.{layer}.self_attn.q_proj").
    rows: output features of this projection.
    offset: its first row in the Hugging Face tensor at `path`; above 0 only if parts share a tensor (GPT-2's c_attn).
    """

    name: str
    path: str
    rows: int
    offset: int = 0


@dataclass(frozen=True)
class Segment:
    """A run of rows: local rows [local_start, +length) of a rank are rows [part_start, +length) of `parts[part]`."""

    local_start: int
    part: int
    part_start: int
    length: int


@dataclass(frozen=True)
class LinearLayout:
    """The Hugging Face projections inside one Megatron linear (out_features × in_features, unsharded).

    kind: "column" shards the output rows, "row" the input columns (every rank then has all output rows).
    interleave: "qkv" = per key/value group [q heads of the group | k | v] over the whole matrix, then split into
        tp_size equal blocks; "gate_up" = every rank holds [its rows of gate ; its rows of up]; "none" = one part.
    group: for "qkv" (query heads per key/value group, head_dim), otherwise None.
    whole: name of the one Hugging Face module that holds all the parts (GPT-2's "c_attn"), otherwise None.
    """

    kind: Literal["column", "row"]
    in_features: int
    out_features: int
    parts: tuple[Part, ...]
    interleave: Literal["qkv", "gate_up", "none"]
    bias: bool
    group: tuple[int, int] | None = None
    whole: str | None = None

    def __post_init__(self) -> None:
        assert sum(part.rows for part in self.parts) == self.out_features, "the parts must make up all rows"
        assert (self.group is not None) == (self.interleave == "qkv"), "a qkv layout needs its group, others have none"
        assert len(self.parts) == {"qkv": 3, "gate_up": 2, "none": 1}[self.interleave]

    @property
    def weights(self) -> int:
        """Elements of the weight matrix, unsharded."""
        return self.in_features * self.out_features

    def segments(self, tp_rank: int, tp_size: int) -> tuple[Segment, ...]:
        """Return the rows of rank `tp_rank` in local order; the segments cover each of its rows exactly once.

        With fewer key/value heads than ranks a block can start inside a group or inside a head, and can hold no row of
        some part.
        """
        assert 0 <= tp_rank < tp_size
        if self.kind == "row":
            return (Segment(0, 0, 0, self.out_features),)
        assert self.out_features % tp_size == 0, "Architecture.check_tp comes first"
        if self.interleave == "qkv":
            block = self.out_features // tp_size
            return _cut(self._qkv_runs(), tp_rank * block, block)
        segments, local_start = [], 0
        for index, part in enumerate(self.parts):
            length = part.rows // tp_size
            segments.append(Segment(local_start, index, tp_rank * length, length))
            local_start += length
        return tuple(segments)

    def local_shape(self, tp_size: int) -> tuple[int, int]:
        """Return (rows, columns) of the weight on one rank."""
        if self.kind == "column":
            return self.out_features // tp_size, self.in_features
        return self.out_features, self.in_features // tp_size

    def tensor_rows(self, path: str) -> int:
        """Return the output features of the Hugging Face module at `path`, summed over the parts that share it."""
        return sum(part.rows for part in self.parts if part.path == path)

    def _qkv_runs(self) -> tuple[Segment, ...]:
        """Return the whole fused matrix as runs: for each key/value group its q heads, its k head, its v head."""
        assert self.group is not None, "a qkv layout has its group"
        queries_per_group, head_dim = self.group
        runs, start = [], 0
        for group in range(self.parts[1].rows // head_dim):
            for part, heads in ((0, queries_per_group), (1, 1), (2, 1)):
                length = heads * head_dim
                runs.append(Segment(start, part, group * length, length))
                start += length
        return tuple(runs)


@dataclass(frozen=True, kw_only=True)
class Linear(LinearLayout):
    """A linear of a layer: its rows, its place in Megatron's layer, and its dropout stream.

    module: its path inside the layer ("self_attention.linear_qkv").
    stream: number of its input within the layer, a key of its dropout masks. No two inputs of a layer share it.
    """

    module: str
    stream: int

    def module_of(self, layer: int) -> str:
        """Return the Megatron path of this linear in layer `layer`."""
        return f"decoder.layers.{layer}.{self.module}"

    @property
    def in_attention(self) -> bool:
        """Return whether it belongs to attention; otherwise it belongs to the MLP."""
        return self.module.startswith("self_attention.")


def _cut(runs: tuple[Segment, ...], start: int, length: int) -> tuple[Segment, ...]:
    """Return the runs inside the global rows [start, start + length), with local_start counted from `start`."""
    pieces = []
    for run in runs:
        first = max(run.local_start, start)
        last = min(run.local_start + run.length, start + length)
        if first < last:
            inside = first - run.local_start
            pieces.append(Segment(first - start, run.part, run.part_start + inside, last - first))
    return tuple(pieces)
