"""Heartbeat lock: at most one driver per sweep in an object store, which has no locks of its own.

The driver rewrites a small lock file every `HEARTBEAT_SECONDS`. A later process that finds the file watches whether it
changes, so the clocks of the machines need not agree. The lock of a driver that was killed is recognised as stale at
once on the driver's machine, and after `STALE_SECONDS` on any other. An extraction holds such a lock in its activation
folder, too, because some file systems have no locks.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from msae_sweep.errors import SweepError
from msae_sweep.paths import StoragePath

HEARTBEAT_SECONDS = 10.0
"""Seconds between two heartbeats."""
STALE_SECONDS = 45.0
"""Seconds without a heartbeat after which a lock is stale: longer than a few heartbeats, even if the store takes
seconds per request."""


@contextlib.contextmanager
def hold_lock(place: StoragePath) -> Iterator[None]:
    """Hold the lock file `place` for this process while the context is open.

    Raises:
        SweepError: another process holds the lock.
    """
    _wait_for_the_dead(place)
    me, ended = f"process {os.getpid()} on {socket.gethostname()}", threading.Event()

    def beat() -> None:
        while True:
            # A store that fails for a while does not end the sweep here. `StoreSync` ends it if the store fails for too
            # long.
            with contextlib.suppress(OSError):
                place.write(json.dumps({"driver": me, "beat": uuid.uuid4().hex}).encode())
            if ended.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="driver-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            place.delete()


def _wait_for_the_dead(place: StoragePath) -> None:
    first = _read(place)
    if not first or _is_dead_here(first["driver"]):
        return
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(2.0, STALE_SECONDS))
        now = _read(place)
        if not now:
            return
        if now["beat"] != first["beat"]:
            raise SweepError(f"{place.parent.parent}: this sweep is being run by {now['driver']}; wait for it")


def _read(place: StoragePath) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(place.read())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _is_dead_here(driver: str) -> bool:
    """Return whether `driver` names a process of this machine that no longer runs.

    The id of this very process also counts: an earlier process had the same id.
    """
    pid, _, host = driver.removeprefix("process ").partition(" on ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(pid) == os.getpid()
