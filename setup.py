"""Builds csrc/ into lowrank_dist/ops/_C.abi3.so; everything else about the package is in pyproject.toml.

The library registers operators with TORCH_LIBRARY and knows no Python, so one file serves every Python version. Without
torch or a C++ compiler the package installs without it, and its operators run as plain PyTorch.
"""

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def without_extension(reason: str) -> dict:
    print(
        f"lowrank_dist: installing without the compiled operators ({reason}); plain PyTorch runs instead",
        file=sys.stderr,
    )
    return {}


def extension() -> dict:
    """What setup() needs to build the operators, or nothing where they cannot be built."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return without_extension("torch is not importable: install it first, then use pip --no-build-isolation")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return without_extension(f"no C++ compiler: {compiler} not found")
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if platform.system() == "Linux":
        # Compiled with OpenMP but not linked to it: at::parallel_for must run in the OpenMP that torch has loaded, and
        # naming a library here could load a second one, which torch.set_num_threads does not reach.
        flags.append("-fopenmp")
    sources = [
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp")))
    ]
    module = CppExtension(
        "lowrank_dist.ops._C",
        sources,
        include_dirs=[str(ROOT / "csrc/include")],
        extra_compile_args=flags,
        py_limited_api=True,
    )
    module.depends = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc/include").glob("*.h")]
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
