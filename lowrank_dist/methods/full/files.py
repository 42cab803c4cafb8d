"""The trained model as a Hugging Face folder, written tensor by tensor: it is never whole in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.errors import UserError
from lowrank_dist.formats.atomic import final_path
from lowrank_dist.formats.layout import pack, write_config
from lowrank_dist.formats.model_folder import (
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    open_checkpoint,
    other_files,
    stored_name,
)
from lowrank_dist.formats.provenance import PROVENANCE_FILE, Provenance
from lowrank_dist.formats.report import Report, inspect_model
from lowrank_dist.formats.safetensors_file import SafetensorsWriter, TensorEntry, tensor_bytes
from lowrank_dist.methods.files import Inspected, MethodFiles, Published, any_there

# The shard size of transformers' save_pretrained.
SHARD_BYTES = 5 * 10**9


class WholeModelFiles:
    """The writer of a trained model as a Hugging Face folder, with config, tokenizer and other files from the base.

    It always writes an index: in a folder without one, vLLM reads every safetensors file, the optimizer's too.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        provenance: Provenance,
        *,
        trained: bool,
    ) -> None:
        """shapes: Hugging Face name → shape, in the order of the calls of `put`.

        trained: `finish` raises UserError where every weight equals the base's.
        """
        self._folder, self._base, self._dtype, self._provenance = folder, base, dtype, provenance
        self._architecture = read_architecture(base)
        # The first rows of OPT's position table are in no parameter; `put` takes them from the base.
        self._unused = {rule.hf: rule.row_offset for rule in self._architecture.tensors if rule.row_offset}
        self._name = next(name for name, each in FLOAT_DTYPES.items() if each == dtype)
        entries = [
            TensorEntry(name, self._name, shape, 0, torch.Size(shape).numel() * dtype.itemsize)
            for name, shape in shapes.items()
        ]
        shards = pack([entry.nbytes for entry in entries], SHARD_BYTES)
        self._open = ExitStack()
        self._places: dict[str, str] = {}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._size = sum(entry.nbytes for entry in entries)
        self._changed = not trained
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            inside = [entries[index] for index in shard]
            writer = self._open.enter_context(SafetensorsWriter(folder / file, inside, {"format": "pt"}))
            for entry in inside:
                self._places[entry.name], self._writers[entry.name] = file, writer

    def put(self, name: str, tensor: Tensor) -> None:
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{final_path(self._folder)}: not written, because {name} has NaN or infinity; lower train.lr or "
                "resume earlier"
            )
        rounded = tensor.to(self._dtype).contiguous()
        if name in self._unused:
            unused = self._unused[name]
            rounded = torch.cat((self._before(name)[:unused], rounded[unused:]))
        self._changed = self._changed or not torch.equal(rounded, self._before(name))
        self._writers[name].write(tensor_bytes(rounded))

    def _before(self, name: str) -> Tensor:
        with open_checkpoint(self._base) as checkpoint:
            stored = stored_name(name, self._architecture, checkpoint)
            assert stored is not None, "every tensor that is trained is one of the base's"
            return checkpoint.slice(stored)[:].to(self._dtype)

    def finish(self) -> None:
        self._open.close()
        if not self._changed:
            raise UserError(
                f"{final_path(self._folder)}: not written, because every weight in {self._name} equals the base's, "
                "so training did not change the model; raise train.lr or train.steps"
            )
        for path in other_files(self._base):
            if path.parent == self._base:  # a checkpoint has no subfolders
                shutil.copyfile(path, self._folder / path.name)
        write_config(self._base / "config.json", self._folder / "config.json", self._name)
        index = {"metadata": {"total_size": self._size}, "weight_map": self._places}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (self._folder / PROVENANCE_FILE).write_text(self._provenance.to_json(), encoding="utf-8")


class ModelFolders(MethodFiles):
    """The checkpoints of full fine-tuning, which are ordinary Hugging Face model folders."""

    published = ()

    def wrote(self, folder: Path) -> bool:
        return any_there(folder, ("config.json", SINGLE_FILE, INDEX_FILE))

    def refuse_merge(self, folder: Path) -> None:
        raise UserError(f"{folder}: a whole model, not an adapter, so there is nothing to merge; use it as it is")

    def publish(self, source: Path, name: str, *, target: str | None, max_rank: int | None) -> Published:
        raise UserError(
            f"{source}: not exported, because it is a whole model and already a Hugging Face folder; use it as it "
            "is, and to publish it leave out optimizer.safetensors, trainer_state.json and manifest.json"
        )

    def inspect(self, folder: Path, report: Report) -> Inspected:
        """Inspect the model folder and require finite numbers. Of a base, only the fingerprint is compared."""
        model = inspect_model(folder)
        report.facts.update({"method": "full", **model.facts})
        report.warnings.extend(model.warnings)
        report.problems.extend(model.problems)
        if model.verifies:
            report.read(folder, _require_finite, folder)
        return Inspected()


FILES = ModelFolders()


def _require_finite(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            if not torch.isfinite(checkpoint.slice(name)[:]).all():
                raise UserError(f"{checkpoint.file(name)}: {name} has NaN or infinity; take an earlier checkpoint")
