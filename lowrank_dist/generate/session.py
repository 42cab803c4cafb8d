"""The ranks and the model of a command that generates text, under a launcher or in this process alone."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from lowrank_dist.arch.config_json import config_notes, read_architecture
from lowrank_dist.arch.generation_config import generation_notes
from lowrank_dist.arch.model_files import CONFIG_FILE, require_folder
from lowrank_dist.backend import select
from lowrank_dist.backend.launchers import is_first_on_node
from lowrank_dist.backend.rank_variables import check_rank_variables
from lowrank_dist.backend.select import Backend
from lowrank_dist.data.keys import tokenizer_notes
from lowrank_dist.data.tokenizer import Tokenizer, load_tokenizer
from lowrank_dist.errors import RankIdentityError, UserError
from lowrank_dist.formats.paths import detect_removal
from lowrank_dist.formats.provenance import digest_of, fingerprint, trained_on_chats
from lowrank_dist.formats.text_files import tokenizer_digest, tokenizer_of_adapter
from lowrank_dist.generate.prompts import Prompt
from lowrank_dist.generate.sampling import SamplingParams
from lowrank_dist.generate.texts import stop_tokens
from lowrank_dist.methods.registry import method_package_of, method_package_reading
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.model.load import dtype_notes, load_model
from lowrank_dist.parallel.collectives import gather_texts, require_agreement
from lowrank_dist.parallel.topology import Topology

# Data-parallel ranks meet only at the end of a command, and one may decode for hours after another is done.
_TIMEOUT_SECONDS = 24 * 3600
_USER_ERROR = 2
_VOCAB_MULTIPLE = 128
_REMEDY = "Give all ranks the same options and files; the paths may differ, but not the contents"


@dataclass(frozen=True)
class Session:
    """The ranks of a command that generates text. should_print: this rank prints and writes."""

    topology: Topology
    backend: Backend
    should_print: bool


@contextmanager
def session(tensor: int, device: str) -> Iterator[Session]:
    """Yield the session of the launcher's job, or of this process alone, at tensor-parallel size `tensor`.

    Further ranks are data parallel. device: auto, cpu or cuda. If several ranks meet a UserError, only the first raises
    it; the others exit with the same code.
    """
    launched, clean = "RANK" in os.environ, False
    if tensor > 1 and not launched:
        raise UserError(
            f"--tensor {tensor} needs {tensor} ranks, but this process was started alone; run `torchrun "
            f"--nproc-per-node {tensor} -m lowrank_dist.cli COMMAND … --tensor {tensor}`"
        )
    try:
        if launched:
            check_rank_variables()
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {device}: unknown device; give auto, cpu or cuda")
        backend = select.select_backend(device, select.local_rank())
        if launched:
            backend = select.init_process_group(backend, _TIMEOUT_SECONDS)
            world = dist.group.WORLD
            assert world is not None, "the ranks have met"
            require_agreement({"--tensor": str(tensor)}, world, backend.device, _REMEDY)
        elif not dist.is_initialized():
            dist.init_process_group(backend.collective, store=dist.HashStore(), rank=0, world_size=1)
        # Without sequence parallelism: decoding works on whole sequences.
        topology = Topology.build(tensor, None, False, _TIMEOUT_SECONDS)
        yield Session(topology, backend, should_print=topology.world_group.rank() == 0)
        clean = True
    except UserError as error:
        if launched and not isinstance(error, RankIdentityError) and not _is_first_to_fail():
            sys.exit(_USER_ERROR)
        raise
    finally:
        select.shutdown(clean=clean or not launched)


def _is_first_to_fail() -> bool:
    if not dist.is_initialized():
        return is_first_on_node()
    try:
        return dist.distributed_c10d._get_default_store().add("lowrank_dist/decoding_failed", 1) == 1
    except RuntimeError:  # the rank that held the store is gone: reporting twice is better than never
        return True


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, with its tokenizer; path: the folder of the base or merged model.

    stop_ids: the tokens that end a completion. trained_on_chats: the adapter, or the model itself, records that its
    training data were chats. notes: a line for each setting in its files that is not applied.
    """

    path: Path
    model: CausalLM
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    trained_on_chats: bool
    notes: tuple[str, ...]

    @property
    def vocab(self) -> int:
        """The number of the model's ids, padding rows not counted."""
        return self.model.architecture.vocab


def load_for_generation(
    path: Path,
    adapter: Path | None,
    topology: Topology,
    device: torch.device,
    *,
    dtype: str = "auto",
    tokenizer: Path | None = None,
) -> LoadedModel:
    """Return this rank's shard of the model in `path`, with the trained adapter of any method from folder `adapter`.

    dtype: auto (that of the weights), fp32 or bf16. tokenizer: its folder; by default the adapter's if it has one, with
    which it was trained, else `path`. Raises UserError on every rank where the ranks were given different content.
    """
    _require_model(path)
    with detect_removal(path) as model, detect_removal(adapter or path) as trained:
        return _load_rank(model, adapter and trained, topology, device, dtype, tokenizer)


def _require_model(path: Path) -> None:
    """Raise UserError where --model is no folder, or is an adapter."""
    require_folder(path)
    if not (path / CONFIG_FILE).is_file() and method_package_of(path) is not None:
        raise UserError(
            f"{path}: this is an adapter; name it with --adapter and its base model with --model: --model BASE "
            f"--adapter {path}"
        )


def _load_rank(
    path: Path, adapter: Path | None, topology: Topology, device: torch.device, dtype: str, tokenizer: Path | None
) -> LoadedModel:
    beside = tokenizer or tokenizer_of_adapter(adapter, path)
    # Rank 0's time, for templates that read the clock: all ranks must render the same prompt.
    present = gather_texts(datetime.now().isoformat(), topology.world_group, device)[0]
    words = load_tokenizer(beside, datetime.fromisoformat(present))
    if topology.world_group.size() > 1:
        digests = {"--model": fingerprint(path), "--tokenizer": tokenizer_digest(beside)}
        if adapter is not None:
            digests["--adapter"] = digest_of(adapter / name for name in method_package_reading(adapter).files.published)
        own = {"--dtype": dtype, **{name: f"{digest[:12]}…" for name, digest in digests.items()}}
        require_agreement(own, topology.world_group, device, _REMEDY)
    # No length is checked here: prompts are checked one by one.
    architecture = read_architecture(path)
    architecture.check_tp(topology.tp_size, topology.world_group.size())
    model = load_model(
        path,
        architecture,
        topology,
        device=device,
        dtype=dtype,
        vocab_multiple=_VOCAB_MULTIPLE,
        broadcast=topology.dp_size > 1,
    )
    if adapter is not None:
        method_package_reading(adapter).builder.attach_trained(model, path, adapter, topology)
    notes = [*config_notes(path), *dtype_notes(path, model.config.params_dtype), *tokenizer_notes(beside)]
    notes += generation_notes(path)
    if adapter is not None:
        notes += method_package_reading(adapter).files.notes(adapter)
    chats = trained_on_chats(path) if adapter is None else trained_on_chats(adapter, path)
    return LoadedModel(path, model.eval(), words, stop_tokens(path, words, adapter), chats, tuple(notes))


def require_same_prompts(prompts: Sequence[Prompt], params: SamplingParams, job: Session) -> None:
    """Raise UserError on every rank where the ranks have different prompts or parameters. Collective."""
    text = repr([(prompt.ids, sorted(prompt.stop_ids), prompt.references) for prompt in prompts])
    own = {"what is decoded": f"{len(prompts)} prompts, {hashlib.sha256(text.encode()).hexdigest()[:12]}…"}
    require_agreement({**own, "how": repr(params)}, job.topology.world_group, job.backend.device, _REMEDY)
