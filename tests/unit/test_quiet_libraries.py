"""What libraries load without being asked stays out of a rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LOADS = """
import sys
from lowrank_dist.backend.libraries import quiet_libraries
if sys.argv[1] == "True":
    quiet_libraries()
import megatron.core.transformer
print("torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.parametrize("quieted", [True, False])
def test_megatron_loads_no_compiler(quieted: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", LOADS, str(quieted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == [str(not quieted)]
