"""Objects made under `exempt_from_gc` are invisible to the garbage collector, whose state is then restored."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from lowrank_dist.backend.libraries import exempt_from_gc


class Loop:
    """Garbage that only the cycle collector can find."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def enabled_again() -> Iterator[None]:
    """Enable the collector again. Frozen objects stay frozen: tests/conftest.py relies on it."""
    yield
    gc.enable()


def test_what_is_made_in_it_is_not_looked_at_again() -> None:
    with exempt_from_gc():
        assert not gc.isenabled()
        inside = weakref.ref(Loop())
    outside = weakref.ref(Loop())
    assert gc.isenabled()
    gc.collect()
    assert inside() is not None and outside() is None


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was_found(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    with pytest.raises(ImportError), exempt_from_gc():
        raise ImportError
    assert gc.isenabled() is enabled
