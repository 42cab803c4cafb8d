"""`lowrank-dist doctor` on all nodes of a job: every planted fault is found and reported with its host and its remedy.

Two healthy hosts pass under every launcher.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.rig import Host, Rig, wait
from tests.cluster.runs import ENVIRONMENT, on_each, write_run
from tests.integration.launching import Outcome, free_port, snapshot
from tests.tiny_models import make_tiny

DOCTOR = ["-m", "lowrank_dist.cli", "doctor"]
PASSING = ("ok", "off", "warning")
# For one rank on each host: no tensor-parallel group may span them.
ALONE = "parallel.tensor=1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the configuration of a run of four ranks whose model has several files."""
    path = write_run(tmp_path_factory.mktemp("doctor"))
    shutil.rmtree(path.parent / "base")
    make_tiny("llama", path.parent / "base", max_shard_size="100KB")
    assert len(shards(path.parent / "base")) > 2
    return path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def examine(
    rig: Rig,
    *arguments: object,
    of: Mapping[str, Mapping[str, str]] | None = None,
    inside: Mapping[str, Sequence[object]] | None = None,
) -> list[Outcome]:
    """Run doctor with one rank on each host. of: host → its own environment. inside: host → a command that runs it."""
    port = str(free_port())
    started = []
    for number, host in enumerate(rig.hosts):
        ranks = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": len(rig.hosts), "LOCAL_WORLD_SIZE": 1}
        settings = {**ranks, "MASTER_ADDR": "h1", "MASTER_PORT": port, **(of or {}).get(host.name, {})}
        variables = [f"{name}={value}" for name, value in settings.items()]
        command = ["env", *variables, *(inside or {}).get(host.name, ()), sys.executable, *DOCTOR, *arguments]
        started.append(host.start(command, seconds=400, environment=ENVIRONMENT))
    return [wait(process) for process in started]


def found(report: Mapping[str, Any], what: str, host: str | None = None) -> dict[str, Any]:
    """Return the only row of this name that concerns `host` (or several hosts) and is not ok."""
    rows = [row for row in report["rows"] if row["what"] == what and row["state"] != "ok"]
    rows = [row for row in rows if host is None or row["nodes"] == [host]]
    assert len(rows) == 1, rows
    return rows[0]


def failing(report: Mapping[str, Any]) -> set[str]:
    return {row["what"] for row in report["rows"] if row["state"] not in PASSING}


@contextmanager
def mounted(host: Host, target: Path, *commands: list[object]) -> Iterator[None]:
    """Mount something over `target` on one host only."""
    for command in commands:
        done = host.run(command)
        assert done.code == 0, done.stderr
    try:
        yield
    finally:
        done = host.run(["umount", target])
        assert done.code == 0, done.stderr


@pytest.fixture(scope="module")
def planted(rig: Rig, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of doctor on two hosts with six faults: h1 has a read-only run folder, h2 all the others."""
    first, second = rig.hosts
    place = tmp_path_factory.mktemp("planted")
    base, run = config.parent / "base", place / "run"
    run.mkdir()
    # doctor reads the version of a package as Python does: from the metadata that comes first on the path.
    other = place / "other" / "deepspeed-0.19.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.9\n")
    lacking = place / "lacking"
    shutil.copytree(base, lacking)
    shards(lacking)[1].unlink()
    programs = place / "programs"
    programs.mkdir()
    for name in ("c++", "nvcc", "srun", "pdsh"):
        if (path := shutil.which(name)) is not None:
            (programs / name).symlink_to(path)
    of_second = {"PYTHONPATH": str(other.parent), "PATH": str(programs), "GLOO_SOCKET_IFNAME": "eth7"}
    with ExitStack() as stack:
        bind = ["mount", "--bind", run, run]
        stack.enter_context(mounted(first, run, bind, ["mount", "-o", "remount,bind,ro", run]))
        disk = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run]
        fill = ["bash", "-c", 'head -c 900K /dev/zero > "$0"', run / "full"]
        stack.enter_context(mounted(second, run, disk, fill))
        stack.enter_context(mounted(second, base, ["mount", "--bind", lacking, base]))
        one, two = examine(rig, config, f"output.dir={run}", ALONE, "--json", of={"h2": of_second})
    assert (one.code, two.code, two.stdout) == (1, 1, ""), (one.stderr, two.stderr, two.stdout)
    assert snapshot(run) == {}, "something was left in the run folder"
    return json.loads(one.stdout)


def test_version_skew(planted: dict[str, Any]) -> None:
    row = found(planted, "deepspeed")
    assert row["state"] == "differs" and row["nodes"] == ["h1", "h2"]
    assert "0.19.9 on h2" in row["detail"] and "make it the same on every node" in row["detail"]


def test_read_only_run_folder(planted: dict[str, Any]) -> None:
    row = found(planted, "run folder", "h1")
    assert row["state"] == "broken" and "Read-only file system" in row["detail"]
    assert "set output.dir to a folder where you may write" in row["detail"]


def test_full_disk(planted: dict[str, Any]) -> None:
    row = found(planted, "run folder", "h2")
    assert row["state"] == "broken" and "No space left on device" in row["detail"]
    assert "free some space" in row["detail"]
    room = found(planted, "free disk", "h2")
    assert room["state"] == "broken" and "124.0 KiB free" in room["detail"] and "set output.dir to" in room["detail"]


def test_missing_shard(planted: dict[str, Any], config: Path) -> None:
    row = found(planted, "model folder", "h2")
    shard = shards(config.parent / "base")[1]
    assert row["state"] == "broken" and f"{shard}: missing; download the model completely" in row["detail"]


def test_wrong_interface(planted: dict[str, Any]) -> None:
    row = found(planted, "interface of gloo", "h2")
    assert row["state"] == "broken" and "GLOO_SOCKET_IFNAME: no interface eth7 here, but" in row["detail"]
    assert "eth0 (10.77.0.2" in row["detail"] and "set GLOO_SOCKET_IFNAME=eth0" in row["detail"]
    # Ranks that cannot meet do not wait for one another.
    assert found(planted, "all-reduce")["detail"] == "not checked, since h2 cannot meet the others"


def test_no_ninja(planted: dict[str, Any]) -> None:
    row = found(planted, "ninja", "h2")
    assert row["state"] == "off" and "not on PATH" in row["detail"]
    assert f"put {Path(sys.executable).parent} on PATH" in row["detail"]


def test_nothing_else_is_found(planted: dict[str, Any]) -> None:
    assert failing(planted) == {
        *("deepspeed", "run folder", "free disk", "model folder", "interface of gloo", "all-reduce")
    }
    assert planted["can_train"] is False and planted["nodes"].keys() == {"h1", "h2"}


def test_an_interface_that_leads_nowhere(quiet_rig: Rig) -> None:
    """The interface is up and has an address. That no rank can be reached by it shows only at the rendezvous."""
    # Of two ranks, gloo lets the one with the higher address connect to the other, so this one must be reachable.
    second = quiet_rig.hosts[1]
    make = "ip link add other0 type veth peer name other1 && ip address add 10.9.0.2/24 dev other0"
    make += " && ip link set other0 up && ip link set other1 up"
    assert second.run(["bash", "-c", make]).code == 0
    try:
        one, two = examine(quiet_rig, "--json", "--timeout", 5, of={"h2": {"GLOO_SOCKET_IFNAME": "other0"}})
    finally:
        assert second.run(["ip", "link", "delete", "other0"]).code == 0
    assert (one.code, two.code) == (1, 1), (one.stderr, two.stderr)
    report = json.loads(one.stdout)
    row = found(report, "interface of gloo", "h2")
    assert row["state"] == "warning" and "MASTER_ADDR is reached through eth0" in row["detail"]
    assert "set GLOO_SOCKET_IFNAME=eth0" in row["detail"]
    assert failing(report) == {"all-reduce"}


def test_hosts_of_one_name(quiet_rig: Rig, tmp_path: Path) -> None:
    """Two machines called "worker". The rig's hosts share a kernel, so each is given a boot id as well."""
    inside: dict[str, list[object]] = {}
    for host, boot in (("h1", "1f3a-4c1e"), ("h2", "77b0-4c1e")):
        (tmp_path / host).write_text(f"{boot}\n")
        become = 'hostname worker && mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        inside[host] = ["unshare", "--uts", "--mount", "bash", "-c", become, tmp_path / host]
    network = {"GLOO_SOCKET_IFNAME": "eth0"}
    one, two = examine(quiet_rig, "--json", of={"h1": network, "h2": network}, inside=inside)
    assert (one.code, two.code) == (0, 0), (one.stderr, two.stderr)
    nodes = {node: each["ranks"] for node, each in json.loads(one.stdout)["nodes"].items()}
    assert nodes == {"worker (1f3a)": [0], "worker (77b0)": [1]}


def test_srun(quiet_rig: Rig, config: Path) -> None:
    """Bare srun starts the ranks. Every row is in order, or about something that training does not need."""
    before = snapshot(config.parent)
    launcher = ["srun", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1"]
    done = quiet_rig.hosts[0].run([*launcher, sys.executable, *DOCTOR, config, "--json"], environment=ENVIRONMENT)
    assert done.code == 0, (done.stdout, done.stderr)
    report = json.loads(done.stdout)
    assert report["can_train"] is True and {row["state"] for row in report["rows"]} == {"ok", "off"}, report["rows"]
    assert {node: of["ranks"] for node, of in report["nodes"].items()} == {"h1": [0, 1], "h2": [2, 3]}
    for what in ("rendezvous", "run folder, shared", "clocks", "all-reduce"):
        assert [row["state"] for row in report["rows"] if row["what"] == what] == ["ok"], what
    between = {row["what"]: row["figures"] for row in report["between"]}
    all_reduce = between["all-reduce"]
    assert all_reduce["ranks"] == 4 and all_reduce["busbw_gb_s"] == pytest.approx(all_reduce["algbw_gb_s"] * 1.5)
    for node in report["nodes"].values():
        (own,) = [row for row in node["rows"] if row["what"] == "all-reduce in a node"]
        assert own["figures"]["ranks"] == 2 and own["figures"]["algbw_gb_s"] > 0
    # Both hosts have this machine's clock.
    assert abs(between["clocks"]["h2_seconds"]) < 0.5
    assert snapshot(config.parent) == before


def test_nodes_of_unequal_size(quiet_rig: Rig, config: Path) -> None:
    """Two ranks on one host and one on the other can train, and doctor says so, with the rules of the run itself."""
    launcher = ["srun", "--nodes=2", "--ntasks=3", "--kill-on-bad-exit=1", sys.executable, *DOCTOR, config, "--json"]
    layout = ["parallel.tensor=1", "parallel.data=3", "train.global_batch=6"]
    done = quiet_rig.hosts[0].run([*launcher, *layout], environment=ENVIRONMENT)
    assert done.code == 0, (done.stdout, done.stderr)
    report = json.loads(done.stdout)
    assert report["can_train"] is True and failing(report) == set()
    assert sorted(len(of["ranks"]) for of in report["nodes"].values()) == [1, 2]
    (row,) = [row for row in report["rows"] if row["what"] == "parallel layout"]
    assert row["detail"] == "1 tensor × 3 data parallel"


def test_deepspeed_over_pdsh(quiet_rig: Rig, config: Path, tmp_path: Path) -> None:
    hostfile, forwarded = tmp_path / "hosts", tmp_path / "environment"
    hostfile.write_text("h1 slots=1\nh2 slots=1\n")
    forwarded.write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    launcher = ["deepspeed", "--hostfile", hostfile, "--master_port", free_port(), "--module"]
    done = quiet_rig.hosts[0].run(
        [*launcher, "lowrank_dist.cli", "doctor", config, ALONE],
        environment={**ENVIRONMENT, "DS_ENV_FILE": str(forwarded)},
    )
    assert done.code == 0, (done.stdout, done.stderr)
    assert "h1: training can run on 2 nodes (2 of 2 ranks)" in done.stdout.splitlines()


def test_torchrun(quiet_rig: Rig) -> None:
    """Without a configuration only the nodes are checked."""
    shared = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "h1", "--master-port", free_port()]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    doctor = ["--module", "lowrank_dist.cli", "doctor"]
    commands = [[*torchrun, "--node-rank", rank, *shared, *doctor] for rank in range(2)]
    one, two = on_each(quiet_rig.hosts, commands)
    assert (one.code, two.code) == (0, 0), (one.stderr, two.stderr)
    assert one.stdout.splitlines()[-1] == "training can run on 2 nodes (2 of 2 ranks)" and two.stdout == ""
