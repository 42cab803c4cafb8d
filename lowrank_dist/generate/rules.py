"""Rules of decoding: lengths, sampling, what stops a row, how many rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.errors import UserError


@dataclass(frozen=True)
class DecodingRules:
    """temperature 0 is greedy. top_k and top_p cut the distribution in this order; None and 1 leave it whole.

    stop: texts that end a completion and are not part of it. batch: rows decoded together on a rank. What is drawn for
    a prompt depends on seed, the prompt's number and the step alone, so batch and order of the prompts do not matter.
    Raises UserError for a value that means nothing.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch: int = 8

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("batch", self.batch)):
            if value < 1:
                raise UserError(f"{name} is {value}: give at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: give 0 for greedy decoding, or a number above")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: give at least 1, or leave it out")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a number above 0 and at most 1")
        if self.greedy and (self.top_k is not None or self.top_p < 1):
            raise UserError("top_k and top_p cut what is sampled from: give a temperature above 0 with them")
        if "" in self.stop:
            raise UserError("an empty stop text would end every completion before it begins: leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
