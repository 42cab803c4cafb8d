"""Builds the job to plan from a run's config, or from a model shape and overrides. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.arch.config_json import parse_architecture
from lowrank_dist.arch.model_files import BUILT_IN, config_file, declared_dtype, find_config, read_config, stored_dtype
from lowrank_dist.config import Config, config_of, load_config
from lowrank_dist.errors import UserError
from lowrank_dist.methods.registry import method_package
from lowrank_dist.planner.choice import choose
from lowrank_dist.planner.job import Decoding, Job, Layout
from lowrank_dist.planner.layouts import Cluster, Fixed
from lowrank_dist.sections.section import Section

# Placeholders for the required config keys that a plan from a shape does not use.
_STAND_IN = {"model": {"path": "none"}, "data": {"train": "none"}, "output": {"dir": "none"}}


@dataclass(frozen=True)
class Model:
    """The model to plan for.

    name: of a built-in shape, or of the model's folder. dtype: of the published weights; fp16 runs as bf16.
    """

    name: str
    architecture: Architecture
    dtype: Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Request:
    """The request for a plan. whole: the config is a run's, so its defaults count as given."""

    model: Model
    config: Config
    whole: bool


def find_model(what: str) -> Model:
    """Return the model of a built-in shape, a model folder or a config.json. Raises UserError for anything else."""
    file = find_config(what)
    return read_model(file, what if what in BUILT_IN else None)


def read_model(path: Path, name: str | None = None) -> Model:
    """Return the model of a folder, or of a config.json and the weights beside it.

    name: None for the folder's.
    """
    file = config_file(path)
    values = read_config(file)
    dtype = stored_dtype(file.parent) or declared_dtype(values)
    return Model(name or file.parent.name, parse_architecture(values, str(file)), dtype)


def read_request(what: str, overrides: Sequence[str]) -> Request:
    """Return the request for a run's YAML file, a built-in shape, a model folder or a config.json.

    Raises ConfigError for errors in the config, UserError for the rest.
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml") or (path.is_file() and path.suffix != ".json"):
        config = load_config(what, overrides)
        source = str(config.model.path)
        if source not in BUILT_IN and not config.model.path.exists():
            raise UserError(
                f"model.path: {source} does not exist, and a plan needs its config.json; give the folder as "
                f"model.path=DIR, or one of the built-in shapes ({', '.join(BUILT_IN)})"
            )
        return Request(find_model(source), config, True)
    return Request(find_model(what), config_of(_STAND_IN, overrides), False)


def fixed_of(request: Request) -> Fixed:
    """Return the fixed part of the layout: all of it for a run's config, only the overrides for a shape.

    parallel.tensor=auto fixes no size.
    """
    parallel, engine, train = request.config.parallel, request.config.engine, request.config.train

    def given(section: Section, key: str) -> bool:
        return request.whole or key in section.model_fields_set

    return Fixed(
        tensor=parallel.tensor if isinstance(parallel.tensor, int) and given(parallel, "tensor") else None,
        data=parallel.data,
        sequence=parallel.sequence,
        micro_batch=train.micro_batch if given(train, "micro_batch") else None,
        recompute=engine.recompute == "full" if given(engine, "recompute") else None,
    )


def auto_tensor(request: Request, cluster: Cluster) -> int:
    """Return the tensor-parallel size that parallel.tensor=auto stands for on a cluster.

    It is that of the fastest layout that agrees with the config and fits with a margin for the plan's error. Where no
    layout fits, the closest one counts. A group crosses nodes only with parallel.across_nodes. Every row is assumed to
    have data.max_length tokens, all of them targets. Raises UserError where no layout agrees with the config.
    """
    fixed = replace(fixed_of(request), tensor=None, across_nodes=request.config.parallel.across_nodes)
    return choose(job_of(request, 1.0), fixed, cluster).safe.job.layout.tensor


def job_of(request: Request, target_share: float) -> Job:
    """Return the job in a layout of one rank, which `layouts.choose` replaces.

    Raises UserError if data.max_length exceeds the model's positions, or leaves no room for tokens beside the method's
    virtual positions.
    """
    config, model, arch = request.config, request.model, request.model.architecture
    length = config.data.max_length
    if length > arch.max_positions:
        raise UserError(
            f"data.max_length={length} is longer than the {arch.max_positions} positions of {model.name}; "
            f"use at most data.max_length={arch.max_positions}"
        )
    reason = config.own_section.reason_without_room(config.method, length)
    if reason is not None:
        raise UserError(reason)
    device: Literal["cpu", "cuda"] = "cpu" if config.model.device == "cpu" else "cuda"
    generate = config.eval.generate
    return Job(
        architecture=arch,
        name=model.name,
        stored_dtype=model.dtype,
        layout=Layout(1, 1, False, config.train.micro_batch, config.engine.recompute == "full"),
        global_batch=config.train.global_batch,
        length=length,
        target_share=target_share,
        dtype=model.dtype if config.model.dtype == "auto" else config.model.dtype,
        vocab_multiple=config.model.vocab_multiple,
        zero_stage=config.engine.zero_stage,
        reduce_bucket=config.engine.reduce_bucket,
        device=device,
        # `auto` fuses factors only where that was measured to be faster (parallel/frozen.py).
        fuse_factors=config.engine.lanes == "on" or (config.engine.lanes == "auto" and device == "cpu"),
        packing=config.data.packing,
        footprint=method_package(config.method).footprint.footprint_of(config.method, config.own_section, arch),
        decoding=None if generate is None else Decoding(generate.batch, generate.max_new_tokens),
    )
