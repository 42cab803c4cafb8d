"""From configuration sections to the parts of a run: what launch/train.py puts together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lowrank_dist.backend import apex
from lowrank_dist.backend.build_locks import stale_build_locks
from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.adapter import module_paths
from lowrank_dist.checkpoint.fingerprint import fingerprint
from lowrank_dist.checkpoint.provenance import Provenance
from lowrank_dist.checkpoint.training_state import DataState
from lowrank_dist.config import Config
from lowrank_dist.data.dataset import Dataset, load_dataset
from lowrank_dist.data.loader import Loader, StepBatch, eval_batches
from lowrank_dist.data.tokenizer import load_tokenizer
from lowrank_dist.engine.forecast import Forecast
from lowrank_dist.engine.meter import Meter
from lowrank_dist.engine.monitor import Monitor
from lowrank_dist.engine.phases import Phases
from lowrank_dist.engine.progress import Progress
from lowrank_dist.engine.resume import Resumption, require_same_run, restore
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.engine.schedule import Schedule
from lowrank_dist.engine.start import initial_factors
from lowrank_dist.engine.stragglers import Stragglers
from lowrank_dist.engine.trainer import NonFinite, Pace, Trainer
from lowrank_dist.engine.writing import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.lora.inject import AdaptedLinear, inject, theta_of
from lowrank_dist.lora.placement import LinearPlacement, LoraRules, place
from lowrank_dist.lora.state import spread_factors
from lowrank_dist.model.architecture import Architecture
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.ops import choice, extension
from lowrank_dist.ops.mask import quantise
from lowrank_dist.parallel.lanes import wanted
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.rank import Supervision

EVAL_MICROBATCHES = 16  # of each rank, made at a time


@dataclass(frozen=True)
class Theta:
    """The trained side of the model: its adapted linears and the source of their dropout masks."""

    adapted: tuple[AdaptedLinear, ...]
    masks: MaskSource


@dataclass(frozen=True)
class Data:
    """The data sets of a run and their loaders on this data-parallel rank."""

    dataset: Dataset
    train: Loader
    held_out: Dataset | None
    evaluation: Callable[[], Iterator[StepBatch]] | None


def choose_kernels(kernels: str, device: str) -> None:
    """Follow engine.kernels on `device` ("cpu" or "cuda"). UserError where what it demands was not built."""
    choice.use_plain(kernels == "plain")
    apex.use_plain(kernels == "plain")
    if kernels == "compiled":
        extension.demand(device)


def describe_kernels(kernels: str, device: str) -> list[str]:
    """What was chosen, and why not what is faster, a line each."""
    if kernels == "plain":
        return ["plain PyTorch operators, norms and AdamW (engine.kernels: plain)"]
    return [extension.describe(device), *([apex.describe(device)] if device == "cuda" else [])]


def prepare_folder(config: Config) -> RunFolder:
    """The run folder; raises UserError where it holds a run already that this one does not go on with."""
    folder, resume = RunFolder(config.output.dir), config.train.resume
    if resume == "never" or (resume != "auto" and not folder.holds(resume)):
        folder.refuse_existing()
    return folder


def place_factors(architecture: Architecture, config: Config) -> tuple[LinearPlacement, ...]:
    """Which linears get factors of which rank, known before anything is loaded. UserError as `place` raises it."""
    lora = config.lora
    rules = LoraRules(lora.rank, lora.alpha, lora.targets, lora.rslora, lora.rank_pattern, lora.alpha_pattern)
    return place(architecture, rules)


def build_theta(
    model: CausalLM,
    placements: tuple[LinearPlacement, ...],
    config: Config,
    topology: Topology,
    resumption: Resumption | None,
) -> Theta:
    """Attach and initialise the low-rank factors; those of a checkpoint come with the optimiser's state."""
    masks = MaskSource(config.train.seed, _threshold(config.lora.dropout))
    model.set_recompute(config.engine.recompute == "full")
    lanes = wanted(config.engine.lanes, next(model.parameters()).device.type)
    adapted = inject(model, placements, masks, config.train.seed, topology.tp_rank, topology.tp_size, lanes)
    if config.lora.init_from is not None and resumption is None:
        spread_factors(adapted, topology.tp_rank, initial_factors(config, placements))
    return Theta(adapted, masks)


def _threshold(dropout: float) -> int:
    try:
        return quantise(dropout)
    except ValueError as error:
        raise UserError(f"lora.dropout: {error}; give a smaller one") from error


def build_data(config: Config, vocab: int, topology: Topology) -> Data:
    """Tokenise and deal out the data sets; the order of samples is a function of seed and step."""
    data, train = config.data, config.train
    tokenizer = load_tokenizer(data.tokenizer or config.model.path)
    cut = {
        "global_batch": train.global_batch,
        "max_length": data.max_length,
        "packing": data.packing,
        "dp_rank": topology.dp_rank,
        "dp_size": topology.dp_size,
        "pad_multiple": topology.tp_size if topology.sequence_parallel else 1,
    }
    dataset = load_dataset(data.train, tokenizer, data.max_length, vocab)
    loader = Loader(dataset, seed=train.seed, micro_batch=train.micro_batch, **cut)
    if data.eval is None:
        return Data(dataset, loader, None, None)
    held_out = load_dataset(data.eval, tokenizer, data.max_length, vocab)
    micro_batch = config.eval.micro_batch or train.micro_batch
    # Nothing is accumulated over an eval batch: its size decides how many rows of like length are put together, and
    # bounds what is laid out as tensors, and packed, at a time.
    cut["global_batch"] = EVAL_MICROBATCHES * micro_batch * topology.dp_size
    return Data(dataset, loader, held_out, partial(eval_batches, held_out, micro_batch=micro_batch, **cut))


def build_trainer(
    model: CausalLM,
    theta: Theta,
    data: Data,
    config: Config,
    folder: RunFolder,
    resumption: Resumption | None,
    forecast: Forecast,
    supervision: Supervision,
    topology: Topology,
    backend: Backend,
) -> Trainer:
    """The optimiser, the monitors and the loop over all of it, from the beginning or from a checkpoint."""
    train, engine = config.train, config.engine
    parameters = theta_of(theta.adapted)
    rules = OptimiserRules(
        engine.zero_stage, engine.clip, engine.reduce_bucket, train.weight_decay, (train.beta1, train.beta2), train.eps
    )
    steps = _steps(config, data)
    writes = topology.world_group.rank() == 0
    state = resumption.state if resumption else None
    progress, output = Progress.of(state), config.output
    phases = Phases(supervision, backend)
    optimiser = ZeroOptimiser(parameters, topology, rules, phases.enter)
    if resumption is not None:
        restore(resumption, theta.adapted, optimiser, topology, backend.device)
    monitor = Monitor(folder, steps, progress.step, active=writes, tensorboard=output.tensorboard, plot=output.plot)
    notes = [*describe_kernels(engine.kernels, backend.device.type), forecast.memory_line, *_warn_of_locks()]
    _introduce(monitor, model, parameters, data, topology, backend, notes)
    if resumption is not None:
        for line in (*resumption.messages, f"resumed from {resumption.folder} at step {progress.step} of {steps}"):
            monitor.say(line)
    writer = None
    if writes:
        retention = Retention(output.keep_last, output.keep_best)
        writer = CheckpointWriter(folder, _facts(model, config, data), retention, state)
    factor = engine.straggler_factor
    stragglers = None if factor is None or len(topology.hosts) == 1 else Stragglers(factor, topology.hosts)
    saver = CheckpointSaver(folder, theta.adapted, optimiser, writer, state, monitor.say, topology, backend)
    return Trainer(
        model,
        theta.masks,
        optimiser,
        data.train,
        data.evaluation,
        Schedule(train.schedule, train.lr, train.warmup_steps, steps, train.min_lr_ratio),
        Pace(
            steps,
            train.log_every,
            config.eval.every,
            config.eval.at_start,
            output.save_every,
            output.probe,
        ),
        NonFinite(train.nonfinite == "skip", train.max_skips),
        monitor,
        Meter(phases, stragglers, forecast, topology, backend),
        saver,
        progress,
        phases,
        supervision.stop,
        topology,
        backend,
    )


def _introduce(
    monitor: Monitor,
    model: CausalLM,
    parameters: Sequence[Tensor],
    data: Data,
    topology: Topology,
    backend: Backend,
    notes: Sequence[str],
) -> None:
    """What is about to happen, in a few lines; samples that were left out are never left out silently."""
    frozen = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in parameters)
    theta = sum(p.numel() for p in parameters)
    monitor.say(
        f"{model.architecture.family}, {topology.tp_size} tensor × {topology.dp_size} data parallel, sequence parallel "
        f"{'on' if topology.sequence_parallel else 'off'}, {backend.describe()}"
    )
    for line in notes:
        monitor.say(line)
    monitor.say(f"on each rank {theta:,} trained parameters beside {frozen:,} frozen ({100 * theta / frozen:.3f} %)")
    for dataset in (data.dataset, data.held_out):
        if dataset is not None:
            monitor.say(dataset.report.summary())


def _warn_of_locks() -> Iterator[str]:
    for lock in stale_build_locks():
        yield f"a killed build left {lock}, for which every later build of that extension waits; remove it"


def check_resumption(resumption: Resumption | None, config: Config, data: Data) -> None:
    """Raise UserError where the run that goes on would not be the one that stopped (`require_same_run`)."""
    if resumption is not None:
        states = _data_state(data.dataset), _data_state(data.held_out)
        require_same_run(config, resumption, *states, _steps(config, data))


def _steps(config: Config, data: Data) -> int:
    train = config.train
    return train.steps or max(1, math.ceil(train.epochs * len(data.dataset) / train.global_batch))


def _data_state(dataset: Dataset | None) -> DataState | None:
    if dataset is None:
        return None
    return DataState(path=str(dataset.report.path), sha256=dataset.sha256, samples=len(dataset))


def _facts(model: CausalLM, config: Config, data: Data) -> Facts:
    path = config.model.path
    return Facts(
        dropout=config.lora.dropout,
        rslora=config.lora.rslora,
        fan_in_fan_out=model.architecture.conv1d,
        base=path,
        modules=module_paths(model.architecture),
        provenance=Provenance(fingerprint(path), str(path), config.model_dump(mode="json")),
        data=_data_state(data.dataset),
        held_out=_data_state(data.held_out),
    )
