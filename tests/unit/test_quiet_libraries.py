"""What libraries load without being asked stays out of a rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowrank_dist.backend.libraries import NOISE

pytestmark = pytest.mark.slow

LOADS = """
import sys
from lowrank_dist.backend.libraries import quiet_libraries
if sys.argv[1] == "True":
    quiet_libraries()
import megatron.core.transformer
print("torch._inductor.compile_fx" in sys.modules)
"""

IMPORTS = """
from lowrank_dist.backend.libraries import quiet_libraries
quiet_libraries()
import lowrank_dist.engine.assemble, lowrank_dist.model.load
"""

SAYS = """
import logging
from lowrank_dist.backend.libraries import NOISE, quiet_libraries
quiet_libraries()
for name, start in NOISE.items():
    logging.getLogger(name).warning("%s, and more", start)
    logging.getLogger(name).warning("a real warning")
    logging.getLogger(f"{name}.below").warning("%s of another", start)
"""


@pytest.mark.parametrize("quieted", [True, False])
def test_megatron_loads_no_compiler(quieted: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", LOADS, str(quieted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == [str(not quieted)]


def test_noise_alone_is_quieted() -> None:
    done = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, timeout=300, check=True)
    expected = [line for start in NOISE.values() for line in ("a real warning", f"{start} of another")]
    assert done.stderr.splitlines() == expected


def test_a_rank_imports_in_silence() -> None:
    """What a CUDA build of torch and the newest Megatron say too (`make test-next`)."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""
