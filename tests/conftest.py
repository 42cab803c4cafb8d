"""One thread, no network, no deadlines: a test gives the same result on a quiet machine and on a busy one."""

import gc
import os
import sys

# Set before torch and transformers are imported, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as in every rank that launch/train.py starts

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("lowrank_dist", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("lowrank_dist")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the fork server, where ranks will be needed, before a test can change the state that it inherits.

    The half a million objects imported so far are left out of every later garbage collection.
    """
    forked = sys.modules.get("tests.forked")
    ranks = any(not item.nodeid.startswith("tests/unit/") for item in session.items)
    if forked is not None and ranks and not session.config.option.collectonly:
        forked.start_server()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the random numbers of a test, which must not depend on the tests before it: those vary with the workers."""
    torch.manual_seed(0)
