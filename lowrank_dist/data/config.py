"""The section `data` of a run: files, sample length, packing and tokenizer."""

from __future__ import annotations

from pydantic import Field

from lowrank_dist.sections.section import Section, YamlFolder, YamlPath


class DataConfig(Section):
    """The data files, and how samples become tokens."""

    train: YamlPath = Field(description="JSONL file to train on")
    eval: YamlPath | None = Field(
        None,
        description="JSONL file to evaluate on, or null; the loss uses the first of a sample's accepted completions",
    )
    max_length: int = Field(1024, ge=2, description="longest sample in tokens, an integer of at least 2")
    packing: bool = Field(False, description="true (several samples share a row; none attends to another) or false")
    tokenizer: YamlFolder | None = Field(None, description="folder or file of the tokenizer, or null for model.path")
