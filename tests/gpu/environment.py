"""The machine of the GPU check, and the missing packages by name. Needs no torch.

    python -m tests.gpu.environment [--missing]

Exit code 1 where something is missing. --missing: no report, only the code.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys

from lowrank_dist.backend.limits import cpu_bound

# Distribution → module, for everything that the check imports, declared in a package's metadata or not.
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "deepspeed": "deepspeed",
    "hjson": "hjson",
    "einops": "einops",
    "msgpack": "msgpack",
    "psutil": "psutil",
    "py-cpuinfo": "cpuinfo",
    "tqdm": "tqdm",
    "packaging": "packaging",
    "megatron-core": "megatron.core",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection",
    "pyyaml": "yaml",
    "typer": "typer",
    "rich": "rich",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "sacrebleu": "sacrebleu",
    "peft": "peft",
    "setuptools": "setuptools",
    "ninja": "ninja",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}


def absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # the parent package is missing
        return True


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "there, without metadata"


def first_line(*command: str) -> str:
    """Return the last line of a program's description of itself, or that the program is missing."""
    if shutil.which(command[0]) is None:
        return "not found"
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return said.splitlines()[-1] if said else "says nothing"


def describe() -> None:
    print(f"{platform.platform()}, {cpu_bound().count} CPUs, Python {platform.python_version()} ({sys.executable})")
    print(f"nvcc: {first_line('nvcc', '--version')}")
    print(f"compiler: {first_line('c++', '-dumpfullversion')}")
    print(", ".join(f"{name} {version(name)}" for name, module in NEEDED.items() if not absent(module)))
    if absent("torch"):
        return
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not asked"
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}, {torch.cuda.device_count()} GPUs")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        print(f"GPU {index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    missing = [name for name, module in NEEDED.items() if absent(module)]
    if options.missing:
        return int(bool(missing))
    describe()
    if missing:
        print(f"MISSING: {' '.join(missing)}\ncarry their wheels in .whl/ (tests/gpu/README.md says how)")
        return 1
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("MISSING: a GPU that torch can use; GPU_CHECK_DEVICE=cpu rehearses the check without one")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
