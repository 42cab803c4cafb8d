"""The configuration of a run, assembled from the sections that lie beside their owners. Imports no torch.

The sections `engine`, `train` and `output` are defined here: their owner, the engine, reads the whole configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from lowrank_dist.data.config import DataConfig
from lowrank_dist.generate.config import EvalConfig
from lowrank_dist.methods.bottleneck.config import AdapterConfig
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.registry import METHOD_PACKAGES, SECTIONS, method_package
from lowrank_dist.model.config import ModelConfig
from lowrank_dist.parallel.config import ParallelConfig
from lowrank_dist.sections.scalars import Dumper
from lowrank_dist.sections.section import MethodName, MethodSection, Section, YamlPath

Resume: TypeAlias = Annotated[
    Annotated[Literal["never", "auto"], Tag("word")] | Annotated[YamlPath, Tag("path")],
    Discriminator(lambda value: "word" if value in ("never", "auto") else "path"),
]


class EngineConfig(Section):
    """Execution of a run: ZeRO, operators, time limits."""

    zero_stage: Literal[1, 2] = Field(
        1,
        description="stage of ZeRO, 1 or 2; others are refused (stage 0 trains wrongly; stage 3 gathers the base at "
        "every step)",
    )
    clip: float | None = Field(
        1.0, gt=0, description="largest gradient norm, a number above 0, or null for no clipping"
    )
    recompute: Literal["none", "full"] = Field(
        "none", description="none, or full (recompute the activations of every layer in backward, to save memory)"
    )
    timeout_seconds: int = Field(
        600, ge=1, description="seconds after which a collective that hangs, or a rank without progress, is an error"
    )
    straggler_factor: float | None = Field(
        1.5,
        gt=1,
        description="number above 1: ranks that need more than this times the median time of all ranks are reported; "
        "or null for no reports",
    )
    reduce_bucket: int | None = Field(
        None, ge=1, description="elements of the reduction bucket, or null for the number of trainable parameters"
    )
    kernels: Literal["auto", "compiled", "plain"] = Field(
        "auto",
        description="auto (compiled operators and apex if they are installed), compiled (the same, but an error if the "
        "operators are not built) or plain (only PyTorch's)",
    )
    lanes: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on (store a factor next to its frozen weight, so that one GEMM multiplies by both; only with "
        "sequence parallelism), off, or auto (on where it was measured to be faster: on CPUs)",
    )


class TrainConfig(Section):
    """Training of a run: length, batches, optimiser, resumption."""

    steps: int | None = Field(
        None, ge=1, description="number of optimizer steps, at least 1; or set train.epochs instead"
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="passes over data.train, above 0 (1 if train.steps is null too); the last batch may be smaller. "
        "Set this or train.steps, not both",
    )
    global_batch: int = Field(8, ge=1, description="samples in an optimizer step over all ranks, at least 1")
    micro_batch: int = Field(
        1,
        ge=1,
        description="rows that a rank processes at once (per_device_train_batch_size); must divide train.global_batch",
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate above 0")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="schedule of the learning rate after the warmup: cosine, linear or constant"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warmup, at least 0")
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="final learning rate as a share of train.lr, from 0 to 1; 0 decays to zero"
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="AdamW's decoupled weight decay, at least 0, for all trained parameters, norms and biases included",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate, at least 0 and below 1")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second decay rate, at least 0 and below 1")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon above 0")
    seed: int = Field(
        42,
        ge=0,
        lt=2**32,
        description="seed of initial values, dropout and the order of samples, at least 0 and below 2^32",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="action for a loss or gradient that is not finite: stop (end the run) or skip (leave out the step)",
    )
    max_skips: int = Field(
        10, ge=1, description="number of skipped steps in a row after which the run stops with an error, at least 1"
    )
    log_every: int = Field(1, ge=1, description="steps between log lines, at least 1")
    ignore_plan: bool = Field(
        False, description="true (start even if the plan says that the run does not fit into memory) or false"
    )
    resume: Resume = Field(
        "never",
        description="never, auto (resume from the newest complete checkpoint in output.dir, if there is one) or a "
        "checkpoint folder (write ./auto for a folder named auto)",
    )
    resume_changes: list[str] = Field(
        [],
        description="list of the keys (section.key) that may differ from the checkpoint's, such as [train.lr]",
    )

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        steps = info.data.get("steps")
        if steps is not None and epochs is not None:
            raise ValueError(
                f"train.steps ({steps}) and train.epochs both say how long to train: for epochs, set train.steps=null"
            )
        return 1.0 if epochs is None and steps is None else epochs

    @field_validator("micro_batch")
    @classmethod
    def _divides_the_batch(cls, micro_batch: int, info: ValidationInfo) -> int:
        if "global_batch" in info.data and info.data["global_batch"] % micro_batch:
            raise ValueError(f"train.global_batch ({info.data['global_batch']}) is not a multiple of it")
        return micro_batch


class OutputConfig(Section):
    """Output of a run: its folder, checkpoints and logs."""

    dir: YamlPath = Field(
        description="folder of the run, which the run creates, outside the model folder. If it already holds a run, "
        "set train.resume=auto to continue that run, or output.overwrite=true to remove it"
    )
    overwrite: bool = Field(
        False,
        description="true (remove the run in output.dir, unless train.resume continues it) or false",
    )
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints, or null for only at the end")
    keep_last: int | None = Field(3, ge=1, description="newest checkpoints to keep, at least 1, or null for all")
    keep_best: int = Field(
        1, ge=0, description="number of best checkpoints (by eval.best) to keep besides the newest, at least 0"
    )
    publish: Literal["best", "last"] = Field(
        "best",
        description="checkpoint that is copied to adapter/ at the end: last, or best (by eval.best, among the steps "
        "that were both evaluated and saved; the last if there are none)",
    )
    tensorboard: bool = Field(True, description="true (write TensorBoard's files in output.dir/tensorboard) or false")
    plot: bool = Field(True, description="true (draw the loss in output.dir/loss.png) or false")
    probe: int = Field(
        0,
        ge=0,
        description="number of data.eval rows whose logits are saved in probe.safetensors, so that a merged model can "
        "be compared; 0: none",
    )


class UnreadKeys(ValueError):
    """The error for a section that the chosen method does not read. keys: the keys that are given in it.

    The text has the remedy and names no key, so that it can be shown for each key.
    """

    def __init__(self, keys: Sequence[str], section: str, method: str) -> None:
        self.keys = tuple(keys)
        readers = " or ".join(name for each in METHOD_PACKAGES if each.section == section for name in each.names)
        super().__init__(f"not read by method {method}; remove it, or set method to {readers}")


class Config(Section):
    """The configuration of a run."""

    model: ModelConfig
    method: MethodName = Field(
        "lora",
        description="lora, full (every weight), adapter_h, adapter_l (adapter layers of Houlsby and of Lin), prefix or "
        "prompt",
    )
    lora: LoraConfig = LoraConfig()
    adapter: AdapterConfig = AdapterConfig()
    prefix: PrefixConfig = PrefixConfig()
    prompt: PromptConfig = PromptConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    output: OutputConfig

    @field_validator(*SECTIONS)
    @classmethod
    def _of_the_method(cls, section: Section, info: ValidationInfo) -> Section:
        method, name = info.data.get("method"), info.field_name
        assert name is not None, "a validator of fields"
        if method is not None and method_package(method).section != name and section.model_fields_set:
            raise UnreadKeys(sorted(section.model_fields_set), name, method)
        return section

    @field_validator("eval")
    @classmethod
    def _has_samples(cls, section: EvalConfig, info: ValidationInfo) -> EvalConfig:
        asked = [key for key in ("generate", "patience") if getattr(section, key) is not None]
        if asked and "data" in info.data and info.data["data"].eval is None:
            raise ValueError(f"eval.{asked[0]} is given, but data.eval is null; name a JSONL file in data.eval")
        return section

    @property
    def own_section(self) -> MethodSection:
        """The section of the chosen method; an empty one for a method that has none."""
        name = method_package(self.method).section
        return MethodSection() if name is None else getattr(self, name)

    @property
    def inputs(self) -> dict[str, Path]:
        """Key → file or folder that the run reads, without those that are not set."""
        found = {
            "model.path": self.model.path,
            "data.train": self.data.train,
            "data.eval": self.data.eval,
            "data.tokenizer": self.data.tokenizer,
            f"{method_package(self.method).section}.init_from": self.own_section.starts_from,
        }
        return {key: path for key, path in found.items() if path is not None}

    @property
    def shaping(self) -> dict[str, object]:
        """Key → value of the keys that a resumed run cannot change, without those that a starting adapter fills in."""
        own, section = method_package(self.method).section, self.own_section
        keys = sorted(section.shaping) if section.starts_from is None else []
        return {"method": self.method, **{f"{own}.{key}": getattr(section, key) for key in keys}}

    def with_own_section(self, section: MethodSection) -> Config:
        """Return this config with another section of the chosen method."""
        name = method_package(self.method).section
        return self if name is None else self.model_copy(update={name: section})

    def read_keys(self) -> dict[str, Any]:
        """Return every key that the run reads, in its section, as JSON values. Other methods' sections are left out."""
        return self.model_dump(mode="json", exclude=set(SECTIONS) - {method_package(self.method).section})

    def to_yaml(self) -> str:
        """Return `read_keys` as YAML, which `load_config` reads back to an equal config."""
        return yaml.dump(self.read_keys(), Dumper=Dumper, sort_keys=False)
