"""Builds csrc/ into lowrank_dist/ops/_C.abi3.so and _C_cuda.abi3.so; all else about the package is in pyproject.toml.

The libraries register operators with TORCH_LIBRARY and know no Python, so one file serves every Python version. Without
torch or a C++ compiler the package installs without either, without nvcc or a CUDA build of torch it installs without
the second, and plain PyTorch runs instead. Nothing is downloaded. CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are
followed.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
LINUX = platform.system() == "Linux"
HOST_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# A100 and H100; what comes after them compiles the last line's PTX when it first loads a kernel.
GENCODE = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
]


def say(missing: str, reason: str) -> None:
    print(f"lowrank_dist: {missing} not built ({reason}); plain PyTorch runs instead", file=sys.stderr)


def paths(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def library(name: str, sources: list[str], **options) -> Extension:
    from torch.utils.cpp_extension import CppExtension

    options["include_dirs"] = [str(ROOT / "csrc/include"), *options.get("include_dirs", [])]
    options["extra_link_args"] = [*options.get("extra_link_args", []), *torch_cxx_library()]
    module = CppExtension(f"lowrank_dist.ops.{name}", sources, py_limited_api=True, **options)
    module.depends = paths("*/*.h", "*/*.cuh")
    return module


def torch_cxx_library() -> list[str]:
    """For the linker: the libstdc++ that torch has loaded here.

    Some compilers put a copy of their own into a library. Two in one process do not know each other's locales: torch
    writing to a stream of ours, as it does where an operator refuses an argument, is then a segmentation fault.
    """
    import torch  # noqa: F401

    loaded = re.search(r"/.*/libstdc\+\+\.so\S*", Path("/proc/self/maps").read_text()) if LINUX else None
    return [loaded[0]] if loaded else []


def cpu_library() -> Extension:
    """All schemas and the CPU operators."""
    # Compiled with OpenMP but not linked to it: at::parallel_for must run in the OpenMP that torch has loaded, and
    # naming a library here could load a second one, which torch.set_num_threads does not reach.
    flags = [*HOST_FLAGS, "-fopenmp"] if LINUX else HOST_FLAGS
    return library("_C", paths("ops.cpp", "cpu/*.cpp"), extra_compile_args=flags)


def cuda_compiler() -> str | None:
    """The nvcc to build with, or None; says why where only one of nvcc and a CUDA build of torch is there."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = torch.version.cuda
    # torch looks for CUDA_HOME only if it is a CUDA build.
    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None)
    if wanted is None:
        reason = f"nvcc is there, but torch {torch.__version__} is not a CUDA build" if nvcc else None
    elif nvcc is None:
        reason = f"no nvcc for torch {torch.__version__}: put that of CUDA {wanted} on PATH or set CUDA_HOME"
    else:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", said)[1]
        same = release.split(".")[0] == wanted.split(".")[0]
        reason = None if same else f"nvcc is of CUDA {release}, torch {torch.__version__} of CUDA {wanted}"
    if reason:
        say("CUDA operators", reason)
    return None if reason else nvcc


def cuda_library(nvcc: str) -> Extension:
    """The CUDA operators. The schemas are the other library's, which is loaded first."""
    # nvcc may be a script or a link far from its toolkit; where that lies only nvcc itself knows.
    plan = subprocess.run([nvcc, "--dryrun", "-c", "nothing.cu"], capture_output=True, text=True, check=True).stderr
    # BuildExtension reads TORCH_CUDA_ARCH_LIST where it is given no architecture.
    architectures = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else GENCODE
    return library(
        "_C_cuda",
        paths("cuda/*.cpp", "cuda/*.cu"),
        include_dirs=sorted(set(re.findall(r'"-I([^"]+)"', plan))),
        library_dirs=sorted(set(re.findall(r'"-L([^"]+)"', plan))),
        libraries=["c10_cuda", "cudart"],
        extra_compile_args={"cxx": HOST_FLAGS, "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden", *architectures]},
        # A symbol that none of the libraries has fails here and not on the machine with the GPU.
        extra_link_args=["-Wl,-z,defs"],
    )


def extensions() -> dict:
    """What setup() needs to build the operators, or nothing where they cannot be built."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        say("compiled operators", "torch is not importable: install it first, then use pip --no-build-isolation")
        return {}
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        say("compiled operators", f"no C++ compiler: {compiler} not found")
        return {}
    nvcc = cuda_compiler()
    return {
        "ext_modules": [cpu_library(), *([cuda_library(nvcc)] if nvcc else [])],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extensions())
