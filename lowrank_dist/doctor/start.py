"""Doctor's checks of a run, made by the code that starts one: they find what `launch/train.py` would refuse.

Megatron is imported inside the checks and not by this module: doctor must also work where Megatron is broken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.backend.libraries import silence_megatron
from lowrank_dist.backend.node import host_name
from lowrank_dist.doctor.rows import Row, State, format_size
from lowrank_dist.errors import UserError

if TYPE_CHECKING:
    from lowrank_dist.arch.architecture import Architecture
    from lowrank_dist.backend.select import Backend
    from lowrank_dist.config import Config
    from lowrank_dist.data.tokenizer import Tokenizer
    from lowrank_dist.methods.method import Method

# Bytes hashed at the beginning, the middle and the end of a data file, so that a node with a different file is detected
# in less than a second per file.
SAMPLE_BYTES = 16 * 2**20
# Samples of each data file that are tokenised: seconds, however large the file is.
SAMPLES = 2000


def kernels(config: Config) -> list[Row]:
    """Return a row on the compiled operators if engine.kernels requires them; otherwise no row."""
    if config.engine.kernels != "compiled":
        return []
    from lowrank_dist.backend.devices import gpus
    from lowrank_dist.ops import extension

    device = config.model.device
    if device == "auto":
        try:
            gpus()
            device = "cuda"
        except RuntimeError:
            device = "cpu"
    extension.require_compiled(device)
    return [Row("engine.kernels", "ok", extension.describe(device))]


def length(config: Config) -> list[Row]:
    """Return a row on data.max_length. Raises UserError where it exceeds the model's positions."""
    with silence_megatron():
        from lowrank_dist.model.load import check_length

    try:
        architecture = read_architecture(config.model.path)
    except UserError:  # it has a row of its own
        return []
    check_length(architecture, config.model.path, config.data.max_length)
    positions = f"{config.data.max_length} of the model's {architecture.max_positions} positions"
    return [Row("data.max_length", "ok", positions)]


def built_method(config: Config) -> tuple[Method, Architecture]:
    """Return the run's method, built for its model. Raises UserError where the run's own start does."""
    with silence_megatron():
        from lowrank_dist.engine.run_method import completed_method

        return completed_method(config)


@dataclass(frozen=True)
class _Ranks:
    """The ranks that the plan is made for."""

    tp_size: int
    dp_size: int
    sequence_parallel: bool
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Met:
    """The facts that a rank knows of the job. hosts: the name of every rank's node. backend: this rank's own."""

    hosts: tuple[str, ...]
    backend: Backend


def memory(config: Config, met: Met | None) -> list[Row]:
    """Return a row on the planned memory of a rank: a run whose ranks do not have it refuses to start.

    met: the ranks of the job. Without them, one tensor-parallel group is assumed to run on this machine with a device
    for each rank. If it does not fit, the row is only a warning, since the run may start elsewhere. There is no row for
    parallel.tensor=auto, which adapts to the ranks, and none if the model or the method is broken, which has a row of
    its own.
    """
    with silence_megatron():
        from lowrank_dist.backend import select
        from lowrank_dist.backend.devices import device_of_rank
        from lowrank_dist.engine.forecast import Forecast
    tensor = config.parallel.tensor
    if tensor == "auto":
        return []
    try:
        _, architecture = built_method(config)
        architecture.check_tp(tensor)
    except UserError:
        return []
    if met is not None:
        hosts, backend = met.hosts, met.backend
    else:
        device = device_of_rank(config.model.device, 0)
        hosts, backend = (host_name(),) * tensor, select.Backend(device, "gloo", device.type)
    parallel = tensor > 1 and config.parallel.sequence is not False
    planned = _Ranks(tensor, max(1, len(hosts) // tensor), parallel, hosts)
    try:
        forecast = Forecast(config, architecture, planned, backend)
        return [Row("planned memory", "warning" if forecast.lacks_host_memory else "ok", forecast.memory_line)]
    except UserError as error:
        if met is not None:
            raise
        return [Row("planned memory", "warning", f"with {tensor} ranks on this machine: {error}")]


def output(config: Config) -> list[Row]:
    """Return a row on output.dir. A run that it holds must be one that this run resumes or may remove."""
    from lowrank_dist.engine.run_folder import RunFolder

    path = config.output.dir
    folder = RunFolder.prepare(
        path, config.train.resume, config.inputs, overwrite=config.output.overwrite, shaping=config.shaping
    )
    held = "holds a run" if folder.config.exists() else "holds no run"
    return [Row("output.dir", "ok", f"{path}: {held}; train.resume={config.train.resume}")]


def resumed(config: Config) -> list[Row]:
    """Return a row on the checkpoint that the run would resume from; no row if it would start afresh.

    The checkpoint's base and settings must be the run's. Its files are not compared with its manifest, nor the data
    with those that it was trained on, since that reads all of them.
    """
    from lowrank_dist.engine.resumable import checkpoint_to_resume, complete, require_same_settings
    from lowrank_dist.engine.run_folder import RunFolder

    found = checkpoint_to_resume(config, RunFolder(config.output.dir), verify=False)
    if found is None:
        return []
    require_same_settings(complete(config, found), found)
    return [Row("train.resume", "ok", f"{found.folder}: step {found.state.step}; data are compared at the start")]


def data(config: Config) -> Iterator[Row]:
    """Yield rows on the data files: they must exist, and the run's own readers must take their first samples."""
    readers: _Readers | Literal["unread", "broken"] = "unread"
    keys: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    for key in keys:
        path: Path | None = getattr(config.data, key)
        if path is None:
            continue
        what = f"data.{key}"
        try:
            size, digest = _hashed(path)
        except OSError as error:
            detail = f"{path}: {error.strerror}; correct {what}, or copy the file to this node"
            yield Row(what, "missing" if isinstance(error, FileNotFoundError) else "broken", detail)
            continue
        if readers == "unread":
            readers = _Readers.of(config) or "broken"
        state: State = "warning"
        said = "its samples were not read, because model, tokenizer or method cannot be read; see their rows"
        if isinstance(readers, _Readers):
            try:
                state, said = readers.read(key)
            except UserError as error:
                # As the run reports them: a line for each bad line of the file.
                yield from (Row(what, "broken", line) for line in str(error).splitlines())
                continue
        alike = f"{size} bytes, digest {digest}"
        yield Row(what, state, f"{path}: {format_size(size)}, digest {digest}; {said}", alike=alike)


def generation(config: Config) -> list[Row]:
    """Return a row on the first prompts of eval.generate; no row if it is null or if their readers are broken."""
    readers = _Readers.of(config) if config.eval.generate is not None else None
    if readers is None:
        return []
    from lowrank_dist.engine.datasets import generation_prompts

    _, samples = generation_prompts(config, readers.method, readers.tokenizer, readers.architecture, SAMPLES)
    return [Row("eval.generate", "ok", f"the first {len(samples)} prompts can be completed")]


@dataclass(frozen=True)
class _Readers:
    """The tokenizer, method and model size that a run reads its data with."""

    config: Config
    tokenizer: Tokenizer
    method: Method
    architecture: Architecture

    @classmethod
    def of(cls, config: Config) -> _Readers | None:
        """Return them; None where one of them is broken, which has a row of its own."""
        from lowrank_dist.data.tokenizer import load_tokenizer

        try:
            return cls(config, load_tokenizer(config.data.tokenizer or config.model.path), *built_method(config))
        except UserError:
            return None

    def read(self, key: Literal["train", "eval"]) -> tuple[State, str]:
        """Return the state of a data set's first samples, and how many can be trained on. Raises as the run does."""
        with silence_megatron():
            from lowrank_dist.engine.datasets import read_set

        report = read_set(self.config, key, self.tokenizer, self.method, self.architecture, SAMPLES).report
        which = f"{report.total} samples" if report.whole else f"of the first {report.total} samples"
        said = f"{which}: {report.kept} fit and have targets"
        if report.too_long or report.no_target:
            said += f", {report.too_long} are over {report.max_length} tokens, {report.no_target} have no target"
        if not report.kept:
            said += "; `lowrank-dist data CONFIG` reads the whole file"
        return "ok" if report.kept else "warning", said


def _hashed(path: Path) -> tuple[int, str]:
    """Return the size of a file and a digest of parts of it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for start in sorted({0, max(0, (size - SAMPLE_BYTES) // 2), max(0, size - SAMPLE_BYTES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return size, digest.hexdigest()[:12]
