"""The map from every Megatron parameter of a rank to tensors of a Hugging Face checkpoint, from the family tables.

One list of copies serves both directions: loading copies from the checkpoint to the shard, export and tests from the
shard to the checkpoint. Pure: no file is opened and no tensor is created here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_dist.arch.architecture import Architecture, TensorRule, padded_vocab
from lowrank_dist.arch.rows import LinearLayout
from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class Copy:
    """local[local_index] equals hf[hf_index], transposed when `transposed` (GPT-2 stores [in, out]).

    hf: tensor name in the checkpoint, with the base-model prefix (`Architecture.find` also finds names without it).
    """

    hf: str
    hf_index: tuple[slice, ...]
    local_index: tuple[slice, ...]
    transposed: bool = False


@dataclass(frozen=True)
class ParameterPlan:
    """One Megatron parameter of one rank: its local shape and the copies that fill it.

    cut: tensor parallelism shards it; otherwise every rank has a copy.
    zero_rows: rows from here on are vocabulary padding: zero, and covered by no copy.
    """

    shape: tuple[int, ...]
    copies: tuple[Copy, ...]
    cut: bool
    zero_rows: int | None = None


def parameter_shapes(architecture: Architecture, tp_size: int, vocab_multiple: int) -> dict[str, tuple[int, ...]]:
    """Return the local shape of each Megatron parameter, in loading order. All tensor-parallel ranks have the same."""
    rows = padded_vocab(architecture.vocab, vocab_multiple, tp_size)
    return {name: plan.shape for name, plan in copy_plans(architecture, 0, tp_size, rows).items()}


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor that the model needs, by its name with the base-model prefix."""
    shapes = {rule.hf: _shape(rule, architecture) for rule in architecture.tensors}
    for layer, kind in enumerate(architecture.layers):
        shapes |= {rule.hf.format(layer=layer): _shape(rule, architecture) for rule in kind.tensors}
        for layout in kind.linears.values():
            for part in layout.parts:
                path = part.path.format(layer=layer)
                rows = layout.tensor_rows(part.path)
                weight = (rows, layout.in_features)
                shapes[f"{path}.weight"] = weight[::-1] if architecture.conv1d else weight
                if layout.bias:
                    shapes[f"{path}.bias"] = (rows,)
    return shapes


def module_paths(architecture: Architecture) -> frozenset[str]:
    """Return the path of every Hugging Face module with weights, the (possibly tied) lm_head included."""
    return frozenset(name.rpartition(".")[0] for name in hf_shapes(architecture)) | {"lm_head"}


def copy_plans(
    architecture: Architecture, tp_rank: int, tp_size: int, padded_vocab_rows: int
) -> dict[str, ParameterPlan]:
    """Return the plan of every Megatron parameter of rank `tp_rank`, by name, in the order of the layers.

    padded_vocab_rows: embedding rows over all ranks (`padded_vocab`), a multiple of tp_size.
    """
    assert padded_vocab_rows % tp_size == 0 and padded_vocab_rows >= architecture.vocab
    plans = {}
    for rule in architecture.tensors:
        plans[rule.megatron] = _rule_plan(rule, None, architecture, tp_rank, tp_size, padded_vocab_rows)
    for layer, kind in enumerate(architecture.layers):
        for rule in kind.tensors:
            name = rule.megatron.format(layer=layer)
            plans[name] = _rule_plan(rule, layer, architecture, tp_rank, tp_size, padded_vocab_rows)
        for linear in kind.linears.values():
            module = linear.module_of(layer)
            plans[f"{module}.weight"] = _weight_plan(linear, layer, architecture.conv1d, tp_rank, tp_size)
            if linear.bias:
                plans[f"{module}.bias"] = _bias_plan(linear, layer, tp_rank, tp_size)
    return plans


def _shape(rule: TensorRule, architecture: Architecture) -> tuple[int, ...]:
    return tuple(architecture.size(dimension) for dimension in rule.shape)


def _rule_plan(
    rule: TensorRule, layer: int | None, architecture: Architecture, tp_rank: int, tp_size: int, padded_rows: int
) -> ParameterPlan:
    hf = rule.hf.format(layer=layer)
    rows, *rest = _shape(rule, architecture)
    everything = tuple(slice(0, size) for size in rest)
    if not architecture.is_cut(rule, tp_size):
        kept = rows - rule.row_offset
        copy = Copy(hf, (slice(rule.row_offset, rows), *everything), (slice(0, kept), *everything))
        return ParameterPlan((kept, *rest), (copy,), cut=False)
    block = (padded_rows if rule.sharding == "vocab" else rows) // tp_size
    start = min(tp_rank * block, rows)
    count = min(start + block, rows) - start
    copies = (Copy(hf, (slice(start, start + count), *everything), (slice(0, count), *everything)),) if count else ()
    return ParameterPlan((block, *rest), copies, cut=True, zero_rows=count)


def _weight_plan(layout: LinearLayout, layer: int, conv1d: bool, tp_rank: int, tp_size: int) -> ParameterPlan:
    shape = layout.local_shape(tp_size)
    first_column = tp_rank * shape[1] if layout.kind == "row" else 0
    columns = slice(first_column, first_column + shape[1])
    copies = []
    for path, hf_rows, local_rows in _row_runs(layout, layer, tp_rank, tp_size):
        hf_index = (columns, hf_rows) if conv1d else (hf_rows, columns)
        copies.append(Copy(f"{path}.weight", hf_index, (local_rows, slice(0, shape[1])), transposed=conv1d))
    return ParameterPlan(shape, tuple(copies), cut=True)


def _bias_plan(layout: LinearLayout, layer: int, tp_rank: int, tp_size: int) -> ParameterPlan:
    """Return the plan of a bias. A row-parallel bias is replicated: it is added once, after the reduction."""
    copies = (
        Copy(f"{path}.bias", (hf_rows,), (local_rows,))
        for path, hf_rows, local_rows in _row_runs(layout, layer, tp_rank, tp_size)
    )
    return ParameterPlan(layout.local_shape(tp_size)[:1], tuple(copies), cut=layout.kind == "column")


def _row_runs(layout: LinearLayout, layer: int, tp_rank: int, tp_size: int) -> list[tuple[str, slice, slice]]:
    """Return (Hugging Face module path, its rows, local rows) for each segment of a rank."""
    runs = []
    for segment in layout.segments(tp_rank, tp_size):
        part = layout.parts[segment.part]
        start = part.offset + segment.part_start
        runs.append(
            (
                part.path.format(layer=layer),
                slice(start, start + segment.length),
                slice(segment.local_start, segment.local_start + segment.length),
            )
        )
    return runs


# Part of a tensor's name → the wrapper that adds it to the names of the wrapped model.
_WRAPPERS: Mapping[str, str] = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "torch's checkpoint_wrapper",
}
# The same, at the beginning of a name only.
_WRAPPERS_AROUND: Mapping[str, str] = {
    "module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.base_model.model.": "PEFT, applied to a model that it had adapted already,",
}


def refuse_wrapped_names(path: Path, names: Sequence[str], remedy: Callable[[Path, str], str]) -> None:
    """Raise UserError, in one line, where tensors have names that a wrapper of the model gave them.

    path: their file or folder. remedy: (path, the wrapper's part of the names) → what to do. PEFT and transformers
    find no weight under such a name and mostly do not say so.
    """
    for part, origin in {**_WRAPPERS, **_WRAPPERS_AROUND}.items():
        if part in _WRAPPERS:
            wrapped = [name for name in names if f".{part}" in f".{name}"]
        else:
            wrapped = [name for name in names if name.startswith(part)]
        if wrapped:
            raise UserError(
                f"{path}: {len(wrapped)} of {len(names)} tensors, such as {wrapped[0]}, have {part!r} in their names, "
                f"which {origin} adds; {remedy(path, part)}"
            )
