"""The section `model` of a run: the base model, its dtype and its device."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lowrank_dist.sections.section import Section, YamlFolder


class ModelConfig(Section):
    """The base model."""

    path: YamlFolder = Field(description="folder of a Hugging Face checkpoint (config.json and safetensors)")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="data type of the frozen weights: auto (as stored), fp32 or bf16"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto (cuda where a GPU is visible), cpu or cuda"
    )
    load: Literal["each", "broadcast"] = Field(
        "each",
        description="each (every data-parallel replica reads the weights from disk) or broadcast (replica 0 reads them "
        "and sends them to the others: for a slow or shared file system)",
    )
    vocab_multiple: int = Field(
        128,
        ge=1,
        description="integer of at least 1; embedding rows are padded to a multiple of it times parallel.tensor",
    )
