"""The run's side of a verification: the cut model, trained by the code of a run on all ranks of the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.training_state import KINDS
from lowrank_dist.config import Config
from lowrank_dist.config.schema import EvalConfig, OutputConfig
from lowrank_dist.data.batches import BatchSplit, Loader
from lowrank_dist.data.masking import Sample
from lowrank_dist.data.tokenizer import load_tokenizer
from lowrank_dist.engine.agreement import require_same_inputs
from lowrank_dist.engine.assemble import optimiser_rules
from lowrank_dist.engine.datasets import Data, StreamRange, read_set, split_of
from lowrank_dist.engine.gathering import Gathering
from lowrank_dist.engine.meter import Watcher
from lowrank_dist.engine.run_method import build_method
from lowrank_dist.engine.zero import Engine, ZeroOptimiser
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.methods.method import Method
from lowrank_dist.model.load import check_model, load_model
from lowrank_dist.parallel.theta import Theta, copy_from_whole, drawn_by_name
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.sections.section import MethodSection, Section
from lowrank_dist.verify.compare import Record
from lowrank_dist.verify.faults import plant
from lowrank_dist.verify.trace import InputTrace, Traced

STEPS = 3
# With AdamW's usual ε, the rounding of a gradient near zero becomes a step of full size.
EPS = 1e-3
# Three steps at a usual rate change so little that a fault of the optimiser stays below the bounds.
_LEAST_LR = 1e-2
# Microbatches of a data-parallel rank in a step: two show that gradients accumulate.
_MICROBATCHES = 2


def settings_for(config: Config, section: MethodSection, cut: Path, output: Path, dp_size: int) -> Config:
    """Return the config of a verification of the run `config` on the cut model in `cut`.

    section: the method's, for the cut model. output: a folder for what the run exports.
    """
    train, base = config.train, config.model.path
    batch = min(train.global_batch, _MICROBATCHES * train.micro_batch * dp_size)
    changed: dict[str, Section] = {
        "model": _with(config.model, path=cut),
        "data": _with(config.data, eval=None, tokenizer=config.data.tokenizer or base),
        "train": _with(
            train, steps=STEPS, epochs=None, global_batch=batch, lr=max(train.lr, _LEAST_LR), warmup_steps=0,
            schedule="constant", eps=EPS, resume="never",
        ),
        "eval": EvalConfig(),
        "output": OutputConfig(dir=output),
    }  # fmt: skip
    return config.model_copy(update=changed).with_own_section(section)


def without_dropout(section: MethodSection) -> MethodSection:
    """Return the section of a method with its dropout, if it has any, at 0."""
    return _with(section, dropout=0.0) if "dropout" in type(section).model_fields else section


def _with(section: Any, **values: object) -> Any:
    return section.model_copy(update=values)


@dataclass(frozen=True)
class Job:
    """The ranks of a verification and its configuration (`settings_for`)."""

    config: Config
    topology: Topology
    backend: Backend
    watcher: Watcher
    started_at: datetime

    @property
    def is_first(self) -> bool:
        return self.topology.world_group.rank() == 0


def read_samples(job: Job, method: Method, architecture: Architecture) -> tuple[Data, BatchSplit]:
    """Return the first samples of data.train, as many as the steps need, and their split over the ranks.

    Raises UserError as `build_data` does.
    """
    config, topology = job.config, job.topology
    train = config.train
    assert config.data.tokenizer is not None, "settings_for names it"
    tokenizer = load_tokenizer(config.data.tokenizer, job.started_at)
    split = split_of(
        config, method, topology.dp_rank, topology.dp_size, topology.tp_size if topology.sequence_parallel else 1
    )
    dataset = read_set(config, "train", tokenizer, method, architecture, most=STEPS * train.global_batch)
    loader = Loader(dataset, split, seed=train.seed, global_batch=train.global_batch)
    return Data(dataset, loader, StreamRange.of(train, dataset, None)), split


class RunSide:
    """The cut model with Θ attached, and the record of what training does to it. Collective throughout."""

    def __init__(self, job: Job, fault: str | None) -> None:
        """fault: one of cli.verify.FAULTS, to plant; None for the code as it is."""
        self._job, config, topology = job, job.config, job.topology
        job.watcher.enter("model")
        architecture = check_model(config.model.path, topology.tp_size, config.data.max_length)
        self.method = build_method(config, architecture)
        self.model = load_model(
            config.model.path,
            architecture,
            topology,
            device=job.backend.device,
            dtype=config.model.dtype,
            vocab_multiple=config.model.vocab_multiple,
            broadcast=False,
        )
        self.model.set_recompute(config.engine.recompute == "full")
        self.theta = self.method.attach(self.model, topology, resumed=False)
        fill_zeros(self.theta, topology, config.train.seed)
        if fault is not None:
            plant(fault, self.model, self.theta)
        job.watcher.enter("data set")
        self.data, self._split = read_samples(job, self.method, architecture)
        require_same_inputs(config, self.data, job.backend.device, afresh=False)
        job.watcher.enter("optimiser state")
        self._gradient = torch.empty(0)
        self._trace = InputTrace(self.model, topology)
        optimiser = ZeroOptimiser(self.theta.parameters, topology, optimiser_rules(config), self._enter)
        self._engine = Engine(self.model, self.theta, optimiser, job.backend.device)
        self._gathering = Gathering(self.theta, optimiser, topology)
        self._step = 0

    def stored(self) -> dict[str, Tensor]:
        """Return stored name → tensor of Θ, whole and in fp32, on rank 0; empty elsewhere."""
        return self._whole(self._engine.optimiser.snapshot())

    def samples(self) -> list[list[Sample]]:
        """Return the samples of each step's global batch, in the order that numbers them."""
        return [self.data.train.samples(step * self._job.config.train.global_batch) for step in range(STEPS)]

    def train(self) -> tuple[Record, Traced]:
        """Run the steps. Returns their record, without what is exported, and the inputs of the first microbatch."""
        losses, norms, gradients = [], [], []
        # Only the first microbatch: its inputs show in which module a fault is.
        self._trace.on = True
        for self._step in range(STEPS):
            batch = self.data.train.batch(self._step * self._job.config.train.global_batch)
            total = self._engine.accumulate(self._step, batch)
            if self._step == 0:
                traced = self._trace.of(batch.microbatches[0], self._split.max_length)
            dist.all_reduce(total, group=self._job.topology.dp_group)
            losses.append(float(total) / batch.global_targets)
            norms.append(self._engine.step(self._job.config.train.lr))
            # In place of Θ and its moments. Copies may differ: a planted fault makes them.
            gradients.append(self._whole(self._gradient.expand(len(KINDS), -1)))
        return Record(traced.inputs, losses, norms, gradients), traced

    def _enter(self, phase: str) -> None:
        """Follow a step's phases: the trace ends with the first forward pass, the gradient is whole before AdamW."""
        self._job.watcher.enter(phase, self._step + 1)
        if phase == "backward":
            self._trace.on = False
        elif phase == "optimiser":
            self._gradient = self._engine.optimiser.gradients()

    def _whole(self, snapshot: Tensor) -> dict[str, Tensor]:
        """Return stored name → the first of the tensors that `Gathering.stream` yields on rank 0; empty elsewhere."""
        stream = self._gathering.stream(snapshot, require_equal=False)
        return {name: tensor[0].clone() for whole in stream for name, tensor in whole.items()}


def fill_zeros(theta: Theta, topology: Topology, seed: int) -> None:
    """Give every stored tensor that is zero small random values, the same at every layout. Collective.

    With B = 0 the gradient of A is zero in the first step, and proves nothing.
    """
    coordinates = topology.coordinates
    shapes = theta.all_shapes()
    found = dict.fromkeys(shapes, 0.0)
    for each in theta.trained:
        for part in each.shard_at(coordinates).slices:
            largest = part.view(each.parameter.detach()).abs().amax() if each.parameter.numel() else 0.0
            found[part.tensor] = max(found[part.tensor], float(largest))
    all_found = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.all_reduce(all_found, op=dist.ReduceOp.MAX, group=topology.host_group)
    zero = {name for name, value in zip(found, all_found.tolist(), strict=True) if value == 0}
    for each in theta.trained:
        for part in each.shard_at(coordinates).slices:
            if part.tensor in zero:
                rows, *others = shapes[part.tensor]
                columns = torch.Size(others).numel()
                drawn = drawn_by_name(part.tensor, seed, rows, columns).view(rows, *others) / 16
                copy_from_whole([part], {part.tensor: drawn}, each.parameter)
    theta.refresh()


def export(
    method: Method, config: Config, stored: Mapping[str, Tensor], folder: Path, *, trained: bool
) -> dict[str, Tensor]:
    """Write Θ into a new folder as a checkpoint has it. Returns the tensors of its files, in fp32.

    stored: stored name → whole tensor. trained: as in `Method.files`.
    """
    base = config.model.path
    folder.mkdir()
    files = method.files(folder, Provenance(fingerprint(base), str(base), config.read_keys()), trained=trained)
    for name, tensor in stored.items():
        files.put(name, tensor.detach().cpu())
    files.finish()
    written = sorted(folder.glob("*.safetensors"))
    return {name: tensor.float() for file in written for name, tensor in load_file(file).items()}
