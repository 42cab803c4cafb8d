"""The inputs of a run as this node sees them: configuration, base model, tokenizer and adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.backend.libraries import silence_megatron
from lowrank_dist.doctor.rows import Row, format_size, one_line, plural
from lowrank_dist.doctor.start import built_method
from lowrank_dist.errors import UserError

if TYPE_CHECKING:
    from lowrank_dist.config import Config
    from lowrank_dist.planner.job import Parameters

# Bytes per element: fp32 master and two moments of AdamW.
STATE_BYTES = 12
THETA = "trained parameters"


def configuration(config: Config) -> list[Row]:
    """Return a row on the configuration as it was resolved here."""
    digest = hashlib.sha256(config.to_yaml().encode()).hexdigest()[:12]
    return [Row("configuration", "ok", f"valid, digest {digest}", alike=f"digest {digest}")]


def device(config: Config) -> list[Row]:
    """Return a row on the requested device."""
    from lowrank_dist.backend.devices import gpus

    wanted = config.model.device
    if wanted == "cuda":
        try:
            gpus()
        except RuntimeError as error:
            detail = f"cuda is required, but {one_line(str(error))}; use model.device=cpu or auto"
            return [Row("model.device", "missing", detail)]
    return [Row("model.device", "ok", wanted)]


def model(config: Config) -> list[Row]:
    """Return rows on the model folder, which must be complete and of a trainable family. Each problem is a row."""
    from lowrank_dist.formats.provenance import fingerprint
    from lowrank_dist.formats.report import inspect_model

    folder = config.model.path
    report = inspect_model(folder)
    if report.problems:
        return [Row("model folder", "broken", one_line(problem)) for problem in dict.fromkeys(report.problems)]
    facts = report.facts
    if not facts["trainable_here"]:
        return [Row("model folder", "unsupported", f"{folder}: {one_line(str(facts['why_not']))}")]
    digest = fingerprint(folder)[:12]
    size = f"{plural(facts['shards'], 'shard')}, {format_size(facts['file_bytes'])}"
    said = f"{facts['family']}, {facts['parameters']:,} parameters, {size}"
    rows = [Row("model folder", "ok", f"{folder}: {said}, fingerprint {digest}", alike=f"fingerprint {digest}")]
    tensor = config.parallel.tensor
    if tensor != "auto" and tensor not in (sizes := facts["tensor_parallel_sizes"]):
        detail = f"{tensor} does not divide the heads; set it to one of {', '.join(map(str, sizes))}"
        rows.append(Row("parallel.tensor", "broken", detail))
    return rows


def tokenizer(config: Config) -> list[Row]:
    """Return a row on the tokenizer, which must load and encode."""
    from lowrank_dist.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(config.data.tokenizer or config.model.path)
    ids = loaded.encode(["The quick brown fox"])[0]
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()[:12]
    return [
        Row("tokenizer", "ok", f"{loaded.path}: can be loaded and encodes", alike=f"encodes a sentence to {digest}")
    ]


def theta(config: Config) -> list[Row]:
    """Return a row on the parameters that the run would train."""
    count, start = parameters(config).trained, config.own_section.starts_from
    built_method(config)
    origin = "" if start is None else f", from {start}"
    return [Row(THETA, "ok", f"{config.method}: {count:,} trainable numbers{origin}", alike=f"{count:,}")]


def parameters(config: Config) -> Parameters:
    """Return |Θ|, the number of trained parameters.

    Raises UserError where targets, sizes, ranks, model or the initial adapter do not fit together.
    """
    from lowrank_dist.methods.registry import method_package

    own = method_package(config.method)
    section = own.files.complete(config.own_section, config.model.path)
    reasons = (
        None if config.parallel.tensor == "auto" else section.reason_not_shardable(config.parallel.tensor),
        section.reason_without_room(config.method, config.data.max_length),
    )
    for reason in reasons:
        if reason is not None:
            raise UserError(reason)
    architecture = read_architecture(config.model.path)
    return own.footprint.footprint_of(config.method, section, architecture).parameters(architecture)


def checkpoint_bytes(config: Config) -> tuple[int, int]:
    """Return the bytes of a checkpoint's tensors, and of the adapter copied out of the last. Raises as `parameters`.

    A checkpoint has the fp32 master and two moments of each element of Θ, and the adapter in fp32 or the model in its
    own dtype, which is not copied.
    """
    from lowrank_dist.formats.model_folder import open_checkpoint
    from lowrank_dist.methods.registry import method_package

    count = parameters(config)
    if method_package(config.method).files.published:
        return STATE_BYTES * count.trained + 4 * count.stored, 4 * count.stored
    if config.model.dtype == "auto":
        with open_checkpoint(config.model.path) as checkpoint:
            itemsize = checkpoint.main_dtype().itemsize
    else:
        itemsize = {"fp32": 4, "bf16": 2}[config.model.dtype]
    return STATE_BYTES * count.trained + itemsize * count.stored, 0


def layout(config: Config, size: int, hosts: Sequence[str]) -> list[Row]:
    """Return a row on the parallel layout, by the rules of the run itself; nodes may have unequal numbers of ranks.

    size: ranks of the job. hosts: the node of each rank, or none where some have not connected. Raises UserError where
    TP × DP is not `size`, or a tensor-parallel group crosses nodes and may not.
    """
    with silence_megatron():
        from lowrank_dist.parallel.topology import refuse_crossing, require_sizes

    parallel = config.parallel
    if parallel.tensor == "auto":
        detail = (
            "parallel.tensor=auto: chosen at the start, for the ranks and their memory; `lowrank-dist plan` says which"
        )
        return [Row("parallel layout", "ok", detail)]
    try:
        fitting = read_architecture(config.model.path).legal_tp_sizes()
    except UserError:  # it has a row of its own
        fitting = None
    require_sizes(size, parallel.tensor, parallel.data, fitting)
    if not parallel.across_nodes:
        refuse_crossing(hosts, parallel.tensor, fitting)
    return [Row("parallel layout", "ok", f"{parallel.tensor} tensor × {size // parallel.tensor} data parallel")]
