"""Sampling parameters, and the choice of each row's next token, the same on every tensor-parallel rank.

Legend: b rows, V_i rows of the head on this rank (padded ones hold −∞), V the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.errors import UserError
from lowrank_dist.parallel.collectives import all_gather_columns


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of decoding. Raises UserError for an invalid value.

    temperature 0 is greedy. top_k and then top_p truncate the distribution; None and 1 leave it whole. stop: texts that
    end a completion and are not part of it. batch: rows decoded together on a rank. The random draw for a prompt
    depends only on seed, the prompt's number and the step, so batch and order of the prompts do not matter.
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
                raise UserError(f"{name} is {value}; give at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; give 0 for greedy decoding, or a number above 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; give at least 1, or leave it out")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a number above 0 and at most 1")
        if self.greedy and (self.top_k is not None or self.top_p < 1):
            raise UserError("top_k and top_p only apply to sampling; give a temperature above 0 with them")
        if "" in self.stop:
            raise UserError("an empty stop text would end every completion at once; leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def next_tokens(
    logits_bVi: Tensor, vocab: int, params: SamplingParams, samples: Sequence[int], step: int, group: ProcessGroup
) -> Tensor:
    """Return the next tokens, int64 [b].

    samples: the number of each row's prompt; step: tokens generated before this one. Raises UserError on every rank for
    logits that are NaN or infinite.
    """
    best, token = _largest(logits_bVi.float(), group)
    if not torch.isfinite(best).all():
        raise UserError("the model's logits are NaN or infinite; check its weights, or use a wider type (--dtype fp32)")
    if params.greedy:
        return token
    logits_bV = all_gather_columns(logits_bVi.float(), group)[:, :vocab]
    uniform = [uniform_draw(params.seed, sample, step) for sample in samples]
    token = draw(logits_bV, params, torch.tensor(uniform, dtype=torch.float64, device=logits_bV.device))
    if group.size() > 1:
        # Rank 0's token is used everywhere: a scan on a GPU need not be bit-identical on every rank.
        dist.broadcast(token, group=group, group_src=0)
    return token


def _largest(logits_bVi: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit over all ranks and its id, the lowest id among equals; NaN is largest."""
    column = logits_bVi.argmax(dim=1, keepdim=True)
    first = group.rank() * logits_bVi.size(1)
    # Logit and id are both exact in float64, so one message carries them.
    mine = torch.cat((logits_bVi.gather(1, column).double(), (first + column).double()), dim=1)
    values, ids = all_gather_columns(mine, group).unflatten(1, (-1, 2)).unbind(dim=2)
    winner = values.argmax(dim=1, keepdim=True)
    return values.gather(1, winner)[:, 0], ids.gather(1, winner)[:, 0].long()


def draw(logits_bV: Tensor, params: SamplingParams, uniform_b: Tensor) -> Tensor:
    """Return one sampled token per row, int64 [b]: the inverse of the distribution function at `uniform_b`.

    Tokens are ordered by logit, then by id. The temperature is applied, then the top_k largest are kept, then the
    fewest of these that hold top_p of their probability (Holtzman et al. 2020).
    """
    ordered, ids = logits_bV.sort(dim=1, descending=True, stable=True)
    if params.top_k is not None:
        ordered, ids = ordered[:, : params.top_k], ids[:, : params.top_k]
    probability = ((ordered - ordered[:, :1]).double() / params.temperature).softmax(dim=1)
    mass = probability.cumsum(dim=1)
    kept = (mass - probability < params.top_p).sum(dim=1, keepdim=True)
    total = mass.gather(1, kept - 1)
    place = torch.searchsorted(mass, uniform_b[:, None] * total, right=True)
    return ids.gather(1, torch.minimum(place, kept - 1))[:, 0]


def uniform_draw(seed: int, sample: int, step: int) -> float:
    """Return a number in [0, 1) that depends only on the arguments, not on ranks, batch or order."""
    digest = hashlib.blake2b(f"{seed} {sample} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
