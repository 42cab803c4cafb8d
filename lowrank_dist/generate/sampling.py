"""The next token of each row, the same on every tensor-parallel rank.

Legend: b rows, V_i rows of the head on this rank (padded ones hold −∞), V the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lowrank_dist.errors import UserError
from lowrank_dist.generate.rules import DecodingRules
from lowrank_dist.parallel.collectives import all_gather_columns


def next_tokens(
    logits_bVi: Tensor, vocab: int, rules: DecodingRules, samples: Sequence[int], step: int, group: ProcessGroup
) -> Tensor:
    """int64 [b]. samples: the number of each row's prompt; step: tokens generated before this one.

    Raises UserError on every rank for logits that are not numbers.
    """
    best, token = _largest(logits_bVi.float(), group)
    if not torch.isfinite(best).all():
        raise UserError(
            "the model's logits are NaN or infinite: its weights are broken, or their type is too narrow (--dtype fp32)"
        )
    if rules.greedy:
        return token
    logits_bV = all_gather_columns(logits_bVi.float(), group)[:, :vocab]
    uniform = [uniform_of(rules.seed, sample, step) for sample in samples]
    token = draw(logits_bV, rules, torch.tensor(uniform, dtype=torch.float64, device=logits_bV.device))
    if group.size() > 1:
        # Not left to each rank's own arithmetic: a scan on a GPU need not be the same bit by bit.
        dist.broadcast(token, group=group, group_src=0)
    return token


def _largest(logits_bVi: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The largest logit of each row over all ranks and its id, the lowest among equals; NaN counts as largest."""
    column = logits_bVi.argmax(dim=1, keepdim=True)
    first = group.rank() * logits_bVi.size(1)
    # In float64 both are exact, and one message carries them.
    mine = torch.cat((logits_bVi.gather(1, column).double(), (first + column).double()), dim=1)
    values, ids = all_gather_columns(mine, group).unflatten(1, (-1, 2)).unbind(dim=2)
    winner = values.argmax(dim=1, keepdim=True)
    return values.gather(1, winner)[:, 0], ids.gather(1, winner)[:, 0].long()


def draw(logits_bV: Tensor, rules: DecodingRules, uniform_b: Tensor) -> Tensor:
    """int64 [b]: the inverse of the distribution function at `uniform_b`, tokens ordered by logit, then by id.

    Temperature, then the top_k largest, then the fewest that reach top_p of what these hold (Holtzman et al. 2020).
    """
    ordered, ids = logits_bV.sort(dim=1, descending=True, stable=True)
    if rules.top_k is not None:
        ordered, ids = ordered[:, : rules.top_k], ids[:, : rules.top_k]
    probability = ((ordered - ordered[:, :1]).double() / rules.temperature).softmax(dim=1)
    mass = probability.cumsum(dim=1)
    kept = (mass - probability < rules.top_p).sum(dim=1, keepdim=True)
    total = mass.gather(1, kept - 1)
    place = torch.searchsorted(mass, uniform_b[:, None] * total, right=True)
    return ids.gather(1, torch.minimum(place, kept - 1))[:, 0]


def uniform_of(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone, whatever the ranks, the batch and the order."""
    digest = hashlib.blake2b(f"{seed} {sample} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
