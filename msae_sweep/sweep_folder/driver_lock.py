"""One driver a sweep, where the sweep lies in an object store: a store knows no locks, so a driver shows that it lives.

It rewrites a small file every few seconds. Who comes later and finds one looks whether it changes: clocks of different
machines need not agree for that. A driver that was killed is recognised at once on its own machine, and after
`DEAD_SECONDS` on another.
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

BEAT_SECONDS = 10.0
DEAD_SECONDS = 45.0
"""Longer than a few beats to a store that takes seconds a request."""


@contextlib.contextmanager
def held(place: StoragePath) -> Iterator[None]:
    """Show at `place` that this process drives the sweep, as long as this is open.

    Raises:
        SweepError: another process does.
    """
    _wait_for_the_dead(place)
    me, ended = f"process {os.getpid()} on {socket.gethostname()}", threading.Event()

    def beat() -> None:
        while True:
            # A store that is away for a while is no reason to stop; the mirror says when it is one.
            with contextlib.suppress(OSError):
                place.write(json.dumps({"driver": me, "beat": uuid.uuid4().hex}).encode())
            if ended.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="lease", daemon=True)
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
    until = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < until:
        time.sleep(min(2.0, DEAD_SECONDS))
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
    """Whether `driver` was a process of this machine that is no more."""
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
