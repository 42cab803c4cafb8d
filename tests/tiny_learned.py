"""Random prefixes, prompts, adapter layers and whole models in the folders that training of tiny models would write.

All numbers differ, so a swapped axis, layer or head is found. The project's own writers write the folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.tensors import hf_shapes
from lowrank_dist.checkpoint.folder import write_checkpoint
from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.formats.model_folder import open_checkpoint, stored_name
from lowrank_dist.formats.provenance import Provenance, fingerprint
from lowrank_dist.methods.bottleneck.files import (
    BottleneckConfig,
    Bottlenecks,
    places,
    stored_shapes,
    write_bottlenecks,
)
from lowrank_dist.methods.files import TrainedFiles
from lowrank_dist.methods.full.files import WholeModelFiles
from lowrank_dist.methods.prompt_files import PromptLearning, write_prompt_learning

LENGTH, BOTTLENECK = 3, 6


def provenance(base: Path, method: str) -> Provenance:
    return Provenance(fingerprint(base), str(base), {"method": method}, training={"step": 4, "loss": 1.5})


def state(base: Path, step: int, method: str) -> TrainingState:
    data = DataState(path="train.jsonl", sha256="ab", samples=3)
    return TrainingState(
        step=step,
        epoch=1.0,
        samples=3,
        tokens=30,
        target_tokens=9,
        loss=1.5,
        eval_losses={step: 2.0},
        data=data,
        held_out=None,
        rng={},
        config={"method": method},
        base_fingerprint=fingerprint(base),
        ranks={"tensor": 1, "data": 1},
        versions={},
    )


def learned(base: Path, kind: str, length: int = LENGTH) -> PromptLearning:
    """Return a random prefix or prompt (`kind`) for the model in `base`."""
    found, generator = read_architecture(base), torch.Generator().manual_seed(5)
    if kind == "prefix":
        heads, width = found.kv_heads, found.kv_heads * found.head_dim
        drawn = torch.randn(length, 2 * len(found.layers) * width, generator=generator)
        return PromptLearning("PREFIX_TUNING", drawn, len(found.layers), heads, width, str(base))
    drawn = torch.randn(length, found.hidden, generator=generator)
    return PromptLearning("PROMPT_TUNING", drawn, len(found.layers), found.heads, found.hidden, str(base))


def layers(base: Path, method: str, scale: float = 0.3) -> Bottlenecks:
    """Return random adapter layers of `method` for the model in `base`."""
    found, generator = read_architecture(base), torch.Generator().manual_seed(5)
    config = BottleneckConfig(
        method=method, bottleneck=BOTTLENECK, layers=len(found.layers), hidden=found.hidden, base=str(base)
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(len(found.layers)):
        for place in places(method):
            shapes |= stored_shapes(config, layer, place)
    return Bottlenecks(
        config, {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )


def save_learned(folder: Path, base: Path, method: str) -> Path:
    """Write the adapter folder of prefix, prompt, adapter_h or adapter_l; returns `folder`."""
    folder.mkdir(parents=True)
    if method in ("prefix", "prompt"):
        write_prompt_learning(folder, learned(base, method), provenance(base, method))
    else:
        write_bottlenecks(folder, layers(base, method), provenance(base, method), trained=True)
    return folder


class _Written:
    """`TrainedFiles` that copies prepared files, for a checkpoint of any method."""

    def __init__(self, write: Callable[[], object]) -> None:
        self._write = write

    def put(self, name: str, tensor: Tensor) -> None: ...

    def finish(self) -> None:
        self._write()


def save_checkpoint(folder: Path, base: Path, method: str) -> Path:
    """Write a checkpoint checkpoints/step-N of one of these methods, with one meaningless tensor as optimizer state."""
    step = int(folder.name.removeprefix("step-"))

    def files(temporary: Path) -> TrainedFiles:
        if method in ("prefix", "prompt"):
            return _Written(partial(write_prompt_learning, temporary, learned(base, method), provenance(base, method)))
        return _Written(
            partial(write_bottlenecks, temporary, layers(base, method), provenance(base, method), trained=True)
        )

    write_checkpoint(folder, files, {"x": (1,)}, [{"x": torch.ones(3, 1)}], state(base, step, method))
    return folder


def base_tensors(base: Path) -> dict[str, Tensor]:
    """Return all tensors of the model in `base` in fp32, by their names with the base-model prefix."""
    architecture = read_architecture(base)
    with open_checkpoint(base) as checkpoint:
        return {
            name: checkpoint.slice(stored_name(name, architecture, checkpoint))[:].float().clone()
            for name in hf_shapes(architecture)
        }


def save_whole(
    folder: Path,
    base: Path,
    edit: Callable[[str, Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[Iterator[Mapping[str, Tensor]]], Iterator[Mapping[str, Tensor]]] = lambda stream: stream,
) -> Path:
    """Write a checkpoint of full fine-tuning from the base's tensors, changed by `edit` (name, fp32 tensor).

    wrap: applied to the stream of tensors before it is written.
    """
    shapes = hf_shapes(read_architecture(base))
    step = int(folder.name.removeprefix("step-"))

    def stream() -> Iterator[dict[str, Tensor]]:
        for name, tensor in base_tensors(base).items():
            yield {name: torch.stack([edit(name, tensor), *[torch.zeros_like(tensor)] * 2])}

    def files(temporary: Path) -> TrainedFiles:
        return WholeModelFiles(temporary, base, shapes, dtype, provenance(base, "full"), trained=True)

    write_checkpoint(folder, files, shapes, wrap(stream()), state(base, step, "full"))
    return folder


def run_of(folder: Path, base: Path, method: str, save: Callable[..., Any]) -> Path:
    """Write the folder of a run with checkpoints of steps 5 and 10, each by `save` (folder)."""
    for step in (5, 10):
        save(folder / "checkpoints" / f"step-{step}")
    for name in ("last", "best"):
        (folder / "checkpoints" / name).symlink_to("step-10")
    (folder / "config.yaml").write_text(
        f"model: {{path: {base}}}\nmethod: {method}\ndata: {{train: a.jsonl}}\noutput: {{dir: {folder}}}\n"
    )
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 4.0}\n{"step": 10, "loss": 2.5}\n')
    return folder
