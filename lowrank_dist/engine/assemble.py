"""Assembly of a run from method, engine and training loop, and the lines that a run prints at its start."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_dist.arch.config_json import config_notes, read_architecture
from lowrank_dist.arch.generation_config import generation_notes
from lowrank_dist.backend import apex
from lowrank_dist.backend.libraries import stale_build_locks
from lowrank_dist.config import Config
from lowrank_dist.data.keys import tokenizer_notes
from lowrank_dist.engine.checkpoint_writer import CheckpointWriter, Facts, Retention
from lowrank_dist.engine.datasets import Data
from lowrank_dist.engine.evaluator import Evaluator
from lowrank_dist.engine.forecast import Forecast
from lowrank_dist.engine.meter import Meter, Stragglers
from lowrank_dist.engine.reporter import open_reporter
from lowrank_dist.engine.resume import restore
from lowrank_dist.engine.run import Run
from lowrank_dist.engine.saving import CheckpointSaver
from lowrank_dist.engine.setting_notes import notes_on_best, notes_on_settings
from lowrank_dist.engine.trainer import Trainer
from lowrank_dist.engine.zero import Engine, OptimiserRules, ZeroOptimiser
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.formats.text_files import (
    TextFiles,
    note_on_adapter_tokenizer,
    note_on_base_tokenizer,
    unknown_end_ids,
)
from lowrank_dist.methods.method import Method
from lowrank_dist.methods.registry import method_package_reading
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.model.load import dtype_notes
from lowrank_dist.ops import extension
from lowrank_dist.parallel.theta import Theta
from lowrank_dist.parallel.topology import Topology


def choose_kernels(kernels: str, device: str) -> None:
    """Apply engine.kernels on `device` ("cpu" or "cuda"). Raises UserError if required kernels are not built."""
    extension.use_plain(kernels == "plain")
    apex.use_plain(kernels == "plain")
    if kernels == "compiled":
        extension.require_compiled(device)


def describe_kernels(kernels: str, device: str) -> list[str]:
    """Return a line for each implementation in use, with the reason where a faster one is not used."""
    if kernels == "plain":
        return ["plain PyTorch operators, norms and AdamW (engine.kernels: plain)"]
    return [extension.describe(device), *([apex.describe(device)] if device == "cuda" else [])]


def build_topology(config: Config) -> Topology:
    """Build the process groups that section `parallel` asks for, over all ranks. Raises as `Topology.build` does."""
    parallel = config.parallel
    return Topology.build(
        parallel.tensor_size,
        parallel.data,
        parallel.sequence,
        config.engine.timeout_seconds,
        across_nodes=parallel.across_nodes,
        fitting=read_architecture(config.model.path).legal_tp_sizes(),
    )


def optimiser_rules(config: Config) -> OptimiserRules:
    """Return the settings of ZeRO and AdamW."""
    train, engine = config.train, config.engine
    betas = train.beta1, train.beta2
    return OptimiserRules(engine.zero_stage, engine.clip, engine.reduce_bucket, train.weight_decay, betas, train.eps)


def build_engine(run: Run, model: CausalLM, theta: Theta) -> Engine:
    """Build the engine: the model and the optimiser of Θ. Collective.

    Where the run resumes, fp32 masters, moments and random generators are restored from the checkpoint.
    """
    device = run.backend.device
    optimiser = ZeroOptimiser(theta.parameters, run.topology, optimiser_rules(run.config), run.phases.enter)
    if run.resumption is not None:
        restore(run.resumption, theta, optimiser, run.topology, device)
    return Engine(model, theta, optimiser, device)


def build_trainer(run: Run, method: Method, engine: Engine, data: Data, forecast: Forecast) -> Trainer:
    """Open the run folder, report `startup_lines` and build the training loop. Collective."""
    run.open_folder()
    reporter = open_reporter(run, data.stream_range.steps)
    for line in startup_lines(run, method, engine, data, forecast):
        reporter.say(line)
    evaluator = Evaluator(run, engine, data, reporter)
    writer = _checkpoint_writer(run, method, engine, data) if run.writes else None
    saver = CheckpointSaver(run, engine, writer, evaluator.history, reporter.say)
    factor, hosts = run.config.engine.straggler_factor, run.topology.hosts
    stragglers = None if factor is None or len(hosts) == 1 else Stragglers(factor, hosts)
    meter = Meter(run.phases, stragglers, forecast, run.topology, run.backend)
    return Trainer(run, engine, data, evaluator, saver, reporter, meter)


def startup_lines(run: Run, method: Method, engine: Engine, data: Data, forecast: Forecast) -> Iterator[str]:
    """Yield the lines that describe the run at its start. Samples that were left out are always reported."""
    config, topology, backend = run.config, run.topology, run.backend
    yield (
        f"{engine.model.architecture.family}, {topology.tp_size} tensor × {topology.dp_size} data parallel, sequence "
        f"parallel {'on' if topology.sequence_parallel else 'off'}, {backend.describe()}"
    )
    yield from describe_kernels(config.engine.kernels, backend.device.type)
    if forecast.layout_line is not None:
        yield forecast.layout_line
    yield forecast.memory_line
    for lock in stale_build_locks():
        yield (
            f"{lock}: left by a build that was killed, and every later build of this extension waits for it; remove it"
        )
    yield from notes_on_settings(config, data.stream_range.steps)
    yield from notes_on_best(config, run.state, data.held_out_state)
    trained = engine.theta.elements
    frozen = sum(parameter.numel() for parameter in engine.model.parameters()) - trained
    share = f" (ratio {100 * trained / frozen:.3f} %)" if frozen else ""
    yield f"{method.summary}; each rank has {trained:,} trained and {frozen:,} frozen parameters{share}"
    yield from _notes_on_files(config, engine.model, afresh=run.resumption is None)
    if method.virtual_positions:
        longest, virtual = config.data.max_length, method.virtual_positions
        yield (f"{virtual} virtual positions leave {longest - virtual} of data.max_length {longest} for a sample")
    for dataset in (data.dataset, data.held_out):
        if dataset is not None:
            yield dataset.report.summary()
    yield from data.notes
    if run.resumption is not None:
        yield from run.resumption.messages
        yield f"resumed from {run.resumption.folder} at step {run.resumption.state.step} of {data.stream_range.steps}"
        yield from data.stream_range.notes
    elif config.train.resume == "auto":
        yield f"train.resume=auto: {config.output.dir} has no checkpoint; the run starts from the beginning"


def _notes_on_files(config: Config, model: CausalLM, *, afresh: bool) -> Iterator[str]:
    """Yield a line for each setting of base, tokenizer or starting adapter that is not applied or does not match.

    afresh: the run reads the starting adapter. A resumed run does not; the adapter may be gone.
    """
    path, start = config.model.path, config.own_section.starts_from
    yield from config_notes(path)
    yield from dtype_notes(path, model.config.params_dtype)
    yield from tokenizer_notes(config.data.tokenizer or path)
    if config.data.tokenizer is not None:
        yield from note_on_base_tokenizer(config.data.tokenizer, path)
    if config.eval.generate is not None:
        yield from generation_notes(path)
    if afresh and start is not None:
        yield from method_package_reading(start).files.notes(start)
        yield from note_on_adapter_tokenizer(start, config.data.tokenizer or path)


def _checkpoint_writer(run: Run, method: Method, engine: Engine, data: Data) -> CheckpointWriter:
    config, path = run.config, run.config.model.path
    text = TextFiles.of_run(config.data.tokenizer or path, path, data.dataset.ends)
    training = {"new_ends": unknown_end_ids(path, text.ends), "data_format": data.dataset.report.kind}
    provenance = Provenance(fingerprint(path), str(path), config.read_keys(), training=training)
    output = config.output
    retention = Retention(output.keep_last, output.keep_best, config.eval.best, output.publish)
    facts = Facts(provenance, data.state, data.held_out_state, text, run.started_at)
    return CheckpointWriter(run.folder, method, engine.theta.all_shapes(), facts, retention, run.state)
