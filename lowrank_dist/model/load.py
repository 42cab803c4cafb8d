"""Fill a rank's shards from a checkpoint, slice by slice, straight into place.

Host memory: a rank's own parameters, the file's pages (mapped, the kernel can drop them) and one bounded chunk.
"""

import re
from collections.abc import Callable, Mapping

import torch

from lowrank_dist.errors import UserError
from lowrank_dist.model.architecture import Architecture
from lowrank_dist.model.families import OUTPUT_LAYER
from lowrank_dist.model.huggingface import Checkpoint
from lowrank_dist.model.tensors import WORD_EMBEDDINGS, Copy, ParameterPlan, copy_plans, hf_shapes

_CHUNK_BYTES = 16 * 2**20


def load_weights(
    parameters: Mapping[str, torch.Tensor],
    architecture: Architecture,
    checkpoint: Checkpoint,
    *,
    tp_rank: int,
    tp_size: int,
    read: bool = True,
    broadcast: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Fill `parameters` (Megatron name → this rank's shard, any device, any floating dtype) from `checkpoint`.

    All of the model's tensors are checked first. Rows of vocabulary padding become zero. With `broadcast` every
    parameter, once filled, is handed to it in the same order on every rank; with read=False nothing is read and
    `broadcast` alone fills. Raises UserError listing every missing, unexpected or wrong tensor, and for a tensor
    parallel size that does not divide the model. Names or shapes of `parameters` that differ from the plan are
    programming errors.
    """
    architecture.check_tp(tp_size)
    check_checkpoint(architecture, checkpoint)
    padded_rows = parameters[WORD_EMBEDDINGS].shape[0] * tp_size
    plans = copy_plans(architecture, tp_rank, tp_size, padded_rows)
    assert parameters.keys() == plans.keys(), f"parameters without a rule or rules without: {parameters.keys() ^ plans}"
    for name, plan in plans.items():
        assert tuple(parameters[name].shape) == plan.shape, f"{name}: {tuple(parameters[name].shape)} != {plan.shape}"
    for name, plan in plans.items():
        parameter = parameters[name].detach()
        if read:
            _fill(parameter, plan, architecture, checkpoint)
            if name == WORD_EMBEDDINGS and architecture.tied:
                _check_tied(plan, architecture, checkpoint)
        if broadcast is not None:
            broadcast(parameter)


def check_checkpoint(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Compare the checkpoint's headers with the architecture; raise UserError with all differences, a line each."""
    problems, used = [], set()
    expected_shapes = hf_shapes(architecture)
    for name, expected in expected_shapes.items():
        found = stored_name(name, architecture, checkpoint)
        if found is None:
            problems.append(f"{checkpoint.path}: tensor {name} {list(expected)} is missing; download the model again")
            continue
        used.add(found)
        where = f"{checkpoint.file(found)}: tensor {found}"
        if checkpoint.shape(found) != expected:
            problems.append(
                f"{where} has shape {list(checkpoint.shape(found))}, but config.json asks for {list(expected)}; "
                "use the config.json that belongs to these weights"
            )
        try:
            checkpoint.dtype(found)
        except UserError as error:
            problems.append(str(error))
    for name in checkpoint.names():
        if name not in used and not _is_ignored(name, architecture):
            problems.append(
                f"{checkpoint.file(name)}: tensor {name} has no place in a {architecture.family} model with this "
                "config.json; use the config.json that belongs to these weights"
            )
    if problems:
        raise UserError("\n".join(problems))


def stored_name(name: str, architecture: Architecture, checkpoint: Checkpoint) -> str | None:
    """The name under which tensor `name` lies in the checkpoint, or None.

    The base-model prefix may be missing; tied embeddings may lie under the name of the output layer alone.
    """
    found = architecture.find(name, checkpoint)
    if found is None and architecture.tied and name == _embedding_name(architecture):
        found = architecture.find(OUTPUT_LAYER.hf, checkpoint)
    return found


def _embedding_name(architecture: Architecture) -> str:
    return next(rule.hf for rule in architecture.tensors if rule.megatron == WORD_EMBEDDINGS)


def _is_ignored(name: str, architecture: Architecture) -> bool:
    if architecture.tied and name == OUTPUT_LAYER.hf:
        return True
    bare = name.removeprefix(architecture.prefix)
    return any(re.fullmatch(pattern, bare) for pattern in architecture.ignored)


@torch.no_grad()
def _fill(parameter: torch.Tensor, plan: ParameterPlan, architecture: Architecture, checkpoint: Checkpoint) -> None:
    for copy in plan.copies:
        name = stored_name(copy.hf, architecture, checkpoint)
        assert name is not None, "check_checkpoint comes first"
        destination = parameter[copy.local_index]
        source = checkpoint.slice(name)
        for rows in _chunks(destination):
            destination[rows].copy_(_read(source, copy, rows))
    if plan.zero_rows is not None:
        parameter[plan.zero_rows :].zero_()


def _read(source: object, copy: Copy, rows: slice) -> torch.Tensor:
    """Rows `rows` of the copy's local region, as a view of the mapped file."""
    outputs = copy.hf_index[-1] if copy.transposed else copy.hf_index[0]
    chunk = slice(outputs.start + rows.start, outputs.start + rows.stop)
    if copy.transposed:
        return source[copy.hf_index[0], chunk].t()
    return source[(chunk, *copy.hf_index[1:])]


def _chunks(destination: torch.Tensor) -> list[slice]:
    """Row ranges of at most `_CHUNK_BYTES`: a copy that converts or goes to a GPU may need a temporary of its size."""
    row_bytes = max(destination[:1].numel() * max(destination.element_size(), 4), 1)
    step = max(_CHUNK_BYTES // row_bytes, 1)
    return [slice(start, min(start + step, len(destination))) for start in range(0, len(destination), step)]


def _check_tied(plan: ParameterPlan, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """An output layer stored beside the embeddings it is tied to must equal them; transformers then ignores the tie."""
    output = architecture.find(OUTPUT_LAYER.hf, checkpoint)
    embedding = stored_name(_embedding_name(architecture), architecture, checkpoint)
    if output is None or output == embedding:
        return
    for copy in plan.copies:
        for rows in _chunks(torch.empty(plan.shape, device="meta")[copy.local_index]):
            same = torch.equal(
                _read(checkpoint.slice(embedding), copy, rows), _read(checkpoint.slice(output), copy, rows)
            )
            if not same:
                raise UserError(
                    f"{checkpoint.path / 'config.json'}: tie_word_embeddings is true, but {output} differs from "
                    f"{embedding}: set tie_word_embeddings to false"
                )
