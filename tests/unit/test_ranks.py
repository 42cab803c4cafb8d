"""The straggler, the rank that all others wait for, and tensor-parallel groups inside nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.engine.meter import WINDOW, Stragglers
from lowrank_dist.errors import UserError
from lowrank_dist.parallel.topology import refuse_crossing, require_sizes

HOSTS = ("h1", "h1", "h2", "h2")


def test_named_once_slow_over_a_window_and_again_when_it_caught_up() -> None:
    stragglers = Stragglers(1.5, HOSTS)
    even, slow = [1.0, 1.1, 1.0, 0.9], [1.0, 1.1, 2.0, 0.9]
    said = [stragglers.observe(step, seconds) for step, seconds in enumerate([slow] * 5 + [even] * 5, start=1)]
    named = {step: lines for step, lines in enumerate(said, start=1) if lines}
    first, caught_up = WINDOW, 5 + WINDOW // 2 + 1
    assert list(named) == [first, caught_up]
    assert named[first] == [
        f"step {first}: rank 2 on h2 is a straggler: its own work takes 2.000 s a step and the median rank's "
        "1.050 s, so all others wait for it"
    ]
    assert named[caught_up] == [f"step {caught_up}: rank 2 on h2 has caught up"]


@pytest.mark.parametrize(
    "records",
    [
        [[1, 1, 1.49, 1]] * 6,
        # Single slow steps on different ranks are noise of the machine.
        [[1, 1, 9, 1], [1, 1, 1, 1], [1, 9, 1, 1], [1, 1, 1, 1], [9, 1, 1, 1]],
        # All ranks are slow at once: nobody waits.
        [[1, 1, 1, 1], [9, 9, 9, 9], [9, 9, 9, 9], [9, 9, 9, 9]],
    ],
    ids=["below the factor", "one step", "all"],
)
def test_not_named(records: list[list[float]]) -> None:
    stragglers = Stragglers(1.5, HOSTS)
    assert [stragglers.observe(step, seconds) for step, seconds in enumerate(records)] == [[]] * len(records)


@pytest.mark.parametrize(("tensor", "hosts"), [(2, HOSTS), (1, HOSTS), (4, ("h1",) * 8), (3, ("a",) * 3 + ("b",) * 6)])
def test_groups_inside_a_node(tensor: int, hosts: tuple[str, ...]) -> None:
    refuse_crossing(hosts, tensor)


def test_a_group_over_two_nodes_is_refused() -> None:
    with pytest.raises(UserError, match=r"with 4, ranks 0 to 3 .* are on h1 and h2, .* set it to 1, 2, or set"):
        refuse_crossing(HOSTS, 4)
    with pytest.raises(UserError, match=r"with 2, ranks 2 to 3 .* are on a and b, .* set it to 1, 3, or set"):
        refuse_crossing(("a", "a", "a", "b", "b", "b"), 2)
    with pytest.raises(UserError, match=r"set it to 1, or set"):
        refuse_crossing(HOSTS, 4, fitting=(1, 4, 8))
    with pytest.raises(UserError, match=r"parallel.tensor may be 1, 3; leave"):
        require_sizes(6, 4, None, fitting=(1, 3, 9))
    # The sizes that it may be set to divide the ranks of every node.
    with pytest.raises(UserError, match=r"with 5, ranks 0 to 4 .* set it to 1, 2, or set"):
        refuse_crossing(("a",) * 4 + ("b",) * 6, 5)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 24))
def test_groups_inside_nodes_are_those_accepted(counts: list[int], tensor: int) -> None:
    """Compared with the definition, for nodes with unequal numbers of ranks: all of a group's ranks share a node."""
    node_of = [node for node, count in enumerate(counts) for _ in range(count)]
    inside = all(count % tensor == 0 for count in counts)
    try:
        require_sizes(len(node_of), tensor, None)
        refuse_crossing([f"h{node}" for node in node_of], tensor)
        accepted = True
    except UserError:
        accepted = False
    assert accepted == inside
