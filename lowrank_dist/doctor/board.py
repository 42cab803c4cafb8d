"""Where the ranks of a job leave word for one another: JSON under names in the job's store.

The store needs nothing but MASTER_ADDR and MASTER_PORT, so that ranks can say why they cannot meet in a process group.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lowrank_dist.doctor.place import Place

# Between two looks for what is not there yet; the store's own wait warns of every time-out, and hears no signal.
_FIRST_PAUSE_SECONDS = 0.0005
_LONGEST_PAUSE_SECONDS = 0.25
# How long a store that was reached may take over an answer, on a machine that is busy.
ANSWER_SECONDS = 30.0
PREFIX = "lowrank_dist.doctor"


class Silent(Exception):
    """Nobody left word under a name in time, or the store is gone."""


class Board:
    def __init__(self, store: dist.Store) -> None:
        self.store = store

    @classmethod
    def join(cls, place: Place, seconds: float) -> Board:
        """The job's store, which rank 0 opens unless the launcher has. RuntimeError where it is not reached in time."""
        store = dist.TCPStore(
            place.master,
            place.port,
            is_master=place.rank == 0 and not place.agent,
            timeout=timedelta(seconds=seconds),
            # It would wait for all ranks, and not say which are missing.
            wait_for_workers=False,
        )
        store.set_timeout(timedelta(seconds=max(seconds, ANSWER_SECONDS)))
        return cls(dist.PrefixStore(PREFIX, store))

    def put(self, name: str, value: Any) -> None:
        """Raises Silent where the store is gone."""
        try:
            self.store.set(name, json.dumps(value))
        except RuntimeError as error:
            raise Silent(f"{name}: {error}") from error

    def take(self, name: str, seconds: float) -> Any:
        """What lies under `name`, as soon as it does. Raises Silent after `seconds`."""
        end = time.monotonic() + seconds
        pause = _FIRST_PAUSE_SECONDS
        try:
            while not self.store.check([name]):
                if time.monotonic() > end:
                    raise Silent(name)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            return json.loads(self.store.get(name))
        except RuntimeError as error:
            raise Silent(f"{name}: {error}") from error
