"""The plan against the planned step, run on fake tensors: memory within 5 %, messages to the byte."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_dist.arch.families import FAMILIES
from lowrank_dist.engine import dry_run, verification
from lowrank_dist.engine.planning import job_of, read_request
from lowrank_dist.ops.extension import extension_loaded
from lowrank_dist.parallel.theta import is_partial
from lowrank_dist.planner import memory, traffic
from lowrank_dist.planner.hardware import GPUS
from lowrank_dist.planner.job import LayerCalls, LayerFlops, Layout
from lowrank_dist.planner.layouts import Candidate, Cluster
from lowrank_dist.planner.parameters import frozen_on_rank, parameter_sizes

pytestmark = pytest.mark.slow

H100 = GPUS["h100"]
# Small in every dimension but with the ratios of published models. kv: key/value heads.
_SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 4001,
    "max_position_embeddings": 1024,
}
_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
_GEMMA3 = {
    "head_dim": 96,
    "sliding_window": 512,
    "sliding_window_pattern": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "dtype": "bfloat16",
}
_GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 4001, "n_positions": 1024}


# Name → config.json: a plan needs no weights.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SMALL, "num_key_value_heads": 4},
    "mha": {"model_type": "llama", **_SMALL, "num_key_value_heads": 8, "dtype": "bfloat16"},
    "two_kv": {"model_type": "llama", **_SMALL, "num_key_value_heads": 2, "dtype": "bfloat16"},
    "qwen2": {"model_type": "qwen2", **_SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SMALL, "num_key_value_heads": 4, "head_dim": 96, "dtype": "bfloat16"},
    "granite": {"model_type": "granite", **_SMALL, **_MULTIPLIERS, "dtype": "bfloat16"},
    "window": {"model_type": "mistral", **_SMALL, "num_key_value_heads": 4, "sliding_window": 96},
    "mixed": {
        **{"model_type": "qwen2", **_SMALL, "num_key_value_heads": 4, "dtype": "bfloat16"},
        **{"use_sliding_window": True, "sliding_window": 96, "max_window_layers": 2},
    },
    "smollm3": {"model_type": "smollm3", **_SMALL, "num_key_value_heads": 4, "dtype": "bfloat16"},
    "ministral3": {"model_type": "ministral3", **_SMALL, "num_key_value_heads": 4, "head_dim": 64},
    "phi3": {"model_type": "phi3", **_SMALL, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "seed_oss": {
        **{"model_type": "seed_oss", **_SMALL, "num_key_value_heads": 4, "head_dim": 96, "dtype": "bfloat16"},
        **{"attention_out_bias": True, "mlp_bias": True},
    },
    "gpt2": {**_GPT2, "dtype": "float16"},
    "opt": {
        **{"model_type": "opt", **_SMALL, "ffn_dim": 2048, "word_embed_proj_dim": 512},
    },
    "olmo3": {"model_type": "olmo3", **_SMALL, "num_key_value_heads": 4, "sliding_window": 96},
    "glm4": {"model_type": "glm4", **_SMALL, "num_key_value_heads": 4, "head_dim": 64, "dtype": "bfloat16"},
    "olmo2": {"model_type": "olmo2", **_SMALL, "num_key_value_heads": 4},
    "olmo2_two_kv": {"model_type": "olmo2", **_SMALL, "num_key_value_heads": 2, "dtype": "bfloat16"},
    "gemma3": {"model_type": "gemma3_text", **_SMALL, **_GEMMA3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("verify")
    for name, values in CONFIGS.items():
        (base / name).mkdir()
        (base / name / "config.json").write_text(json.dumps(values))
    return {name: str(base / name) for name in CONFIGS}


def verified(source: str, *overrides: str, layout: Layout, target_share: float = 1.0, **changes: Any) -> dict[str, Any]:
    request = read_request(source, overrides)
    job = replace(
        job_of(request, target_share), layout=layout, global_batch=layout.micro_batch * layout.data, **changes
    )
    cluster = Cluster(1, layout.ranks, H100, H100.memory)
    candidate = Candidate(job, cluster)
    found = verification.verification(candidate, request.config)
    # The steps from the plan's total to the executed peak add up exactly.
    steps = sum(nbytes for _, nbytes in found.from_plan)
    assert candidate.memory.total + steps == found.memory["peak"].formula
    return asdict(found)


DORA = "lora.dora=true"
CASES = [
    # folder, TP, DP, sequence parallel, rows, recompute, target share, overrides
    ("llama", 1, 1, False, 2, False, 1.0, []),
    ("llama", 1, 1, False, 2, True, 0.1, []),
    ("llama", 2, 2, True, 2, False, 1.0, ["lora.dropout=0.1"]),
    ("llama", 4, 1, True, 2, True, 0.1, []),
    ("llama", 4, 1, False, 2, False, 0.1, []),
    ("llama", 4, 1, False, 2, True, 1.0, ["lora.targets=[q_proj,v_proj]"]),
    ("mha", 4, 1, True, 4, False, 0.2, []),
    ("llama", 2, 1, True, 4, False, 0.2, ["data.packing=true"]),
    ("llama", 1, 1, False, 4, True, 0.2, ["data.packing=true", "model.dtype=bf16"]),
    ("gpt2", 2, 1, False, 4, False, 0.2, ["data.packing=true", "lora.targets=[q_proj,v_proj]"]),
    ("two_kv", 4, 1, True, 2, False, 1.0, ["lora.targets=[q_proj,v_proj]"]),
    ("two_kv", 8, 1, True, 2, True, 0.5, []),
    ("two_kv", 8, 1, False, 2, False, 0.5, []),
    ("qwen2", 2, 1, True, 2, False, 0.3, ["lora.rank_pattern={down_proj: 24}"]),
    ("qwen3", 4, 1, True, 2, False, 0.3, []),
    ("olmo3", 2, 1, True, 2, False, 0.3, []),
    ("olmo2", 2, 1, True, 2, False, 0.3, []),
    ("olmo3", 2, 1, True, 2, False, 0.3, ["data.max_length=64"]),
    ("olmo3", 1, 1, False, 2, False, 0.3, []),
    ("glm4", 4, 1, True, 2, False, 0.3, []),
    ("olmo2", 1, 1, False, 2, True, 0.3, []),
    ("olmo2", 2, 1, False, 2, False, 1.0, ["lora.targets=[down_proj]"]),
    ("olmo2", 4, 1, True, 2, True, 0.3, ["model.dtype=bf16"]),
    ("olmo2_two_kv", 4, 1, True, 2, False, 0.3, ["data.packing=true"]),
    ("olmo2_two_kv", 8, 1, False, 2, True, 0.3, ["lora.targets=[q_proj,v_proj]"]),
    ("gemma3", 1, 1, False, 2, False, 1.0, []),
    ("gemma3", 2, 1, True, 2, True, 0.3, []),
    ("gemma3", 4, 1, False, 2, False, 0.3, ["model.dtype=fp32", "data.packing=true"]),
    ("qwen3", 2, 1, True, 2, True, 0.3, ["model.dtype=fp32"]),
    ("gpt2", 2, 1, True, 2, False, 1.0, ["lora.targets=[q_proj,v_proj]"]),
    ("gpt2", 4, 1, False, 2, True, 0.1, []),
    ("opt", 4, 1, True, 2, False, 0.5, []),
    ("window", 4, 1, True, 2, False, 0.3, []),
    ("window", 2, 1, False, 2, True, 0.3, ["data.packing=true"]),
    ("mixed", 4, 1, True, 2, False, 0.3, []),
    ("mixed", 2, 1, True, 2, True, 0.3, ["model.dtype=fp32"]),
    ("smollm3", 4, 1, True, 2, False, 0.3, []),
    ("ministral3", 2, 1, True, 2, False, 0.3, []),
    ("phi3", 4, 1, True, 2, False, 0.3, ["data.packing=true"]),
    ("seed_oss", 2, 1, True, 2, False, 0.3, []),
    # Multipliers save nothing for the backward.
    ("granite", 2, 1, True, 2, False, 1.0, []),
    ("granite", 2, 1, False, 2, True, 0.3, ["data.packing=true"]),
    # Only layers 1 and 3, from layer 1's MLP on: there is no backward below.
    ("llama", 4, 1, True, 2, False, 0.3, [r"lora.targets=.*layers\.(1\.mlp|3)\..*(up|down|o)_proj"]),
    ("llama", 4, 1, True, 2, True, 0.3, [r"lora.targets=.*layers\.2\..*o_proj"]),
    ("llama", 4, 1, False, 2, False, 0.3, [r"lora.targets=.*layers\.3\..*down_proj"]),
    # The top layer is like one below it and unlike the nearest one that differs.
    ("llama", 4, 1, True, 4, False, 0.1, [r"lora.targets=.*layers\.[013]\.mlp\..*_proj"]),
    ("llama", 4, 1, True, 4, True, 0.1, [r"lora.targets=.*layers\.[013]\.mlp\..*_proj"]),
    ("llama", 2, 2, True, 2, False, 1.0, [DORA, "lora.dropout=0.1"]),
    ("llama", 4, 1, True, 2, True, 0.1, [DORA]),
    ("two_kv", 8, 1, False, 2, False, 0.5, [DORA]),
    ("gpt2", 4, 1, False, 2, True, 0.1, [DORA]),
    ("llama", 4, 1, True, 2, False, 0.3, [DORA, r"lora.targets=.*layers\.(1\.mlp|3)\..*(up|down|o)_proj"]),
]


def test_every_family_has_a_case() -> None:
    assert {CONFIGS[folder]["model_type"] for folder, *_ in CASES} == set(FAMILIES)


@pytest.mark.parametrize(("folder", "tensor", "data", "sequence", "rows", "recompute", "share", "overrides"), CASES)
def test_formulas_agree_with_the_executed_step(
    folders: dict[str, str],
    folder: str,
    tensor: int,
    data: int,
    sequence: bool,
    rows: int,
    recompute: bool,
    share: float,
    overrides: list[str],
) -> None:
    layout = Layout(tensor, data, sequence, rows, recompute)
    found = verified(folders[folder], "data.max_length=512", *overrides, layout=layout, target_share=share)
    assert found["agrees"], found
    # Stricter than required: persistent and saved tensors are counted, not estimated.
    for part in ("frozen weights", "Θ", "gradients of Θ"):
        assert found["memory"][part]["difference"] == 0, part
    assert abs(found["memory"]["activations"]["difference"]) < 1e-3
    assert tensor == 1 or found["messages"]["microbatch"]["executed"]


ADAPTER_H = ["method=adapter_h", "adapter.bottleneck=64"]
ADAPTER_L = ["method=adapter_l", "adapter.bottleneck=64"]
REPLICATED = "adapter.placement=replicated"
PREFIX = ["method=prefix", "prefix.length=32", "prefix.width=null"]
MLP = ["method=prefix", "prefix.length=16", "prefix.width=128"]
PROMPT = ["method=prompt", "prompt.length=32"]
PACKED = "data.packing=true"
OTHER_METHODS = [
    # folder, TP, sequence parallel, recompute, target share, overrides
    ("llama", 1, False, False, 1.0, ["method=full"]),
    ("qwen2", 2, True, True, 0.3, ["method=full"]),
    ("gpt2", 2, False, False, 0.3, ["method=full"]),
    ("qwen3", 2, True, False, 0.3, ["method=full"]),
    ("granite", 2, True, False, 0.3, ["method=full"]),
    ("olmo2", 1, False, True, 0.3, ["method=full", "model.dtype=bf16"]),
    ("olmo2", 2, True, False, 0.3, ["method=full"]),
    ("olmo2_two_kv", 4, True, True, 0.3, ["method=full"]),
    ("olmo2", 2, True, True, 0.3, ADAPTER_H),
    ("olmo2_two_kv", 2, False, True, 0.3, [*ADAPTER_L, REPLICATED]),
    ("olmo2", 1, False, True, 0.3, [*ADAPTER_H, REPLICATED]),
    ("olmo2_two_kv", 4, True, False, 0.3, PREFIX),
    ("olmo2", 2, False, True, 0.3, [*PROMPT, PACKED]),
    ("gemma3", 2, True, False, 0.3, ["method=full"]),
    ("gemma3", 1, False, True, 0.3, ADAPTER_L),
    ("gemma3", 2, True, True, 0.3, PREFIX),
    ("two_kv", 4, True, True, 1.0, ["method=full"]),
    ("mha", 1, False, True, 0.3, ["method=full", PACKED]),
    ("llama", 2, True, False, 1.0, ADAPTER_H),
    ("gpt2", 2, False, True, 0.3, ADAPTER_H),
    ("mha", 4, True, True, 0.3, [*ADAPTER_H, REPLICATED]),
    ("llama", 1, False, False, 0.3, ADAPTER_H),
    ("llama", 2, False, False, 1.0, ADAPTER_L),
    ("mha", 2, True, True, 1.0, ADAPTER_L),
    ("opt", 2, False, True, 0.3, [*ADAPTER_L, REPLICATED]),
    ("qwen3", 1, False, True, 0.3, ADAPTER_L),
    ("llama", 1, False, False, 1.0, MLP),
    ("gpt2", 2, True, True, 0.3, MLP),
    ("qwen3", 2, True, False, 0.3, PREFIX),
    ("two_kv", 4, True, False, 0.3, MLP),
    ("mha", 2, False, True, 0.3, PREFIX),
    ("llama", 2, True, False, 0.3, [*PREFIX, PACKED]),
    ("llama", 1, False, True, 1.0, PROMPT),
    ("llama", 4, True, False, 0.3, PROMPT),
    ("gpt2", 2, True, False, 1.0, PROMPT),
    ("mha", 2, False, True, 0.3, [*PROMPT, PACKED]),
]


@pytest.mark.parametrize(("folder", "tensor", "sequence", "recompute", "share", "overrides"), OTHER_METHODS)
def test_the_formulas_of_the_other_methods(
    folders: dict[str, str],
    folder: str,
    tensor: int,
    sequence: bool,
    recompute: bool,
    share: float,
    overrides: list[str],
) -> None:
    """Messages to the byte, persistent and saved tensors exactly, the peak within 5 %."""
    layout = Layout(tensor, 1, sequence, 2, recompute)
    found = verified(folders[folder], "data.max_length=512", *overrides, layout=layout, target_share=share)
    assert found["agrees"], found
    for part in ("frozen weights", "Θ", "gradients of Θ"):
        assert found["memory"][part]["difference"] == 0, part
    assert abs(found["memory"]["activations"]["difference"]) < 1e-3
    if tensor == 1:
        assert found["memory"]["FLOPs of a microbatch"]["difference"] == 0


@pytest.mark.parametrize(
    ("formula", "broken", "overrides"),
    [
        ("methods.bottleneck.footprint.Bottlenecks._saved", lambda self, job: 0, ADAPTER_H),
        (
            "methods.bottleneck.footprint.Bottlenecks.layer_calls",
            lambda self, job, input_requires_grad: LayerCalls(),
            ADAPTER_L,
        ),
        ("planner.activations.norm_saves", lambda job, rows, features: 4 * rows * features, ["method=full"]),
        ("planner.memory.frozen_bytes", lambda job: job.itemsize * frozen_on_rank(job), ["method=full"]),
        (
            "methods.prefix.footprint.PrefixFootprint.saved_by_attention",
            lambda self, job, kind, input_requires_grad, without_method: 0,
            PREFIX,
        ),
        (
            "methods.bottleneck.footprint.Bottlenecks.layer_flops",
            lambda self, architecture, tokens, input_requires_grad: LayerFlops(),
            [*ADAPTER_H, "adapter.bottleneck=256"],
        ),
        ("methods.lora.footprint.Decomposed.saved_behind_linear", lambda self, job, linear, factors: 0, [DORA]),
        ("methods.lora.footprint.Decomposed.step_calls", lambda self, job: [], [DORA]),
    ],
)
def test_notices_a_wrong_formula_of_another_method(
    folders: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    formula: str,
    broken: Any,
    overrides: list[str],
) -> None:
    monkeypatch.setattr(f"lowrank_dist.{formula}", broken)
    layout = Layout(2, 1, True, 2, False)
    assert not verified(folders["llama"], "data.max_length=512", *overrides, layout=layout)["agrees"]


@pytest.mark.parametrize(
    ("folder", "formula", "broken"),
    [
        ("olmo2", "activations.head_norms", lambda job, kind, copied: 0),
        ("olmo2", "activations._norms", lambda layer, input_requires_grad, needs: 4),
        ("gemma3", "activations._norms", lambda layer, input_requires_grad, needs: 2),
        ("gemma3", "activations.widths", lambda job: 2),
    ],
)
def test_notices_a_wrong_formula_of_norms(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: str, formula: str, broken: Any
) -> None:
    monkeypatch.setattr(f"lowrank_dist.planner.{formula}", broken)
    found = verified(folders[folder], "data.max_length=512", layout=Layout(2, 1, True, 2, False))
    assert abs(found["memory"]["activations"]["difference"]) > 1e-3


def test_fused_factors_are_counted(folders: dict[str, str]) -> None:
    found = verified(folders["llama"], "data.max_length=512", layout=Layout(4, 1, True, 2, False), fuse_factors=True)
    assert found["agrees"] and found["memory"]["frozen weights"]["difference"] == 0, found


@pytest.mark.nightly
def test_the_paper_s_model() -> None:
    agrees_at_tp_8("gpt3-175b", "[q_proj,v_proj]")  # larger steps: tests/long


def agrees_at_tp_8(name: str, targets: str) -> None:
    started = time.process_time()  # of this process: other tests may keep the machine busy
    layout = Layout(8, 1, True, 1, False)
    found = verified(name, "lora.rank=4", f"lora.targets={targets}", "data.max_length=2048", layout=layout)
    assert found["agrees"], found
    assert time.process_time() - started < 120


@pytest.mark.parametrize("targets", ["[v_proj]", "all-linear"])
def test_magnitudes_lie_as_the_rows_of_b(folders: dict[str, str], targets: str) -> None:
    """Parameter by parameter, in the order of ZeRO's buckets; two of four ranks hold no row of v_proj."""
    request = read_request(folders["two_kv"], [DORA, f"lora.targets={targets}"])
    job = replace(job_of(request, 1.0), layout=Layout(4, 1, True, 2, False))
    lone = []
    for rank in range(4):
        with dry_run._fake_ranks(job, rank) as topology, FakeTensorMode(allow_non_fake_inputs=True):
            _, theta, _ = dry_run._build(job, request.config, topology)
        found = tuple([p.numel() for p in theta.parameters if is_partial(p) == partial] for partial in (True, False))
        assert found == parameter_sizes(job, rank)
        lone.append(1 in found[1])
    assert lone == [targets == "[v_proj]", False] * 2


def test_flops_are_those_of_the_products(folders: dict[str, str]) -> None:
    """Without attention, exact to the last multiplication: one rank, compiled operators with a block-diagonal B."""
    if not extension_loaded():
        pytest.skip("the compiled operators are not built: B's zeros are multiplied")
    for overrides in ([], [DORA], [r"lora.targets=.*layers\.[12]\..*(q|up)_proj"]):
        for recompute in (False, True):
            layout = Layout(1, 1, False, 2, recompute)
            found = verified(folders["llama"], "data.max_length=512", *overrides, layout=layout, target_share=0.3)
            assert found["memory"]["FLOPs of a microbatch"]["difference"] == 0, (overrides, recompute, found)


@pytest.fixture
def small(folders: dict[str, str]) -> Any:
    layout = Layout(4, 1, True, 2, False)
    return lambda: verified(folders["llama"], "data.max_length=512", layout=layout)


def test_notices_a_formula_without_frozen_weights(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "frozen_bytes", lambda job: 0)
    assert not small()["agrees"]


def test_notices_a_formula_with_gradients_of_frozen_weights(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = memory.persistent_bytes

    def counting_all(job: Any, theta: Any) -> dict[str, int]:
        found = real(job, theta)
        return found | {"gradients of Θ": found["gradients of Θ"] + memory.frozen_bytes(job)}

    monkeypatch.setattr(verification, "persistent_bytes", counting_all)
    assert not small()["agrees"]


def test_notices_a_formula_of_other_messages(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one column more in every message is 0.2 % of the bytes and no more calls."""
    monkeypatch.setattr(traffic, "total_rank", lambda factors: sum(f.adapter_rank for f in factors) + bool(factors))
    found = small()
    assert not found["agrees"] and all(abs(row["difference"]) < 0.05 for row in found["memory"].values())


def test_notices_a_collective_too_many(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dry_run._loss

    def with_one_more(model: Any, batch: Any) -> Any:
        dist.all_reduce(torch.zeros(1), group=model.topology.tp_group)
        return real(model, batch)

    monkeypatch.setattr(dry_run, "_loss", with_one_more)
    assert not small()["agrees"]


def test_notices_activations_that_are_kept(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: like a layer that saves its gathered input, the test keeps a copy of every message."""
    held: list[Any] = []
    from lowrank_dist.parallel import autograd

    real = autograd.gather_rows

    def holding(shard: Any, group: Any) -> Any:
        gathered, work = real(shard, group)
        held.append(gathered)
        return gathered, work

    monkeypatch.setattr(autograd, "gather_rows", holding)
    assert not small()["agrees"]


def test_leaves_nothing_behind(small: Any) -> None:
    """No process group and no patch stays, so that another verification can follow in the same process."""
    before = torch.nn.Module.to, torch.get_default_dtype()
    small()
    assert not dist.is_initialized()
    assert (torch.nn.Module.to, torch.get_default_dtype()) == before


def test_a_plan_needs_only_a_config(folders: dict[str, str]) -> None:
    assert [path.name for path in Path(folders["llama"]).iterdir()] == ["config.json"]


def test_every_rank_issues_the_same_messages() -> None:
    """Blocks of logits are all-reduced, so a rank with fewer vocabulary rows must split them like the others."""
    request = read_request("llama-3-8b", ["lora.rank=4", "lora.targets=[v_proj]", "data.max_length=2048"])
    job = replace(job_of(request, 0.6), layout=Layout(8, 1, True, 2, False))
    first, last = (dry_run.execute(job, request.config, rank).microbatch for rank in (0, 7))
    assert first == last
