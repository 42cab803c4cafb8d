"""What a checkpoint holds beside the adapter: optimizer.safetensors and trainer_state.json."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_dist.checkpoint.manifest import MANIFEST_FILE
from lowrank_dist.checkpoint.safetensors_file import write_fp32
from lowrank_dist.errors import UserError

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
# What AdamW keeps of every element of Θ: the fp32 master and the two moments, under torch's names.
KINDS = ("master", "exp_avg", "exp_avg_sq")


def tensor_name(module: str, side: str, kind: str) -> str:
    """The name in optimizer.safetensors of a module's A or B (side) and one of KINDS."""
    return f"{module}.lora_{side}.{kind}"


def is_checkpoint(folder: Path) -> bool:
    """Whether an adapter folder is a checkpoint, whole or not: any file is there that a plain adapter does not have."""
    return any((folder / name).exists() for name in (MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE))


class DataState(BaseModel):
    """A data set as it was trained or evaluated on. sha256: of its tokens and targets, not of the file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    path: str
    sha256: str
    samples: int


class TrainingState(BaseModel):
    """Where a run stands after `step` optimizer steps; `samples` of the endless shuffled stream have been consumed.

    tokens and target_tokens: non-padding tokens seen and tokens trained on so far. loss: mean of the last step, in nats
    a target token; eval_losses: step → the same on the eval set. rng: `backend.rng.capture`. config: as JSON.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: int = 1
    step: int = Field(ge=1)
    epoch: float = Field(ge=0)
    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)
    target_tokens: int = Field(ge=0)
    loss: float
    eval_losses: dict[int, float]
    data: DataState
    held_out: DataState | None
    rng: dict[str, Any]
    config: dict[str, Any]
    base_fingerprint: str
    ranks: dict[str, int]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of trainer_state.json."""
        return self.model_dump_json(indent=2) + "\n"

    def summary(self) -> dict[str, Any]:
        """What an adapter that is taken out of the checkpoint still says of its training (`Provenance.training`)."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "data": self.data.model_dump(),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "eval_loss": self.eval_losses.get(self.step),
        }


def read_state(path: Path) -> TrainingState:
    """Raises UserError for a file that is not what `TrainingState.to_json` writes."""
    try:
        return parse_state(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is not what this version of lowrank_dist writes ({error}): take another") from error


def parse_state(text: bytes) -> TrainingState:
    """The state from its JSON; pydantic's ValidationError when it is malformed."""
    return TrainingState.model_validate_json(text)


def write_optimizer(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """fp32 tensors by `tensor_name`, whole (unsharded): those of side A are [r, in], those of side B [out, r]."""
    write_fp32(path, {name: tensors[name].contiguous() for name in sorted(tensors)})


def read_optimizer(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of `shapes`, and only these; UserError, naming file and tensor, for anything else or not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): take another checkpoint") from error
    odd = sorted(found.keys() ^ shapes.keys())
    if odd:
        raise UserError(f"{path}: {odd[0]} and this run's factors do not fit together: lora.targets must be the same")
    for name, tensor in found.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, this run needs float32 {list(shapes[name])}: "
                "lora.rank and the model must be the same"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinity: take an earlier checkpoint")
    return found
