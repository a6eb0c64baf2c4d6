"""Journal of the events for MLflow: an append-only file with one JSON object a line, written before anything is sent.

{sweep folder}/journal/
    events.jsonl    the events, in order; only the sweep's driver writes them
    cursor.json     how far the events were sent, and to which destination (cursor.py)
    refused.jsonl   the parts of events that MLflow rejected permanently, and the reasons
    lock            the lock of the process that sends the events

A driver that is killed while it writes a line leaves an incomplete line. Readers stop before that line, and the next
driver removes it. This module does not depend on MLflow.
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
"""Kind of an event whose line is not a JSON object with a kind."""


class Entry(NamedTuple):
    """An event and its position in the journal."""

    seq: int
    """Sequence number, counted from 1."""
    event: dict[str, Any]
    end: int
    """Byte offset just after the event's line."""

    @property
    def kind(self) -> str:
        """Kind of the event.

        One of `sweep_started`, `trial_started`, `metrics`, `trial_ended`, `sweep_ended`, `artifacts` and `unreadable`.
        """
        return str(self.event["event"])


class Journal:
    """Appends events to a sweep's journal. A journal has at most one writer at a time."""

    def __init__(self, sweep_folder: Path) -> None:
        """Open the journal for appending after the events that it has already.

        Raises:
            SweepError: another process has the journal open, so the sweep is running already.
        """
        folder = sweep_folder / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a write that failed on a full disk must not be retried, and fail again, when the file is closed.
        self._file = open(_events(sweep_folder), "ab", buffering=0)  # noqa: SIM115 - open as long as the sweep runs
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SweepError(f"{sweep_folder}: this sweep is being run by another process; wait for it") from None
        end = 0
        self.seq = 0
        """Sequence number of the last event; 0 if there is none."""
        for entry in read(sweep_folder):
            self.seq, end = entry.seq, entry.end
        self._file.truncate(end)
        self._end = end

    def append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        """Append one event, without the secrets of any URI in it.

        With `durable`, wait until the event is safe from a power cut.

        Raises:
            OSError: the disk is full or can no longer be written. The event is then not in the journal.
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
            # An incomplete line must not remain in front of the next event.
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            error.filename = error.filename or str(self._file.name)
            raise
        self.seq, self._end = self.seq + 1, self._end + len(line)

    def close(self) -> None:
        """Close the journal, so that another process can write to it."""
        self._file.close()


def read(sweep_folder: Path, position: int = 0, seq: int = 0) -> Iterator[Entry]:
    """Yield the complete events after byte offset `position`, at which event number `seq` ends.

    If there is no journal, yield nothing.
    """
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
    """Return the last event of a kind whose `fields` have the given values, or None if there is none."""
    found = None
    for entry in read(sweep_folder):
        if entry.kind == kind and all(entry.event.get(key) == value for key, value in fields.items()):
            found = entry.event
    return found


def lock(sweep_folder: Path) -> IO[str]:
    """Take the lock for sending this sweep's events. It is held until the returned file is closed.

    Raises:
        TrackingError: another process holds the lock.
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
    """Convert a NumPy or torch scalar to a Python number, and anything else to text."""
    return value.item() if hasattr(value, "item") else str(value)
