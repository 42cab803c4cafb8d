"""The whole configuration of a run, put together from the sections that lie beside their owners. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import Field, ValidationInfo, field_validator

from lowrank_dist.data.config import DataConfig
from lowrank_dist.engine.config import EngineConfig, OutputConfig, TrainConfig
from lowrank_dist.generate.config import EvalConfig
from lowrank_dist.methods import MethodName
from lowrank_dist.methods.bottleneck.config import AdapterConfig
from lowrank_dist.methods.lora.config import LoraConfig
from lowrank_dist.methods.prefix.config import PrefixConfig
from lowrank_dist.methods.prompt.config import PromptConfig
from lowrank_dist.methods.registry import HOMES, SECTIONS, home
from lowrank_dist.model.config import ModelConfig
from lowrank_dist.parallel.config import ParallelConfig
from lowrank_dist.sections.scalars import Dumper
from lowrank_dist.sections.section import MethodSection, Section


class UnreadKeys(ValueError):
    """`keys` of a section that the method does not read. Its text is what is wrong with each, and the remedy."""

    def __init__(self, keys: Sequence[str], section: str, method: str) -> None:
        self.keys = tuple(keys)
        readers = " or ".join(name for each in HOMES if each.section == section for name in each.names)
        super().__init__(f"not read by method {method} — remove it, or set method to {readers}")


class Config(Section):
    """A whole run. Two configs are equal when the runs they describe are."""

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
        method = info.data.get("method")
        if method is not None and home(method).section != info.field_name and section.model_fields_set:
            raise UnreadKeys(sorted(section.model_fields_set), info.field_name, method)
        return section

    @field_validator("eval")
    @classmethod
    def _has_samples(cls, section: EvalConfig, info: ValidationInfo) -> EvalConfig:
        asked = [key for key in ("generate", "patience") if getattr(section, key) is not None]
        if asked and "data" in info.data and info.data["data"].eval is None:
            raise ValueError(f"eval.{asked[0]} is given, but data.eval is null — name a JSONL file in data.eval")
        return section

    @property
    def own_section(self) -> MethodSection:
        """The section of the chosen method; one without keys for a method that has none."""
        name = home(self.method).section
        return MethodSection() if name is None else getattr(self, name)

    def with_own_section(self, section: MethodSection) -> Config:
        """The same config with another section of the chosen method."""
        name = home(self.method).section
        return self if name is None else self.model_copy(update={name: section})

    def read_keys(self) -> dict[str, Any]:
        """Every key that the run reads, in its section, as JSON values: those of other methods are left out."""
        return self.model_dump(mode="json", exclude=set(SECTIONS) - {home(self.method).section})

    def to_yaml(self) -> str:
        """Every key that the run reads with the value it has, as `load_config` reads it back to an equal config."""
        return yaml.dump(self.read_keys(), Dumper=Dumper, sort_keys=False)
