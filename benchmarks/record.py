"""Result files of benchmarks: the figures and the machine they were measured on, as JSON."""

import functools
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, object]:
    """Return processor, cores, memory, load, library versions, on "cuda" the GPU too; nothing that names the host."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    found: dict[str, object] = {
        "processor": f"{model or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


@functools.cache
def commit() -> str | None:
    """Return this tree's commit, with "+" where files differ from it; None where there is no repository."""
    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        said = subprocess.run(words, cwd=RESULTS.parent, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def write_result(
    name: str,
    started_on: dict[str, object],
    figures: dict[str, object],
    folder: Path = RESULTS,
    *,
    complete: bool = True,
) -> Path:
    """Write FOLDER/NAME.json, whole or not at all, and return its path.

    `started_on`: `machine()` from before the measurement, so that its load is that of other programs. complete: False
    where more figures will follow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.json"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    result = {"date": date, "commit": commit(), "complete": complete, "machine": started_on, **figures}
    # A time limit may stop a stage in the middle of a write; the earlier figures stay.
    unfinished = target.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(target)
    return target
