"""Layouts: the legal, the fitting and the recommended ones; and the plan's estimates of time and traffic."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from lowrank_dist.arch.placement import LoraRules
from lowrank_dist.engine.job_layout import job_layout
from lowrank_dist.engine.planning import auto_tensor, find_model, job_of, read_request
from lowrank_dist.errors import UserError
from lowrank_dist.methods.lora.footprint import LowRank
from lowrank_dist.methods.registry import Sizes, footprints_beside
from lowrank_dist.planner.choice import Choice, choose
from lowrank_dist.planner.describe import compare, describe
from lowrank_dist.planner.factors import low_rank, on_every_linear
from lowrank_dist.planner.flops import attended_square, step_flops
from lowrank_dist.planner.hardware import GPUS, bytes_in, gpu_of, usable
from lowrank_dist.planner.job import Footprint, Job, Layout
from lowrank_dist.planner.layouts import Candidate, Cluster, Fixed, tensor_sizes
from lowrank_dist.planner.memory import Memory, memory
from lowrank_dist.planner.parameters import adapter_bytes, base_bytes, checkpoint_bytes, disk_bytes, host_bytes
from lowrank_dist.planner.report import report
from lowrank_dist.planner.result import MethodPlan, Plan
from lowrank_dist.planner.step_time import DATA, GEMMS, TENSOR, job_flops
from lowrank_dist.planner.traffic import calls, microbatch_messages
from lowrank_dist.sections.section import MethodName
from lowrank_dist.terminal import open_console

H100 = GPUS["h100"]
METHODS = get_args(MethodName)


def planned(shape: str, *overrides: str) -> Job:
    return job_of(read_request(shape, overrides), 1.0)


def cluster(nodes: int = 1, gpus: int = 8, memory: int = H100.memory) -> Cluster:
    return Cluster(nodes, gpus, H100, memory)


def chosen(shape: str, *overrides: str, nodes: int = 1, memory: int = H100.memory, **fixed: Any) -> Choice:
    return choose(planned(shape, *overrides), Fixed(**fixed), cluster(nodes, memory=memory))


def beside(candidate: Candidate, sizes: Sizes) -> list[Footprint]:
    job = candidate.job
    return footprints_beside(job.footprint, sizes, job.architecture, job.layout.tensor)


def drawn(plan: Plan) -> str:
    """Return the report as text."""
    console = open_console(width=160, file=io.StringIO())
    console.print(report(plan))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def compared(candidate: Candidate, sizes: Sizes) -> list[MethodPlan]:
    return compare(candidate, beside(candidate, sizes))


def test_legal_sizes_and_why_the_others_are_not() -> None:
    illegal, legal = tensor_sizes(find_model("llama-3-70b").architecture, 16)
    assert legal == [1, 2, 4, 8, 16]
    assert illegal[3] == "64 attention heads"
    # 28 heads, 4 key/value heads, ffn 18944 = 2^9·37.
    illegal, legal = tensor_sizes(find_model("qwen2.5-7b").architecture, 28)
    assert legal == [1, 2, 4] and illegal[7] == "ffn 18944" and illegal[8] == "28 attention heads"
    with pytest.raises(UserError, match=r"parallel.tensor=3 does not divide .* \(64 attention heads.* 1, 2, 4"):
        chosen("llama-3-70b", tensor=3)


def test_a_small_model_needs_no_tensor_parallelism_and_a_large_one_stays_inside_its_node() -> None:
    small = chosen("llama-3-8b")
    assert small.fits and (small.best.job.layout.tensor, small.best.job.layout.data) == (1, 8)
    large = chosen("gpt3-175b", "train.global_batch=32", nodes=4)
    assert large.fits and (large.best.job.layout.tensor, large.best.job.layout.data) == (8, 4)
    for choice in (small, large):
        assert choice.runner_up is not None and choice.remedies == ()
        assert choice.best.time.seconds <= choice.runner_up.time.seconds
        assert choice.best.memory.total <= usable(H100.memory)


def test_what_is_fixed_stays() -> None:
    choice = chosen("llama-3-8b", tensor=4, micro_batch=2, recompute=True, sequence=False)
    assert choice.best.job.layout == Layout(4, 2, False, 2, True)
    assert choice.runner_up is None


def test_where_nothing_fits_it_says_how_much_is_short_and_what_would_fit() -> None:
    choice = chosen("llama-3-405b")
    assert not choice.fits
    needed = choice.best.memory.total
    assert choice.best.missing_bytes == needed - usable(H100.memory) > 0
    larger = choice.remedies[-1]
    gpu = gpu_of(larger.words.removeprefix("--gpu "))
    assert larger.candidate.cluster.gpu == gpu and usable(gpu.memory) >= needed
    faster = [other for other in GPUS.values() if other.flops >= H100.flops and other.node >= H100.node]
    assert gpu in faster and all(usable(other.memory) < needed for other in faster if other.memory < gpu.memory)
    more = next(remedy.words for remedy in choice.remedies if remedy.words.startswith("--nodes"))
    nodes, tensor = int(more.split()[1]), int(more.split("parallel.tensor=")[1].split()[0])
    assert "parallel.across_nodes=true" in more
    job = planned("llama-3-405b")
    assert choose(job, Fixed(tensor=tensor), cluster(nodes)).fits
    assert not choose(job, Fixed(), cluster(nodes // 2)).fits


@pytest.mark.parametrize("remedy", ["engine.recompute=full", "train.micro_batch=1", "data.max_length"])
def test_each_remedy_is_one(remedy: str) -> None:
    """Each remedy fits where the requested layout does not."""
    overrides = ["data.max_length=8192", "train.global_batch=8"]
    fixed: dict[str, Any] = {"tensor": 8, "micro_batch": 8, "recompute": False}
    choice = chosen("llama-3-70b", *overrides, **fixed)
    assert not choice.fits
    offered = [found.words for found in choice.remedies if found.words.startswith(remedy)]
    if remedy == "engine.recompute=full":
        fixed["recompute"] = True
    elif remedy == "train.micro_batch=1":
        fixed["micro_batch"] = 1
    else:
        overrides[0] = offered[0]
    assert chosen("llama-3-70b", *overrides, **fixed).fits == bool(offered) and offered


def test_the_first_remedy_is_a_layout_of_the_same_nodes() -> None:
    """Without tensor parallelism a 70B model fits no GPU; with it the model fits these nodes."""
    batch, asked = "train.global_batch=32", {"micro_batch": 1, "recompute": False}
    choice = chosen("llama-3-70b", batch, nodes=2, tensor=1, **asked)
    first = choice.remedies[0]
    assert not choice.fits and first.candidate.cluster == choice.best.cluster and not first.candidate.missing_bytes
    tensor = first.candidate.job.layout.tensor
    assert first.words == f"parallel.tensor={tensor}"
    # Pasted into the command, it gives the layout that it promises.
    again = chosen("llama-3-70b", batch, nodes=2, tensor=tensor, **asked)
    assert again.fits and again.best.job.layout == first.candidate.job.layout
    # So does `auto`, which fits any number of nodes.
    auto = {remedy.words: remedy.candidate for remedy in choice.remedies}["parallel.tensor=auto"]
    request = read_request("llama-3-70b", [batch, "train.micro_batch=1", "engine.recompute=none"])
    assert auto_tensor(request, cluster(2)) == auto.job.layout.tensor and not auto.missing_bytes
    # Where the tensor-parallel size alone does not suffice, the remedy changes further keys.
    wide = chosen("llama-3-70b", "data.max_length=8192", tensor=1, micro_batch=8, recompute=False)
    words = dict(word.split("=") for word in wide.remedies[0].words.split())
    freed = {"parallel.tensor", "train.micro_batch", "engine.recompute"}
    assert words.keys() > {"parallel.tensor"} and words.keys() <= freed
    # For a job that fits these nodes in no layout there is no such remedy.
    none = chosen("llama-3-405b", tensor=8)
    assert none.remedies[0].words.startswith("--nodes") and "parallel.tensor=auto" not in map(str, none.remedies)


def test_a_refused_layout_names_one_that_fits() -> None:
    said = r"train.global_batch: 8 samples .* the job fits these nodes with parallel.tensor=\d+$"
    with pytest.raises(UserError, match=said):
        chosen("llama-3-70b", nodes=2, tensor=1)
    with pytest.raises(UserError, match=r"parallel.data: .*; the job fits these nodes with parallel.data=null$"):
        chosen("llama-3-8b", tensor=4, data=4)


def test_a_layout_that_fits_by_less_than_the_error_of_a_plan_is_tight() -> None:
    free = chosen("llama-3-70b", tensor=8).best

    def with_spare(share: float) -> Plan:
        """Return the plan on nodes with `share` of the memory to spare."""
        usable_bytes = int((1 + share) * free.memory.total)
        memory = next(size for size in range(usable_bytes, 2 * usable_bytes, 10**6) if usable(size) >= usable_bytes)
        layout = free.job.layout
        fixed: dict[str, Any] = {"tensor": 8, "micro_batch": layout.micro_batch, "recompute": layout.recompute}
        choice = chosen("llama-3-70b", memory=memory, **fixed)
        return describe(choice, None, cluster(memory=memory), [], 3, 1)

    barely, easily = with_spare(0.01), with_spare(0.06)
    assert (barely.fits, barely.tight, easily.fits, easily.tight) == (True, True, True, False)
    assert barely.remedies and not easily.remedies
    change = barely.remedies[0]
    assert change.words and change.layout.spare >= barely.accuracy * change.layout.memory
    assert 0 < barely.layout.spare < barely.accuracy * barely.layout.memory


def test_a_group_that_crosses_nodes_is_said() -> None:
    inside, across = (chosen("llama-3-70b", nodes=2, tensor=tensor) for tensor in (8, 16))
    plans = [describe(choice, None, cluster(2), [], 3, 1) for choice in (inside, across)]
    assert [plan.layout.crosses_nodes for plan in plans] == [False, True]
    said = [" ".join(drawn(plan).split()) for plan in plans]
    assert "TP 16 across nodes" in said[1] and "refuses it without parallel.across_nodes=true" in said[1]
    assert "across" not in said[0]


def test_auto_leaves_a_margin() -> None:
    """Where the fastest layout is tight, auto chooses the fastest that is not."""
    request = read_request("llama-3-70b", ["train.global_batch=32", "parallel.tensor=auto", "train.micro_batch=1"])
    fixed = Fixed(micro_batch=1)
    nodes = cluster(2)
    assert auto_tensor(request, nodes) == choose(job_of(request, 1.0), fixed, nodes).best.job.layout.tensor
    fastest = choose(job_of(request, 1.0), fixed, cluster(2)).best
    tight = replace(nodes, free=int(1.01 * fastest.memory.total))
    best = choose(job_of(request, 1.0), fixed, tight)
    assert best.best.tight and not best.safe.tight
    assert auto_tensor(request, tight) == best.safe.job.layout.tensor


@pytest.mark.parametrize(
    ("fixed", "said"),
    [
        ({"tensor": 16}, "parallel.tensor: 16 does not divide 1 × 8 = 8 GPUs"),
        ({"tensor": 4, "data": 4}, "parallel.data: 4 tensor × 4 data parallel is not"),
        ({"data": 3}, "parallel.data: no tensor-parallel size of this model gives 3 data-parallel replicas"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(fixed: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen("llama-3-8b", **fixed)


def test_more_replicas_than_samples_are_refused() -> None:
    with pytest.raises(UserError, match="train.global_batch: 8 samples"):
        chosen("gpt2-medium", nodes=16, tensor=1)


def test_recomputation_costs_time_and_saves_memory() -> None:
    kept = chosen("llama-3-70b", tensor=8, micro_batch=1, recompute=False).best
    again = chosen("llama-3-70b", tensor=8, micro_batch=1, recompute=True).best
    assert again.memory.total < kept.memory.total and again.time.seconds > kept.time.seconds
    flops = job_flops(kept.job), job_flops(again.job)
    assert flops[0].model == flops[1].model and 1.4 < flops[1].executed / flops[0].executed < 1.6


def test_flops_of_a_frozen_base_by_hand() -> None:
    """Two products of the weights per token; full training has three. The lowest linear has no dX; n ≤ T logits."""
    shape = find_model("gpt2-medium").architecture
    weights, head = sum(kind.weights for kind in shape.layers), shape.vocab * shape.hidden
    placement = low_rank(shape, LoraRules(1, 1.0, ["q_proj"]))
    lora = LowRank("lora", placement)
    found = step_flops(shape, lora, tokens=1000, target_tokens=100, square_lengths={None: 0}, recompute=False)
    elements = placement.elements
    lowest = shape.layers[0].linears["linear_qkv"].weights
    once = low_rank(shape, LoraRules(1, 1.0, ["q_proj"])).layers[0].factors[0][0]
    expected = 2 * 1000 * (2 * weights - lowest) + 2 * 100 * 2 * head
    # U and U·B; dU, dB, dA, and dU·A except in the lowest linear.
    expected += 2 * 1000 * (3 * elements - once.adapter_rank * once.in_features)
    assert found.model == found.executed == expected
    attended = step_flops(shape, lora, tokens=1000, target_tokens=100, square_lengths={None: 10**6}, recompute=False)
    # Scores and values, the causal half, forward and twice backward; flash attention recomputes the scores.
    half = 2 * 10**6 * shape.hidden * len(shape.layers)
    assert attended.model - found.model == 3 * half
    assert attended.executed - found.executed == attended.attention == half * 7 // 2


def test_attention_below_the_lowest_factor_has_no_backward() -> None:
    shape = find_model("gpt2-medium").architecture
    lora = LowRank("lora", low_rank(shape, LoraRules(1, 1.0, r".*\.h\.23\.mlp\.c_proj")))
    counts = [
        step_flops(shape, lora, tokens=0, target_tokens=0, square_lengths={None: 10**6}, recompute=recompute)
        for recompute in (False, True)
    ]
    half = 2 * 10**6 * shape.hidden
    assert counts[0].model == counts[0].executed == 24 * half
    assert counts[1].executed == 25 * half, "the one layer that has a backward is run again"


@pytest.mark.parametrize("sequence", [True, False])
def test_messages_of_a_layer(sequence: bool) -> None:
    """docs/DESIGN.md: four calls forward and four backward, or two and two; recomputation adds three or one."""
    shape = find_model("gpt2-medium").architecture
    found = {}
    for layers in (3, 4):
        for recompute in (False, True):
            deep = replace(shape, layers=shape.layers[:1] * layers)
            job = planned("gpt2-medium")
            job = replace(
                job,
                architecture=deep,
                footprint=LowRank("lora", on_every_linear(deep, 4)),
                layout=Layout(2, 1, sequence, 1, recompute),
            )
            found[layers, recompute] = calls(microbatch_messages(job)).total()
    assert found[4, False] - found[3, False] == (8 if sequence else 4)
    assert found[4, True] - found[3, True] == (11 if sequence else 5)


def test_time_is_bound_by_what_takes_longest() -> None:
    """A network with every rank on its own node, and a model that fits one GPU and needs no messages."""
    job = planned("llama-3-405b", "data.max_length=4096")
    across = choose(job, Fixed(tensor=16), Cluster(16, 1, H100, H100.memory)).best.time
    assert across.bound == TENSOR and across.mfu < 0.25
    inside = chosen("llama-3-8b", "data.max_length=4096", tensor=1).best.time
    assert inside.bound == GEMMS and 0.3 < inside.mfu < 0.8
    assert inside.terms[TENSOR] == 0 < inside.terms[DATA]
    assert across.seconds == pytest.approx(sum(across.terms.values()))


def test_files_and_host_memory() -> None:
    job = planned("gpt3-175b", "lora.rank=4", "lora.targets=[q_proj,v_proj]")
    assert adapter_bytes(job) == 4 * 18_874_368
    assert checkpoint_bytes(job) == 16 * 18_874_368
    assert base_bytes(job) == 2 * 174_604_259_328
    assert disk_bytes(job, 3, 1) == base_bytes(job) + (5 * 16 + 4) * 18_874_368
    # Shards lie in host memory on a CPU, but not on a GPU.
    on_cpu = replace(job, device="cpu", layout=Layout(8, 1, True, 1, False))
    assert host_bytes(on_cpu, 8) > base_bytes(job) > 10 * host_bytes(job, 8)


def test_every_method_is_beside() -> None:
    candidate = chosen("llama-3-8b", tensor=2, recompute=False).best
    rows = compared(candidate, Sizes(bottleneck=64, virtual_positions=16))
    assert list(dict.fromkeys(row.method for row in rows)) == list(METHODS)
    by_name = {(row.method, row.placement): row for row in rows}
    lora = by_name["lora", ""]
    assert lora.memory == candidate.memory.total and lora.added == 0 and lora.seconds == candidate.time.seconds
    # One gather and one scatter each way under sequence parallelism; none where bottlenecks are replicated.
    assert by_name["adapter_h", "sharded"].added == 8 and by_name["adapter_l", "sharded"].added == 4
    assert by_name["adapter_h", "replicated"].added == 0
    # Sharded, a bottleneck saves the gathered input; replicated, its own tokens, and has few weights beside a layer's.
    assert by_name["adapter_h", "replicated"].memory < by_name["adapter_h", "sharded"].memory
    full = by_name["full", ""]
    assert full.trained == 8_030_261_248
    assert full.memory > 2 * lora.memory and full.flops > 1.4 * lora.flops
    without = choose(candidate.job, Fixed(tensor=2, sequence=False, recompute=False), cluster()).best
    rows = {(row.method, row.placement): row for row in compared(without, Sizes())}
    assert rows["adapter_h", "sharded"].added == 4 and rows["adapter_l", "sharded"].added == 2
    again = choose(candidate.job, Fixed(tensor=2, recompute=True), cluster()).best
    rows = {(row.method, row.placement): row for row in compared(again, Sizes())}
    assert rows["adapter_h", "sharded"].added == 12 and rows["adapter_l", "sharded"].added == 6
    # The layer is recomputed up to its last saved tensor, which is the bottleneck's after fc2's reduction.
    assert rows["adapter_h", "replicated"].added == rows["adapter_l", "replicated"].added == 1


@pytest.mark.parametrize(
    ("overrides", "trained", "stored"),
    [
        (["method=full"], 8_030_261_248, 8_030_261_248),
        (["method=adapter_h", "adapter.bottleneck=16"], 64 * (2 * 4096 * 16 + 16 + 4096), None),
        (["method=prefix", "prefix.length=4", "prefix.width=8"], 4 * 4096 + 4097 * 8 + 9 * 65536, 4 * 65536),
        (["method=prompt", "prompt.length=4"], 4 * 4096, None),
    ],
)
def test_the_configured_method_is_planned(overrides: list[str], trained: int, stored: int | None) -> None:
    """It comes first, with its own sizes in memory and on disk; low-rank updates are listed too."""
    choice = chosen("llama-3-8b", *overrides, tensor=2)
    plan = describe(choice, None, cluster(), beside(choice.best, Sizes()), 3, 1)
    first, *others = plan.methods
    assert first.method == plan.trained.method == overrides[0].removeprefix("method=")
    assert (first.trained, first.stored) == (trained, stored or trained)
    assert plan.trained.parameters == trained and first.memory == plan.layout.memory
    assert {row.method for row in others} | {first.method} == set(METHODS)
    per_element = 2 if first.method == "full" else 4
    assert plan.files.adapter == per_element * (stored or trained)
    assert plan.files.checkpoint == plan.files.adapter + 12 * trained


def test_full_fine_tuning_needs_more_gpus_and_says_so() -> None:
    """16 bytes a parameter of gradients and optimizer state do not fit where low-rank factors do."""
    assert chosen("llama-3-70b", tensor=8).fits
    full = chosen("llama-3-70b", "method=full", tensor=8)
    assert not full.fits and 3 * full.best.memory.parts["Θ"] <= full.best.memory.parts["masters and moments"] > 100e9
    assert any(remedy.words.startswith("--nodes") for remedy in full.remedies)


def test_a_bottleneck_that_cannot_be_cut() -> None:
    with pytest.raises(UserError, match=r"adapter.bottleneck=6 is not a multiple of parallel.tensor=4.*replicated"):
        chosen("llama-3-8b", "method=adapter_l", "adapter.bottleneck=6", tensor=4)
    assert chosen("llama-3-8b", "method=adapter_l", "adapter.bottleneck=6", "adapter.placement=replicated", tensor=4)


def test_virtual_positions_take_from_the_sequence() -> None:
    prefix, prompt, lora = (
        planned("llama-3-8b", "data.max_length=512", *more)
        for more in (["method=prefix", "prefix.length=32"], ["method=prompt", "prompt.length=32"], [])
    )
    assert (prefix.row, prompt.row, lora.row) == (480, 512, 512)
    assert prefix.targets == prompt.targets == lora.targets - 32
    with pytest.raises(UserError, match=r"prefix.length=511 leaves no room in data.max_length=512.*at most 510"):
        planned("llama-3-8b", "data.max_length=512", "method=prefix", "prefix.length=511")


def test_an_evaluation_that_generates_has_its_keys_and_values_planned() -> None:
    def held(batch: int, new: int = 256) -> Memory:
        generate = f"eval.generate={{batch: {batch}, max_new_tokens: {new}}}"
        job = planned("llama-3-8b", "data.max_length=1024", "data.eval=none", generate)
        return memory(replace(job, layout=Layout(2, 1, True, 1, True)), 0)

    large = held(64)
    assert large.moment == "prompts of an evaluation" and large.parts["gradients of Θ"] == 0
    # 32 layers, 4 of 8 key/value heads of 128, in bf16; the last token is never an input.
    assert large.parts["keys and values"] == 2 * 32 * 64 * 4 * (1024 + 256 - 1) * 128 * 2
    # The cache has no more columns than the model has positions.
    assert held(64, 10**6).parts["keys and values"] == 2 * 32 * 64 * 4 * (8192 - 1) * 128 * 2
    small, plain = held(1), planned("llama-3-8b", "data.max_length=1024")
    assert small == memory(replace(plain, layout=Layout(2, 1, True, 1, True)), 0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_memory_is_what_a_gpu_took(method: str, tmp_path: Path) -> None:
    """The peak of torch's allocator on an H200, as benchmarks/training.py recorded it: TinyLlama, one microbatch."""
    measured = json.loads((Path(__file__).parents[2] / "benchmarks/results/training_cuda_short.json").read_text())
    peak = next(run["peak_gib"] for run in measured["methods"] if run["method"] == method) * 2**30
    keys = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    keys |= {"num_hidden_layers": measured["layers"], "vocab_size": 32000, "max_position_embeddings": 4096}
    config = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, "dtype": "bfloat16", **keys}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = measured["micro_batch"]
    overrides = [f"method={method}", f"data.max_length={measured['length']}", f"train.global_batch={rows}"]
    job = planned(str(tmp_path), *overrides, *(["lora.rank=16"] if method == "lora" else []))
    one, two = (
        memory(replace(job, global_batch=count * rows, layout=Layout(1, 1, False, rows, False)), 0).total
        for count in (1, 2)
    )
    assert abs(one / peak - 1) < 0.01
    # The control, where gradients count: a second microbatch keeps those of all of Φ.
    assert method == "lora" or two / peak > 1.1


def test_a_smaller_batch_of_an_evaluation_is_a_remedy() -> None:
    overrides = ["data.max_length=4096", "data.eval=none"]
    fixed: dict[str, Any] = {"tensor": 8, "micro_batch": 1, "recompute": True}
    choice = chosen("llama-3-70b", *overrides, "eval.generate={batch: 512}", **fixed)
    assert not choice.fits and "eval.generate.batch=1" in map(str, choice.remedies)
    assert chosen("llama-3-70b", *overrides, "eval.generate={batch: 1}", **fixed).fits


def test_a_description_is_json_all_through() -> None:
    choice = chosen("llama-3-8b")
    plan = describe(choice, None, cluster(), beside(choice.best, Sizes()), 3, 1)
    text = json.dumps(plan.to_json(), allow_nan=False)
    plan = json.loads(text)
    held = plan["memory"]["without_recompute"]
    assert sum(held["parts"].values()) == held["total"] == max(held["moments"].values())
    assert plan["time"]["modelled"] is True


def test_less_memory_per_rank_with_more_ranks() -> None:
    totals = []
    for tensor in (1, 2, 4, 8):
        layout = Layout(tensor, 1, tensor > 1, 1, False)
        totals.append(memory(replace(planned("llama-3-8b"), layout=layout), 0).total)
    assert totals == sorted(totals, reverse=True)


def test_layout_of_a_job_script() -> None:
    """Keys that config and command line leave open come from the plan; given keys stay."""
    request = read_request("llama-3-70b", ["train.global_batch=16", "engine.recompute=full"])
    found = job_layout(request, cluster(2)).chosen
    assert not any(text.startswith("engine.recompute") for text in found)
    layout = choose(job_of(request, 1.0), Fixed(recompute=True), cluster(2)).best.job.layout
    assert found == (f"parallel.tensor={layout.tensor}", f"train.micro_batch={layout.micro_batch}")
    with pytest.raises(UserError, match=r"llama-3-405b does not fit 1 × 8 h100.*fits with --nodes"):
        job_layout(read_request("llama-3-405b", []), cluster(1))


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("80 GiB", 80 * 2**30), ("0.5TB", 5 * 10**11), ("900mb", 9 * 10**8)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert bytes_in(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "0GB", "80 bananas", "", "1e3GB", "9" * 400 + "GB"])
def test_sizes_without_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--gpu-memory.*80GB or 80GiB"):
        bytes_in(text, "--gpu-memory")


def test_a_candidate_remembers() -> None:
    candidate = Candidate(replace(planned("gpt2-medium"), layout=Layout(1, 8, False, 1, False)), cluster())
    assert candidate.memory is candidate.memory and candidate.missing_bytes == 0


def test_attention_under_a_window_costs_its_pairs() -> None:
    """Twice the pairs (i, j) with i − window < j ≤ i, counted one by one, up to a term linear in the length."""
    for length in (1, 5, 8, 9, 40):
        for window in (None, 1, 8, 64):
            pairs = sum(min(i + 1, window or length) for i in range(length))
            linear = min(length, window or length)
            assert attended_square(length, window) == 2 * pairs - linear
