"""Decoding across ranks: one token for all, sequence parallelism switched off and on again, few messages."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.dist.tiny_runs import Setting, build
from tests.integration.launching import write_jsonl
from tests.tiny_models import VOCAB, make_tiny

ROWS, LENGTH = 2, 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("generate_ranks")
    return {family: str(make_tiny(family, base / family)) for family in ("llama", "gpt2")}


def adapted_model(folder: str, sequence: bool) -> tuple[Any, list[Any]]:
    """Return the factors (B ≠ 0) and the model with them, fused where sequence parallelism allows it."""
    from tests.dist.whole import theta_of

    model, adapted, _, _ = build(Setting(folder, 2, sequence, zero_b=False, fuse_factors=True))
    return model, theta_of(adapted)


def loss_and_gradients(model: Any, theta: list[Any]) -> list[np.ndarray]:
    for parameter in theta:
        parameter.grad = None
    ids = torch.arange(ROWS * LENGTH, device=ranks.device()).view(ROWS, LENGTH)
    loss = model.loss(ids, torch.arange(LENGTH).expand(ROWS, LENGTH).to(ids), ids.flatten()[::2], ids.flatten()[::2])
    loss.backward()
    return [loss.detach().cpu().numpy(), *(parameter.grad.cpu().numpy() for parameter in theta)]


def switched(folder: str) -> dict[str, Any]:
    """On one rank: return loss, partial gradients and calls of a pass, for either model and for a switched one."""
    from lowrank_dist.parallel.counting import count_collectives

    found = {}
    for name, sequence in (("off", False), ("on", True), ("switched", True), ("back", True)):
        if name != "back":
            model, theta = adapted_model(folder, sequence)
        switch = model.without_sequence_parallelism() if name == "switched" else nullcontext()
        with switch, count_collectives() as calls:
            found[name] = loss_and_gradients(model, theta)
        found[f"{name} calls"] = [(call.kind, call.bytes) for call in calls.calls]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_switch_gives_the_model_that_was_built_without(folders: dict[str, str], family: str) -> None:
    """A switched model has the gradients and the calls of one that was built that way.

    Gradients of replicated factors are partial sums over token shards or over weight shards, which tells the two apart.
    """
    for found in run_ranks(2, switched, folders[family]):
        for name, twin in (("switched", "off"), ("back", "on")):
            assert found[f"{name} calls"] == found[f"{twin} calls"]
            for one, other in zip(found[name], found[twin], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
        # Negative control: the two differ.
        assert found["on calls"] != found["off calls"]
        assert any(not np.allclose(a, b, rtol=1e-2) for a, b in zip(found["on"], found["off"], strict=True))


def unswitched(folder: str) -> str:
    """On one rank: return the error of decoding one token on a model that is still sharded over positions."""
    model, _ = adapted_model(folder, True)
    cache = model.new_cache(torch.zeros(1, dtype=torch.int64, device=ranks.device()), 4)
    try:
        model.decode(torch.ones(1, 1, dtype=torch.int64, device=ranks.device()), cache)
    except AssertionError as error:
        return str(error)
    return ""


def test_decoding_under_sequence_parallelism_is_refused(folders: dict[str, str]) -> None:
    assert all("without_sequence_parallelism" in text for text in run_ranks(2, unswitched, folders["llama"]))


def step_calls(folder: str, temperature: float) -> list[tuple[str, int]]:
    """On one rank: return the calls of one decoding step, from completions of two lengths."""
    from lowrank_dist.generate.decode import generate
    from lowrank_dist.generate.prompts import Prompt
    from lowrank_dist.generate.sampling import SamplingParams
    from lowrank_dist.generate.session import load_for_generation
    from lowrank_dist.parallel.counting import count_collectives

    topology = ranks.topology(2, True)
    loaded = load_for_generation(Path(folder), None, topology, ranks.device(), dtype="fp32")
    prompt, counts = [Prompt("", "", (7, 8, 9), frozenset())], []
    for new in (3, 4):
        with count_collectives() as calls:
            rules = SamplingParams(max_new_tokens=new, temperature=temperature)
            generate(loaded.model, loaded.tokenizer, prompt, rules, topology)
        counts.append(Counter((call.kind, call.bytes) for call in calls.calls))
    return sorted((counts[1] - counts[0]).elements())


@pytest.mark.parametrize(("temperature", "drawing"), [(0.0, []), (1.0, [("all-gather", 512), ("broadcast", 8)])])
def test_calls_of_a_step(folders: dict[str, str], temperature: float, drawing: list[tuple[str, int]]) -> None:
    """One reduction for the embedding, two a layer, one gather: 16 bytes in greedy decoding, all logits in sampling."""
    for found in run_ranks(2, step_calls, folders["llama"], temperature):
        kinds = Counter(kind for kind, _ in found)
        assert kinds.pop("all-reduce") == 1 + 2 * 2
        assert kinds == Counter(["all-gather", *(kind for kind, _ in drawing)])


def drawn_by_ranks(disagree: bool, agreement: bool) -> list[list[int]]:
    """On one rank: draw tokens from equal logits, with random numbers that depend on the rank where `disagree`."""
    from lowrank_dist.generate import sampling
    from lowrank_dist.generate.sampling import SamplingParams

    topology = ranks.topology(2, False)
    shard = torch.zeros(ROWS, 8, device=ranks.device())
    rules, found = SamplingParams(temperature=1.0), []
    original = sampling.uniform_draw
    own = topology.tp_rank if disagree else 0
    with (
        mock.patch.object(sampling, "uniform_draw", lambda seed, sample, step: original(seed + own, sample, step)),
        nullcontext() if agreement else mock.patch.object(dist, "broadcast"),
    ):
        for step in range(8):
            found.append(sampling.next_tokens(shard, 16, rules, [3, 4], step, topology.tp_group).tolist())
    return found


def test_ranks_go_on_with_one_token() -> None:
    one, other = run_ranks(2, drawn_by_ranks, True, True)
    assert one == other == run_ranks(2, drawn_by_ranks, False, True)[0]
    # Negative control: without the broadcast the ranks' tokens differ.
    one, other = run_ranks(2, drawn_by_ranks, True, False)
    assert one != other


def greedy_of(logits: list[list[float]]) -> list[int] | str:
    """On one rank: return the greedy tokens of logits of which it holds its share, padded to whole columns."""
    from lowrank_dist.errors import UserError
    from lowrank_dist.generate.sampling import SamplingParams, next_tokens

    topology = ranks.topology(dist.get_world_size(), False)
    whole = torch.tensor(logits, device=ranks.device())
    width = -(-whole.size(1) // topology.tp_size)
    padded = torch.full((whole.size(0), width * topology.tp_size), -torch.inf, device=whole.device)
    padded[:, : whole.size(1)] = whole
    shard = padded.chunk(topology.tp_size, dim=1)[topology.tp_rank]
    try:
        return next_tokens(shard, whole.size(1), SamplingParams(), [0] * len(logits), 0, topology.tp_group).tolist()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_of_equal_logits_the_lowest_id_wins(world: int) -> None:
    rows = [
        [0.0, 5.0, 1.0, 5.0, 5.0, 0.0, 5.0],  # ties within a rank and across ranks
        [-9.0, -9.0, -9.0, -9.0, -9.0, -9.0, -8.0],  # if padding counted as 0 it would win
        [-3.0, -3.0, -3.0, -3.0, -3.0, -3.0, -3.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0],
    ]
    assert run_ranks(world, greedy_of, rows) == [[1, 6, 0, 5]] * world


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_every_rank(broken: float) -> None:
    """One rank alone has the NaN or infinity, in one row."""
    for message in run_ranks(2, greedy_of, [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, broken]]):
        assert "NaN or infinite" in message


def last_columns(folder: str) -> np.ndarray:
    """On one rank of four, whose head is padded to 128 rows: return the logits after one token."""
    from lowrank_dist.generate.session import load_for_generation

    model = load_for_generation(Path(folder), None, ranks.topology(4, False), ranks.device(), dtype="fp32").model
    cache = model.new_cache(torch.zeros(1, dtype=torch.int64, device=ranks.device()), 1)
    return model.decode(torch.full((1, 1), 9, device=ranks.device()), cache)[0].cpu().numpy()


def test_padded_rows_of_the_vocabulary_never_win(folders: dict[str, str]) -> None:
    logits = np.concatenate(run_ranks(4, last_columns, folders["llama"]))
    assert np.isfinite(logits[:VOCAB]).all() and (logits[VOCAB:] == -np.inf).all()
    assert logits.size > VOCAB + 128  # this rank holds only padding


def evaluated_in_training(folder: str, data: str, tensor: int) -> dict[str, Any]:
    """On one rank: return an evaluation's results between two training passes, and the gradients of both passes."""
    from lowrank_dist.data.tokenizer import load_tokenizer
    from lowrank_dist.generate.decode import EvaluationParams, evaluate_generation
    from lowrank_dist.generate.prompts import read_prompts
    from lowrank_dist.generate.sampling import SamplingParams
    from lowrank_dist.generate.texts import stop_tokens
    from tests.dist.whole import theta_of

    setting = Setting(folder, tensor, True, dropout=0.1, zero_b=False, fuse_factors=True, recompute=True)
    model, adapted, masks, topology = build(setting)
    rows = torch.arange(ROWS * LENGTH, device=ranks.device()).view(ROWS, LENGTH).t().contiguous()
    masks.set(1, rows)
    tokenizer = load_tokenizer(Path(folder))
    samples = read_prompts(Path(data), tokenizer, stop_tokens(Path(folder), tokenizer), vocab=VOCAB, references=True)
    model.train()
    before = loss_and_gradients(model, theta_of(adapted))
    rules = EvaluationParams(("exact_match", "rouge_l"), SamplingParams(max_new_tokens=9, batch=2))
    found = evaluate_generation(model, tokenizer, samples, rules, topology)
    assert model.training and model.topology == topology
    return {"found": found, "before": before, "after": loss_and_gradients(model, theta_of(adapted))}


def test_an_evaluation_leaves_training_as_it_was(folders: dict[str, str], tmp_path: Path) -> None:
    """Gradients are the same bits before and after; results are the same at every layout, dropout included."""
    rows = [{"prompt": "the" * n, "completion": "the t " * n} for n in range(1, 6)]
    data = str(write_jsonl(tmp_path / "data.jsonl", rows))
    (alone,) = run_ranks(1, evaluated_in_training, folders["llama"], data, 1)
    assert alone["found"].keys() == {"exact_match", "rouge_l", "samples", "met_length_limit", "mean_tokens"}
    for tensor in (1, 2):
        for rank in run_ranks(2, evaluated_in_training, folders["llama"], data, tensor):
            assert rank["found"] == alone["found"]
            for one, other in zip(rank["before"], rank["after"], strict=True):
                np.testing.assert_array_equal(one, other)
                assert one.any()


def tokens_near_the_end(folder: str, lengths: tuple[int, ...]) -> list[tuple[int, str]]:
    """On one rank: return how many tokens prompts of these lengths get in 64 positions, and why they end."""
    from lowrank_dist.generate.decode import generate
    from lowrank_dist.generate.prompts import Prompt
    from lowrank_dist.generate.sampling import SamplingParams
    from lowrank_dist.generate.session import load_for_generation

    topology = ranks.topology(1, False)
    loaded = load_for_generation(Path(folder), None, topology, ranks.device(), dtype="fp32")
    prompts = [Prompt("", "", tuple(range(6, 6 + length)), frozenset()) for length in lengths]
    found = generate(loaded.model, loaded.tokenizer, prompts, SamplingParams(max_new_tokens=20), topology)
    return [(len(generation.tokens), generation.finish_reason) for generation in found]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_token_lies_beyond_the_last_position(folders: dict[str, str], family: str) -> None:
    """Also where other rows of the batch continue: learned positions have no row beyond the last."""
    (found,) = run_ranks(1, tokens_near_the_end, folders[family], (2, 60, 63, 44, 45))
    assert found == [(20, "length"), (4, "length"), (1, "length"), (20, "length"), (19, "length")]
