"""The section `eval` of a run: when to evaluate, what to generate, and which metric decides the best checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from lowrank_dist.sections.section import Section


class GenerateConfig(Section):
    """Generation in an evaluation. It is always greedy, so that equal models write equal texts."""

    metrics: list[Literal["exact_match", "bleu", "rouge_l"]] = Field(
        ["exact_match"], min_length=1, description="list of exact_match, bleu and rouge_l"
    )
    max_new_tokens: int = Field(
        128, ge=1, description="most tokens of a completion, an integer of at least 1; how many met it is recorded"
    )
    batch: int = Field(8, ge=1, description="prompts decoded together on a rank, at least 1")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="list of texts that end a completion, beside the end-of-text and end-of-turn tokens"
    )
    samples: int | None = Field(None, ge=1, description="samples of data.eval to use, its first, or null for all")


class EvalConfig(Section):
    """When to evaluate, and which metric decides the best checkpoint."""

    every: int | None = Field(
        None, ge=1, description="steps between evaluations, or null for only at the start and end"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="rows per rank and microbatch, or null for train.micro_batch"
    )
    at_start: bool = Field(True, description="true (evaluate before the first step as well) or false")
    generate: GenerateConfig | None = Field(
        None,
        description="mapping of what to generate for data.eval's prompts at every evaluation ({} for its defaults), or "
        "null for the loss alone",
    )
    best: Literal["loss", "exact_match", "bleu", "rouge_l"] = Field(
        "loss",
        description="what checkpoints/best and eval.patience go by: loss (the lowest), or one of eval.generate.metrics "
        "(the highest); of equals the earlier step",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations in a row without a better value of eval.best after which the run ends early, at least "
        "1, or null for never",
    )

    @field_validator("best")
    @classmethod
    def _is_measured(cls, best: str, info: ValidationInfo) -> str:
        if best != "loss" and "generate" in info.data:
            generate = info.data["generate"]
            if generate is None:
                raise ValueError("nothing is generated: eval.generate is null")
            if best not in generate.metrics:
                raise ValueError(f"eval.generate.metrics has only {', '.join(generate.metrics)}")
        return best

    @field_validator("patience")
    @classmethod
    def _sees_evaluations(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("every", 1) is None:
            raise ValueError("eval.every is null: there is no evaluation after which a run could end early")
        return patience
