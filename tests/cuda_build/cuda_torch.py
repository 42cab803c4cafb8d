"""A CUDA build of torch to compile against, without installing it and without CUDA's libraries.

    python -m tests.cuda_build.cuda_torch        prints the folder to put on PYTHONPATH

The wheel (530 MB) is unpacked into build/cuda-torch once. It is linked to libraries that are not here (cuBLAS, cuDNN,
NCCL and others, 2 GB); stubs with the same symbols replace them and trap when called. Then torch can be imported, and
setup.py runs with it as on a machine with a GPU. Nothing can be computed on a GPU with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION, CUDA = "2.11.0", "13.0"
FOLDER = ROOT / "build/cuda-torch" / f"{VERSION}-{sys.implementation.cache_tag}"
LEFT_OUT = ("torch/bin/p", "torch/test/", "torch/lib/libtorch_cuda_linalg.so")
LINKED = ("libtorch_cuda.so", "libtorch_nvshmem.so", "libtorch_python.so")
REPLACED = re.compile(r"(cublas|cudnn|cufft|cufile|curand|cusparse|nccl|nvshmem)", re.IGNORECASE)


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout


def unpack(folder: Path) -> None:
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    output(*download, "--dest", folder, f"torch=={VERSION}")
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("torch/") and not name.startswith(LEFT_OUT)]
        archive.extractall(folder, names)
    wheel.unlink()
    if f"cuda: Optional[str] = '{CUDA}'" not in (folder / "torch/version.py").read_text():
        sys.exit(f"the torch {VERSION} that pip finds for this machine is not built for CUDA {CUDA}")


def replace_libraries(folder: Path) -> None:
    """Write stubs of the missing libraries, with the symbols that the libraries of `torch/lib` need from them."""
    wanted: dict[str, set[str]] = defaultdict(set)  # version of the symbol → names
    needed: set[str] = set()
    for library in (folder / "torch/lib" / name for name in LINKED):
        needed |= {
            x for x in re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-dW", library)) if REPLACED.search(x)
        }
        for line in output("nm", "-D", "--undefined-only", library).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if REPLACED.match(name):
                wanted[version].add(name)
    needed = {name for name in needed if REPLACED.search(name) and not name.startswith("libtorch")}
    # torch looks here first, whatever LD_LIBRARY_PATH says ($ORIGIN/../../nvidia/cu13/lib is in its RPATH).
    target = folder / "nvidia/cu13/lib"
    target.mkdir(parents=True)
    # Symbol versions are named after their libraries, except NVSHMEM's. One without a version may be in any library.
    nodes = {name: "NVSHMEM" if "nvshmem" in name else name for name in needed}
    first = min(needed)
    for library, node in nodes.items():
        functions = wanted.pop(node, set())
        script = target / "versions"
        script.write_text(f"{node} {{ global: {'; '.join(sorted(functions)) or '*'}; }};\n")
        if library == first:
            functions = functions | wanted.pop("", set())
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", f"-Wl,--version-script,{script}"]
            + ["-x", "c", "-", "-o", str(target / library)],
            input="".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in sorted(functions)),
            text=True,
            check=True,
        )


def obtain() -> Path:
    """Return the folder, made where it is missing.

    An interrupted download leaves nothing that passes for the folder.
    """
    if not FOLDER.is_dir():
        partial = FOLDER.with_name(f"{FOLDER.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        unpack(partial)
        replace_libraries(partial)
        environment = {**os.environ, "PYTHONPATH": str(partial)}
        subprocess.run([sys.executable, "-c", "import torch; torch.ones(1) + 1"], env=environment, check=True)
        partial.rename(FOLDER)
    return FOLDER


if __name__ == "__main__":
    print(obtain())
