"""A verification on the ranks of a job: cut the model, train it on all ranks, and hold it against the reference."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import transformers

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.cut import one_of_each_kind
from lowrank_dist.backend.select import Backend, init_process_group, local_rank, select_backend
from lowrank_dist.config import Config
from lowrank_dist.data.masking import Sample
from lowrank_dist.engine.agreement import require_same_start
from lowrank_dist.engine.assemble import build_topology, choose_kernels, optimiser_rules
from lowrank_dist.engine.forecast import with_tensor_size
from lowrank_dist.engine.meter import Watcher
from lowrank_dist.engine.resume import started_at
from lowrank_dist.errors import UserError
from lowrank_dist.methods.method import Setting
from lowrank_dist.methods.reference import Start
from lowrank_dist.methods.registry import method_package
from lowrank_dist.parallel.collectives import gather_texts
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.supervision.rank import Supervision
from lowrank_dist.terminal import put, say
from lowrank_dist.verify.compare import Record, compare, first_difference
from lowrank_dist.verify.cut_model import write_cut_model
from lowrank_dist.verify.reference import inputs_of, run_reference
from lowrank_dist.verify.report import beginning, table, verdict
from lowrank_dist.verify.run_side import STEPS, Job, RunSide, export, settings_for, without_dropout
from lowrank_dist.verify.trace import Traced

_POLL_SECONDS = 0.2


def verify(config: Config, fault: str | None, supervision: Supervision) -> int:
    """Verify the run `config` on all ranks. Returns the exit code: 0 where everything agrees, 1 where not.

    fault: one of cli.verify.FAULTS, to plant in the run's side. Raises UserError as the start of the run would.
    """
    backend = select_backend(config.model.device, local_rank())
    choose_kernels(config.engine.kernels, backend.device.type)
    supervision.enter("meeting")
    backend = init_process_group(backend, config.engine.timeout_seconds)
    require_same_start(config, backend)
    config, _ = with_tensor_size(config, backend)
    topology = build_topology(config)
    supervision.hosts = topology.hosts
    supervision.enter("model")
    return verify_on(config, fault, topology, backend, supervision)


def verify_on(config: Config, fault: str | None, topology: Topology, backend: Backend, watcher: Watcher) -> int:
    """Verify the run on ranks that have met. Collective. watcher: is told of progress. Otherwise as `verify`."""
    with ExitStack() as stack:
        temporary = partial(TemporaryDirectory, prefix="lowrank-dist-verify-")
        folders = _on_each_node(topology, lambda: stack.enter_context(temporary()))
        folder = Path(folders[topology.world_group.rank()])
        layers, config = _cut(config, folder, topology)
        job = Job(config, topology, backend, watcher, started_at(None, topology))
        trained = _train(job, folder, fault)
        # Rank 0's folder is a name that no other verification has.
        answer = f"lowrank_dist/verified/{folders[0]}"
        if trained is None:
            return _answer(answer, watcher)
        code = _compare(job, layers, trained)
        _store().set(answer, str(code))
        return code


def _cut(config: Config, folder: Path, topology: Topology) -> tuple[tuple[int, ...], Config]:
    """Write the cut model on every node, and say so. Returns its layers' numbers and the verification's config."""
    base = config.model.path
    package, architecture = method_package(config.method), read_architecture(base)
    section = without_dropout(package.files.complete(config.own_section, base))
    layers = one_of_each_kind(architecture, package.reference.adapted_layers(section, architecture))
    cut = folder / "model"
    nbytes = _on_each_node(topology, lambda: str(write_cut_model(base, cut, layers, config.model.dtype).nbytes))
    own = package.reference.cut_section(section, architecture, layers)
    config = settings_for(config, own, cut, folder / "exported", topology.dp_size)
    if topology.world_group.rank() == 0:
        for line in beginning(config, topology, layers, len(architecture.layers), int(nbytes[0])):
            say(line)
    return layers, config


@dataclass(frozen=True)
class _Trained:
    """The run's side, trained, on rank 0: what the reference starts from and is held against."""

    dtype: torch.dtype
    start: Start
    record: Record
    traced: Traced
    samples: Sequence[Sequence[Sample]]


def _train(job: Job, folder: Path, fault: str | None) -> _Trained | None:
    """Train the run's side, and free its model. Returns None on ranks above 0."""
    side = RunSide(job, fault)
    start = side.stored()
    if job.is_first:
        export(side.method, job.config, start, folder / "start", trained=False)
    record, traced = side.train()
    end = side.stored()
    if not job.is_first:
        return None
    exported = export(side.method, job.config, end, job.config.output.dir, trained=True)
    record = replace(record, exported=exported)
    dtype = side.model.config.params_dtype
    return _Trained(dtype, Start(folder / "start", start), record, traced, side.samples())


def _compare(job: Job, layers: Sequence[int], trained: _Trained) -> int:
    """Run the references, print the comparison and return the exit code."""
    gc.collect()  # the run's model, whose modules and process groups refer to each other
    reference, by = _reference(job, trained, torch.float32)
    rounded = _reference(job, trained, torch.bfloat16)[0] if trained.dtype == torch.bfloat16 else None
    differences = compare(trained.record, reference, rounded)
    put(f"reference: transformers {transformers.__version__}, {by}")
    for line in table(trained.record, reference, differences, layers):
        put(line)
    put(verdict(trained.record, differences, layers))
    return int(first_difference(differences) is not None)


def _reference(job: Job, trained: _Trained, dtype: torch.dtype) -> tuple[Record, str]:
    """Return the record of transformers' model in `dtype`, and what applies the method to it."""
    config, device = job.config, job.backend.device
    setting = Setting(config.method, config.model.path, config.train.seed, config.data.max_length, "off")
    package = method_package(config.method).reference
    reference = package.build(config.own_section, setting, trained.start, dtype, device)
    inputs = inputs_of(reference, trained.samples[0], trained.traced)
    progress = partial(job.watcher.enter, "evaluation", STEPS)
    record = run_reference(reference, trained.samples, config.train.lr, optimiser_rules(config), progress)
    return replace(record, inputs=inputs), reference.by


def _on_each_node(topology: Topology, work: Callable[[], str]) -> list[str]:
    """Call `work` on the first rank of each node. Returns the text of every rank's node, in rank order. Collective.

    A UserError or OSError of `work` is raised on every rank, as UserError.
    """
    rank, hosts = topology.world_group.rank(), topology.hosts
    answer = {}
    if rank == hosts.index(hosts[rank]):
        try:
            answer = {"text": work()}
        except (UserError, OSError) as error:
            answer = {"error": str(error)}
    answers = [json.loads(text) for text in gather_texts(json.dumps(answer), topology.host_group, torch.device("cpu"))]
    errors = [each["error"] for each in answers if "error" in each]
    if errors:
        raise UserError(errors[0])
    return [answers[hosts.index(host)]["text"] for host in hosts]


def _answer(name: str, watcher: Watcher) -> int:
    """Return the exit code of rank 0, which may compute its references for minutes. name: its key in the store.

    A launcher ends all ranks when the first ends with an error, so every rank waits. Each look counts as progress for
    the watchdog.
    """
    while not _store().check([name]):
        watcher.enter("evaluation", STEPS)
        time.sleep(_POLL_SECONDS)
    return int(_store().get(name))


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
