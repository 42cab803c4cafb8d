"""The data sets of a run, their batches on this rank, and the texts that evaluation generates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Literal

from lowrank_dist.arch.architecture import Architecture
from lowrank_dist.checkpoint.training_state import DataState, TrainingState
from lowrank_dist.config import Config
from lowrank_dist.config.schema import TrainConfig
from lowrank_dist.data.batches import BatchSplit, Loader, StepBatch, eval_batches
from lowrank_dist.data.dataset import Dataset, load_dataset
from lowrank_dist.data.formats import Use
from lowrank_dist.data.tokenizer import FastTokenizer, Tokenizer, load_tokenizer
from lowrank_dist.errors import UserError
from lowrank_dist.generate.decode import EvaluationParams, check_lengths, evaluate_generation
from lowrank_dist.generate.metrics import notes_on_references
from lowrank_dist.generate.prompts import Prompt, note_on_rewritten, read_prompts
from lowrank_dist.generate.sampling import SamplingParams
from lowrank_dist.generate.texts import stop_tokens
from lowrank_dist.methods.method import Method
from lowrank_dist.model.causal_lm import CausalLM
from lowrank_dist.parallel.topology import Topology
from lowrank_dist.terminal import ProgressLines, say

EVAL_MICROBATCHES = 16  # microbatches of each rank in one batch of evaluation

# Arguments: the model, and a callback that gets (prompts done, prompts in all) after each batch. Returns name → value.
Generating = Callable[[CausalLM, Callable[[int, int], None]], dict[str, float]]


@dataclass(frozen=True)
class StreamRange:
    """The part that a run reads of the training stream: its data set, shuffled by the seed and repeated without end.

    position: samples read before this start. end: the position at which a run by epochs ends; None for a run by steps.
    steps: optimizer steps of the whole run. notes: a line where a resumed run reads other data than an uninterrupted
    one would.
    """

    position: int
    end: int | None
    steps: int
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, train: TrainConfig, dataset: Dataset, resumed: TrainingState | None) -> StreamRange:
        """Return the range of a run that resumes from `resumed`, or starts afresh where that is None.

        With train.epochs the number of steps follows from the position.
        """
        position, notes = (0, ()) if resumed is None else _position(train, dataset, resumed)
        if train.steps is not None:
            return cls(position, None, train.steps, notes)
        assert train.epochs is not None, "the configuration has one of the two"
        # Rounded first: 0.1 of 30 samples is 3.0000000000000004.
        end = max(1, math.ceil(round(train.epochs * len(dataset), 6)))
        done = 0 if resumed is None else resumed.step
        return cls(position, end, done + math.ceil((end - position) / train.global_batch), notes)


def _position(train: TrainConfig, dataset: Dataset, resumed: TrainingState) -> tuple[int, Sequence[str]]:
    """Return the position in the stream, and notes on it.

    Another data set or seed makes another stream. Resuming in the middle of a pass over it would leave samples out.
    """
    position, n, before = resumed.stream_position, len(dataset), f"up to step {resumed.step}"
    seed, batch = resumed.setting("train", "seed"), resumed.setting("train", "global_batch")
    if resumed.data.sha256 != dataset.sha256:
        return 0, [
            f"data.train was another file {before}: the new one is read from its beginning, and passes count from zero"
        ]
    if seed not in (None, train.seed):
        whole = position // n
        return whole * n, [
            f"train.seed was {seed} {before}: pass {whole + 1} over the data starts again in a new order"
        ]
    if batch not in (None, train.global_batch):
        return position, [
            f"train.global_batch was {batch} {before}: the data continues after {position / n:.2f} passes"
        ]
    return position, ()


@dataclass(frozen=True)
class Data:
    """The data sets of a run and their batches on this data-parallel rank.

    evaluation: returns an iterator over the eval set's batches, from the first each time. generation: decodes the eval
    set's prompts and scores the completions (`evaluate_generation`). notes: lines to print at the start of the run.
    """

    dataset: Dataset
    train: Loader
    stream_range: StreamRange
    held_out: Dataset | None = None
    evaluation: Callable[[], Iterator[StepBatch]] | None = None
    generation: Generating | None = None
    notes: Sequence[str] = ()

    @property
    def state(self) -> DataState:
        """The training set as a checkpoint records it; a resumed run compares it with its own."""
        return _state(self.dataset)

    @property
    def held_out_state(self) -> DataState | None:
        """The same for the eval set; None without one."""
        return None if self.held_out is None else _state(self.held_out)

    def first_batch(self) -> StepBatch:
        """Return the first batch of the eval set, or of training where there is none."""
        return self.train.batch(0) if self.evaluation is None else next(self.evaluation())


def build_data(
    config: Config,
    method: Method,
    architecture: Architecture,
    topology: Topology,
    resumed: TrainingState | None = None,
    started_at: datetime | None = None,
) -> Data:
    """Tokenise the data sets and distribute them over data-parallel ranks. The seed determines the order of samples.

    resumed: the state that the run resumes from. started_at: the time at which the run began; None for now.
    Raises UserError for samples that cannot be trained on, and for those from which eval.generate cannot generate.
    """
    data, train = config.data, config.train
    tokenizer = load_tokenizer(data.tokenizer or config.model.path, started_at)
    pad_multiple = topology.tp_size if topology.sequence_parallel else 1
    split = split_of(config, method, topology.dp_rank, topology.dp_size, pad_multiple)
    tell = partial(say, err=True) if topology.world_group.rank() == 0 else lambda line: None
    dataset = read_set(config, "train", tokenizer, method, architecture, tell=tell)
    stream_range = StreamRange.of(train, dataset, resumed)
    loader = Loader(dataset, split, seed=train.seed, global_batch=train.global_batch, end=stream_range.end)
    own_notes = [
        *note_on_batch(train, len(dataset), stream_range),
        *note_on_idle_ranks(train, topology.dp_size),
        *_note_on_clock(tokenizer, started_at),
    ]
    if data.eval is None:
        return Data(dataset, loader, stream_range, notes=own_notes)
    held_out = read_set(config, "eval", tokenizer, method, architecture, tell=tell)
    split = replace(split, micro_batch=config.eval.micro_batch or train.micro_batch)
    # Nothing is accumulated over an eval batch. Its size decides how many rows of similar length are grouped, and
    # bounds how much is packed and made into tensors at a time.
    together = EVAL_MICROBATCHES * split.micro_batch * topology.dp_size
    evaluation = partial(eval_batches, held_out, split, global_batch=together)
    generation, notes = _generation(config, method, tokenizer, architecture, topology)
    return Data(dataset, loader, stream_range, held_out, evaluation, generation, [*own_notes, *notes])


def read_set(
    config: Config,
    key: Literal["train", "eval"],
    tokenizer: Tokenizer,
    method: Method,
    architecture: Architecture,
    most: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Return the data set of data.train or data.eval.

    most: as in `load_dataset`. tell: called with lines of progress if reading takes long. Raises as `load_dataset`.
    """
    path, use = (config.data.train, Use.TRAINING) if key == "train" else (config.data.eval, Use.EVALUATION)
    assert path is not None, "the configuration has no data.eval"
    # Tokens of the longest sample. Virtual tokens are part of its row; a prefix takes positions outside the row.
    longest = config.data.max_length - method.virtual_positions
    progress = ProgressLines(f"tokenising data.{key}", "samples", tell=tell)
    return load_dataset(path, tokenizer, longest, architecture.vocab, method.virtual_token_ids, use, most, progress)


def split_of(config: Config, method: Method, dp_rank: int, dp_size: int, pad_multiple: int) -> BatchSplit:
    """Return the split of training batches."""
    return BatchSplit(
        config.train.micro_batch,
        max_length=config.data.max_length - method.virtual_positions + len(method.virtual_token_ids),
        packing=config.data.packing,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pad_multiple=pad_multiple,
    )


def note_on_batch(train: TrainConfig, samples: int, stream_range: StreamRange) -> list[str]:
    """Return a line where one optimizer step needs more samples than the data set has."""
    if train.global_batch <= samples or (stream_range.end is not None and stream_range.end <= samples):
        return []
    return [
        f"train.global_batch {train.global_batch} is more than the {samples} samples of data.train, so a step reads "
        "some of them more than once"
    ]


def note_on_idle_ranks(train: TrainConfig, dp_size: int) -> list[str]:
    """Return a line where a step has fewer microbatches than data-parallel ranks, so that some have no samples."""
    busy = train.global_batch // train.micro_batch
    if busy >= dp_size:
        return []
    return [
        f"{dp_size - busy} of {dp_size} data-parallel ranks have no samples: train.global_batch {train.global_batch} "
        f"fills {busy} microbatch{'es' * (busy > 1)} of train.micro_batch {train.micro_batch}; lower train.micro_batch "
        f"to {max(1, train.global_batch // dp_size)}, or raise train.global_batch"
    ]


def _note_on_clock(tokenizer: Tokenizer, started_at: datetime | None) -> list[str]:
    if started_at is None or not isinstance(tokenizer, FastTokenizer):
        return []
    if tokenizer.template is None or not tokenizer.template.reads_the_clock:
        return []
    return [
        f"the chat template reads the clock, which stays at {started_at}, the start of this run, even after a resume"
    ]


def _generation(
    config: Config, method: Method, tokenizer: Tokenizer, architecture: Architecture, topology: Topology
) -> tuple[Generating | None, Sequence[str]]:
    """Return the function that generates in an evaluation, None without eval.generate, and notes on its prompts.

    It is prepared here so that every error in its configuration and prompts is found before training begins.
    """
    if config.eval.generate is None:
        return None, ()
    params, samples = generation_prompts(config, method, tokenizer, architecture)

    def generation(model: CausalLM, progress: Callable[[int, int], None]) -> dict[str, float]:
        done = 0

        def finished(rows: int) -> None:
            nonlocal done
            done = min(done + rows * topology.dp_size, len(samples))
            progress(done, len(samples))

        return evaluate_generation(model, tokenizer, samples, params, topology, finished)

    notes = notes_on_references(params.metrics, [sample.references for sample in samples])
    return generation, [*note_on_rewritten(samples), *notes]


def generation_prompts(
    config: Config, method: Method, tokenizer: Tokenizer, architecture: Architecture, most: int | None = None
) -> tuple[EvaluationParams, list[Prompt]]:
    """Return the settings and the prompts of eval.generate. most: as in `load_dataset`.

    Raises UserError for samples from which the model cannot generate, and for metrics that cannot be computed.
    """
    asked = config.eval.generate
    assert asked is not None and config.data.eval is not None, "there is nothing to generate for"
    try:
        sampling = SamplingParams(asked.max_new_tokens, batch=asked.batch, stop=tuple(asked.stop))
        params = EvaluationParams(tuple(asked.metrics), sampling)
        stops = stop_tokens(config.model.path, tokenizer)
        samples = read_prompts(
            config.data.eval,
            tokenizer,
            stops,
            vocab=architecture.vocab,
            references=True,
            stop=asked.stop,
            most=most,
        )
        samples = samples[: asked.samples]
        check_lengths(samples, architecture.max_positions - method.virtual_positions)
    except UserError as error:
        raise UserError(f"eval.generate: {error}") from error
    return params, samples


def _state(dataset: Dataset) -> DataState:
    return DataState(path=str(dataset.report.path), sha256=dataset.sha256, samples=len(dataset))
