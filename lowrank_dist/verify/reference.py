"""The training of a reference: sample by sample on one rank, with torch's own clipping and AdamW.

Legend: T tokens of a sample, n of its targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_dist.data.masking import Sample
from lowrank_dist.engine.zero import OptimiserRules
from lowrank_dist.methods.reference import Reference
from lowrank_dist.verify.compare import Record
from lowrank_dist.verify.trace import Traced


def run_reference(
    reference: Reference,
    steps: Sequence[Sequence[Sample]],
    lr: float,
    rules: OptimiserRules,
    progress: Callable[[], None] = lambda: None,
) -> Record:
    """Take the steps, which changes the reference's parameters. Return their numbers on the CPU, without inputs.

    steps: the samples of each optimizer step, of all ranks together, as the run's data set has them. Of `rules`, those
    of ZeRO have no meaning here. progress: called after each sample.
    """
    parameters = list(reference.parameters.values())
    optimiser = torch.optim.AdamW(parameters, lr, rules.betas, rules.eps, rules.weight_decay)
    clip = math.inf if rules.clip is None else rules.clip
    losses, norms, gradients = [], [], []
    for samples in steps:
        losses.append(_backward(reference, samples, progress))
        # Every tensor has a gradient in the run, and is decayed.
        for leaf in parameters:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradients.append({name: _copy(leaf.grad) for name, leaf in reference.parameters.items()})
        norms.append(float(nn.utils.clip_grad_norm_(parameters, clip)))
        optimiser.step()
        optimiser.zero_grad()
    return Record({}, losses, norms, gradients, reference.exported())


def _backward(reference: Reference, samples: Sequence[Sample], progress: Callable[[], None]) -> float:
    """Add the gradients of the mean loss over the step's target tokens, and return that loss."""
    # Position 0 is no target: nothing predicts it.
    targets = sum(int(sample.target[1:].sum()) for sample in samples)
    total = 0.0
    for sample in samples:
        loss = _loss(reference, sample) / targets
        loss.backward()
        total += loss.item()
        progress()
    return total


def _loss(reference: Reference, sample: Sample) -> Tensor:
    """Return Σ −log p(target) over a sample."""
    device = next(reference.model.parameters()).device
    tokens = torch.from_numpy(sample.tokens).long().to(device)
    keep = torch.from_numpy(sample.target[1:]).nonzero()[:, 0].to(device)
    return F.cross_entropy(reference.logits(tokens, keep).float(), tokens[keep + 1], reduction="sum")


def inputs_of(reference: Reference, samples: Sequence[Sample], traced: Traced) -> dict[str, Tensor]:
    """Return the inputs that the run traced, of the same linears and tokens. samples: of the step, by their numbers."""
    found: dict[str, list[Tensor]] = {path: [] for path in traced.inputs}

    def keep(path: str, positions: list[int], module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[path].append(_copy(inputs[0].flatten(0, -2)[positions]))

    for number in sorted({name // traced.stride for name in traced.names}):
        positions = [name % traced.stride for name in traced.names if name // traced.stride == number]
        modules = ((path, reference.model.get_submodule(path)) for path in traced.inputs)
        hooks = [each.register_forward_pre_hook(partial(keep, path, positions)) for path, each in modules]
        with torch.no_grad():
            _loss(reference, samples[number])
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(rows) for path, rows in found.items()}


def _copy(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().to("cpu", torch.float32, copy=True)
