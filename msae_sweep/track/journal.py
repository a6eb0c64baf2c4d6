"""What MLflow is to be told, on disk before anything else: an append-only file of events, one JSON object a line.

{sweep folder}/journal/
    events.jsonl    the events, in order; written by the sweep's driver alone
    cursor.json     how far they were sent, and to where (cursor.py)
    refused.jsonl   what MLflow refused for itself, and why
    lock            held by whoever sends

A driver killed in the middle of a line leaves it torn: readers stop before it, and the next driver cuts it off.
Nothing here knows MLflow.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from msae_sweep.errors import SweepError, TrackingError
from msae_sweep.track.uri import redact

UNREADABLE = "unreadable"
"""Kind of an event whose line is not JSON."""


class Entry(NamedTuple):
    """One event and its place in the journal."""

    seq: int
    """Counts from 1."""
    event: dict[str, Any]
    end: int
    """Byte position behind the line."""

    @property
    def kind(self) -> str:
        """`sweep_started`, `trial_started`, `metrics`, `trial_ended`, `sweep_ended` or `artifacts`."""
        return str(self.event["event"])


class Journal:
    """Appends events; one writer a sweep."""

    def __init__(self, sweep_folder: Path) -> None:
        """Open for appending, after whatever is there.

        Raises:
            SweepError: another process writes it, so the sweep is running already.
        """
        folder = sweep_folder / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refuses must not be tried again, and refused again, when the file is closed.
        self._file = open(_events(sweep_folder), "ab", buffering=0)  # noqa: SIM115 - open as long as the sweep runs
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SweepError(f"{sweep_folder}: this sweep is being run by another process; wait for it") from None
        end = 0
        self.seq = 0
        """Number of the last event."""
        for entry in read(sweep_folder):
            self.seq, end = entry.seq, entry.end
        self._file.truncate(end)
        self._end = end

    def append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        """Write one event, without the secrets of any URI in it; `durable` waits until it is safe from a power cut.

        Raises:
            OSError: the disk is full, or cannot be written any more; the event is not in the journal then.
        """
        record = {"seq": self.seq + 1, "time_ms": int(time.time() * 1000), "event": event, **fields}
        line = redact(json.dumps(record, ensure_ascii=False, default=_plain)).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            # Half a line must not stand before the next one.
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            error.filename = error.filename or str(self._file.name)
            raise
        self.seq, self._end = self.seq + 1, self._end + len(line)

    def close(self) -> None:
        """Let another process write."""
        self._file.close()


def read(sweep_folder: Path, position: int = 0, seq: int = 0) -> Iterator[Entry]:
    """Whole events behind byte `position`, which follows event number `seq`; nothing where there is no journal."""
    try:
        file = open(_events(sweep_folder), "rb")  # noqa: SIM115 - closed by the `with` below
    except FileNotFoundError:
        return
    with file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position, seq = position + len(line), seq + 1
            yield Entry(seq, _parse(line), position)


def last(sweep_folder: Path, kind: str, **fields: Any) -> dict[str, Any] | None:
    """The last event of a kind in which `fields` are as given; None where there is none."""
    found = None
    for entry in read(sweep_folder):
        if entry.kind == kind and all(entry.event.get(key) == value for key, value in fields.items()):
            found = entry.event
    return found


def lock(sweep_folder: Path) -> IO[str]:
    """The right to send this sweep's events, held until the returned file is closed.

    Raises:
        TrackingError: another process holds it.
    """
    file = open(sweep_folder / "journal" / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - open while the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise TrackingError(f"{holder} is sending this sweep to MLflow already; let it finish") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _events(sweep_folder: Path) -> Path:
    return sweep_folder / "journal" / "events.jsonl"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        return {"event": UNREADABLE, "time_ms": 0, "line": line[:200].decode(errors="replace")}
    return event


def _plain(value: Any) -> Any:
    """NumPy and torch scalars as Python's; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)
