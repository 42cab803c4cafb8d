"""Load this rank's shard of the frozen model from a Hugging Face folder, slice by slice, directly into place.

Host memory: the rank's own parameters, mapped pages of the file (which the kernel can drop) and one bounded chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.arch.architecture import WORD_EMBEDDINGS, Architecture
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.families import OUTPUT_LAYER
from lowrank_dist.arch.tensors import Copy, ParameterPlan, copy_plans
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import Checkpoint, check_checkpoint, open_checkpoint, stored_name
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.terminal import ProgressLines, say

_CHUNK_BYTES = 16 * 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(
    path: Path,
    architecture: Architecture,
    topology: Topology,
    *,
    device: torch.device,
    dtype: str,
    vocab_multiple: int,
    broadcast: bool,
    linears: tuple[type, type] = (LowRankColumnParallelLinear, LowRankRowParallelLinear),
) -> CausalLM:
    """Build this rank's shard of the frozen model and fill it from the folder.

    architecture: that of the folder, divisible by the tensor-parallel size (`check_model`). dtype: "auto" keeps the
    checkpoint's (bf16 for fp16). broadcast: data-parallel replica 0 reads and sends, so that a file is read once per
    cluster and not once per replica. If loading takes long, rank 0 reports the progress of its shard on stderr. Raises
    UserError for weights that are missing or do not fit the architecture.
    """
    source = dist.get_process_group_ranks(topology.dp_group)[0]
    send = broadcast and topology.dp_size > 1
    with open_checkpoint(path) as checkpoint:
        model = CausalLM(
            architecture,
            topology,
            dtype=running_dtype(checkpoint, dtype),
            device=device,
            vocab_multiple=vocab_multiple,
            linears=linears,
        )
        load_weights(
            dict(model.named_parameters()),
            architecture,
            checkpoint,
            tp_rank=topology.tp_rank,
            tp_size=topology.tp_size,
            read=not send or topology.dp_rank == 0,
            broadcast=(lambda parameter: _broadcast(parameter, source, topology)) if send else None,
            progress=ProgressLines("loading the model, rank 0's shard", "GB", 10**9, partial(_say_on_rank_0, topology)),
        )
    return model


def _say_on_rank_0(topology: Topology, line: str) -> None:
    if topology.world_group.rank() == 0:
        say(line, err=True)  # stdout is for what a command returns


def check_model(path: Path, tp_size: int, max_length: int, ranks: int = 0) -> Architecture:
    """Return the architecture that the folder's config.json describes, without reading the weights.

    ranks: number of ranks of the job; 0 where it is not known. Raises UserError for an unsupported model, a
    tensor-parallel size that does not divide it, or a length that it cannot represent (`check_length`).
    """
    architecture = read_architecture(path)
    architecture.check_tp(tp_size, ranks)
    check_length(architecture, path, max_length)
    return architecture


def check_length(architecture: Architecture, path: Path, max_length: int) -> None:
    """Raise UserError if `max_length` exceeds the model's positions."""
    if max_length > architecture.max_positions:
        raise UserError(
            f"data.max_length={max_length} is longer than the model's {architecture.max_positions} positions "
            f"({path / 'config.json'}); use at most data.max_length={architecture.max_positions}"
        )


def dtype_notes(path: Path, running: torch.dtype) -> list[str]:
    """Return a note where most weights of a folder are stored in fp16, which is not a dtype that models run in."""
    with open_checkpoint(path) as checkpoint:
        stored = checkpoint.main_dtype()
    if stored != torch.float16:
        return []
    name = next(name for name, dtype in DTYPES.items() if dtype == running)
    return [f"{path}: stored in fp16, but runs in {name}; model.dtype=fp32 or --dtype fp32 keeps every bit"]


def running_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """Return the dtype in which a model runs; for "auto" that of most stored weights.

    fp16 checkpoints run in bf16, because its range is that of fp32.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    stored = checkpoint.main_dtype()
    return torch.bfloat16 if stored == torch.float16 else stored


def _broadcast(parameter: Tensor, source: int, topology: Topology) -> None:
    dist.broadcast(parameter, src=source, group=topology.dp_group)


def load_weights(
    parameters: Mapping[str, torch.Tensor],
    architecture: Architecture,
    checkpoint: Checkpoint,
    *,
    tp_rank: int,
    tp_size: int,
    read: bool = True,
    broadcast: Callable[[torch.Tensor], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill `parameters` (Megatron name → this rank's shard, any device, any floating dtype) from `checkpoint`.

    All of the model's tensors are checked first. Rows of vocabulary padding become zero. broadcast: called with every
    parameter once it is filled, in the same order on every rank. With read=False nothing is read, and `broadcast` alone
    fills the parameters. progress: called with (bytes done, bytes in all) after each parameter. Raises UserError that
    lists every missing, unexpected or wrong tensor, and for a tensor-parallel size that does not divide the model.
    Names or shapes of `parameters` that differ from the plan are programming errors.
    """
    architecture.check_tp(tp_size)
    check_checkpoint(architecture, checkpoint)
    padded_rows = parameters[WORD_EMBEDDINGS].shape[0] * tp_size
    plans = copy_plans(architecture, tp_rank, tp_size, padded_rows)
    assert parameters.keys() == plans.keys(), f"parameters without a rule or rules without: {parameters.keys() ^ plans}"
    for name, plan in plans.items():
        assert tuple(parameters[name].shape) == plan.shape, f"{name}: {tuple(parameters[name].shape)} != {plan.shape}"
    done, total = 0, sum(parameter.nbytes for parameter in parameters.values())
    for name, plan in plans.items():
        parameter = parameters[name].detach()
        if read:
            _fill(parameter, plan, architecture, checkpoint)
            if name == WORD_EMBEDDINGS and architecture.tied:
                _check_tied(plan, architecture, checkpoint)
        if broadcast is not None:
            broadcast(parameter)
        done += parameter.nbytes
        progress(done, total)


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
    """Return rows `rows` of the copy's local region, as a view of the mapped file."""
    outputs = copy.hf_index[-1] if copy.transposed else copy.hf_index[0]
    chunk = slice(outputs.start + rows.start, outputs.start + rows.stop)
    if copy.transposed:
        return source[copy.hf_index[0], chunk].t()
    return source[(chunk, *copy.hf_index[1:])]


def _chunks(destination: torch.Tensor) -> list[slice]:
    """Return row ranges of at most `_CHUNK_BYTES`: a copy that converts or goes to a GPU may need a temporary."""
    row_bytes = max(destination[:1].numel() * max(destination.element_size(), 4), 1)
    step = max(_CHUNK_BYTES // row_bytes, 1)
    return [slice(start, min(start + step, len(destination))) for start in range(0, len(destination), step)]


def _check_tied(plan: ParameterPlan, architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Raise UserError where the stored output layer differs from the embeddings: transformers would ignore the tie."""
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
                    f"{embedding}; set tie_word_embeddings to false"
                )
