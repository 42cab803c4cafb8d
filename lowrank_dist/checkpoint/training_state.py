"""The state in a checkpoint beside the adapter: optimizer.safetensors and trainer_state.json."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from lowrank_dist.errors import UserError
from lowrank_dist.formats.safetensors_file import SafetensorsWriter, TensorEntry, read_header, tensor_bytes
from lowrank_dist.untrusted.files import read_bytes
from lowrank_dist.untrusted.json import LARGEST, JsonError, parse_json

# AdamW's values for every element of Θ: the fp32 master and the two moments, under torch's names.
KINDS = ("master", "exp_avg", "exp_avg_sq")
# Name of the eval loss among the values of an evaluation; all others are metrics of generated texts.
LOSS = "loss"
_ANOTHER = "take another checkpoint"


def tensor_name(stored: str, kind: str) -> str:
    """Return the name of a tensor of Θ (parallel/theta.py) in optimizer.safetensors. kind: one of KINDS."""
    return f"{stored}.{kind}"


class DataState(BaseModel):
    """The identity of a data set in training or evaluation. sha256: of its tokens and targets, not of the file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    path: str
    sha256: str
    samples: int


class TrainingState(BaseModel):
    """The state of a run after `step` optimizer steps, which read `samples` samples.

    updates: steps that were not skipped, as AdamW counts them. position: samples read from the training stream, which
    is `data` shuffled by its seed and repeated without end. epoch: the same in passes over `data`. tokens,
    target_tokens: non-padding tokens seen and tokens trained on so far. loss: mean of the last step that was not
    skipped, in nats per target token; None where all were skipped. eval_losses: step → the same on the eval set.
    eval_metrics: metric → step → value for generated texts (generate/metrics.py). metric_definition:
    generate.metrics.DEFINITION when the values were computed. rng: as `backend.devices.generator_states` returned it.
    config: as JSON. started_at: when the run began ("begun" in the file); a chat template that reads the clock gets
    this time.

    Old checkpoints lack updates (`updates_made`), position (`stream_position`), eval_metrics and started_at.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: int = 1
    step: int = Field(ge=1)
    updates: int | None = Field(None, ge=0)
    epoch: float = Field(ge=0)
    samples: int = Field(ge=0)
    position: int | None = Field(None, ge=0)
    tokens: int = Field(ge=0)
    target_tokens: int = Field(ge=0)
    loss: float | None
    eval_losses: dict[int, float]
    eval_metrics: dict[str, dict[int, float]] = {}
    metric_definition: int = 1
    data: DataState
    held_out: DataState | None
    rng: dict[str, Any]
    config: dict[str, Any]
    base_fingerprint: str
    ranks: dict[str, int]
    versions: dict[str, str]
    started_at: datetime | None = Field(None, alias="begun")

    @property
    def stream_position(self) -> int:
        """`position`; for an old checkpoint without it, step · train.global_batch, as old runs computed it."""
        if self.position is not None:
            return self.position
        batch = self.setting("train", "global_batch")
        return self.step * batch if isinstance(batch, int) else self.samples

    @property
    def updates_made(self) -> int:
        """`updates`, or `step` for an old checkpoint without it."""
        return self.step if self.updates is None else self.updates

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the configuration that the run had; None where it had no such key."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def evaluations(self) -> dict[str, dict[int, float]]:
        """Name (`LOSS` or a metric) → step → value."""
        return {LOSS: self.eval_losses, **self.eval_metrics}

    def to_json(self) -> str:
        """Return the text of trainer_state.json."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    def summary(self) -> dict[str, Any]:
        """Return the training facts that go into the adapter's provenance (`Provenance.training`)."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "data": self.data.model_dump(),
            "loss": self.loss,
            "eval_loss": self.eval_losses.get(self.step),
            **{f"eval_{name}": steps[self.step] for name, steps in self.eval_metrics.items() if self.step in steps},
        }


def read_state(path: Path) -> TrainingState:
    """Return the state in a trainer_state.json. Raises UserError for a file that `to_json` would not write."""
    content = read_bytes(path, _ANOTHER, largest=LARGEST)
    try:
        # Before pydantic, which accepts NaN and integers that are too long to print.
        parse_json(content, unique=True, finite=True)
        return parse_state(content)
    except (JsonError, ValidationError) as error:
        raise UserError(f"{path}: not in the format of this version of lowrank_dist ({error}); {_ANOTHER}") from error


def parse_state(text: bytes) -> TrainingState:
    """Return the state from its JSON. Raises pydantic's ValidationError where it is malformed."""
    return TrainingState.model_validate_json(text)


class OptimizerWriter(SafetensorsWriter):
    """Writes optimizer.safetensors sequentially: masters and moments in fp32, unsharded.

    shapes: stored name → shape of the tensors of Θ, in the order of the calls to `put`.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        entries = (
            TensorEntry(tensor_name(name, kind), "F32", shape, 0, 4 * torch.Size(shape).numel())
            for name, shape in shapes.items()
            for kind in KINDS
        )
        super().__init__(path, entries, {"format": "pt"})

    def put(self, tensor: Tensor) -> None:
        """Write the next tensor, [3, *shape] in fp32, in the order of KINDS."""
        assert tensor.dtype == torch.float32
        self.write(tensor_bytes(tensor.contiguous()))


class OptimizerReader:
    """Reads the tensors of optimizer.safetensors, one at a time.

    shapes: stored name → shape of all tensors of Θ; the file must hold exactly these. Raises UserError, naming file and
    tensor, where it does not.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._path = path
        found = {entry.name: entry for entry in read_header(path).entries}
        expected = {tensor_name(name, kind): shape for name, shape in shapes.items() for kind in KINDS}
        odd = sorted(found.keys() ^ expected.keys())
        if odd:
            raise UserError(
                f"{path}: the checkpoint and this run do not both train {odd[0]}; use the same method, lora.targets "
                "and lora.dora"
            )
        for name, shape in expected.items():
            entry = found[name]
            if entry.dtype != "F32" or entry.shape != shape:
                raise UserError(
                    f"{path}: {name} is {entry.dtype} {list(entry.shape)}, but this run needs F32 {list(shape)}; use "
                    "the same model and the same sizes of the method (such as lora.rank)"
                )
        self._file = safe_open(path, framework="pt")

    def get(self, stored: str) -> Tensor:
        """Return [3, *shape] in fp32, in the order of KINDS. Raises UserError for NaN or infinity."""
        kinds = []
        for kind in KINDS:
            name = tensor_name(stored, kind)
            kinds.append(self._file.get_tensor(name))
            if not torch.isfinite(kinds[-1]).all():
                raise UserError(f"{self._path}: {name} has NaN or infinity; take an earlier checkpoint")
        return torch.stack(kinds)
