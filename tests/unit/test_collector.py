"""What is made under `exempt_from_gc` is out of the collector's sight, and the collector is as it was before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from lowrank_dist.backend.libraries import exempt_from_gc


class Loop:
    """Garbage that only the collector can find."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def enabled_again() -> Iterator[None]:
    """What is frozen stays so: tests/conftest.py counts on it."""
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
