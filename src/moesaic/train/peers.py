"""Ranks that watch over each other: who failed, who is lost, and what the others do then.

Each rank has a thread that says through the launch's store, once a second, that it is alive. A rank that fails writes
a report there. The threads of the others see it, and cut the connections of their collectives. So no rank waits for a
peer that will not come, and all meet in :meth:`Peers.meet`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moesaic.sharding.internals import abort_groups, flight_record, limit_waits, peers_store

_TICK = 1.0
# For the checkpoint after a failure: another one may happen on the way.
_LAST_SAVE = timedelta(hours=1)
# A rank that has not been heard of for so long, after another one failed, is lost.
_PATIENCE = 6.0
# One that has not been heard of for so long, or for the timeout if that is more, is lost though nobody has failed yet.
# Long, as a thread does not run while another one of its process holds on to Python.
_SILENCE = 60.0
# For what may take long on one rank while the others wait, such as a checkpoint on a slow disk.
_SLOW = timedelta(days=1)
# Each launch in a process has names of its own in the store. All ranks count alike.
_launches = itertools.count()


@dataclass(frozen=True)
class Report:
    """What a rank says of itself when it has failed, or when others have."""

    step: int | None
    """The last step that is done, None outside of training."""
    sound: bool
    """Whether the weights are those of that step, and finite."""
    unsaved: bool
    """Whether this step is not in a checkpoint yet."""
    error: str


@dataclass(frozen=True)
class Meeting:
    """What the ranks have agreed on, the same on all that are left."""

    reports: dict[int, Report]
    """Of the ranks that are left."""
    first: int | None
    """The rank that failed first; None if it was one of those that are lost."""
    lost: list[int]
    """The ranks that do not answer: killed, stopped, or cut off."""

    def can_save(self) -> bool:
        """Whether all ranks are there, and have sound weights of one step."""
        steps = {report.step for report in self.reports.values()}
        return not self.lost and len(steps) == 1 and None not in steps and all(r.sound for r in self.reports.values())


class Peers:
    """This rank's view of the others.

    Args:
        rank, world_size: of this process.
        timeout: seconds after which a rank that is not heard of is lost.
    """

    def __init__(self, rank: int, world_size: int, timeout: int | float):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._prefix = f"moesaic/{next(_launches)}"
        # Two connections, made now: to a store that is gone, a new one would be tried for long.
        self._store, self._own = (dist.PrefixStore(self._prefix, peers_store()) for _ in range(2))
        self.failed = False
        """Whether this rank is in or past :meth:`meet`."""
        self._cutting = threading.Lock()
        self._cut = False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._ends.set()
        self._thread.join()

    @contextmanager
    def slowly(self) -> Iterator[None]:
        """Collectives within this, and until all ranks have left it, may wait for long."""
        limit_waits(_SLOW)
        yield
        # An error does not come here: other ranks may not have it.
        dist.barrier()
        limit_waits(timedelta(seconds=self.timeout))

    def wait_for_long(self) -> None:
        """From now on collectives may wait for long."""
        limit_waits(_SLOW)

    def meet(self, report: Report) -> Meeting | None:
        """Tell the others that this rank cannot go on, end their waiting, and hear what they say.

        Every rank that is left comes here, by itself or because its collectives fail. Collectives do not work any more
        then; :meth:`rejoin` makes new ones. None if the store is gone too: it was rank 0's or the launcher's.
        """
        self.failed = True
        store = self._own
        try:
            is_first = store.add("failed", 1) == 1
            if is_first:
                store.set("first", str(self.rank))
            store.set(f"report/{self.rank}", json.dumps(asdict(report)))
            self._stop_collectives()
            # One rank counts: the store has many to serve, and a late rank must not see more than the others.
            if is_first:
                store.set("meeting", json.dumps(self._who_comes(store)))
            return self._meeting(store)
        except (RuntimeError, OSError):
            # torch's errors of a store are RuntimeErrors.
            self._stop_collectives()
            return None

    def rejoin(self) -> None:
        """Make a new process group of all ranks, in place of those that have failed. Collective."""
        store = dist.PrefixStore(f"{self._prefix}/again", peers_store())
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=_LAST_SAVE)

    def _limit(self) -> float:
        """Seconds in which all ranks should come."""
        return max(min(self.timeout, 60.0), 2 * _PATIENCE)

    def _who_comes(self, store: dist.Store) -> list[int]:
        """The ranks that report, once all others have been silent for long."""
        alive = _Alive(self.world_size)
        end = time.monotonic() + self._limit()
        there: set[int] = set()
        waiting = set(range(self.world_size))
        while waiting and time.monotonic() < end:
            there |= {rank for rank in waiting if store.check([f"report/{rank}"])}
            waiting -= there
            waiting -= {rank for rank in waiting if alive.silence(rank, _beat(store, rank)) > _PATIENCE}
            time.sleep(0.05)
        return sorted(there)

    def _meeting(self, store: dist.Store) -> Meeting:
        end = time.monotonic() + self._limit() + 2 * _PATIENCE
        while not store.check(["meeting"]):
            if time.monotonic() > end:
                raise RuntimeError("the rank that failed first is lost, too")
            time.sleep(0.05)
        reports = {rank: Report(**json.loads(store.get(f"report/{rank}"))) for rank in json.loads(store.get("meeting"))}
        lost = [rank for rank in range(self.world_size) if rank not in reports]
        return Meeting(reports, None if lost else int(store.get("first")), lost)

    def _watch(self) -> None:
        """The thread's work."""
        alive = _Alive(self.world_size)
        neighbour = (self.rank + 1) % self.world_size
        beats = 0
        while not self._ends.wait(_TICK):
            beats += 1
            # Without a store there is nobody to hear; the collectives fail then as well.
            with contextlib.suppress(RuntimeError, OSError):
                self._store.set(f"beat/{self.rank}", str(beats))
                if alive.silence(neighbour, _beat(self._store, neighbour)) > max(self.timeout, _SILENCE):
                    self._stop_collectives()
                if self._store.check(["first"]):
                    self._stop_collectives()

    def _stop_collectives(self) -> None:
        """Let every collective of this process fail, once."""
        with self._cutting:
            if not self._cut:
                self._cut = True
                abort_groups()
                _cut_connections(keep=int(os.environ.get("MASTER_PORT", "0")))


def last_collectives() -> str | None:
    """What this process did last with the others, as JSON, where torch has recorded it (TORCH_FR_BUFFER_SIZE)."""
    return flight_record()


class _Alive:
    """For how long the beats of each rank have not changed."""

    def __init__(self, world_size: int):
        self._heard: list[tuple[Any, float]] = [(None, time.monotonic())] * world_size

    def silence(self, rank: int, beat: Any) -> float:
        """Seconds since the last change."""
        now = time.monotonic()
        if self._heard[rank][0] != beat:
            self._heard[rank] = (beat, now)
        return now - self._heard[rank][1]


def _beat(store: dist.Store, rank: int) -> bytes | None:
    return store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else None


def _cut_connections(keep: int) -> None:
    """Shut down the network connections of this process but those of the port ``keep``, which are the store's.

    gloo has no other way to end a collective that waits: its groups notice nothing but a connection that closes.
    """
    try:
        descriptors = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # Windows: peers notice when the process ends
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if keep not in (connection.getsockname()[1], connection.getpeername()[1]):
                    connection.shutdown(socket.SHUT_RDWR)
