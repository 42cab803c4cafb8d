"""What a benchmark leaves behind: its figures and the machine they were measured on, as JSON in results/."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """Processor, cores, memory, load and library versions; nothing that names the host."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    return {
        "processor": f"{model or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_result(name: str, started_on: dict[str, object], figures: dict[str, object]) -> Path:
    """Write results/NAME.json. `started_on`: `machine()` from before the measurement, so that its load is others'."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    result = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": started_on, **figures}
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return target
