"""From a config, or from a shape and overrides, to the job that is planned."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_dist.arch.model_files import BUILT_IN
from lowrank_dist.arch.placement import LoraRules
from lowrank_dist.config import Config, load_config
from lowrank_dist.errors import UserError
from lowrank_dist.plan.factors import joined, low_rank
from lowrank_dist.plan.job import Decoding, Job, Layout, Tuning
from lowrank_dist.plan.layouts import Cluster, Fixed, choose
from lowrank_dist.plan.model import Model, find_model

# What a plan from a shape has no use for, and a config cannot do without.
_STAND_IN = "model: {path: none}\ndata: {train: none}\noutput: {dir: none}\n"


@dataclass(frozen=True)
class Request:
    """What is to be planned. whole: the config is a run's, defaults included."""

    model: Model
    config: Config
    whole: bool


def read_request(what: str, overrides: Sequence[str]) -> Request:
    """`what` is a run's YAML file, a built-in shape, a model folder or a config.json.

    Raises ConfigError for what is wrong with the config, UserError for the rest.
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml") or (path.is_file() and path.suffix != ".json"):
        config = load_config([what, *overrides])
        source = str(config.model.path)
        if source not in BUILT_IN and not config.model.path.exists():
            raise UserError(
                f"model.path: {source} is not there, and a plan needs its config.json: give the folder as "
                f"model.path=DIR, or one of the built-in shapes ({', '.join(BUILT_IN)})"
            )
        return Request(find_model(source), config, True)
    model = find_model(what)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as stand_in:
        stand_in.write(_STAND_IN)
        stand_in.flush()
        return Request(model, load_config([stand_in.name, *overrides]), False)


def fixed_of(request: Request) -> Fixed:
    """What is decided of the layout: all of it by a run's config, what was given as overrides for a shape."""
    parallel, engine, train = request.config.parallel, request.config.engine, request.config.train

    def given(section: object, key: str) -> bool:
        return request.whole or key in section.model_fields_set

    return Fixed(
        tensor=parallel.tensor if given(parallel, "tensor") else None,
        data=parallel.data,
        sequence=parallel.sequence,
        micro_batch=train.micro_batch if given(train, "micro_batch") else None,
        recompute=engine.recompute == "full" if given(engine, "recompute") else None,
    )


def layout_overrides(request: Request, cluster: Cluster) -> list[str]:
    """Overrides that give a run the plan's layout, for the keys that its config and command line leave open.

    Every row is taken to be as long as data.max_length allows, and all of it trained on. Raises UserError where nothing
    fits, with what would make it fit.
    """
    parallel, engine, train = request.config.parallel, request.config.engine, request.config.train
    choice = choose(job_of(request, 1.0), fixed_of(replace(request, whole=False)), cluster)
    layout = choice.best.job.layout
    if not choice.fits:
        raise UserError(
            f"no layout of {request.model.name} fits {cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}: the "
            f"smallest ({layout}) lacks {choice.best.short / 1e9:.1f} GB on each; it would fit with "
            f"{'; '.join(choice.remedies)}"
        )
    wanted = [(parallel, "tensor", "parallel.tensor", str(layout.tensor))]
    if layout.tensor > cluster.gpus_per_node:
        wanted.append((parallel, "across_nodes", "parallel.across_nodes", "true"))
    wanted.append((train, "micro_batch", "train.micro_batch", str(layout.micro_batch)))
    wanted.append((engine, "recompute", "engine.recompute", "full" if layout.recompute else "none"))
    return [f"{name}={value}" for section, key, name, value in wanted if key not in section.model_fields_set]


def job_of(request: Request, target_share: float) -> Job:
    """The job in a layout of one rank, for `layouts.choose` to replace."""
    config, model, arch = request.config, request.model, request.model.architecture
    length = config.data.max_length
    if length > arch.max_positions:
        raise UserError(
            f"data.max_length={length} is longer than the {arch.max_positions} positions of {model.name}; "
            f"use at most data.max_length={arch.max_positions}"
        )
    device = "cpu" if config.model.device == "cpu" else "cuda"
    lora, tuning, generate = config.lora, tuning_of(config), config.eval.generate
    if length - tuning.virtual < 2:
        raise UserError(
            f"{config.method}.length={tuning.virtual} takes from data.max_length={length}: no room is left for a "
            f"sample of two tokens; give a length of at most {length - 2}, or a larger data.max_length"
        )
    return Job(
        architecture=arch,
        name=model.name,
        stored_dtype=model.dtype,
        placement=low_rank(
            arch,
            LoraRules(lora.rank, lora.alpha, lora.targets, lora.rslora, lora.rank_pattern, lora.alpha_pattern),
        )
        if config.method == "lora"
        else joined(arch, config.method),
        layout=Layout(1, 1, False, config.train.micro_batch, config.engine.recompute == "full"),
        global_batch=config.train.global_batch,
        length=length,
        target_share=target_share,
        dtype=model.dtype if config.model.dtype == "auto" else config.model.dtype,
        vocab_multiple=config.model.vocab_multiple,
        zero_stage=config.engine.zero_stage,
        reduce_bucket=config.engine.reduce_bucket,
        device=device,
        # On by itself only where lanes were measured to be faster (parallel/factors.py).
        lanes=config.engine.lanes == "on" or (config.engine.lanes == "auto" and device == "cpu"),
        packing=config.data.packing,
        tuning=tuning,
        decoding=None if generate is None else Decoding(generate.batch, generate.max_new_tokens),
    )


def tuning_of(config: Config) -> Tuning:
    """What the config's method section says."""
    if config.method in ("adapter_h", "adapter_l"):
        adapter = config.adapter
        return Tuning(config.method, bottleneck=adapter.bottleneck, sharded=adapter.placement == "sharded")
    if config.method == "prefix":
        return Tuning("prefix", virtual=config.prefix.length, width=config.prefix.width)
    if config.method == "prompt":
        return Tuning("prompt", virtual=config.prompt.length)
    return Tuning(config.method)
