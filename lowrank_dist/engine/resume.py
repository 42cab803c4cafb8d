"""Resuming from a checkpoint on the ranks of a run: agree on it, and load Θ into ZeRO's partitions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowrank_dist.backend.devices import restore_generators
from lowrank_dist.checkpoint.training_state import KINDS, OptimizerReader, parse_state
from lowrank_dist.config import Config
from lowrank_dist.engine.gathering import BATCH_ELEMENTS
from lowrank_dist.engine.resumable import Resumption, checkpoint_to_resume
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.zero import ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.formats.manifest import OPTIMIZER_FILE
from lowrank_dist.parallel.theta import Theta, copy_from_whole
from lowrank_dist.parallel.topology import Topology


def find_resumption(config: Config, folder: RunFolder, topology: Topology) -> Resumption | None:
    """Return the checkpoint that train.resume asks for; None to start afresh. Collective: rank 0 finds and verifies it.

    Raises UserError on every rank where `checkpoint_to_resume` does on rank 0.
    """

    def ask() -> dict[str, Any] | None:
        found = checkpoint_to_resume(config, folder)
        if found is None:
            return None
        return {"folder": str(found.folder), "state": found.state.to_json(), "messages": found.messages}

    answer = from_rank_0(ask, topology)
    if not answer:
        return None
    return Resumption(Path(answer["folder"]), parse_state(answer["state"].encode()), tuple(answer["messages"]))


def started_at(resumption: Resumption | None, topology: Topology) -> datetime:
    """Return the time at which the run began, the same on every rank and after every resume. Collective.

    A chat template that reads the clock gets this time; otherwise ranks and resumed runs would train different texts.
    It is rank 0's current time where there is no checkpoint, or an old one that does not hold it.
    """
    told = from_rank_0(lambda: {"present": datetime.now().isoformat(timespec="seconds")}, topology)
    kept = None if resumption is None else resumption.state.started_at
    return kept or datetime.fromisoformat(told["present"])


def from_rank_0(ask: Callable[[], dict[str, Any] | None], topology: Topology) -> dict[str, Any]:
    """Call `ask` on rank 0 and return its answer, sent as JSON, on every rank. Collective.

    A UserError or OSError of `ask` is raised on every rank, as UserError.
    """
    text = b""
    if topology.world_group.rank() == 0:
        try:
            answer = ask() or {}
        except UserError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"train.resume: {error}"}
        text = json.dumps(answer).encode()
    size = torch.tensor([len(text)], dtype=torch.int64)
    dist.broadcast(size, 0, group=topology.host_group)
    data = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
    dist.broadcast(data, 0, group=topology.host_group)
    answer = json.loads(data.numpy().tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def restore(
    resumption: Resumption, theta: Theta, optimiser: ZeroOptimiser, topology: Topology, device: torch.device
) -> None:
    """Set masters, moments, step count and random generators from the checkpoint. Collective.

    This works at any topology and ZeRO stage. Rank 0 reads and broadcasts a few tensors at a time, so other nodes need
    not see the run folder. Raises UserError on every rank for a file that cannot be read or does not fit.
    """
    shapes, coordinates = theta.all_shapes(), topology.coordinates
    opened: list[OptimizerReader] = []

    def open_file() -> None:
        opened.append(OptimizerReader(resumption.folder / OPTIMIZER_FILE, shapes))

    from_rank_0(open_file, topology)
    for batch in theta.batches(BATCH_ELEMENTS):
        whole = {
            name: torch.empty(len(KINDS), *shape)
            for number in batch
            for name, shape in theta.trained[number].shapes.items()
        }

        def read(whole: Mapping[str, torch.Tensor] = whole) -> None:
            for name, tensor in whole.items():
                tensor.copy_(opened[0].get(name))

        from_rank_0(read, topology)
        for tensor in whole.values():
            dist.broadcast(tensor, 0, group=topology.host_group)
        for number in batch:
            parameter, slices = theta.trained[number].parameter, theta.trained[number].shard_at(coordinates).slices
            values = torch.zeros(len(KINDS), *parameter.shape, device=parameter.device)
            for kind in range(len(KINDS)):
                copy_from_whole(slices, {name: tensor[kind] for name, tensor in whole.items()}, values[kind])
            optimiser.restore(number, values)
    optimiser.restored(resumption.state.updates_made)
    theta.refresh()
    try:
        restore_generators(resumption.state.rng, device)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{resumption.folder}: the states of the random number generators cannot be restored ({error}); take "
            "another checkpoint"
        ) from error
