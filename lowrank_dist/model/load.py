"""Fill a rank's shards from a checkpoint, slice by slice, straight into place.

Host memory: a rank's own parameters, the file's pages (mapped, the kernel can drop them) and one bounded chunk.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lowrank_dist.arch.architecture import WORD_EMBEDDINGS, Architecture
from lowrank_dist.arch.families import OUTPUT_LAYER
from lowrank_dist.arch.tensors import Copy, ParameterPlan, copy_plans
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import Checkpoint, check_checkpoint, stored_name

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


def _read(source: Any, copy: Copy, rows: slice) -> torch.Tensor:
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
    embedding = stored_name(architecture.embedding_name, architecture, checkpoint)
    if output is None or output == embedding:
        return
    assert embedding is not None, "check_checkpoint comes first"
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
