"""A model with two kinds of layers equals the sum over its layers' kinds, by hand; a model of one kind is the control.

Odd layers have a wider MLP, their own dropout streams for it, and one more norm.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

from lowrank_dist.arch.architecture import Architecture, TensorRule
from lowrank_dist.arch.config_json import parse_architecture
from lowrank_dist.arch.placement import LoraRules, place_factors
from lowrank_dist.arch.tensors import copy_plans, hf_shapes, parameter_shapes
from lowrank_dist.engine.planning import job_of, read_request
from lowrank_dist.methods.full.footprint import WholeModel
from lowrank_dist.methods.lora.footprint import Decomposed, LowRank
from lowrank_dist.planner.activations import activations
from lowrank_dist.planner.factors import Factor, low_rank, placement_without_factors
from lowrank_dist.planner.flops import step_flops
from lowrank_dist.planner.job import Footprint, Job, Layout
from lowrank_dist.planner.memory import microbatch_moments, persistent_bytes
from lowrank_dist.planner.parameters import frozen_on_rank, frozen_parameters, parameter_sizes, theta_on_rank
from lowrank_dist.planner.traffic import bytes_of, microbatch_messages, step_messages

HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB, RANK = 64, 4, 2, 16, 107, 3
NARROW, WIDE = 96, 160
FFN = (NARROW, WIDE, NARROW, WIDE)
NORM_BEHIND = TensorRule("decoder.layers.{layer}.norm_behind.weight", "model.layers.{layer}.behind.weight", ("hidden",))
EVERYTHING = LoraRules(RANK, 2.0 * RANK, "all-linear")


def of_width(ffn: int) -> Architecture:
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": ffn,
        "num_hidden_layers": len(FFN),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
    }
    return parse_architecture(config, "config.json")


ALIKE = of_width(NARROW)


def two_kinds() -> Architecture:
    narrow, wide = ALIKE.layers[0], of_width(WIDE).layers[0]
    linears = {
        name: replace(x, stream=x.stream if x.in_attention else x.stream + 4) for name, x in wide.linears.items()
    }
    odd = replace(wide, linears=linears, tensors=(*wide.tensors, NORM_BEHIND))
    # Kinds are compared by value, not by object.
    return replace(ALIKE, layers=(narrow, odd, replace(narrow), replace(odd)))


MIXED = two_kinds()


def projections(layer: int) -> dict[str, tuple[int, int]]:
    """Return the Hugging Face modules of a layer → (rows, columns)."""
    ffn, keys = FFN[layer], KV_HEADS * HEAD
    found = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (ffn, HIDDEN),
        "mlp.up_proj": (ffn, HIDDEN),
        "mlp.down_proj": (HIDDEN, ffn),
    }
    return {f"model.layers.{layer}.{name}": shape for name, shape in found.items()}


def all_projections() -> dict[str, tuple[int, int]]:
    return {name: shape for layer in range(len(FFN)) for name, shape in projections(layer).items()}


def expected_shapes() -> dict[str, tuple[int, ...]]:
    outside = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {**outside, **all_projections()}
    for layer, ffn in enumerate(FFN):
        norms = ["input_layernorm", "post_attention_layernorm", *["behind"] * (ffn == WIDE)]
        shapes |= {f"model.layers.{layer}.{norm}": (HIDDEN,) for norm in norms}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


WEIGHTS = [sum(map(prod, projections(layer).values())) for layer in range(len(FFN))]


def job(architecture: Architecture, footprint: Footprint, layout: Layout) -> Job:
    found = job_of(read_request("llama-3-8b", ["data.max_length=128", "train.global_batch=32"]), 0.5)
    return replace(found, architecture=architecture, footprint=footprint, layout=layout, reduce_bucket=1000)


def lora(architecture: Architecture) -> LowRank:
    return LowRank("lora", low_rank(architecture, EVERYTHING))


def dora(architecture: Architecture) -> Decomposed:
    return Decomposed("lora", low_rank(architecture, EVERYTHING))


def full(architecture: Architecture) -> WholeModel:
    return WholeModel("full", placement_without_factors(architecture, None))


def layouts() -> list[Layout]:
    return [Layout(n, 1, n > 1, 2, recompute) for n in (1, 2) for recompute in (False, True)]


def test_kinds_are_counted_by_what_they_are() -> None:
    assert list(MIXED.kinds.values()) == [2, 2] and list(MIXED.kinds) == list(MIXED.layers[:2])
    assert ALIKE.kinds == {ALIKE.layers[0]: 4}
    assert MIXED.legal_tp_sizes() == (1, 2, 4)
    odd = replace(MIXED, layers=(of_width(NARROW).layers[0], of_width(98).layers[0]))
    assert odd.legal_tp_sizes() == (1, 2) and odd.indivisible_by(4) == "ffn 96 and 98"


def test_shapes_and_modules_are_those_of_each_layer() -> None:
    assert hf_shapes(MIXED) == expected_shapes() != hf_shapes(ALIKE)
    assert MIXED.linear_modules() == set(all_projections())


def test_placement_is_that_of_each_layer() -> None:
    placed = place_factors(MIXED, EVERYTHING)
    found = {factor.path: (factor.rows, factor.in_features) for each in placed for factor in each.factors}
    assert found == all_projections()
    assert found != {f.path: (f.rows, f.in_features) for each in place_factors(ALIKE, EVERYTHING) for f in each.factors}
    assert [(each.layer, each.layout.stream) for each in placed] == [
        (layer, stream) for layer in range(4) for stream in ((0, 1, 6, 7) if layer % 2 else (0, 1, 2, 3))
    ]


def loaded(architecture: Architecture, tensors: dict[str, Tensor], tp_rank: int, tp_size: int) -> dict[str, Tensor]:
    """Return every parameter of a rank, filled by its plan."""
    parameters = {}
    for name, plan in copy_plans(architecture, tp_rank, tp_size, 112).items():
        parameters[name] = torch.full(plan.shape, -1.0)
        parameters[name][plan.zero_rows :] = 0.0 if plan.zero_rows is not None else -1.0
        for copy in plan.copies:
            parameters[name][copy.local_index] = tensors[copy.hf][copy.hf_index]
    return parameters


def by_hand(tensors: dict[str, Tensor], rank: int, n: int) -> dict[str, Tensor]:
    """Return every parameter of rank `rank` of `n`, sharded from the checkpoint by hand, fused as in Megatron."""

    def rows(x: Tensor) -> Tensor:
        return x.chunk(n)[rank]

    def padded(x: Tensor) -> Tensor:
        return rows(torch.cat((x, torch.zeros(112 - VOCAB, HIDDEN))))

    found = {
        "embedding.word_embeddings.weight": padded(tensors["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": padded(tensors["lm_head.weight"]),
    }
    for layer, ffn in enumerate(FFN):
        own = {name.split(".")[-2]: x for name, x in tensors.items() if name.startswith(f"model.layers.{layer}.")}
        groups = zip(*(own[name].chunk(KV_HEADS) for name in ("q_proj", "k_proj", "v_proj")), strict=True)
        there = {
            "input_layernorm": own["input_layernorm"],
            "pre_mlp_layernorm": own["post_attention_layernorm"],
            **({"norm_behind": own["behind"]} if ffn == WIDE else {}),
            "self_attention.linear_qkv": rows(torch.cat([part for group in groups for part in group])),
            "self_attention.linear_proj": own["o_proj"].chunk(n, 1)[rank],
            "mlp.linear_fc1": torch.cat((rows(own["gate_proj"]), rows(own["up_proj"]))),
            "mlp.linear_fc2": own["down_proj"].chunk(n, 1)[rank],
        }
        found |= {f"decoder.layers.{layer}.{name}.weight": x for name, x in there.items()}
    return found


@pytest.mark.parametrize("n", [1, 2])
def test_copies_fill_every_parameter(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes().items()}
    for rank in range(n):
        found, expected = loaded(MIXED, tensors, rank, n), by_hand(tensors, rank, n)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        plans = copy_plans(MIXED, rank, n, 112)
        cut = {name for name in expected if "linear" in name or name.startswith(("embedding", "output"))}
        assert {name for name, plan in plans.items() if plan.cut} == cut
        exchanged = replace(MIXED, layers=(*MIXED.layers[:2], MIXED.layers[3], MIXED.layers[2]))
        assert parameter_shapes(exchanged, n, 1) != parameter_shapes(MIXED, n, 1)


def test_parameters_of_the_base() -> None:
    parts = frozen_parameters(MIXED)
    attention = sum(prod(shape) for name, shape in all_projections().items() if "self_attn" in name)
    assert (parts["attention"], parts["MLP"]) == (attention, sum(WEIGHTS) - attention)
    assert parts["biases and norms"] == (3 * 2 + 2 * 1 + 1 + 2) * HIDDEN
    assert sum(parts.values()) == sum(map(prod, expected_shapes().values())) != sum(frozen_parameters(ALIKE).values())
    for n in (1, 2):
        planned = replace(job(MIXED, full(MIXED), Layout(n, 1, n > 1, 1, False)), vocab_multiple=56)
        shapes = parameter_shapes(MIXED, n, 56)
        assert frozen_on_rank(planned) == sum(map(prod, shapes.values()))
        assert sum(map(sum, parameter_sizes(planned, 0))) == frozen_on_rank(planned)


def test_parameters_of_factors() -> None:
    expected = sum(RANK * (rows + columns) for rows, columns in all_projections().values())
    assert lora(MIXED).placement.elements == expected != lora(ALIKE).placement.elements
    assert theta_on_rank(job(MIXED, lora(MIXED), layouts()[0]), 0).elements == expected
    # The shards: B of column-parallel and A of row-parallel linears. The other factor is replicated.
    sharded = sum(
        RANK * (columns if "o_proj" in x or "down" in x else rows) for x, (rows, columns) in all_projections().items()
    )
    assert theta_on_rank(job(MIXED, lora(MIXED), layouts()[2]), 1).elements == expected - sharded // 2


def flops(architecture: Architecture, footprint: Footprint) -> int:
    return step_flops(
        architecture, footprint, tokens=100, target_tokens=0, square_lengths={None: 0}, recompute=False
    ).executed


def test_flops() -> None:
    """2 FLOPs per weight and token forward, 2 for dX and 2 for dW; the lowest factors' input needs no gradient."""
    once = 2 * 100
    assert flops(MIXED, full(MIXED)) == once * 3 * sum(WEIGHTS) != flops(ALIKE, full(ALIKE))
    elements = sum(RANK * (rows + columns) for rows, columns in all_projections().values())
    qkv = (HEADS + 2 * KV_HEADS) * HEAD * HIDDEN
    expected = once * (2 * sum(WEIGHTS) - qkv + 3 * elements - 3 * RANK * HIDDEN)
    assert flops(MIXED, lora(MIXED)) == expected != flops(ALIKE, lora(ALIKE))


@pytest.mark.parametrize("layout", layouts(), ids=str)
@pytest.mark.parametrize("method", [lora, dora, full])
def test_activations_of_two_kinds_are_the_mean_of_one_kind_each(layout: Layout, method: type) -> None:
    """Half of the layers are of each kind. The difference removes the lowest, whose input may need no gradient."""

    def kept(*kinds: int) -> int:
        layers = tuple(MIXED.layers[kind] for kind in kinds)
        architecture = replace(MIXED, layers=layers)
        return activations(job(architecture, method(architecture), layout), recompute=layout.recompute)

    narrow, wide = kept(0, 0) - kept(0), kept(0, 1) - kept(0)
    assert kept(0, 1, 0, 1) - kept(0) == narrow + 2 * wide
    assert (narrow < wide) == (not layout.recompute)


@pytest.mark.parametrize("layout", layouts(), ids=str)
@pytest.mark.parametrize("method", [lora, dora, full])
def test_a_wide_layer_below_a_narrow_one_has_its_moments(layout: Layout, method: type) -> None:
    """The peaks are those of the model whose top layer is the wide one: by then the activations of the layer above are
    freed, except for the products out of a collective that DoRA keeps beside the graph.
    """

    def moments(*kinds: int, more: int = 0) -> list[tuple[str, tuple[tuple[str, int], ...]]]:
        architecture = replace(MIXED, layers=tuple(MIXED.layers[kind] for kind in kinds))
        found = microbatch_moments(job(architecture, method(architecture), layout), 0)
        own = [x for x in found if "of the top" in x.name or "magnitudes" in x.name]
        return [(x.name, tuple((x.parts | {"activations": x.parts["activations"] + more}).items())) for x in own]

    # Z and U of o_proj and of down_proj.
    beside = 2 * job(MIXED, method(MIXED), layout).shard_tokens * (HIDDEN + RANK) * 2
    beside *= method is dora and layout.sequence
    assert len(moments(1, 1)) == 2 + layout.recompute + 2 * (method is dora)
    assert set(moments(1, 1, more=beside)) < set(moments(1, 1, 0))
    assert not set(moments(1, 1)) & set(moments(0, 0, 0)), "another kind has other moments"


def test_messages_follow_the_factors_of_each_layer() -> None:
    """Under sequence parallelism a message is H and R wide; here only the wide layers' MLPs have factors."""
    rules = LoraRules(RANK, 1.0, r".*layers\.[13]\.mlp\..*")

    def sent(architecture: Architecture) -> int:
        planned = job(architecture, LowRank("lora", low_rank(architecture, rules)), Layout(2, 1, True, 1, False))
        return sum(bytes_of(microbatch_messages(planned)).values())

    assert sent(MIXED) == sent(ALIKE), "messages are H wide whatever ffn is"
    layer = low_rank(MIXED, rules).layers[3]
    assert layer.total_rank("linear_fc1") == 2 * RANK and layer.total_rank("linear_qkv") == 0
    assert layer.on("linear_fc2") == (Factor("down_proj", RANK, WIDE, HIDDEN, (0,)),)


@pytest.mark.parametrize("n", [1, 2])
def test_magnitudes_are_those_of_each_layer(n: int) -> None:
    """One magnitude per row of every projection; a row-parallel linear has all of its rows on every rank."""

    def magnitudes(architecture: Architecture) -> tuple[int, ...]:
        """Return the elements of Θ (model and rank), the bytes of buffers and passes, and those sent in a step."""
        with_them, without = (
            job(architecture, method(architecture), Layout(n, 1, n > 1, 2, False)) for method in (dora, lora)
        )
        held, bare = (theta_on_rank(each, n - 1) for each in (with_them, without))
        buffers = (
            persistent_bytes(with_them, held)["Θ"]
            - persistent_bytes(without, bare)["Θ"]
            - 4 * (held.elements - bare.elements)
        )
        return (
            with_them.footprint.parameters(architecture).trained - without.footprint.parameters(architecture).trained,
            held.elements - bare.elements,
            buffers,
            with_them.footprint.step_passes(with_them),
            sum(message.bytes for message in step_messages(with_them, 0) if message.bytes == 4 * 2 * HIDDEN * len(FFN)),
        )

    on_rows = {name: rows for name, (rows, _) in all_projections().items()}
    here = sum(rows if "o_proj" in name or "down" in name else rows // n for name, rows in on_rows.items())
    # A row index (int64), norms and g (fp32) per row. W's cast from bf16, and seven passes in fp32.
    passes = (2 + 4 + 7 * 4) * sum(WEIGHTS) // n
    sent = 4 * 2 * HIDDEN * len(FFN) if n > 1 else 0
    assert magnitudes(MIXED) == (sum(on_rows.values()), here, (8 + 4 + 4) * here, passes, sent)
    assert all(found != alike for found, alike in zip(magnitudes(MIXED)[:4], magnitudes(ALIKE)[:4], strict=True))


def test_the_widest_adapted_kind_decides_what_an_evaluation_needs() -> None:
    def working(targets: str) -> int:
        footprint = Decomposed("lora", low_rank(MIXED, LoraRules(RANK, 1.0, targets)))
        return footprint.evaluation_working(job(MIXED, footprint, layouts()[0]), 1000 * HIDDEN)

    residual = 4 * 1000 * HIDDEN
    for layers, fc1 in ("01", 2 * WIDE), ("0", 2 * NARROW):
        assert working(rf".*layers\.[{layers}]\.mlp\..*") == residual + 2 * 1000 * fc1
    assert working(r".*layers\.1\.self_attn\..*") == residual
