"""The section `eval` of a run: times of evaluation, generation, and the metric that decides the best checkpoint."""

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
        128,
        ge=1,
        description="maximum tokens of a completion, at least 1; the number of completions that reached it is recorded",
    )
    batch: int = Field(8, ge=1, description="prompts decoded together on a rank, an integer of at least 1")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="list of texts that end a completion, beside the end-of-text and end-of-turn tokens"
    )
    samples: int | None = Field(
        None, ge=1, description="number of samples of data.eval to use, from the first, or null for all"
    )


class EvalConfig(Section):
    """Evaluations during training, and the metric that decides the best checkpoint."""

    every: int | None = Field(
        None, ge=1, description="steps between evaluations, or null for only at the start and end"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="rows per rank and microbatch, or null for train.micro_batch"
    )
    at_start: bool = Field(True, description="true (evaluate before the first step as well) or false")
    generate: GenerateConfig | None = Field(
        None,
        description="how to complete the prompts of data.eval at every evaluation, a mapping ({} for defaults) or null",
    )
    best: Literal["loss", "exact_match", "bleu", "rouge_l"] = Field(
        "loss",
        description="metric for checkpoints/best and eval.patience: loss (lowest) or an entry of eval.generate.metrics",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="end the run after this many evaluations in a row that do not improve the metric of eval.best, at "
        "least 1; null: never",
    )

    @field_validator("best")
    @classmethod
    def _is_measured(cls, best: str, info: ValidationInfo) -> str:
        if best != "loss" and "generate" in info.data:
            generate = info.data["generate"]
            if generate is None:
                raise ValueError("eval.generate is null, so nothing is generated")
            if best not in generate.metrics:
                raise ValueError(f"eval.generate.metrics has only {', '.join(generate.metrics)}")
        return best

    @field_validator("patience")
    @classmethod
    def _sees_evaluations(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("every", 1) is None:
            raise ValueError("eval.every is null, so there is no evaluation after which a run could end early")
        return patience
