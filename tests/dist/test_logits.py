"""Logits of the sharded model equal transformers' for every family; packed samples equal the samples alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from lowrank_dist.arch.architecture import Architecture, LayerKind
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.arch.rope import RopeParameters
from tests.dist import ranks
from tests.dist.ranks import run_ranks
from tests.tiny_models import FAMILY_NAMES, VOCAB, flipped_flags, make_tiny

Reference = Callable[..., np.ndarray]
TOLERANCE = 1e-4  # of the largest |logit|, in fp32; found: at most 1.2e-6
BROKEN = 1e-2  # what a negative control must exceed
LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2_sp": (2, True), "tp4": (4, False), "tp4_sp": (4, True)}
ROWS, LENGTH = 2, 16
FIRST = 9  # the packed row: samples of 9 and 7 tokens

# One KV head for two and four ranks: a rank's rows of the fused matrix begin and end inside a head.
ONE_KV_HEAD = ("llama", "qwen2", "qwen3", "phi3", "olmo2")
# Windows shorter than the rows and than both packed samples; the last block of queries is shorter than the others.
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"sliding_window": 5}),
    "window_beside_full": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "window_without_rope": ("smollm3", {"use_sliding_window": True, "sliding_window": 5}),
}
# Rope types that no tiny model of a family has. The packed row has a sample that longrope calls long, and a short one.
ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "truncate": False},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0 + i / 20 for i in range(8)],
        "long_factor": [1.5 + i for i in range(8)],
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("logits")
    made = {family: make_tiny(family, base / family) for family in FAMILY_NAMES}
    for family in ONE_KV_HEAD:
        made[f"{family}_one_kv"] = make_tiny(family, base / f"{family}_one_kv", num_key_value_heads=1)
    for rope, keys in ROPES.items():
        parameters = {"rope_type": rope, "rope_theta": 1e4, **keys}
        made[rope] = make_tiny("llama", base / rope, rope_parameters=parameters)
    made |= {name: make_tiny(family, base / name, **keys) for name, (family, keys) in WINDOWS.items()}
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture(scope="module")
def flipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models that differ from those of FAMILY_NAMES in one flag of their config.json."""
    base = tmp_path_factory.mktemp("logits_flipped")
    made = {}
    for family in FAMILIES:
        for key, value in flipped_flags(make_tiny(family, base / family)).items():
            name = f"{family}_{key}={value}"
            made[name] = str(make_tiny(family, base / name, **{key: value}))
    return made


@pytest.fixture(scope="module")
def bf16_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("logits_bf16")
    return {family: str(make_tiny(family, base / family, dtype=torch.bfloat16)) for family in FAMILY_NAMES}


def tokens() -> torch.Tensor:
    """Return ids [ROWS, LENGTH] that include the vocabulary's first and last id."""
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    ids[0, 3], ids[1, 7] = 0, VOCAB - 1
    return ids


def transformers_logits(folder: str, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Return transformers' logits: in fp32 the reference, on a CPU; in bf16 those of the device under test."""
    device = torch.device("cpu") if dtype == torch.float32 else ranks.device()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype).eval().to(device)
    with torch.no_grad():
        return model(ids.to(device), use_cache=False).logits.double().cpu().numpy()


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Return transformers_logits, which computes the logits of a folder, ids and dtype once."""
    known: dict[tuple[str, str, torch.dtype], np.ndarray] = {}

    def logits(folder: str, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
        key = folder, str(ids.tolist()), dtype
        if key not in known:
            known[key] = transformers_logits(folder, ids, dtype)
            known[key].flags.writeable = False
        return known[key]

    return logits


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def load(folder: str, topology: Any, dtype: str = "fp32", broadcast: bool = False) -> Any:
    from lowrank_dist.model.load import check_model, load_model

    return load_model(
        Path(folder),
        check_model(Path(folder), topology.tp_size, LENGTH),
        topology,
        device=ranks.device(),
        dtype=dtype,
        vocab_multiple=1,
        broadcast=broadcast,
    )


def all_logits(
    folders: dict[str, str], tensor: int, sequence: bool, dtype: str, broken: str = ""
) -> dict[str, np.ndarray]:
    """On one rank: return the logits of every folder, [ROWS, LENGTH, VOCAB] in float64."""
    topology = ranks.topology(tensor, sequence)
    device = ranks.device()
    ids, positions = tokens().to(device), torch.arange(LENGTH, device=device).expand(ROWS, LENGTH)
    logits = {}
    for name, folder in folders.items():
        model = load(folder, topology, dtype)
        if broken:
            BREAKAGES[broken][0](model)
        logits[name] = model.logits(ids, positions).double().cpu().numpy()
    return logits


def exchange_k_and_v(model: Any) -> None:
    layout, topology = model.architecture.layers[0].linears["linear_qkv"], model.topology
    part_of = {
        s.local_start + i: s.part for s in layout.segments(topology.tp_rank, topology.tp_size) for i in range(s.length)
    }
    k, v = ([row for row, part in part_of.items() if part == wanted] for wanted in (1, 2))
    weight = model.decoder.layers[0].self_attention.linear_qkv.weight
    weight[k + v] = weight[v + k]


def scale_rope_theta(model: Any) -> None:
    from lowrank_dist.model.rope import inv_freq

    for rope, frequencies in model.frequencies.items():
        other, columns = replace(rope, theta=rope.theta / 50), rope.rotated(model.architecture.head_dim)
        frequencies.short.copy_(inv_freq(other, columns))
        if frequencies.long is not None:
            frequencies.long.copy_(inv_freq(other, columns, long=True))


def rotate_every_layer(model: Any) -> None:
    (rope,) = model.frequencies
    for layer in model.decoder.layers:
        attention = layer.self_attention.core_attention
        attention.kind = replace(attention.kind, rope=rope)


def forget_query_scale(model: Any) -> None:
    for frequencies in model.frequencies.values():
        frequencies.rope = replace(frequencies.rope, query_beta=0.0)


def forget_rope_scaling(model: Any) -> None:
    for frequencies in model.frequencies.values():
        frequencies.rope = replace(frequencies.rope, scaling=1.0)


def shift_positions(model: Any) -> None:
    weight = model.embedding.position_embeddings.weight
    weight.copy_(weight.roll(1, dims=0))


def forget_biases_of(linear: str) -> Callable[[Any], None]:
    def forget(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(f"{linear}.bias"):
                parameter.zero_()

    return forget


def set_windows(model: Any, change: Callable[[int], int | None]) -> None:
    for layer in model.decoder.layers:
        attention = layer.self_attention.core_attention
        if attention.kind.sliding_window is not None:
            attention.kind = replace(attention.kind, sliding_window=change(attention.kind.sliding_window))


def widen_windows(model: Any) -> None:
    set_windows(model, lambda window: window + 1)


def forget_windows(model: Any) -> None:
    set_windows(model, lambda window: None)


def rotate_halves(model: Any) -> None:
    (rope,) = model.frequencies
    halves = replace(rope, interleaved=False)
    model.frequencies = {halves: model.frequencies[rope]}
    for layer in model.decoder.layers:
        attention = layer.self_attention.core_attention
        attention.kind = replace(attention.kind, rope=halves)


def rotate_whole_heads(model: Any) -> None:
    for frequencies in model.frequencies.values():
        frequencies.short = frequencies.short.repeat(2)
        if frequencies.long is not None:
            frequencies.long = frequencies.long.repeat(2)


def forget_norm_weights(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)


def forget_embedding_multiplier(model: Any) -> None:
    model.architecture = replace(model.architecture, embedding_multiplier=1.0)


def forget_attention_multiplier(model: Any) -> None:
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.softmax_scale = None  # 1/√head_dim


def forget_residual_multiplier(model: Any) -> None:
    for layer in model.decoder.layers:
        layer.self_attn_bda._scale = layer.mlp_bda._scale = 1.0


def forget_logits_divisor(model: Any) -> None:
    model.architecture = replace(model.architecture, logits_divisor=1.0)


def forget_one_of_zero_centered_norms(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.sub_(1.0)


def forget_norms_behind_the_mlp(model: Any) -> None:
    from lowrank_dist.model.layers import ResidualAdd

    for layer in model.decoder.layers:
        layer.mlp_bda = ResidualAdd(None, 1.0)


def norm_over_own_heads(model: Any) -> None:
    for layer in model.decoder.layers:
        layer.self_attention.heads_norm._group = mock.Mock(**{"size.return_value": 1})


def exchange_thetas(model: Any) -> None:
    first, second = model.frequencies
    model.frequencies = {first: model.frequencies[second], second: model.frequencies[first]}


Applies = Callable[[Architecture], bool]


def kind(has: Callable[[LayerKind], bool]) -> Applies:
    return lambda architecture: any(has(each) for each in architecture.kinds)


def rope(has: Callable[[RopeParameters], bool]) -> Applies:
    return lambda architecture: any(has(each) for each in architecture.ropes)


def bias(linear: str) -> Applies:
    return kind(lambda each: each.linears[linear].bias)


LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# What is broken, and the models that must notice it.
CONTROLS: tuple[tuple[Callable[[Any], None], Applies], ...] = (
    (exchange_k_and_v, lambda of: True),
    (forget_norm_weights, lambda of: True),
    (scale_rope_theta, rope(lambda each: True)),
    (rotate_every_layer, lambda of: None in {each.rope for each in of.kinds} and of.positions == "rope"),
    (exchange_thetas, lambda of: len(of.ropes) > 1),
    (forget_query_scale, rope(lambda each: each.query_beta != 0)),
    (forget_rope_scaling, rope(lambda each: each.scaling != 1)),
    (rotate_whole_heads, rope(lambda each: each.columns is not None)),
    (rotate_halves, rope(lambda each: each.interleaved)),
    (shift_positions, lambda of: of.positions == "learned"),
    (widen_windows, kind(lambda each: (each.sliding_window or LENGTH) < LENGTH)),
    (forget_windows, kind(lambda each: (each.sliding_window or LENGTH) < LENGTH)),
    (forget_one_of_zero_centered_norms, lambda of: of.zero_centered_norm),
    (forget_norms_behind_the_mlp, kind(lambda each: each.has("post_mlp_layernorm"))),
    (norm_over_own_heads, kind(lambda each: each.norms_all_heads)),
    (forget_embedding_multiplier, lambda of: of.embedding_multiplier != 1),
    (forget_attention_multiplier, lambda of: of.attention_multiplier is not None),
    (forget_residual_multiplier, lambda of: of.residual_multiplier != 1),
    (forget_logits_divisor, lambda of: of.logits_divisor != 1),
)
BREAKAGES = {function.__name__: (function, applies) for function, applies in CONTROLS}
BREAKAGES |= {f"forget_biases_of_{name}": (forget_biases_of(name), bias(name)) for name in LINEARS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_transformers(folders: dict[str, str], layout: str, reference: Reference) -> None:
    tensor, sequence = LAYOUTS[layout]
    expected = {name: reference(folder, tokens()) for name, folder in folders.items()}
    for found in run_ranks(tensor, all_logits, folders, tensor, sequence, "fp32"):
        gaps = {name: gap(found[name], expected[name]) for name in folders}
        assert max(gaps.values()) <= TOLERANCE, gaps


def test_each_flag_is_transformers(flipped: dict[str, str], reference: Reference) -> None:
    """Biases and tied embeddings that no other model of the family here has, or lacks."""
    for found in run_ranks(2, all_logits, flipped, 2, True, "fp32"):
        gaps = {name: gap(found[name], reference(folder, tokens())) for name, folder in flipped.items()}
        assert max(gaps.values()) <= TOLERANCE, gaps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_errs_as_transformers_does(bf16_folders: dict[str, str], layout: str, reference: Reference) -> None:
    """Against float32 on the same rounded weights: at most twice the error of transformers' own bf16."""
    tensor, sequence = LAYOUTS[layout]
    found = run_ranks(tensor, all_logits, bf16_folders, tensor, sequence, "auto")[0]
    for family, folder in bf16_folders.items():
        exact = reference(folder, tokens())
        allowed = 2 * gap(reference(folder, tokens(), torch.bfloat16), exact)
        assert 0 < gap(found[family], exact) <= allowed, family


@pytest.mark.parametrize("broken", BREAKAGES)
def test_notices_what_is_broken(folders: dict[str, str], broken: str, reference: Reference) -> None:
    """Negative controls: any exchanged weight or position moves the logits far beyond the tolerance."""
    _, applies = BREAKAGES[broken]
    chosen = {name: folder for name, folder in folders.items() if applies(read_architecture(Path(folder)))}
    found = run_ranks(2, all_logits, chosen, 2, True, "fp32", broken)[0]
    gaps = {name: gap(found[name], reference(folder, tokens())) for name, folder in chosen.items()}
    assert min(gaps.values()) > BROKEN, gaps


def test_bf16_notices_exchanged_projections(bf16_folders: dict[str, str], reference: Reference) -> None:
    """Negative control: a wrong weight exceeds twice transformers' error."""
    found = run_ranks(2, all_logits, bf16_folders, 2, True, "auto", "exchange_k_and_v")[0]
    for family, folder in bf16_folders.items():
        exact = reference(folder, tokens())
        assert gap(found[family], exact) > 2 * gap(reference(folder, tokens(), torch.bfloat16), exact), family


def logits_without_global_groups(folder: str) -> np.ndarray:
    """On one rank at TP 2: return the logits of a model built and run while Megatron's global state has no group."""
    from megatron.core import parallel_state

    topology, device = ranks.topology(2, True), ranks.device()
    groups = {name: None for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)}
    ids, positions = tokens().to(device), torch.arange(LENGTH, device=device).expand(ROWS, LENGTH)
    with mock.patch.multiple(parallel_state, **groups):
        with pytest.raises(AssertionError, match="not initialized"):
            parallel_state.get_tensor_model_parallel_group()
        return load(folder, topology).logits(ids, positions).double().cpu().numpy()


def test_process_groups_are_arguments(folders: dict[str, str], reference: Reference) -> None:
    for found in run_ranks(2, logits_without_global_groups, folders["gpt2"]):
        assert gap(found, reference(folders["gpt2"], tokens())) <= TOLERANCE


def packed_logits(folders: dict[str, str], tensor: int, sequence: bool, segmented: bool) -> dict[str, np.ndarray]:
    """On one rank: return the logits [1, LENGTH, VOCAB] of a row of two samples, which segments keep apart."""
    topology = ranks.topology(tensor, sequence)
    positions = torch.cat((torch.arange(FIRST), torch.arange(LENGTH - FIRST)))[None].to(ranks.device())
    segments = ((0, 0, FIRST), (0, FIRST, LENGTH)) if segmented else None
    ids = tokens()[:1].to(ranks.device())
    models = {name: load(folder, topology) for name, folder in folders.items()}
    return {name: model.logits(ids, positions, segments).double().cpu().numpy() for name, model in models.items()}


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2_sp"])
def test_packed_samples_equal_each_alone(folders: dict[str, str], layout: str, reference: Reference) -> None:
    tensor, sequence = LAYOUTS[layout]
    ids = tokens()[:1]
    found = run_ranks(tensor, packed_logits, folders, tensor, sequence, True)[0]
    for name, folder in folders.items():
        alone = [reference(folder, part) for part in (ids[:, :FIRST], ids[:, FIRST:])]
        assert gap(found[name], np.concatenate(alone, axis=1)) <= TOLERANCE, name


def test_notices_samples_that_see_each_other(folders: dict[str, str], reference: Reference) -> None:
    """Negative control: without segments the first sample's logits stay the same, and the second's change."""
    ids = tokens()[:1]
    found = run_ranks(2, packed_logits, folders, 2, True, False)[0]
    for name, folder in folders.items():
        assert gap(found[name][:, :FIRST], reference(folder, ids[:, :FIRST])) <= TOLERANCE, name
        assert gap(found[name][:, FIRST:], reference(folder, ids[:, FIRST:])) > BROKEN, name


def ragged_logits(folder: str, positions: torch.Tensor) -> np.ndarray:
    """On one rank at TP 2: return the logits of two rows of which the second has FIRST - 2 tokens and then padding."""
    model, device = load(folder, ranks.topology(2, True)), ranks.device()
    return model.logits(tokens().to(device), positions.to(device)).double().cpu().numpy()


def test_longrope_goes_by_the_length_of_each_row(folders: dict[str, str], reference: Reference) -> None:
    """Padding has position 0 and does not count. Control: a row that ends later is long."""
    ids, short = tokens(), FIRST - 2
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1, short:] = 0
    found = run_ranks(2, ragged_logits, folders["longrope"], positions)[0]
    assert gap(found[:1], reference(folders["longrope"], ids[:1])) <= TOLERANCE
    assert gap(found[1:, :short], reference(folders["longrope"], ids[1:, :short])) <= TOLERANCE
    positions[1, -1] = LENGTH - 1
    longer = run_ranks(2, ragged_logits, folders["longrope"], positions)[0]
    assert gap(longer[1:, :short], found[1:, :short]) > BROKEN


def broadcast_parameters(folders: list[str]) -> tuple[bool, bool]:
    """On one rank of TP 2 × DP 2, where replica 1 reads a folder of its own: return whether it got replica 0's weights.

    The first value is with broadcasting, the second without.
    """
    topology = ranks.topology(2, True)
    first = dict(load(folders[0], topology).named_parameters())
    own = folders[topology.dp_rank]
    answers = []
    for broadcast in (True, False):
        found = dict(load(own, topology, broadcast=broadcast).named_parameters())
        assert found.keys() == first.keys()
        answers.append(all(torch.equal(found[name], first[name]) for name in first))
    return answers[0], answers[1]


def test_broadcast_gives_what_replica_0_reads(tmp_path: Path) -> None:
    """Replica 1's folder holds other weights, so only the broadcast can make them equal."""
    for family in ("qwen2", "gpt2"):
        folders = [str(make_tiny(family, tmp_path / f"{family}{seed}", seed=seed)) for seed in (0, 1)]
        results = run_ranks(4, broadcast_parameters, folders)
        assert [with_broadcast for with_broadcast, _ in results] == [True] * 4
        # Negative control: ranks 2 and 3 are replica 1 and have read their own folder.
        assert [without for _, without in results] == [True, True, False, False]


def loss_in_blocks(folder: str, tensor: int, sequence: bool, block_bytes: int) -> float:
    """On one rank: return the summed next-token loss of all positions, in blocks of so many bytes of logits."""
    from lowrank_dist.parallel import vocab

    topology, device = ranks.topology(tensor, sequence), ranks.device()
    ids, positions = tokens().to(device), torch.arange(LENGTH, device=device).expand(ROWS, LENGTH)
    targets = torch.arange(ROWS * LENGTH, device=device)
    with mock.patch.object(vocab, "LOGIT_BLOCK_BYTES", block_bytes):
        return float(load(folder, topology).loss(ids, positions, targets, ids.t().flatten(), None))


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, True), (4, True), (4, False)])
def test_loss_in_blocks(folders: dict[str, str], tensor: int, sequence: bool) -> None:
    """Ranks hold 27, 27, 27 and 26 of 107 rows, and still split the positions into the same blocks."""
    expected = run_ranks(1, loss_in_blocks, folders["llama"], 1, False, 2**27)[0]
    rows = -(-VOCAB // tensor)
    for positions in (1, 26):  # of the 32; at TP 4, 27 would fit on the rank with fewer rows
        found = run_ranks(tensor, loss_in_blocks, folders["llama"], tensor, sequence, 4 * rows * positions)
        assert found == pytest.approx([expected] * tensor, rel=1e-5)
