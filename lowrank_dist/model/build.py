"""From a Hugging Face folder to this rank's frozen shard."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import Checkpoint, open_checkpoint
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.model.load import load_weights
from lowrank_dist.parallel.linear import LowRankColumnParallelLinear, LowRankRowParallelLinear
from lowrank_dist.parallel.topology import Topology

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
    """Build the frozen model of this rank and stream its slices in.

    architecture: the folder's (`check_model`). dtype: "auto" keeps the checkpoint's. broadcast: data-parallel replica 0
    reads and sends, so that a file is read once a cluster and not once a replica. Raises UserError for weights that do
    not fit.
    """
    source = dist.get_process_group_ranks(topology.dp_group)[0]
    send = broadcast and topology.dp_size > 1
    with open_checkpoint(path) as checkpoint:
        model = CausalLM(
            architecture,
            topology,
            dtype=_checkpoint_dtype(checkpoint) if dtype == "auto" else DTYPES[dtype],
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
        )
    return model


def check_model(path: Path, tp_size: int, max_length: int) -> Architecture:
    """What the folder's config.json describes, without a look at the weights.

    Raises UserError for what is no model of ours, a tensor-parallel size that does not divide it, or a length that it
    cannot represent.
    """
    architecture = read_architecture(path)
    architecture.check_tp(tp_size)
    check_length(architecture, path, max_length)
    return architecture


def check_length(architecture: Architecture, path: Path, max_length: int) -> None:
    """Refuse sequences that the base cannot represent, or would attend to differently."""
    if max_length > architecture.max_positions:
        raise UserError(
            f"data.max_length={max_length} is longer than the model's {architecture.max_positions} positions "
            f"({path / 'config.json'}); use at most data.max_length={architecture.max_positions}"
        )
    if architecture.sliding_window is not None and max_length > architecture.sliding_window:
        raise UserError(
            f"data.max_length={max_length} exceeds the model's sliding window of {architecture.sliding_window} tokens "
            f"({path / 'config.json'}), which this system does not apply; use at most that"
        )


def _checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype most weights are stored in; fp16 checkpoints run in bf16, whose range is fp32's."""
    dtype = checkpoint.main_dtype()
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _broadcast(parameter: Tensor, source: int, topology: Topology) -> None:
    dist.broadcast(parameter, src=source, group=topology.dp_group)
