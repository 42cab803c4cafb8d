"""The parts of `make gpu-bench` that need no GPU: traces, groups of kernels, bytes and FLOPs, ncu."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.engine.planning import job_of, read_request
from lowrank_dist.formats.model_folder import check_checkpoint, open_checkpoint
from lowrank_dist.planner.flops import step_flops
from tests.gpu.bench import stages as bench_stages

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import counters  # noqa: E402
import microbench  # noqa: E402
import products  # noqa: E402
import record  # noqa: E402
import roofline  # noqa: E402
import sides  # noqa: E402
import timeline  # noqa: E402
import training  # noqa: E402
import training_run  # noqa: E402
from timeline import Span  # noqa: E402

CPU = torch.device("cpu")


# --- traces


def test_the_union_counts_time_once() -> None:
    apart = [Span("a", 1.0, 2.0), Span("b", 5.0, 1.0)]
    assert timeline.union(apart) == 3.0
    assert timeline.union([*apart, Span("inside", 1.5, 1.0)]) == 3.0
    assert timeline.union([*apart, Span("across", 2.0, 3.5)]) == 5.0
    assert timeline.union([Span("late", 5.0, 1.0), Span("early", 1.0, 2.0)]) == 3.0
    assert timeline.union([]) == 0.0


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


# In microseconds. Two kernels on two streams that overlap by 10, a copy to the host, and a wait.
STEP = [
    {"ph": "M", "name": "process_name"},
    event("cpu_op", "aten::mm", 0, 9, **{"External id": 3, "Input Dims": [[8192, 4096], [4096, 16], []]}),
    event("cuda_runtime", "cudaLaunchKernel", 2, 5, correlation=7),
    event("cuda_driver", "cuLaunchKernelEx", 8, 4, correlation=8),
    event("kernel", "nvjet_tst_128x64", 20, 30, correlation=7, **{"External id": 3}),
    event("kernel", "void lowrank_dist::(anonymous namespace)::down_half<2, true>(Problem)", 40, 20, correlation=8),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 70, 5, correlation=9),
    event("cuda_runtime", "cudaMemcpyAsync", 15, 61, correlation=9),
    event("cuda_runtime", "cudaDeviceSynchronize", 80, 20, correlation=10),
    event("gpu_user_annotation", "Optimizer.step#AdamW.step", 0, 100),
]


def test_a_trace_is_read_from_the_profilers_events() -> None:
    trace = timeline.read(STEP, 100e-6, cuda=True)
    assert [span.name[:5] for span in trace.kernels] == ["nvjet", "void ", "Memcp"]
    assert trace.busy_share == pytest.approx(0.45)  # 20 to 60 and 70 to 75: no annotation, overlaps counted once
    assert trace.host_seconds == pytest.approx(19e-6)  # all but 15 to 76 and 80 to 100
    assert timeline.union(trace.launches) == pytest.approx(9e-6)
    figures = trace.figures()
    assert figures["kernels"] == 3 and set(figures["groups"]) == {"GEMM, thin", "ours: down_half", "copies and fills"}


def test_an_annotation_taken_for_work_would_be_seen() -> None:
    """Negative control: in the same trace Kineto's projection of an annotation is labelled a kernel."""
    spoilt = [{**e, "cat": "kernel"} if e.get("cat") == "gpu_user_annotation" else e for e in STEP]
    assert timeline.read(spoilt, 100e-6, cuda=True).busy_share == pytest.approx(1.0)


@pytest.mark.parametrize("categories", [{"cpu_op"}, {"cpu_op", "cuda_runtime", "cuda_driver"}, set()])
def test_a_trace_of_a_gpu_without_kernels_is_an_error(categories: set[str]) -> None:
    """CPU activity must not count as GPU kernels, and an empty trace must not give a busy share of zero."""
    seen = [e for e in STEP if e.get("cat") in categories]
    with pytest.raises(RuntimeError, match="the profiler saw no kernel of the GPU"):
        timeline.read(seen, 1.0, cuda=True)
    assert len(timeline.read(seen, 1.0, cuda=False).kernels) == ("cpu_op" in categories)


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", ((8192, 4096), (4096, 28672)), "GEMM, large"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", ((48, 8192), (8192, 6144)), "GEMM, thin"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", (), "GEMM"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", (), "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", (), "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", (), "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", (), "NCCL"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", (), "copies and fills"),
        ("Memset (Device)", (), "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor>", (), "elementwise and reductions"),
        ("void lowrank_dist::(anonymous namespace)::grad_a_half<1>(Problem)", (), "ours: grad_a_half"),
        ("void lowrank_dist::sum_parts<float, float>(float const*)", (), "ours: sum_parts"),
        ("lowrank_dist::expand", (), "ours: expand"),
        ("aten::addmm", ((8192, 16),), "GEMM, thin"),
        ("triton_poi_fused_0", (), "other"),
    ],
)
def test_groups_of_kernels(name: str, shapes: tuple[tuple[int, ...], ...], expected: str) -> None:
    assert timeline.group(Span(name, 0.0, 1.0, shapes)) == expected


def test_groups_add_up_to_all_kernels() -> None:
    kernels = timeline.read(STEP, 1.0, cuda=True).kernels
    for rows in (timeline.by_group(kernels).values(), timeline.by_name(kernels)):
        assert sum(row["launches"] for row in rows) == 3
        assert sum(row["us"] for row in rows) == pytest.approx(55.0)


def test_operators_have_the_time_that_is_theirs_alone() -> None:
    outer, inner = event("cpu_op", "outer", 0, 10), event("cpu_op", "inner", 2, 5)
    deepest, after = event("cpu_op", "deepest", 3, 1), event("cpu_op", "after", 10, 4)
    other = {**event("cpu_op", "elsewhere", 1, 8), "tid": 2}
    found = {span["name"]: span["dur"] for span in timeline.exclusive([after, inner, other, outer, deepest])}
    assert found == {"outer": 5, "inner": 4, "deepest": 1, "after": 4, "elsewhere": 8}


def test_a_real_profile_on_a_cpu() -> None:
    a = torch.randn(96, 128)
    trace = timeline.record(lambda: (a @ a.t()).relu(), CPU, shapes=True)
    products = [span for span in trace.kernels if span.name == "aten::mm"]
    assert len(products) == 1 and products[0].shapes[:2] == ((96, 128), (128, 96))
    assert 0 < trace.busy_share <= 1 and trace.waits == [] and trace.host_seconds == trace.seconds


# --- result files


def test_a_result_says_which_commit_it_is_of_and_whether_more_was_to_come(tmp_path: Path) -> None:
    path = record.write_result("some", {"cores": 2}, {"rows": [1]}, tmp_path, complete=False)
    assert json.loads(path.read_text())["complete"] is False
    found = json.loads(record.write_result("some", {"cores": 2}, {"rows": [1, 2]}, tmp_path).read_text())
    assert found["complete"] is True and found["rows"] == [1, 2] and found["machine"] == {"cores": 2}
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", found["commit"])
    assert [child.name for child in tmp_path.iterdir()] == ["some.json"]


# --- single products


def all_products(tokens: int = 24) -> list[products.Product]:
    return list(products.products(sides.architecture("tiny").layers[0].linears, products.Operands(tokens, CPU)))


def test_every_product_that_the_layer_has_is_there_once() -> None:
    labels = [product.label for product in all_products()]
    assert len(labels) == len(set(labels)) == 2 + 16 + 12 + 24
    assert sum(product.name.startswith("gemm") for product in all_products()) == 16


def test_the_bytes_are_those_of_the_roofline() -> None:
    """roofline.passes counts the elements of the same products elsewhere; here the factors are added."""
    tokens = 24
    for name, layout in sides.architecture("tiny").layers[0].linears.items():
        (o, k), r = layout.local_shape(1), products.RANK * len(layout.parts)
        counted = roofline.passes(layout, 1, tokens, products.RANK)
        factor = {"down": 2 * r * k, "expand": 2 * r * k, "grad_a": 4 * r * k, "up": 2 * r * o, "dU": 2 * r * o}
        for product in all_products(tokens):
            if product.linear == name and product.name in counted and product.variant != "masked":
                assert product.bytes == 2 * counted[product.name] + factor.get(product.name, 4 * r * o), product.label
        frozen = {p.label: p for p in all_products(tokens) if p.linear == name and p.name.startswith("gemm")}
        assert {product.flops for product in frozen.values()} == {2 * tokens * o * k}
        for direction, output in (("gemm", o), ("gemm dX", k)):
            written, added = (frozen[f"{direction} {name} beta {beta}"].bytes for beta in (0, 1))
            assert written == 2 * (tokens * o + tokens * k + o * k) and added - written == 2 * tokens * output


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("direction", ["gemm", "gemm dX"])
def test_a_frozen_product_is_what_it_is_called(direction: str, beta: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked with every operand: Y = X·Wᵀ or dY·W, overwriting the output or added to it."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(products.Operands, "normal", lambda _, *shape: drawn.append(torch.randn(*shape)) or drawn[-1])
    product = next(p for p in all_products() if p.label == f"{direction} linear_fc1 beta {beta}")
    call = product.make()
    x, weight, y = drawn
    expected = x @ (weight.t() if direction == "gemm" else weight) + beta * y
    assert torch.allclose(call(), expected, atol=1e-4)
    assert torch.equal(y, call() if not beta else y)


def test_the_pool_exceeds_the_cache_and_has_sets_of_its_own() -> None:
    product = next(p for p in all_products() if p.name == "dU")
    made = []
    counting = replace(product, make=lambda: made.append(len(made)) or (lambda: None))
    assert len(microbench.pool_of(counting, round(4 * product.bytes / 3.0))) == 4 == len(made)
    assert len(microbench.pool_of(counting, 0)) == microbench.FEWEST_SETS
    assert len(microbench.pool_of(counting, 10**12)) == microbench.MOST_SETS


def test_a_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sets of operands, and a clock that moves 0.01 s per call."""
    product = products.Product("p", "", "", lambda: lambda: None, flops=10**9, bytes=10**8)
    monkeypatch.setattr(microbench, "seconds_of", lambda work, count, device: 0.03 * count)
    row = microbench.measure(product, 3, 10**8, CPU)
    assert row["sets"] == 3 and row["us"] == pytest.approx(10_000)
    assert row["terabytes_per_second"] == pytest.approx(0.01) and row["teraflops"] == pytest.approx(0.1)


# --- Nsight Compute

NCU = """ran once: down linear_fc2 masked
==PROF== Disconnected from process 12
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","python3","a-host","down_half","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","GPU Speed Of Light Throughput","Duration","us","131.07"
"0","12","python3","a-host","down_half","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0","Occupancy","Achieved Occupancy","%","24.9"
"1","12","python3","a-host","sum_parts","1","7","(256, 1, 1)","(8, 1, 1)","0","9.0","Launch Statistics","Registers Per Thread","register/thread","32"
"""  # noqa: E501


def test_counters_are_read_without_the_hosts_name() -> None:
    metrics = counters.parse_csv(NCU)
    assert [(m["launch"], m["kernel"], m["metric"], m["value"]) for m in metrics] == [
        ("0", "down_half", "Duration", "131.07"),
        ("0", "down_half", "Achieved Occupancy", "24.9"),
        ("1", "sum_parts", "Registers Per Thread", "32"),
    ]
    assert "a-host" not in json.dumps(metrics)
    assert counters.parse_csv("==WARNING== No kernels were profiled.\n") == []


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 0, "no permission"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", 0, "does not load"),
        ("Traceback (most recent call last):\nValueError", 1, "ended with code 3"),
    ],
)
def test_a_refusal_is_a_result_and_a_crash_is_not(
    said: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit 3\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(counters, "find_ncu", lambda: str(ncu))
    args = argparse.Namespace(device="cpu", shape="tiny", tokens=8, kernels=["down"])
    found, metrics, exit_code = counters.collect(args)
    assert words in found and metrics == [] and exit_code == code


def test_without_ncu_the_result_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    place = str(tmp_path / "nsight-compute" / "*")
    assert counters.find_ncu([place]) is None
    newest = tmp_path / "nsight-compute" / "2025.3.1" / "ncu"
    for file in (newest, newest.parents[1] / "2024.1" / "ncu"):
        file.parent.mkdir(parents=True)
        file.touch()
    assert counters.find_ncu([place]) == str(newest)
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    assert counters.collect(argparse.Namespace())[::2] == ("ncu not found: no hardware counters on this machine", 0)


def test_ncu_leaves_the_clocks_alone_and_sees_one_run() -> None:
    words = counters.command("/x/ncu", ["--once", "down"])
    assert words[0] == "/x/ncu" and words[words.index("--clock-control") + 1] == "none"
    assert words[words.index("--profile-from-start") + 1] == "off" and words[-2:] == ["--once", "down"]


# --- training steps


def test_flops_of_a_step_are_those_that_peft_executes(tmp_path: Path) -> None:
    """The FLOPs in MFU against torch's own counter on transformers and PEFT; attention is compared separately."""
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=96, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"))
    ids = torch.arange(40).view(2, 20)
    with FlopCounterMode(display=False) as counter:
        peft(input_ids=ids, use_cache=False).logits.sum().backward()
    modules = counter.get_flop_counts()
    executed = {str(name): count for name, count in modules["Global"].items()}
    # In some versions of transformers RoPE's angles are computed by a matrix product.
    angles = [count for name, counts in modules.items() if name.endswith("rotary_emb") for count in counts.values()]
    job = job_of(read_request(str(tmp_path), ["lora.rank=4"]), target_share=1.0)
    count = {"tokens": 40, "target_tokens": 40, "recompute": False}
    whole, linear = (
        step_flops(job.architecture, job.footprint, square_lengths={None: squares}, **count).model
        for squares in (800, 0)
    )
    assert linear == executed["aten.mm"] + executed.get("aten.addmm", 0)
    assert 2 * (whole - linear) == executed["aten.bmm"] - sum(angles), "transformers computes both triangles"


def test_published_tokens_per_second_by_our_count() -> None:
    row = {"model_flops_per_token": 32.5e9}
    assert training.our_mfu({"gpu": "h100", "tokens_per_second": 12473}, row) == pytest.approx(40.99, abs=0.01)


def test_the_published_figure_stands_beside_ours() -> None:
    trace = {"seconds": 0.5, "busy_share": 0.75, "host_seconds": 0.3, "kernels": 9, "groups": {"GEMM": {"us": 1500}}}
    row = {"shape": "llama-3-8b", "method": "lora", "tokens_per_second": 9000.0, "tflops": 300.0, "mfu_percent": 30.3}
    row |= {"step_seconds": 1.8, "busy_share": 0.21, "peak_gib": 55.0, "planned_gib": 53.4, "traced_step": trace}
    theirs = {**training.PUBLISHED["llama-3-8b", "lora"], "mfu_percent_by_our_count": 41.0}
    console = Console(width=190, record=True, file=io.StringIO())
    training.show([row | {"published": theirs}], console)
    said = console.export_text()
    lines = said.splitlines()
    ours, published = (next(line for line in lines if words in line) for words in ("| llama", "| published"))
    assert all(word in ours for word in ("9,000", "30.3", "1.800", " 21 ", " 75 ", "0.300"))
    assert "12,473" in published and "41 (41.0 by our count)" in published and "memory bandwidth" in said
    training.show([row], console)
    assert "published" not in console.export_text()


@pytest.mark.parametrize("name", training.RECIPES)
def test_the_base_is_a_complete_folder_that_takes_no_space(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PLACE", tmp_path)
    folder = training.make_base(name, training.RECIPES[name])
    with open_checkpoint(folder) as checkpoint:
        check_checkpoint(read_architecture(folder), checkpoint)
    weights = (folder / "model.safetensors").stat()
    assert weights.st_size > 2e9 and weights.st_blocks * 512 < 2**20


def test_weights_are_drawn_where_they_lie_and_are_not_zeros() -> None:
    parameters = {"matrix": torch.zeros(64, 64, dtype=torch.bfloat16), "norm": torch.zeros(64)}
    training_run.draw_weights(parameters, "architecture", "checkpoint", tp_rank=0, tp_size=1)
    assert parameters["matrix"].float().std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(parameters["norm"], torch.ones(64))


def test_every_step_runs_once_and_the_one_that_was_asked_for_is_traced() -> None:
    done: list[int] = []
    kept: list[timeline.Trace] = []
    stepping = training_run.traced(lambda trainer, step: done.append(step), 4, kept.append)
    trainer = SimpleNamespace(run=SimpleNamespace(backend=SimpleNamespace(device=CPU)))
    for step in range(6):
        stepping(trainer, step)
        assert len(kept) == (step >= 3)
    assert done == list(range(6))


def test_a_rehearsal_cuts_the_recipe() -> None:
    args = argparse.Namespace(layers=2, hidden=256, length=64)
    for name, recipe in training.RECIPES.items():
        small = training.cut(recipe, args)
        assert (small.length, small.prompt) == (64, {"tinyllama": 32, "llama-3-8b": 1}[name])
        assert small.config["num_hidden_layers"] == 2 and small.micro_batch == recipe.micro_batch
        assert training.cut(recipe, argparse.Namespace(layers=None, hidden=None, length=None)).config == recipe.config


def test_the_bench_fits_its_time_and_every_stage_has_a_script(tmp_path: Path) -> None:
    found = list(bench_stages(SimpleNamespace(out=tmp_path)))
    assert sum(stage.seconds for stage in found) <= 330 - 40  # leaves the time that the build was measured to take
    assert all((Path(__file__).parents[2] / stage.command[1]).is_file() for stage in found)
