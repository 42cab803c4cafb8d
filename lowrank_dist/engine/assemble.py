"""From configuration sections to the parts of a run: what launch/train.py puts together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lowrank_dist.backend import apex
from lowrank_dist.backend.build_locks import stale_build_locks
from lowrank_dist.backend.select import Backend
from lowrank_dist.checkpoint.fingerprint import fingerprint
from lowrank_dist.checkpoint.provenance import Provenance
from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.config import Config
from lowrank_dist.data.dataset import Dataset, load_dataset
from lowrank_dist.data.loader import Loader, StepBatch, eval_batches
from lowrank_dist.data.tokenizer import Tokenizer, load_tokenizer
from lowrank_dist.engine.forecast import Forecast
from lowrank_dist.engine.history import History, label
from lowrank_dist.engine.meter import Meter
from lowrank_dist.engine.monitor import Monitor
from lowrank_dist.engine.phases import Phases
from lowrank_dist.engine.progress import Progress
from lowrank_dist.engine.resume import Resumption, require_same_run, restore
from lowrank_dist.engine.run_folder import RunFolder
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.engine.schedule import Schedule
from lowrank_dist.engine.stragglers import Stragglers
from lowrank_dist.engine.trainer import Generating, NonFinite, Pace, Trainer
from lowrank_dist.engine.writing import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.zero import OptimiserRules, ZeroOptimiser
from lowrank_dist.errors import UserError
from lowrank_dist.generate.decode import check_lengths
from lowrank_dist.generate.evaluation import EvaluationRules, evaluate_generation
from lowrank_dist.generate.prompts import read_prompts, stop_tokens
from lowrank_dist.generate.rules import DecodingRules
from lowrank_dist.methods.method import Method
from lowrank_dist.model.architecture import Architecture
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.ops import choice, extension
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.rank import Supervision

EVAL_MICROBATCHES = 16  # of each rank, made at a time


@dataclass(frozen=True)
class Data:
    """The data sets of a run and their loaders on this data-parallel rank; generation: see `Trainer`."""

    dataset: Dataset
    train: Loader
    held_out: Dataset | None
    evaluation: Callable[[], Iterator[StepBatch]] | None
    generation: Generating | None


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


def build_theta(
    model: CausalLM, method: Method, config: Config, topology: Topology, resumption: Resumption | None
) -> Theta:
    """Attach and initialise what is trained; the values of a checkpoint come with the optimiser's state."""
    model.set_recompute(config.engine.recompute == "full")
    return method.attach(model, topology, resumed=resumption is not None)


def build_data(config: Config, method: Method, architecture: Architecture, topology: Topology) -> Data:
    """Tokenise and deal out the data sets; the order of samples is a function of seed and step.

    Raises UserError for samples that cannot be trained on, and for those from which eval.generate cannot generate.
    """
    vocab = architecture.vocab
    data, train = config.data, config.train
    # The longest sample, and the longest row: a prefix has positions, but none in a row.
    longest = data.max_length - method.virtual
    tokenizer = load_tokenizer(data.tokenizer or config.model.path)
    cut = {
        "global_batch": train.global_batch,
        "max_length": longest + len(method.lead),
        "packing": data.packing,
        "dp_rank": topology.dp_rank,
        "dp_size": topology.dp_size,
        "pad_multiple": topology.tp_size if topology.sequence_parallel else 1,
    }
    dataset = load_dataset(data.train, tokenizer, longest, vocab, method.lead)
    loader = Loader(dataset, seed=train.seed, micro_batch=train.micro_batch, **cut)
    if data.eval is None:
        return Data(dataset, loader, None, None, None)
    held_out = load_dataset(data.eval, tokenizer, longest, vocab, method.lead)
    micro_batch = config.eval.micro_batch or train.micro_batch
    # Nothing is accumulated over an eval batch: its size decides how many rows of like length are put together, and
    # bounds what is laid out as tensors, and packed, at a time.
    cut["global_batch"] = EVAL_MICROBATCHES * micro_batch * topology.dp_size
    evaluation = partial(eval_batches, held_out, micro_batch=micro_batch, **cut)
    return Data(dataset, loader, held_out, evaluation, _generation(config, method, tokenizer, architecture, topology))


def _generation(
    config: Config, method: Method, tokenizer: Tokenizer, architecture: Architecture, topology: Topology
) -> Generating | None:
    """What an evaluation generates, with everything that may be wrong with it found before training begins."""
    asked = config.eval.generate
    if asked is None:
        return None
    try:
        decoding = DecodingRules(asked.max_new_tokens, batch=asked.batch, stop=tuple(asked.stop))
        rules = EvaluationRules(tuple(asked.metrics), decoding)
        stops = stop_tokens(config.model.path, tokenizer)
        samples = read_prompts(config.data.eval, tokenizer, stops, vocab=architecture.vocab, references=True)
        samples = samples[: asked.samples]
        check_lengths(samples, architecture.max_positions - method.virtual)
    except UserError as error:
        raise UserError(f"eval.generate: {error}") from error

    def generation(model: CausalLM, progress: Callable[[int], None]) -> dict[str, float]:
        return evaluate_generation(model, tokenizer, samples, rules, topology, progress)

    return generation


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
    notes += _notes_on_best(config, state)
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


def _notes_on_best(config: Config, state: TrainingState | None) -> list[str]:
    """What limits the choice of the best step, a line each. state: of the run that goes on, or None."""
    evaluation, save_every, lines = config.eval, config.output.save_every, []
    if config.data.eval is not None and evaluation.every is not None:
        both = None if save_every is None else math.lcm(evaluation.every, save_every)
        if both != evaluation.every:
            steps = "the last" if both is None else f"one of {both}, {2 * both}, … and the last"
            lines.append(
                f"checkpoints/best can only be a step that is both evaluated and saved, {steps}: eval.every is "
                f"{evaluation.every}, output.save_every {save_every or 'null'}"
            )
    if state is None:
        return lines
    if not state.evaluations.get(evaluation.best) and any(state.evaluations.values()):
        lines.append(
            f"eval.best is {label(evaluation.best)}, which was not measured up to step {state.step}: checkpoints/best "
            "and eval.patience begin with the next evaluation"
        )
    before, now = (state.config.get("eval") or {}).get("generate"), config.model_dump(mode="json")["eval"]["generate"]
    if before and now and any(before.get(key) != now[key] for key in ("max_new_tokens", "stop", "samples")):
        lines.append(
            f"eval.generate was {before} up to step {state.step}: what was measured until then counts on, though other "
            "texts were generated"
        )
    return lines


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


def _facts(config: Config, data: Data) -> Facts:
    path = config.model.path
    return Facts(
        Provenance(fingerprint(path), str(path), config.read_keys()),
        _data_state(data.dataset),
        _data_state(data.held_out),
    )
