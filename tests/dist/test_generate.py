"""Decoding on shards: the tokens of transformers' `generate`; cached = uncached; every rank draws the same token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.tiny_adapters import random_adapter, save_adapter
from tests.tiny_models import FAMILY_NAMES, PAD, VOCAB, make_tiny

LENGTHS = (3, 11, 7, 1, 20, 11)
NEW = 24
WINDOW = 6
STOPS = tuple(range(30, 38))  # random models write one about every thirteenth token
# Name → (family, keys of config.json).
VARIANTS = {
    "one_kv": ("llama", {"num_key_value_heads": 1}),
    "one_kv_qk_norm": ("qwen3", {"num_key_value_heads": 1}),
    "one_kv_norm_over_heads": ("olmo2", {"num_key_value_heads": 1}),
    "window": ("mistral", {"sliding_window": WINDOW}),
    "linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "tied_gpt2_apart": ("gpt2", {"tie_word_embeddings": False}),
    "window_beside_full": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "window_without_rope": ("smollm3", {"use_sliding_window": True, "sliding_window": WINDOW}),
}
# A row of 3 tokens becomes long while it is decoded; rows of 20 are long from the start.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + i / 20 for i in range(8)],
    "long_factor": [1.5 + i for i in range(8)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("generate")
    made = {family: make_tiny(family, base / family) for family in FAMILY_NAMES if family != "phi3"}
    # No row becomes long: transformers would decide for the batch (test_longrope_goes_by_the_length_of_a_sample).
    made["phi3"] = make_tiny("phi3", base / "phi3", original_max_position_embeddings=64)
    made |= {name: make_tiny(family, base / name, **keys) for name, (family, keys) in VARIANTS.items()}
    return {name: str(folder) for name, folder in made.items()}


def token_rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def prompts() -> list[Any]:
    from lowrank_dist.generate.prompts import Prompt

    return [Prompt(f"row {i}", "", tuple(ids), frozenset(STOPS)) for i, ids in enumerate(token_rows())]


def transformers_tokens(folder: str, adapter: str | None = None) -> list[list[int]]:
    """Decode greedily in one left-padded batch and cut after the stop token; an adapter is applied by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    rows, width = token_rows(), max(LENGTHS)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": list(STOPS), "pad_token_id": PAD}
    found = model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in STOPS), NEW) + 1] for row in found]


def load(folder: str, topology: Any, adapter: str | None = None) -> Any:
    from lowrank_dist.generate.session import load_for_generation

    return load_for_generation(Path(folder), Path(adapter) if adapter else None, topology, ranks.device(), dtype="fp32")


def generated(
    folders: dict[str, str], tensor: int, sequence: bool, rules: dict[str, Any], broken: str = "", adapter: str = ""
) -> dict[str, list[list[int]]]:
    """On one rank: return the tokens of every prompt from every folder."""
    from lowrank_dist.generate.decode import generate
    from lowrank_dist.generate.sampling import SamplingParams

    topology = ranks.topology(tensor, sequence)
    found = {}
    with ExitStack() as stack:
        if broken:
            stack.enter_context(BREAKAGES[broken]())
        for name, folder in folders.items():
            loaded = load(folder, topology, adapter)
            made = generate(loaded.model, loaded.tokenizer, prompts(), SamplingParams(**rules), topology)
            assert all((g.finish_reason == "stop") == (g.tokens[-1] in STOPS) for g in made)
            found[name] = [list(generation.tokens) for generation in made]
    return found


def cache_patch(name: str, function: Callable[..., Any]) -> Any:
    from lowrank_dist.model.attention import KVCache

    return mock.patch.object(KVCache, name, function)


def forget_padding() -> Any:
    from lowrank_dist.model.attention import KVCache

    original = KVCache.__init__
    return cache_patch("__init__", lambda self, padding, **sizes: original(self, torch.zeros_like(padding), **sizes))


def forget_window() -> Any:
    from lowrank_dist.model.attention import KVCache

    original = KVCache.visible
    return cache_patch("visible", lambda self, new, window: original(self, new, None))


def keep_other_rows() -> Any:
    from lowrank_dist.model.attention import KVCache

    original = KVCache.keep
    return cache_patch("keep", lambda self, rows: original(self, [*range(len(rows))]))


def overwrite_the_column_before() -> Any:
    from lowrank_dist.model.attention import KVCache

    original = KVCache.extend

    def extend(self: Any, *new: Any) -> Any:
        keys, values = original(self, *new)
        if self.filled:
            keys[:, :, -2] = keys[:, :, -1]
        return keys, values

    return cache_patch("extend", extend)


def decide_by_the_batch() -> Any:
    from lowrank_dist.model.rope import Frequencies

    original = Frequencies.rotation

    def rotation(self: Any, positions: Any, lengths: Any, dtype: Any) -> Any:
        return original(self, positions, torch.full_like(lengths, int(lengths.max())), dtype)

    return mock.patch.object(Frequencies, "rotation", rotation)


BREAKAGES = {
    function.__name__: function
    for function in (
        *(forget_padding, forget_window, keep_other_rows, overwrite_the_column_before, decide_by_the_batch),
    )
}
# Ranks, tensor-parallel size, sequence parallel.
LAYOUTS = {
    "tp1": (1, 1, False),
    "tp2": (2, 2, False),
    "tp2_sp": (2, 2, True),
    "dp2": (2, 1, False),
    "tp4_sp": (4, 4, True),
}


@pytest.fixture(scope="module")
def expected(folders: dict[str, str]) -> dict[str, list[list[int]]]:
    return {name: transformers_tokens(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_is_transformers_generate(
    folders: dict[str, str], expected: dict[str, list[list[int]]], layout: str
) -> None:
    world, tensor, sequence = LAYOUTS[layout]
    # Four ranks add only the case of heads that no rank holds whole.
    chosen = folders if world < 4 else {name: folders[name] for name in ("one_kv", "qwen3")}
    found = run_ranks(world, generated, chosen, tensor, sequence, {"max_new_tokens": NEW, "batch": 4})
    for rank in found:
        for name in chosen:
            assert rank[name] == expected[name], name


def by_recomputation(folder: str) -> list[list[int]]:
    """Decode each prompt by itself and without a cache, so that every step has the frequencies of the whole sample."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    found = []
    for row in token_rows():
        ids = list(row)
        while len(ids) < len(row) + NEW and (len(ids) == len(row) or ids[-1] not in STOPS):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(ids[len(row) :])
    return found


@pytest.mark.parametrize("layout", ["tp1", "tp2_sp"])
def test_longrope_goes_by_the_length_of_a_sample(tmp_path: Path, layout: str) -> None:
    """Rows of a batch are long or short each by itself, and a row that becomes long changes its earlier keys too."""
    folder = str(make_tiny("llama", tmp_path / "longrope", rope_parameters=LONGROPE))
    world, tensor, sequence = LAYOUTS[layout]
    expected = by_recomputation(folder)
    original, rules = LONGROPE["original_max_position_embeddings"], {"max_new_tokens": NEW, "batch": 4}
    assert any(len(row) < original < len(row) + len(new) for row, new in zip(token_rows(), expected, strict=True))
    for rank in run_ranks(world, generated, {"longrope": folder}, tensor, sequence, rules):
        assert rank["longrope"] == expected
    if world == 1:
        (by_batch,) = run_ranks(1, generated, {"longrope": folder}, 1, False, rules, "decide_by_the_batch")
        assert by_batch["longrope"] != expected


def test_models_stop_and_run_on(expected: dict[str, list[list[int]]]) -> None:
    """The prompts above cover both ways to end, and rows that leave a batch at different steps."""
    lengths = {len(row) for rows in expected.values() for row in rows}
    assert NEW in lengths and len(lengths) > 8


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ("forget_padding", FAMILY_NAMES),
        ("forget_window", ("window", "window_beside_full", "window_without_rope")),
        ("keep_other_rows", ("llama", "opt")),
        ("overwrite_the_column_before", ("llama", "opt")),
    ],
)
def test_notices_what_is_broken(
    folders: dict[str, str], expected: dict[str, list[list[int]]], broken: str, names: tuple[str, ...]
) -> None:
    chosen = {name: folders[name] for name in names}
    found = run_ranks(2, generated, chosen, 2, False, {"max_new_tokens": NEW, "batch": 4}, broken)[0]
    for name in chosen:
        assert found[name] != expected[name], name


@pytest.fixture(scope="module")
def adapters(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("adapters")
    return {
        name: str(save_adapter(base / name, Path(folders[name]), adapter_of(Path(folders[name]))))
        for name in ("llama", "one_kv", "gpt2")
    }


def adapter_of(folder: Path) -> Any:
    """Return an adapter with uneven r, modules without factors, and B ≠ 0. The head, which is not trained, has none."""
    sizes = {"q_proj": (3, 6.0), "v_proj": (2, 6.0), "down_proj": (5, 6.0), "c_attn": (3, 6.0), "c_fc": (2, 6.0)}
    return random_adapter(folder, lambda module: sizes.get(module.rpartition(".")[2]))


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2_sp"])
def test_adapters_decode_as_in_peft(
    folders: dict[str, str], adapters: dict[str, str], expected: dict[str, list[list[int]]], layout: str
) -> None:
    world, tensor, sequence = LAYOUTS[layout]
    rules = {"max_new_tokens": NEW, "batch": 4}
    for name, adapter in adapters.items():
        found = run_ranks(world, generated, {name: folders[name]}, tensor, sequence, rules, "", adapter)[0][name]
        assert found == transformers_tokens(folders[name], adapter), name
        # Negative control: the adapter changes the tokens.
        assert found != expected[name], name


def stepwise_logits(
    folders: dict[str, str], adapters: dict[str, str], tensor: int, sequence: bool
) -> dict[str, dict[str, np.ndarray]]:
    """On one rank: return the logits after each last column: of whole rows, cached in a padded batch, and alone."""
    from lowrank_dist.parallel.vocab import all_gather_columns

    topology = ranks.topology(tensor, sequence)
    rows = [row + row[::-1] for row in token_rows()[:3]]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, folder in folders.items():
        model = load(folder, topology, adapters.get(name)).model
        whole = []
        with model.without_sequence_parallelism():
            for row in rows:
                ids = torch.tensor([row], device=ranks.device())
                whole.append(model.logits(ids, torch.arange(len(row), device=ids.device)[None])[0, -4:])

        def cached(chosen: list[list[int]], model: Any = model) -> torch.Tensor:
            width = max(map(len, chosen))
            padding = torch.tensor([width - len(row) for row in chosen], device=ranks.device())
            ids = torch.tensor([[PAD] * (width - len(row)) + row for row in chosen], device=ranks.device())
            cache, steps = model.new_cache(padding, width), []
            pieces = (ids[:, : width - 3], *ids[:, width - 3 :].split(1, dim=1))
            with model.without_sequence_parallelism():
                for piece in pieces:
                    steps.append(all_gather_columns(model.decode(piece, cache), topology.tp_group)[:, :VOCAB])
            return torch.stack(steps, dim=1)

        found[name] = {
            "whole": torch.stack(whole).cpu().numpy(),
            "batch": cached(rows).cpu().numpy(),
            "alone": torch.cat([cached([row]) for row in rows]).cpu().numpy(),
        }
    return found


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2_sp"])
def test_cached_equals_uncached_and_a_batch_its_rows(
    folders: dict[str, str], adapters: dict[str, str], layout: str
) -> None:
    world, tensor, sequence = LAYOUTS[layout]
    for found in run_ranks(world, stepwise_logits, folders, adapters, tensor, sequence):
        for name, logits in found.items():
            scale = np.abs(logits["whole"]).max()
            for kind in ("batch", "alone"):
                assert np.abs(logits[kind] - logits["whole"]).max() <= 1e-5 * scale, (name, kind)
            # Negative control: the logits of different steps differ by far more.
            assert np.abs(logits["batch"][:, 1:] - logits["whole"][:, :-1]).max() > 1e-2 * scale, name


@pytest.mark.parametrize("layout", ["tp1", "tp2", "dp2"])
def test_what_is_sampled_depends_on_nothing_but_seed_prompt_and_step(folders: dict[str, str], layout: str) -> None:
    world, tensor, sequence = LAYOUTS[layout]
    chosen = {name: folders[name] for name in ("llama", "gpt2")}
    for cut in ({}, {"top_k": 9, "top_p": 0.8}):
        rules = {"max_new_tokens": NEW, "temperature": 0.7, "seed": 5, **cut}
        expected = run_ranks(1, generated, chosen, 1, False, {**rules, "batch": 6})[0]
        for batch in (1, 4):
            for found in run_ranks(world, generated, chosen, tensor, sequence, {**rules, "batch": batch}):
                assert found == expected
        # Negative control: another seed gives other tokens, and so does greedy decoding.
        assert run_ranks(1, generated, chosen, 1, False, {**rules, "batch": 6, "seed": 6})[0] != expected
