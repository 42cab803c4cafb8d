"""The variables by which a launcher, or a person, tells a rank its place."""

from __future__ import annotations

import pytest

from launch.train import start
from lowrank_dist.backend.rank_variables import check_rank_variables, require_place
from lowrank_dist.errors import RankIdentityError, UserError
from lowrank_dist.generate.session import session

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h1", "MASTER_PORT": "29500"}
PORTS = ("", "abc", "0", "70000", "-1", " 29500", "29500.0")


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        *(("MASTER_PORT", port, "MASTER_PORT: ") for port in PORTS),
        ("MASTER_ADDR", "", "MASTER_ADDR: empty; set it to the name or the address of rank 0's node"),
        ("MASTER_ADDR", " ", "MASTER_ADDR: empty"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: 0 ranks; give the number of ranks"),
        ("WORLD_SIZE", "", "WORLD_SIZE: '' is not a number"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE: 0 ranks"),
    ],
)
def test_a_variable_that_all_ranks_share(name: str, value: str, named: str) -> None:
    """One rank of a node reports it (`should_print_for_node`), so it is no RankIdentityError."""
    with pytest.raises(UserError) as raised:
        check_rank_variables({**PLACE, name: value})
    assert str(raised.value).startswith(named) and not isinstance(raised.value, RankIdentityError)


@pytest.mark.parametrize(("name", "value"), [("RANK", ""), ("RANK", "2"), ("RANK", "-1"), ("LOCAL_RANK", "one")])
def test_a_variable_of_one_rank(name: str, value: str) -> None:
    with pytest.raises(RankIdentityError, match=f"^{name}: "):
        check_rank_variables({**PLACE, name: value})


@pytest.mark.parametrize("port", ["1", "1023", "29500", "65535", "029500"])
def test_ports(port: str) -> None:
    """A port below 1024 is for root to use; the kernel answers for the others (tests/unit/test_rendezvous.py)."""
    check_rank_variables({**PLACE, "MASTER_PORT": port})
    check_rank_variables({})


def test_what_is_missing() -> None:
    with pytest.raises(UserError, match="^RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set, because launch/train.py"):
        require_place({})
    with pytest.raises(
        UserError, match=r"^MASTER_ADDR, MASTER_PORT not set, although RANK=1 is; .* or unset RANK if an earlier shell"
    ):
        require_place({"RANK": "1", "WORLD_SIZE": "2"})
    require_place(PLACE)


@pytest.mark.parametrize("port", PORTS)
def test_training_and_generating_end_with_the_cause(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**PLACE, "LOCAL_RANK": "0", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    assert start([]) == 2
    assert capsys.readouterr().err.startswith("lowrank_dist: MASTER_PORT: ")
    with pytest.raises(UserError, match="^MASTER_PORT: "), session(1, "cpu"):
        pass


@pytest.mark.parametrize("rank", ["", "x", "2"])
def test_generating_with_a_wrong_rank(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**PLACE, "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankIdentityError, match="^RANK: "), session(1, "cpu"):
        pass
