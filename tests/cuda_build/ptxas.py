"""Registers, stack and spills of each kernel, from ptxas's report (-Xptxas -v).

python -m tests.cuda_build.ptxas BUILD_LOG FOLDER     writes FOLDER/ptxas-sm_80.txt and so on
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>sm_\w+)'\n"
    r"(?:ptxas info.*\n)*?"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"ptxas info\s+: Used (?P<registers>\d+) registers"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; sizes in bytes a thread."""

    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> bool:
        return self.stack + self.spill_stores + self.spill_loads > 0

    @property
    def main(self) -> bool:
        """Report half precision, which training runs in. Float and double are for tests and small parts."""
        return re.search(r"\b(BFloat16|Float16)\b", self.name) is not None


def parse(report: str) -> list[Kernel]:
    """Return all kernels in the output of a build, with readable names. Raises ValueError where one has no report."""
    found = list(_ENTRY.finditer(report))
    compiled = report.count("Compiling entry function")
    if len(found) != compiled:
        raise ValueError(f"{compiled} kernels were compiled, but {len(found)} have a report that is understood")
    symbols = "\n".join(match["symbol"] for match in found)
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        Kernel(name, m["arch"], int(m["registers"]), int(m["stack"]), int(m["stores"]), int(m["loads"]))
        for name, m in zip(names, found, strict=True)
    ]


def table(kernels: list[Kernel]) -> str:
    lines = ["registers  stack  spill stores  spill loads  kernel (* main configuration)"]
    for k in sorted(set(kernels), key=lambda kernel: kernel.name):
        star = "*" if k.main else " "
        lines.append(f"{k.registers:9d}  {k.stack:5d}  {k.spill_stores:12d}  {k.spill_loads:11d} {star}{k.name}")
    return "\n".join(lines) + "\n"


def main(log: str, folder: str) -> None:
    kernels = parse(Path(log).read_text())
    for arch in sorted({kernel.arch for kernel in kernels}):
        own = [kernel for kernel in kernels if kernel.arch == arch]
        (Path(folder) / f"ptxas-{arch}.txt").write_text(table(own))
        spilling = sum(kernel.spills for kernel in own)
        most = max(kernel.registers for kernel in own)
        print(f"{arch}: {len(set(own))} kernels, at most {most} registers a thread, {spilling} with spills")


if __name__ == "__main__":
    main(*sys.argv[1:])
