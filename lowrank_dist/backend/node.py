"""The node that a process runs on: its name, for messages, and its identity, by which ranks find that they share it."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

# Drawn by the kernel at each boot. Containers on one host read the same one.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHOWN = 4  # digits of the boot id in the name of a node


def host_name() -> str:
    """Return the host name, the name of this node in the messages of one process."""
    return socket.gethostname()


def node_id() -> str:
    """Return the identity of this node: "HOST/BOOT_ID", or "HOST/" where the kernel shows no boot id.

    Neither part is enough: containers and cloud images on several hosts may all be called "worker", and containers on
    one host share its boot id. NCCL tells hosts apart by the same two.
    """
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        boot = ""
    return f"{host_name()}/{boot}"


def node_names(identities: Sequence[str]) -> tuple[str, ...]:
    """Return a name for the node of each identity, in their order: different nodes have different names.

    A node is called by its host name. Where several nodes share it, the beginning of the boot id follows, as in
    "worker (1f3a)".
    """
    boots: dict[str, set[str]] = {}
    for identity in identities:
        host, _, boot = identity.rpartition("/")
        boots.setdefault(host, set()).add(boot)
    shown = {host: _digits_that_differ(found) for host, found in boots.items()}
    parts = (identity.rpartition("/") for identity in identities)
    return tuple(f"{host} ({boot[: shown[host]]})" if shown[host] else host for host, _, boot in parts)


def _digits_that_differ(boots: set[str]) -> int:
    """Return how many first digits tell these boot ids apart, at least _SHOWN; 0 for a single one."""
    if len(boots) == 1:
        return 0
    longest = max(map(len, boots))
    return next(n for n in range(_SHOWN, longest + _SHOWN) if len({boot[:n] for boot in boots}) == len(boots))
