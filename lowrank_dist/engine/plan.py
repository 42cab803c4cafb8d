"""The plan of a run on a cluster. Imports no torch, unless the plan is verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lowrank_dist.config import Config
from lowrank_dist.engine.planning import Request, auto_tensor, find_model, fixed_of, job_of, read_request
from lowrank_dist.errors import UserError
from lowrank_dist.methods.registry import Sizes, footprints_beside, method_package
from lowrank_dist.planner.choice import choose
from lowrank_dist.planner.describe import describe
from lowrank_dist.planner.job import Job
from lowrank_dist.planner.layouts import Cluster, Fixed
from lowrank_dist.planner.result import Plan, Setting
from lowrank_dist.sections.section import Section


def plan(
    source: Config | str | Path,
    cluster: Cluster,
    overrides: Sequence[str] = (),
    *,
    target_share: float | None = None,
    sizes: Sizes | None = None,
    verify: Callable[[str], None] | None = None,
) -> Plan:
    """Return the plan of a run on a cluster.

    source: a run's config or its YAML file, a built-in shape, a model folder or its config.json. overrides: changes to
    it, section.key=value; none where `source` is a Config. target_share: the share of the tokens that is trained on,
    above 0 and at most 1; None for 1. sizes: of the methods that are compared with the run's own. verify: where it is
    given, the planned step is executed on fake tensors as well, which takes seconds to minutes; it is called with the
    name of each stage as the stage begins.

    Raises UserError for errors in the config (ConfigError), the model or an argument, and where no layout respects the
    config. A plan that does not fit is returned, with `fits` False and the remedies.
    """
    if target_share is not None and not 0 < target_share <= 1:
        raise UserError(f"--target-share: {target_share} is not a share; give a number above 0 and at most 1")
    if isinstance(source, Config):
        if overrides:
            raise UserError(f"{overrides[0]}: a Config is not changed any more: give overrides to load_config")
        request = Request(find_model(str(source.model.path)), source, True)
    else:
        request = read_request(str(source), overrides)
    request = _with_adapter(request)
    job, fixed = job_of(request, 1.0 if target_share is None else target_share), fixed_of(request)
    auto = auto_tensor(request, cluster) if request.config.parallel.tensor == "auto" else None
    fixed = fixed if auto is None else replace(fixed, tensor=auto)
    planned, free = choose(job, fixed, cluster), choose(job, Fixed(), cluster)
    layout, output = planned.best.job.layout, request.config.output
    found = describe(
        planned,
        None if free.best.job.layout == layout else free,
        cluster,
        footprints_beside(job.footprint, sizes or Sizes(), job.architecture, layout.tensor),
        output.keep_last,
        output.keep_best,
        tuple(_settings(request, fixed, planned.best.job, target_share)),
        auto,
    )
    if verify is None:
        return found
    verify("loading PyTorch, Megatron and DeepSpeed")
    from lowrank_dist.engine.verification import verification

    return replace(found, verification=verification(planned.best, request.config, verify))


def _with_adapter(request: Request) -> Request:
    """Return the request with the method's section completed by the adapter that training starts from."""
    config = request.config
    if config.own_section.starts_from is None:
        return request
    if not request.whole:
        raise UserError(
            "lora.init_from: an adapter can only be read together with its model; plan a run's YAML file, or give "
            "lora.rank and lora.targets"
        )
    section = method_package(config.method).files.complete(config.own_section, config.model.path)
    return replace(request, config=config.with_own_section(section))


def _settings(request: Request, fixed: Fixed, job: Job, target_share: float | None) -> Iterator[Setting]:
    """Yield what the plan assumes: the workload, the method's keys that decide what is trained, and the layout."""
    config, layout = request.config, job.layout

    def of(section: Section, key: str, name: str) -> Setting:
        value = getattr(section, key)
        shown = value if isinstance(value, int | float) else str(value)
        return Setting(name, shown, "given" if key in section.model_fields_set else "default")

    yield of(config.train, "global_batch", "train.global_batch")
    yield of(config.data, "max_length", "data.max_length")
    yield Setting("--target-share", job.target_share, "default" if target_share is None else "given")
    if config.data.packing:
        yield of(config.data, "packing", "data.packing")
    yield of(config, "method", "method")
    own = config.own_section
    for key in own.__class__.model_fields:
        if key in own.shaping and getattr(own, key):
            yield of(own, key, f"{method_package(config.method).section}.{key}")
    own_size = None if config.parallel.tensor == "auto" else fixed.tensor
    chosen = (
        (config.parallel, "tensor", "parallel.tensor", own_size, layout.tensor),
        (config.train, "micro_batch", "train.micro_batch", fixed.micro_batch, layout.micro_batch),
        (config.engine, "recompute", "engine.recompute", fixed.recompute, "full" if layout.recompute else "none"),
    )
    for section, key, name, value, planned in chosen:
        yield of(section, key, name) if value is not None else Setting(name, planned, "plan")
