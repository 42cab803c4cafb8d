"""Decode what a file of samples asks for and hold it against the references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank_dist.data.tokenizer import Tokenizer
from lowrank_dist.generate.decode import Generation, generate
from lowrank_dist.generate.metrics import check_metrics, score
from lowrank_dist.generate.prompts import Prompt
from lowrank_dist.generate.rules import DecodingRules
from lowrank_dist.model.gpt import CausalLM
from lowrank_dist.parallel.topology import Topology


@dataclass(frozen=True)
class EvaluationRules:
    """metrics: names in `metrics.METRICS`. Raises UserError for one that is not there."""

    metrics: tuple[str, ...]
    decoding: DecodingRules

    def __post_init__(self) -> None:
        check_metrics(self.metrics)


def evaluate_generation(
    model: CausalLM,
    tokenizer: Tokenizer,
    samples: Sequence[Prompt],
    rules: EvaluationRules,
    topology: Topology,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, float]:
    """The metrics by name, the same on every rank, and how the completions ended; see `summary`. Collective.

    samples: of `read_prompts` with references. No rank waits for another for longer than a batch takes, so that this
    can run under the timeouts of training.
    """
    found = generate(model, tokenizer, samples, rules.decoding, topology, progress, in_step=True)
    return summary(found, samples, rules.metrics)


def summary(found: Sequence[Generation], samples: Sequence[Prompt], metrics: Sequence[str]) -> dict[str, float]:
    """The metrics, and beside them: samples, their number; met_length_limit, how many of them ended for their length
    and not for a stop; mean_tokens, generated for each."""
    return {
        **score(metrics, [generation.text for generation in found], [sample.references for sample in samples]),
        "samples": float(len(samples)),
        "met_length_limit": float(sum(generation.finish == "length" for generation in found)),
        "mean_tokens": sum(len(generation.tokens) for generation in found) / len(found),
    }
