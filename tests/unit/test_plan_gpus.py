"""The GPUs that a plan knows: their names, their memory and their links."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowrank_dist.engine.planning import job_of, read_request
from lowrank_dist.errors import UserError
from lowrank_dist.planner.choice import Choice, choose
from lowrank_dist.planner.describe import describe
from lowrank_dist.planner.hardware import GPUS, Gpu, gpu_called, gpu_of, other_forms, peak_flops
from lowrank_dist.planner.job import Layout
from lowrank_dist.planner.layouts import Candidate, Cluster, Fixed
from lowrank_dist.planner.report import memory_size, size
from lowrank_dist.planner.step_time import DATA, TENSOR
from tests.unit.test_plan_layouts import drawn

GIB = 2**30
# As torch reports them.
TORCH = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100 80GB PCIe": "a100-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-pcie-40gb",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H800": "h800",
    "NVIDIA H20": "h20",
    "NVIDIA H20-3e": "h20-141gb",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA L40S": "l40s",
    "NVIDIA L40": "l40",
    "NVIDIA L4": "l4",
    "NVIDIA A40": "a40",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
}
# As people and Slurm's gres write them.
WRITTEN = {
    "H100": "h100",
    "h100-80gb": "h100",
    "H100_SXM": "h100",
    "h100-sxm5-80gb": "h100",
    "h100pcie": "h100-pcie",
    "a100_80g": "a100",
    "a100-80gb": "a100",
    "NVIDIA-A100-40GB": "a100-40gb",
    "dgx-a100": "a100",
    "gpu:a100:8": "a100",
    "a100:4": "a100",
    "gpu:h100:8(S:0-1)": "h100",
    "gres/gpu:h200=8": "h200",
    "gpu:nvidia_a100_80gb_pcie:2": "a100-pcie",
    "nvidia_h100_80gb_hbm3": "h100",
    "rtx_4090": "rtx4090",
    "4090": "rtx4090",
    "A100 80 GB": "a100",
    "NVIDIA A100 40 GB PCIe": "a100-pcie-40gb",
    "H100 80 GB HBM3": "h100",
    "h200 141 GB": "h200",
    "gh200-96gb": "gh200",
}
UNKNOWN = {
    "h1000": "h100",
    "h2000": "h200",
    "a100-64gb": "a100",
    "a100 64 GB": "a100",
    "a100 gb": "a100",
    "NVIDIA GH200 144G HBM3e": "gh200",
    "gh200-144gb": "gh200",
    "l40s-sxm": "l40s",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "rtx4090",
    "h100-nlv": "h100",
}


@pytest.mark.parametrize(("name", "meant"), [*TORCH.items(), *WRITTEN.items(), *((name, name) for name in GPUS)])
def test_a_name_in_every_way_it_is_written(name: str, meant: str) -> None:
    assert gpu_of(name) is gpu_of(name.upper()) is gpu_of(f" {name} ") is GPUS[meant]
    assert gpu_called(name) is GPUS[meant] and peak_flops(name) == GPUS[meant].flops


@pytest.mark.parametrize(("name", "meant"), UNKNOWN.items())
def test_an_unknown_name_is_refused_with_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean {meant}\? There are a100, .*rtx5090; .*--gpu-memory"):
        gpu_of(name)


def test_names_of_no_known_gpu() -> None:
    for name in ("AMD EPYC", "x86_64 CPU", "", "gpu:8", "Quadro RTX 6000", "NVIDIA RTX A1000", "Tesla V100-SXM2-32GB"):
        assert gpu_called(name) is None and peak_flops(name) is None, name
        with pytest.raises(UserError, match="is not known"):
            gpu_of(name)
    # Another size of a known model: its rates are known, its memory is not.
    assert gpu_called("NVIDIA A100-SXM-64GB") is GPUS["a100"]


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        *(("a100", (79.1, 79.6)), ("h100", (79.1, 79.6)), ("h100-pcie", (79.1, 79.6)), ("a100-40gb", (39.3, 39.6))),
        *(("h200", (139.7, 139.9)), ("b200", (178, 180)), ("l40s", (44.3, 44.6)), ("h100-nvl", (93, 93.7))),
        *(("rtx4090", (23.5, 23.7)), ("rtx5090", (31.3, 31.5)), ("a10g", (22, 22.3)), ("gh200", (94.5, 95.6))),
    ],
)
def test_memory_is_what_torch_reports(name: str, gib: tuple[float, float]) -> None:
    low, high = gib
    assert low - 0.01 <= GPUS[name].memory / GIB <= high
    assert all(gpu.memory < 1.08 * 10**9 * gpu.sold_as for gpu in GPUS.values())


def test_a_mig_device_is_a_part_of_its_gpu() -> None:
    part, whole = gpu_of("NVIDIA A100-SXM4-80GB MIG 1g.10gb"), GPUS["a100"]
    assert part == gpu_of("gpu:a100_1g.10gb:2") and part.name == "a100 MIG 1g.10gb"
    assert part.memory == int(9.5 * GIB) and part.flops == whole.flops / 8 and part.bandwidth == whole.bandwidth / 8
    assert part.node == 32e9 < whole.node and other_forms(part) == other_forms(whole)
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 3g.40gb") == 989e12 * 3 / 8
    for wrong in ("a100 8g.80gb", "a100 1g.0gb", "a100 1g.160gb", f"a100 1g.{'1' * 5000}gb", "1g.10gb"):
        with pytest.raises(UserError, match="is not known"):
            gpu_of(wrong)


def candidate(gpu: Gpu, tensor: int, data: int) -> Candidate:
    layout = Layout(tensor, data, tensor > 1, 1, False)
    job = replace(job_of(read_request("llama-3-8b", ["train.global_batch=8"]), 1.0), layout=layout)
    return Candidate(job, Cluster(1, tensor * data, gpu, gpu.memory))


def test_the_link_of_a_group_is_that_of_the_form() -> None:
    """PCIe is slower than NVLink, and a bridge joins few GPUs."""

    def seconds(name: str, tensor: int, data: int, term: str) -> float:
        return candidate(GPUS[name], tensor, data).time.terms[term]

    assert seconds("h100-pcie", 4, 1, TENSOR) > 3 * seconds("h100", 4, 1, TENSOR)
    # Two H100 NVL share a bridge; four do not, and of two pairs only the tensor-parallel groups do.
    assert seconds("h100-nvl", 2, 1, TENSOR) < seconds("h100-pcie", 2, 1, TENSOR) / 2
    assert seconds("h100-nvl", 4, 1, TENSOR) == seconds("h100-pcie", 4, 1, TENSOR)
    assert seconds("h100-nvl", 2, 2, DATA) == seconds("h100-pcie", 2, 2, DATA)
    assert seconds("h100-nvl", 1, 2, DATA) < seconds("h100-pcie", 1, 2, DATA)
    assert seconds("h200-nvl", 4, 1, TENSOR) == seconds("h200", 4, 1, TENSOR)


def test_the_plan_says_which_form_is_planned() -> None:
    def said(name: str) -> str:
        planned: Choice = choose(job_of(read_request("llama-3-8b", []), 1.0), Fixed(), cluster := Cluster.of(gpu=name))
        return " ".join(drawn(describe(planned, None, cluster, [], None, 1)).split())

    usual = said("gpu:h100:8")
    assert "h100 is the SXM form that is sold as 80 GB. Other forms and sizes: --gpu h100-pcie, h100-nvl." in usual
    assert "8 h100 of 79.1 GiB" in usual and "usable" not in usual
    assert "h100-pcie is the PCIe form that is sold as 80 GB. Other forms and sizes: --gpu h100, h1" in said(
        "H100 PCIe"
    )
    assert "is the" not in said("l40s").partition("TP: tensor-parallel size")[0]


def test_memory_is_in_powers_of_two_and_files_are_in_powers_of_ten() -> None:
    assert [memory_size(n) for n in (85 * 10**9, GIB, 150 * GIB, 3 * 2**19, 2000, 12)] == [
        *("79.2 GiB", "1 GiB", "150 GiB", "1.5 MiB", "1.95 KiB", "12 B")
    ]
    assert [size(n) for n in (85 * 10**9, 1500, 12)] == ["85 GB", "1.5 kB", "12 B"]
