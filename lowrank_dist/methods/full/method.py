"""Full fine-tuning: the base's weights Φ are trained (equation 1 of Hu et al., "LoRA", 2021)."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowrank_dist.arch.architecture import WORD_EMBEDDINGS, Architecture
from lowrank_dist.arch.tensors import Copy, ParameterPlan, copy_plans, hf_shapes
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import other_files
from lowrank_dist.formats.provenance import Provenance
from lowrank_dist.methods.full.files import WholeModelFiles
from lowrank_dist.methods.method import Setting
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.coordinates import RankCoordinates
from lowrank_dist.parallel.masks import MaskSource
from lowrank_dist.parallel.theta import LocalShard, TensorSlice, Theta, TrainedParameter, mark
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.sections.section import MethodSection


class FullFineTuning:
    """The `Method` of full fine-tuning. Its checkpoints are Hugging Face folders in the dtype of the loaded model."""

    virtual_positions = 0
    virtual_token_ids: tuple[int, ...] = ()
    published: tuple[str, ...] = ()

    def __init__(self, architecture: Architecture, base: Path, seed: int) -> None:
        self._architecture, self._base, self._seed = architecture, base, seed
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtype = torch.float32

    @property
    def summary(self) -> str:
        return "full fine-tuning: every weight, bias, norm and embedding"

    def attach(self, model: CausalLM, topology: Topology, *, resumed: bool) -> Theta:
        architecture, size = self._architecture, topology.tp_size
        self._dtype = model.config.params_dtype
        padded_rows = dict(model.named_parameters())[WORD_EMBEDDINGS].size(0) * size

        def plans(tp_rank: int, tp_size: int = size) -> dict[str, ParameterPlan]:
            return copy_plans(architecture, tp_rank, tp_size, padded_rows)

        plans_here = cache(plans)

        def shard_at(name: str, coordinates: RankCoordinates) -> LocalShard:
            plan = plans_here(coordinates.dense.tp)[name]
            return LocalShard(
                plan.shape, tuple(TensorSlice(copy.hf, copy.hf_index, partial(_view, copy)) for copy in plan.copies)
            )

        shapes, trained = hf_shapes(architecture), []
        # Iterate over the plan of a single rank, which has a part of every tensor.
        for name, plan in plans(0, 1).items():
            cut = plans_here(0)[name].cut
            partial_grad = size > 1 and not cut and _is_partial(name, topology.sequence_parallel)
            parameter = mark(_trained(model, name), sharded=cut and size > 1, partial=partial_grad)
            trained.append(
                TrainedParameter(parameter, {copy.hf: shapes[copy.hf] for copy in plan.copies}, partial(shard_at, name))
            )
        theta = Theta(tuple(trained), MaskSource(self._seed, 0))
        self._shapes = theta.all_shapes()
        return theta

    def files(self, folder: Path, provenance: Provenance, *, trained: bool) -> WholeModelFiles:
        return WholeModelFiles(folder, self._base, self._shapes, self._dtype, provenance, trained=trained)


def build(section: MethodSection, setting: Setting, architecture: Architecture) -> FullFineTuning:
    """See `method.MethodBuilder`."""
    other_files(setting.base)  # raise before training for files that a checkpoint cannot copy
    return FullFineTuning(architecture, setting.base, setting.seed)


def attach_trained(model: CausalLM, base: Path, folder: Path, topology: Topology) -> None:
    """Raise UserError: the trained folder is a whole model, not an adapter."""
    raise UserError(f"{folder}: a whole model, not an adapter; give it as the model, instead of the base")


class _Cast(nn.Module):
    """The parametrization of an fp32 master weight: the model uses it in the dtype in which it was loaded."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self._dtype)


def _trained(model: CausalLM, name: str) -> nn.Parameter:
    """Make the parameter of this name trainable, in fp32, and return it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = getattr(module, leaf)
    if parameter.dtype == torch.float32:
        return parameter.requires_grad_(True)
    # The parametrization's `right_inverse` is not used: it may not change the dtype.
    master = nn.Parameter(parameter.detach().float())
    setattr(module, leaf, master)
    parametrize.register_parametrization(module, leaf, _Cast(parameter.dtype), unsafe=True)
    return master


def _is_partial(name: str, sequence_parallel: bool) -> bool:
    """Return whether a rank's gradient of a replicated parameter is partial: from its heads or its tokens only.

    Position embeddings are added before the tokens are sharded, so their gradient is whole.
    """
    if any(norm in name for norm in ("q_layernorm", "k_layernorm", "heads_norm")):
        return True
    return sequence_parallel and not name.startswith("embedding.")


def _view(copy: Copy, local: Tensor) -> Tensor:
    part = local[copy.local_index]
    return part.t() if copy.transposed else part
