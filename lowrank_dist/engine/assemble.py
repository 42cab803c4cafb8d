"""From configuration sections to the parts of a run: what launch/train.py puts together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.backend import apex
from lowrank_dist.backend.build_locks import stale_build_locks
from lowrank_dist.backend.select import Backend
from lowrank_dist.config import Config
from lowrank_dist.engine.datasets import Data, data_state
from lowrank_dist.engine.forecast import Forecast
from lowrank_dist.engine.history import History, Progress, notes_on_best
from lowrank_dist.engine.meter import Meter, Stragglers
from lowrank_dist.engine.monitor import Monitor
from lowrank_dist.engine.phases import Phases
from lowrank_dist.engine.resume import Resumption, require_same_run, restore
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.engine.schedule import Schedule
from lowrank_dist.engine.trainer import NonFinite, Pace, Trainer
from lowrank_dist.engine.writing import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
from lowrank_dist.formats.fingerprint import fingerprint
from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.methods.method import Method, Setting
from lowrank_dist.methods.registry import home
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.ops import choice, extension
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.rank import Supervision


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


def build_method(config: Config, architecture: Architecture) -> Method:
    """Return what config.method names, for this model. UserError as `methods.method.Tuner.build` raises it."""
    setting = Setting(config.method, config.model.path, config.train.seed, config.data.max_length, config.engine.lanes)
    return home(config.method).tuner.build(config.own_section, setting, architecture)


def build_theta(
    model: CausalLM, method: Method, config: Config, topology: Topology, resumption: Resumption | None
) -> Theta:
    """Attach and initialise what is trained; the values of a checkpoint come with the optimiser's state."""
    model.set_recompute(config.engine.recompute == "full")
    return method.attach(model, topology, resumed=resumption is not None)


def build_trainer(
    model: CausalLM,
    method: Method,
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
    rules = OptimiserRules(
        engine.zero_stage, engine.clip, engine.reduce_bucket, train.weight_decay, (train.beta1, train.beta2), train.eps
    )
    steps = _steps(config, data)
    writes = topology.world_group.rank() == 0
    state = resumption.state if resumption else None
    progress, output = Progress.of(state), config.output
    phases = Phases(supervision, backend)
    optimiser = ZeroOptimiser(theta.parameters, topology, rules, phases.enter)
    if resumption is not None:
        restore(resumption, theta, optimiser, topology, backend.device)
    monitor = Monitor(folder, steps, progress.step, active=writes, tensorboard=output.tensorboard, plot=output.plot)
    notes = [*describe_kernels(engine.kernels, backend.device.type), forecast.memory_line, *_warn_of_locks()]
    notes += notes_on_best(config, state)
    _introduce(monitor, model, method, theta, data, config, topology, backend, notes)
    if resumption is not None:
        for line in (*resumption.messages, f"resumed from {resumption.folder} at step {progress.step} of {steps}"):
            monitor.say(line)
    writer = None
    if writes:
        retention = Retention(output.keep_last, output.keep_best, config.eval.best)
        writer = CheckpointWriter(folder, method, theta.all_shapes(), _facts(config, data), retention, state)
    factor = engine.straggler_factor
    stragglers = None if factor is None or len(topology.hosts) == 1 else Stragglers(factor, topology.hosts)
    history = History(config.eval.best, state)
    saver = CheckpointSaver(folder, theta, optimiser, writer, history, monitor.say, topology, backend)
    return Trainer(
        model,
        theta.masks,
        optimiser,
        data.train,
        data.evaluation,
        data.generation,
        history,
        Schedule(train.schedule, train.lr, train.warmup_steps, steps, train.min_lr_ratio),
        Pace(
            steps,
            train.log_every,
            config.eval.every,
            config.eval.at_start,
            output.save_every,
            output.probe,
            config.eval.patience,
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
    method: Method,
    theta: Theta,
    data: Data,
    config: Config,
    topology: Topology,
    backend: Backend,
    notes: Sequence[str],
) -> None:
    """What is about to happen, in a few lines; samples that were left out are never left out silently."""
    monitor.say(
        f"{model.architecture.family}, {topology.tp_size} tensor × {topology.dp_size} data parallel, sequence parallel "
        f"{'on' if topology.sequence_parallel else 'off'}, {backend.describe()}"
    )
    for line in notes:
        monitor.say(line)
    trained = theta.elements
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    share = f" ({100 * trained / frozen:.3f} %)" if frozen else ""
    monitor.say(f"{method.summary}; on each rank {trained:,} trained parameters beside {frozen:,} frozen{share}")
    if method.virtual:
        longest = config.data.max_length
        monitor.say(
            f"{method.virtual} virtual positions take from data.max_length {longest}: {longest - method.virtual} "
            "remain for a sample"
        )
    for dataset in (data.dataset, data.held_out):
        if dataset is not None:
            monitor.say(dataset.report.summary())


def _warn_of_locks() -> Iterator[str]:
    for lock in stale_build_locks():
        yield f"a killed build left {lock}, for which every later build of that extension waits; remove it"


def check_resumption(resumption: Resumption | None, config: Config, data: Data) -> None:
    """Raise UserError where the run that goes on would not be the one that stopped (`require_same_run`)."""
    if resumption is not None:
        states = data_state(data.dataset), data_state(data.held_out)
        require_same_run(config, resumption, *states, _steps(config, data))


def _steps(config: Config, data: Data) -> int:
    train = config.train
    return train.steps or max(1, math.ceil(train.epochs * len(data.dataset) / train.global_batch))


def _facts(config: Config, data: Data) -> Facts:
    path = config.model.path
    return Facts(
        Provenance(fingerprint(path), str(path), config.read_keys()),
        data_state(data.dataset),
        data_state(data.held_out),
    )
