"""The training of a reference: sample by sample on one rank, with torch's own clipping and AdamW.

Legend: T tokens of a sample, n of its targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_dist.data.masking import Sample
from lowrank_dist.engine.zero import OptimiserRules
from lowrank_dist.methods.reference import Reference
from lowrank_dist.verify.compare import Record


def run_reference(
    reference: Reference, steps: Sequence[Sequence[Sample]], lrs: Sequence[float], rules: OptimiserRules
) -> Record:
    """Take the steps, which changes the reference's parameters, and return their numbers, on the CPU in fp32.

    steps: the samples of each optimizer step, of all ranks together, as the run's data set has them. lrs: learning rate
    of each step. Of `rules`, those of ZeRO have no meaning here.
    """
    parameters = list(reference.parameters.values())
    optimiser = torch.optim.AdamW(parameters, 0.0, rules.betas, rules.eps, rules.weight_decay)
    clip = math.inf if rules.clip is None else rules.clip
    losses, norms, gradients = [], [], []
    with _recorded(reference) as inputs:
        losses.append(_backward(reference, steps[0]))
    for number, (samples, lr) in enumerate(zip(steps, lrs, strict=True)):
        if number:
            losses.append(_backward(reference, samples))
        # Every tensor has a gradient in the run, and is decayed.
        for leaf in parameters:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradients.append({name: _copy(leaf.grad) for name, leaf in reference.parameters.items()})
        norms.append(float(nn.utils.clip_grad_norm_(parameters, clip)))
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        optimiser.zero_grad()
    found = {path: torch.cat(pieces) for path, pieces in inputs.items()}
    return Record(found, losses, norms, gradients, reference.exported())


def _backward(reference: Reference, samples: Sequence[Sample]) -> float:
    """Add the gradients of the mean loss over the step's target tokens, and return that loss."""
    device = next(reference.model.parameters()).device
    # Position 0 is no target: nothing predicts it.
    targets = sum(int(sample.target[1:].sum()) for sample in samples)
    total = 0.0
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens).long().to(device)
        keep = torch.from_numpy(sample.target[1:]).nonzero()[:, 0].to(device)
        loss = F.cross_entropy(reference.logits(tokens, keep).float(), tokens[keep + 1], reduction="sum") / targets
        loss.backward()
        total += loss.item()
    return total


@contextmanager
def _recorded(reference: Reference) -> Iterator[dict[str, list[Tensor]]]:
    """Yield path of a linear of the layers, in the order of execution → its input [T, K] of each sample within."""
    found: dict[str, list[Tensor]] = {}

    def recorder(path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, inputs: found.setdefault(path, []).append(_copy(inputs[0].flatten(0, -2)))

    hooks = [
        reference.model.get_submodule(path).register_forward_pre_hook(recorder(path))
        for path in sorted(reference.architecture.linear_modules())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _copy(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().to("cpu", torch.float32, copy=True)
