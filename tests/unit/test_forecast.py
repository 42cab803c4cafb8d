"""A run's forecast of its memory before it starts, on a device whose memory the test chooses."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lowrank_dist.arch.config_json import read_architecture
from lowrank_dist.arch.placement import LoraRules
from lowrank_dist.backend.limits import MemoryBound
from lowrank_dist.config import Config, load_config
from lowrank_dist.engine.forecast import Forecast, cluster_of_ranks
from lowrank_dist.errors import UserError
from lowrank_dist.methods.lora.footprint import LowRank
from lowrank_dist.planner.factors import low_rank
from lowrank_dist.planner.flops import step_flops
from lowrank_dist.planner.hardware import GPUS, peak_flops
from lowrank_dist.planner.layouts import Cluster
from tests.tiny_models import make_tiny

TOPOLOGY: Any = SimpleNamespace(tp_size=2, dp_size=1, sequence_parallel=True, hosts=("here", "here"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("forecast")
    sections = {
        "model": {"path": str(make_tiny("llama", place / "base"))},
        "data": {"train": "train.jsonl", "max_length": 48},
        "output": {"dir": "run"},
    }
    path = place / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def backend(memory: int, limit: MemoryBound | None = None) -> Any:
    return SimpleNamespace(
        device=torch.device("cpu"),
        memory_for_a_rank=lambda: memory,
        memory_limit=lambda: limit,
        peak_memory_gib=lambda: 0.5,
        name=lambda: "NVIDIA H100 80GB HBM3",
    )


def forecast(path: Path, memory: int, *overrides: str) -> Forecast:
    return Forecast(config(path, *overrides), read_architecture(path.parent / "base"), TOPOLOGY, backend(memory))


def config(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides)


def planned(path: Path) -> int:
    """Return the planned bytes: bisect the device memory at which the warning ends."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if "IT MAY" not in memory_line(path, middle) else (middle, high)
    return high


def memory_line(path: Path, memory: int) -> str:
    return forecast(path, memory, "train.ignore_plan=true").memory_line


def test_a_run_that_fits_too_barely_and_not_at_all(path: Path) -> None:
    enough = planned(path)
    assert re.match(r"planned memory \d+\.\d\d GiB a rank \(.+\) of ", forecast(path, enough).memory_line)
    assert "IT MAY NOT FIT" not in forecast(path, enough).memory_line
    assert forecast(path, enough - 1).memory_line.endswith("IT MAY NOT FIT")
    assert forecast(path, int(enough / 1.09)).memory_line.endswith("IT MAY NOT FIT")
    with pytest.raises(UserError, match=r"it does not fit\. .*train\.ignore_plan=true starts it anyway"):
        forecast(path, int(enough / 1.11))
    assert forecast(path, 1, "train.ignore_plan=true").memory_line.endswith("IT MAY NOT FIT")


def test_a_run_that_does_not_fit_names_the_layout_that_does(path: Path) -> None:
    """TP is 1 in the config, and each rank has room for half the model only."""
    large = ("data.max_length=64", "train.global_batch=16", "train.micro_batch=8")
    whole: Any = SimpleNamespace(tp_size=1, dp_size=2, sequence_parallel=False, hosts=("here", "here"))
    half = Forecast(
        config(path, *large, "parallel.tensor=2"), read_architecture(path.parent / "base"), TOPOLOGY, backend(2**40)
    )
    enough = int(1.06 * half._planned.total)
    said = r"On these 2 ranks it fits with parallel\.tensor=2 \(TP 2, DP 1, microbatch 8, sequence parallel\)"
    with pytest.raises(UserError, match=said):
        Forecast(config(path, *large), read_architecture(path.parent / "base"), whole, backend(enough))
    with pytest.raises(UserError, match="No layout of these 2 ranks fits; use more ranks"):
        Forecast(config(path, *large), read_architecture(path.parent / "base"), whole, backend(1000))


def test_a_limit_is_named_with_its_place(path: Path) -> None:
    limit = MemoryBound(2**30, 1000, "memory.max of /sys/fs/cgroup/job", "Slurm's --mem")
    shape = read_architecture(path.parent / "base")
    fits = Forecast(config(path, "train.ignore_plan=true"), shape, TOPOLOGY, backend(2**30, limit))
    assert fits.memory_line.endswith("of 1.00 GiB (limit of 1.00 GiB: memory.max of /sys/fs/cgroup/job)")
    with pytest.raises(UserError, match=r"\(limit of .*job\): it does not fit.*or raise the limit \(Slurm's --mem\)"):
        Forecast(config(path), shape, TOPOLOGY, backend(1000, limit))


def test_host_memory_of_a_run_on_gpus(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm gives a job of GPUs little host memory unless it asks for it; the ranks would be killed as they load."""

    def line(limit: MemoryBound, kind: str = "cuda") -> str:
        monkeypatch.setattr("lowrank_dist.engine.forecast.memory_bound", lambda: limit)
        device: Any = SimpleNamespace(**{**vars(backend(2**40)), "device": torch.device(kind)})
        shape = read_architecture(path.parent / "base")
        made = Forecast(config(path, "model.device=auto"), shape, TOPOLOGY, device)
        assert made.lacks_host_memory == ("host memory" in made.memory_line)
        return made.memory_line

    small = MemoryBound(2**30, 2**29, "memory.max of /sys/fs/cgroup/job", "Slurm's --mem")
    said = r"; host memory: 2 ranks of a node need 3\.\d\d GiB while they load, and this node has 1\.00 GiB "
    assert re.search(
        said + r"for them \(memory\.max of /sys/fs/cgroup/job\): .*; more is given by Slurm's --mem$", line(small)
    )
    assert "host memory" not in line(MemoryBound(2**36, 2**29, "MemAvailable of /proc/meminfo"))
    assert "host memory" not in line(small, "cpu")


def test_the_cluster_of_a_run(path: Path) -> None:
    """Groups that the plan keeps inside a node lie on one host, however many ranks each host has."""
    for hosts, nodes in ((["a"] * 8, (1, 8)), (["a"] * 4 + ["b"] * 4, (2, 4)), (["a"] * 4 + ["b"] * 2, (3, 2))):
        cluster = cluster_of_ranks(hosts, 10**9, backend(10**9))
        assert (cluster.nodes, cluster.gpus_per_node) == nodes and cluster.usable == 10**9
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), name=lambda: "NVIDIA H200")
    assert cluster_of_ranks(["a"], GPUS["h200"].memory, on_gpu) == Cluster(1, 1, GPUS["h200"], GPUS["h200"].memory)


def test_flops_are_the_plans(path: Path) -> None:
    ahead = forecast(path, 2**40)
    shape = read_architecture(path.parent / "base")
    lora = config(path).lora
    count = step_flops(
        shape,
        LowRank("lora", low_rank(shape, LoraRules(lora.rank, lora.alpha, lora.targets))),
        tokens=100,
        target_tokens=30,
        square_lengths={None: 2000},
        recompute=False,
    )
    assert ahead.flops(100, 30, {20: 5}) == count.model > 0
    assert ahead.peak() == 989e12


def test_flops_of_every_method(path: Path) -> None:
    """By hand, at 100 tokens of which none is trained on: two FLOPs per weight forward, two more where a gradient
    passes through it, and two more where the weight is trained.
    """
    shape, counted = read_architecture(path.parent / "base"), {}
    for method, *sizes in (
        ("full",),
        ("adapter_h", "adapter.bottleneck=8"),
        ("adapter_l", "adapter.bottleneck=8"),
        ("prefix", "prefix.length=8", "prefix.width=null"),
        ("prompt", "prompt.length=8"),
    ):
        ahead = forecast(path, 2**40, f"method={method}", *sizes)
        counted[method] = ahead.flops(100, 0, {})
    once, weights, layers = 2 * 100, shape.layers[0].weights, len(shape.layers)
    assert counted["full"] == once * 3 * weights * layers
    assert counted["prompt"] == once * 2 * weights * layers
    # The lowest layer has a backward only above the trained modules; the lowest bottleneck needs no input gradient.
    qkv, proj, fc1, fc2 = (linear.weights for linear in shape.layers[0].linears.values())
    bottleneck = 2 * shape.hidden * 8
    assert counted["adapter_h"] == once * (
        2 * weights * layers - qkv - proj + 3 * 2 * layers * bottleneck - bottleneck // 2
    )
    assert counted["adapter_l"] == once * (2 * weights * layers - weights + 3 * layers * bottleneck)
    pairs = 100 * 8 * shape.heads * shape.head_dim
    assert counted["prefix"] == once * (2 * weights * layers - qkv) + 3 * layers * 4 * pairs


def test_memory_is_that_of_the_method(path: Path) -> None:
    """With memory for low-rank updates, full fine-tuning does not fit and is refused."""
    enough = planned(path)
    assert "(masters and moments" in forecast(path, 2**40, "method=full").memory_line
    with pytest.raises(UserError, match="it does not fit"):
        forecast(path, enough, "method=full")


@pytest.mark.parametrize(
    ("name", "flops"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200", 989e12), ("NVIDIA V100-SXM2-32GB", None), ("x86_64 CPU", None)],
)
def test_peak_by_name(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_the_measured_peak_says_what_it_counts(path: Path) -> None:
    """On a CPU it is the process's, so the part from before the model stands beside it; on a GPU it is the tensors'."""
    made = forecast(path, 2**40)
    assert re.fullmatch(
        r"peak memory of a rank 1\.37 GiB, the whole process with Python and its libraries \(0\.50 GiB before the "
        r"model was loaded\); planned 0\.\d\d GiB for tensors alone",
        made.compare(1.37),
    )
    vars(made._backend)["device"] = torch.device("cuda")
    assert re.fullmatch(r"peak memory of a rank 1\.37 GiB; planned 0\.\d\d GiB", made.compare(1.37))
