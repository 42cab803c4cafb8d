"""Libraries do not load unneeded packages into a rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lowrank_dist.backend.libraries import CACHES, NOISE

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

# The order of launch/train.py, where torch is loaded first.
COMPUTES = """
import torch
from lowrank_dist.backend.libraries import quiet_libraries
from tests.dist.test_plan_memory import resident
quiet_libraries()
torch.set_num_threads(1)
linear = torch.nn.Linear(512, 512, bias=False).bfloat16()
for rows in range(100, 260):
    linear(torch.ones(rows, 512, dtype=torch.bfloat16)).sum().backward()
    if rows == 120:
        before = resident()
print(resident() - before)
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
    """Also with a CUDA build of torch and the newest Megatron (`make test-next`)."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == ""


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU")
def test_shapes_that_vary_fill_no_cache_unless_the_user_wants_them() -> None:
    grown = []
    for wanted in ({}, dict.fromkeys(CACHES, "1024")):
        environment = {name: value for name, value in os.environ.items() if name not in CACHES} | wanted
        command = [sys.executable, "-c", COMPUTES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        grown.append(int(done.stdout))
    assert grown[0] < 10e6 and grown[1] > 3 * max(grown[0], 10e6), grown
