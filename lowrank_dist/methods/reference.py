"""The interface of a reference: one method on transformers' own modules, under plain autograd on one rank.

It shares no code with the run beyond the tables of names, so that an error is not made twice. Only functions load
transformers, since a run needs no reference.

Legend: T tokens of a sample, n kept positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.methods.method import Setting
from lowrank_dist.sections.section import MethodSection


@dataclass(frozen=True)
class Start:
    """Θ before the first step, so that run and reference start from the same values.

    folder: the adapter as the run exports it. values: stored name → whole tensor, in the order of `Theta.trained`.
    """

    folder: Path
    values: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Reference:
    """A model that a method trains, one sample at a time.

    model: transformers' module of the base, frozen and in evaluation mode. parameters: stored name → fp32 leaf in the
    shape of the run's stored tensor. logits: (token ids [T], kept positions [n]) → [n, V]; virtual token ids are those
    beyond the vocabulary, as in the run. exported: returns name in the exported files → tensor in fp32, from the
    present parameters. by: what applies the method, for a report.
    """

    model: nn.Module
    architecture: Architecture
    parameters: Mapping[str, Tensor]
    logits: Callable[[Tensor, Tensor], Tensor]
    exported: Callable[[], Mapping[str, Tensor]]
    by: str = "plain PyTorch"


class ReferenceBuilder(Protocol):
    """The functions that the module `reference` of every method's folder has."""

    def adapted_layers(self, section: MethodSection, architecture: Architecture) -> Sequence[int]:
        """Return the numbers of the layers that have trained tensors, in ascending order.

        section: completed by `MethodFiles.complete`, as everywhere here.
        """
        ...

    def cut_section(self, section: MethodSection, architecture: Architecture, layers: Sequence[int]) -> MethodSection:
        """Return the section for the model cut to `layers`. architecture: that of the whole model."""
        ...

    def build(
        self, section: MethodSection, setting: Setting, start: Start, dtype: torch.dtype, device: torch.device
    ) -> Reference:
        """Return the reference on the model in `setting.base`, which computes in `dtype`. section: of that model."""
        ...


def all_layers(section: MethodSection, architecture: Architecture) -> Sequence[int]:
    """Return the number of every layer: the `adapted_layers` of methods that name none."""
    return range(len(architecture.layers))


def unchanged(section: MethodSection, architecture: Architecture, layers: Sequence[int]) -> MethodSection:
    """Return the section: the `cut_section` of methods that name no layer."""
    return section


def load_frozen(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return transformers' own model, frozen and in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa", dtype=dtype
    )
    return model.requires_grad_(False).eval().to(device)


def leaves(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a copy of every tensor as an fp32 leaf that takes a gradient."""
    return {
        name: value.detach().to(device, torch.float32, copy=True).requires_grad_() for name, value in values.items()
    }


def call(model: nn.Module, input_ids: Tensor, keep: Tensor) -> Tensor:
    """Return the logits [n, V] of one sample without virtual positions."""
    logits: Tensor = model(input_ids=input_ids[None], logits_to_keep=keep, use_cache=False).logits[0]
    return logits


def call_with(model: nn.Module, weights: Mapping[str, Tensor], input_ids: Tensor, keep: Tensor) -> Tensor:
    """Return the logits of `call`, with the given parameters of the model replaced and cast to its type.

    weights: name in the model → fp32 leaf, to which the gradient goes.
    """
    own = dict(model.named_parameters())
    cast = {name: leaf.to(own[name].dtype).view_as(own[name]) for name, leaf in weights.items()}
    options = {"input_ids": input_ids[None], "logits_to_keep": keep, "use_cache": False}
    logits: Tensor = torch.func.functional_call(model, cast, (), options).logits[0]
    return logits


def detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of every parameter on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in parameters.items()}
