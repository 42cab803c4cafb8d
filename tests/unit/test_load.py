"""Loading is exact: the shards of all ranks, reassembled through the same plans, equal the file bit for bit."""

import dataclasses
import json
import math
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_dist.model.load as load
from lowrank_dist.arch.architecture import Architecture, padded_vocab
from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.rows import LinearLayout, Segment
from lowrank_dist.arch.tensors import copy_plans, hf_shapes, parameter_shapes
from lowrank_dist.errors import UserError
from lowrank_dist.formats.model_folder import SINGLE_FILE, open_checkpoint
from lowrank_dist.model.load import load_weights
from tests.tiny_models import FAMILY_NAMES, make_tiny

MULTIPLE = 8


def load_ranks(folder: Path, tp_size: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    architecture, ranks = read_architecture(folder), []
    for tp_rank in range(tp_size):
        # NaN reveals elements that were not written.
        shapes = parameter_shapes(architecture, tp_size, MULTIPLE)
        parameters = {name: torch.full(shape, math.nan, dtype=dtype) for name, shape in shapes.items()}
        with open_checkpoint(folder) as checkpoint:
            load_weights(parameters, architecture, checkpoint, tp_rank=tp_rank, tp_size=tp_size)
        assert not any(parameter.isnan().any() for parameter in parameters.values())
        ranks.append(parameters)
    return ranks


def reassemble(architecture: Architecture, ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors from all shards by running the plans backwards; NaN where no shard reaches."""
    tensors = {name: torch.full(shape, math.nan) for name, shape in hf_shapes(architecture).items()}
    rows = padded_vocab(architecture.vocab, MULTIPLE, len(ranks))
    for tp_rank, parameters in enumerate(ranks):
        for name, plan in copy_plans(architecture, tp_rank, len(ranks), rows).items():
            for copy in plan.copies:
                part = parameters[name][copy.local_index]
                tensors[copy.hf][copy.hf_index] = part.t() if copy.transposed else part
    return tensors


def differing(architecture: Architecture, ranks: list[dict[str, torch.Tensor]], folder: Path) -> list[str]:
    """Return the names of the tensors that differ from the file after reassembly."""
    stored, found = load_file(folder / SINGLE_FILE), reassemble(architecture, ranks)
    if architecture.position_offset:
        # The rows before position 0 belong to no token and are not loaded.
        name = "model.decoder.embed_positions.weight"
        assert found[name][: architecture.position_offset].isnan().all()
        stored[name], found[name] = (tensors[name][architecture.position_offset :] for tensors in (stored, found))
    assert stored.keys() == found.keys()
    return [name for name in stored if not torch.equal(stored[name], found[name])]


CASES = [(family, {}) for family in FAMILY_NAMES]
CASES += [(family, {"num_key_value_heads": 1}) for family in ("llama", "mistral", "qwen2", "qwen3")]
CASES += [("llama", {"tie_word_embeddings": True}), ("gpt2", {"tie_word_embeddings": False})]
CASES += [("llama", {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 2})]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize(("family", "overrides"), CASES, ids=[f"{f}-{'-'.join(o)}" for f, o in CASES])
def test_round_trip_is_exact(family: str, overrides: dict, tp_size: int, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path, **overrides)
    architecture, ranks = read_architecture(folder), load_ranks(folder, tp_size)
    assert differing(architecture, ranks, folder) == []
    words = torch.cat([parameters["embedding.word_embeddings.weight"] for parameters in ranks])
    assert len(words) == padded_vocab(107, MULTIPLE, tp_size) and (words[107:] == 0).all()
    assert (words[106] != 0).any()


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_qkv_rows_are_megatrons(family: str, tp_size: int, tmp_path: Path) -> None:
    """Megatron's fused weight and bias are built from the file by torch operations, independently of the plans."""
    folder = make_tiny(family, tmp_path)
    architecture, ranks = read_architecture(folder), load_ranks(folder, tp_size)
    stored = load_file(folder / SINGLE_FILE)
    for kind in ("weight", "bias") if architecture.layers[0].linears["linear_qkv"].bias else ("weight",):
        if family == "gpt2":
            q, k, v = stored[f"transformer.h.1.attn.c_attn.{kind}"].split(64, dim=-1)
            if kind == "weight":
                q, k, v = q.t(), k.t(), v.t()
        else:
            attention = "model.decoder.layers.1.self_attn" if family == "opt" else "model.layers.1.self_attn"
            q, k, v = (stored[f"{attention}.{name}_proj.{kind}"] for name in "qkv")
        groups = [tensor.unflatten(0, (architecture.kv_heads, -1)) for tensor in (q, k, v)]
        expected = torch.cat(groups, dim=1).flatten(0, 1)
        name = f"decoder.layers.1.self_attention.linear_qkv.{kind}"
        assert torch.equal(torch.cat([parameters[name] for parameters in ranks]), expected)


@pytest.mark.parametrize("defect", ["k and v swapped", "one row late", "ranks swapped", "gate and up swapped"])
def test_a_wrong_map_is_noticed(defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load through a defective map, reassemble through the correct one."""
    folder = make_tiny("llama", tmp_path, num_key_value_heads=4)
    right = LinearLayout.segments

    def wrong(self: LinearLayout, tp_rank: int, tp_size: int) -> tuple[Segment, ...]:
        if defect == "ranks swapped" and self.interleave == "qkv":
            return right(self, tp_size - 1 - tp_rank, tp_size)
        segments = right(self, tp_rank, tp_size)
        if defect == "k and v swapped" and self.interleave == "qkv":
            return tuple(dataclasses.replace(s, part=(0, 2, 1)[s.part]) for s in segments)
        if defect == "gate and up swapped" and self.interleave == "gate_up":
            return tuple(dataclasses.replace(s, part=1 - s.part) for s in segments)
        if defect == "one row late" and self.interleave == "qkv":
            rows = self.parts[0].rows
            return tuple(dataclasses.replace(s, part_start=(s.part_start + 16) % rows) for s in segments)
        return segments

    monkeypatch.setattr(LinearLayout, "segments", wrong)
    ranks = load_ranks(folder, 2)
    monkeypatch.undo()
    damaged = {name.split(".")[-2] for name in differing(read_architecture(folder), ranks, folder)}
    assert (
        damaged
        == {
            "k and v swapped": {"k_proj", "v_proj"},
            "one row late": {"q_proj", "k_proj", "v_proj"},
            "ranks swapped": {"q_proj", "k_proj", "v_proj"},
            "gate and up swapped": {"gate_proj", "up_proj"},
        }[defect]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_small_chunks_give_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny(family, tmp_path)
    whole = load_ranks(folder, 2)
    monkeypatch.setattr(load, "_CHUNK_BYTES", 1000)
    for chunked, expected in zip(load_ranks(folder, 2), whole, strict=True):
        assert all(torch.equal(chunked[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_dtype_is_converted_as_torch_does(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    folder = make_tiny("qwen2", tmp_path, dtype=stored)
    (parameters,) = load_ranks(folder, 1, wanted)
    tensors = load_file(folder / SINGLE_FILE)
    assert tensors["model.norm.weight"].dtype == stored
    assert torch.equal(parameters["decoder.final_layernorm.weight"], tensors["model.norm.weight"].to(wanted))
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(parameters["decoder.layers.0.mlp.linear_fc2.weight"], down.to(wanted))


def test_sharded_checkpoint_loads_the_same(tmp_path: Path) -> None:
    single, sharded = make_tiny("opt", tmp_path / "a"), make_tiny("opt", tmp_path / "b", max_shard_size="50KB")
    for one, many in zip(load_ranks(single, 2), load_ranks(sharded, 2), strict=True):
        assert all(torch.equal(one[name], many[name]) for name in one)


def test_parameters_that_require_gradients_are_filled_in_place(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    architecture = read_architecture(folder)
    shapes = parameter_shapes(architecture, 1, MULTIPLE)
    parameters = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    load_weights(parameters, architecture, open_checkpoint(folder), tp_rank=0, tp_size=1)
    (expected,) = load_ranks(folder, 1)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name]) and parameter.data_ptr() == places[name]
        assert parameter.is_leaf and parameter.grad_fn is None


def test_broadcast_hands_over_every_parameter_in_order(tmp_path: Path) -> None:
    """A reader and a receiver joined by a queue: the receiver gets the same parameters and reads no file."""
    folder = make_tiny("llama", tmp_path)
    architecture, checkpoint = read_architecture(folder), open_checkpoint(folder)
    shapes = parameter_shapes(architecture, 2, MULTIPLE)
    reader = {name: torch.empty(shape) for name, shape in shapes.items()}
    receiver = {name: torch.full(reader[name].shape, math.nan) for name in reversed(list(shapes))}
    sent: list[torch.Tensor] = []
    told: list[tuple[int, int]] = []
    load_weights(
        reader,
        architecture,
        checkpoint,
        tp_rank=1,
        tp_size=2,
        broadcast=lambda parameter: sent.append(parameter.clone()),
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(sent) == len(shapes)
    assert [done for done, _ in told] == list(accumulate(tensor.nbytes for tensor in sent))
    assert {total for _, total in told} == {told[-1][0]}
    checkpoint.slice = lambda name: pytest.fail(f"read {name}")
    load_weights(
        receiver,
        architecture,
        checkpoint,
        tp_rank=1,
        tp_size=2,
        read=False,
        broadcast=lambda parameter: parameter.copy_(sent.pop(0)),
    )
    assert all(torch.equal(reader[name], receiver[name]) for name in shapes)


# ---- missing and additional tensors


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace (or with None remove) tensors of the folder's single file."""
    tensors = load_file(folder / SINGLE_FILE) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE_FILE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_names_without_the_base_model_prefix(family: str, tmp_path: Path) -> None:
    """gpt2 on the Hub has such names, and the causal mask that old versions of transformers stored."""
    folder = make_tiny(family, tmp_path)
    expected = load_ranks(folder, 2)
    prefix = read_architecture(folder).prefix
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / SINGLE_FILE).items()}
    if family == "gpt2":
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        tensors["h.1.attn.masked_bias"] = torch.ones(())
    save_file(tensors, folder / SINGLE_FILE)
    for found, wanted in zip(load_ranks(folder, 2), expected, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_tied_output_layer_in_the_file(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path)
    expected = load_ranks(folder, 2)
    name = {"qwen2": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[family]
    words = load_file(folder / SINGLE_FILE)[name]
    for change in ({"lm_head.weight": words.clone()}, {"lm_head.weight": words.clone(), name: None}):
        rewrite(folder, change)
        for found, wanted in zip(load_ranks(folder, 2), expected, strict=True):
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_tied_output_layer_that_differs_is_refused(tmp_path: Path) -> None:
    """transformers would then leave them untied, whatever the config says."""
    folder = make_tiny("qwen2", tmp_path)
    words = load_file(folder / SINGLE_FILE)["model.embed_tokens.weight"].clone()
    words[100, 3] += 1
    rewrite(folder, {"lm_head.weight": words})
    with pytest.raises(UserError, match="config.json: tie_word_embeddings is true, but lm_head.weight differs"):
        load_ranks(folder, 1)


def test_wrong_tensors_are_all_named(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    rewrite(
        folder,
        {
            "model.norm.weight": None,
            "lm_head.weight": torch.zeros(106, 64),
            "model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64, dtype=torch.int8),
            "model.layers.1.self_attn.q_proj.bias": torch.zeros(64),
        },
    )
    with pytest.raises(UserError) as error:
        load_ranks(folder, 2)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all(str(folder) in line for line in lines)
    for said in (
        "model.norm.weight [64] is missing",
        "lm_head.weight has shape [106, 64], but config.json asks for [107, 64]",
        "model.layers.0.mlp.up_proj.weight has dtype I8",
        "model.layers.1.self_attn.q_proj.bias does not exist",
    ):
        assert said in str(error.value)


def test_half_a_model_is_refused(tmp_path: Path) -> None:
    """config.json has a layer more or less than the weights."""
    folder = make_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for layers, said in (
        (3, r"9 tensors \(model.layers.2.input_layernorm.weight \[64\], .* and 6 more\) are missing"),
        (1, r"9 tensors \(model.layers.1.input_layernorm.weight, .* and 6 more\) do not exist"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(UserError, match=said):
            load_ranks(folder, 1)


def test_tp_size_that_does_not_divide(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    architecture = read_architecture(folder)
    with pytest.raises(UserError, match="parallel.tensor=3 .*use one of 1, 2, 4"):
        load_weights({}, architecture, open_checkpoint(folder), tp_rank=0, tp_size=3)


def test_a_parameter_without_a_rule_is_a_programming_error(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    architecture, checkpoint = read_architecture(folder), open_checkpoint(folder)
    parameters = {name: torch.empty(shape) for name, shape in parameter_shapes(architecture, 1, MULTIPLE).items()}
    with pytest.raises(AssertionError, match="adapter"):
        load_weights(parameters | {"adapter": torch.empty(1)}, architecture, checkpoint, tp_rank=0, tp_size=1)
    parameters["decoder.final_layernorm.weight"] = torch.empty(63)
    with pytest.raises(AssertionError, match="final_layernorm"):
        load_weights(parameters, architecture, checkpoint, tp_rank=0, tp_size=1)
