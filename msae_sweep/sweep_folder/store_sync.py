"""Synchronise a sweep folder with an object store: the driver writes to a copy on its disk, a thread uploads changes.

An object store cannot append, cannot rename, and may take seconds per request, so the sweep never waits for it. The
driver writes to the copy, and the thread uploads the changes in rounds. A round first uploads the journal's new lines,
as one more piece of the journal, and then every file that has changed, as it was when the round began. The store
therefore always holds the sweep as it was at some moment, and no record says that a trial has ended while the journal
lacks that event. Workers write their models and states directly to the store.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msae_sweep.errors import StorageError, SweepError, first_line
from msae_sweep.paths import StoragePath

MAX_PARALLEL_REQUESTS = 16
"""Number of simultaneous requests to the store."""

LISTINGS = 4
"""Maximum number of listings of the store in one fetch. Each listing after the first finds files that have changed
during the fetch, because a driver may be running."""

PATIENCE_SECONDS = 600.0
"""Seconds that the store may fail before the sweep ends. Trials continue meanwhile."""

EVENTS = "journal/events.jsonl"
LARGE_FILES = ("model.pt", "state.pt")
"""Names of large files, which `fetch` leaves out; `SweepFolder.read` and `SweepFolder.fetch` get them one by one."""


def fetch(shared: StoragePath, copy: Path) -> None:
    """Download all small files of a sweep into `copy`. Do nothing if there is no sweep.

    Raises:
        SweepError: the store fails.
    """
    contents: dict[Path, bytes] = {}
    known: dict[Path, tuple[int, int]] = {}
    try:
        # A file that changes while it is read may arrive incomplete, so files that changed since are read again.
        for _ in range(LISTINGS):
            files = _small_files(shared)
            changed = {way: file for way, (file, *seen) in files.items() if known.get(way) != tuple(seen)}
            if not changed:
                break
            with ThreadPoolExecutor(MAX_PARALLEL_REQUESTS) as pool:
                contents |= zip(changed, pool.map(StoragePath.read, changed.values()), strict=True)
            known = {way: (size, at) for way, (_, size, at) in files.items()}
    except OSError as error:
        raise SweepError(str(error)) from None
    pieces: dict[int, bytes] = {}
    for way, content in contents.items():
        if way.parts[0] == "journal" and way.name.startswith("events-"):
            pieces[int(way.stem.removeprefix("events-"))] = content
            continue
        target = copy / way
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    events = b""
    for start, content in sorted(pieces.items()):
        # Two drivers may have cut the same lines into different pieces, so pieces can overlap.
        if start <= len(events) < start + len(content):
            events += content[len(events) - start :]
    if events:
        (copy / EVENTS).parent.mkdir(parents=True, exist_ok=True)
        (copy / EVENTS).write_bytes(events)


def _small_files(shared: StoragePath) -> dict[Path, tuple[StoragePath, int, int]]:
    """Return a sweep's small files by path relative to `shared`, each with its size and modification time."""
    tops = ("sweep.yaml", "identity.json", "data.json", "origins.json", "summary.json", "trials", "journal", "results")
    found = {file.relative_to(shared): (file, info) for file, info in shared.files(recursive=True).items()}
    return {
        way: (file, info.size, info.mtime_ns)
        for way, (file, info) in found.items()
        if way.parts[0] in tops and way.name not in LARGE_FILES
    }


class StoreSync:
    """Thread that uploads files that change in `copy` to `shared`."""

    def __init__(self, copy: Path, shared: StoragePath) -> None:
        self._copy, self._shared = copy, shared
        self._changed: dict[Path, None] = {}
        self._news = threading.Condition()
        self._asked = 0
        """Number of requests to the thread so far. A round uploads everything requested before it starts."""
        self._brought = 0
        """Value of `_asked` at the start of the last round that has ended."""
        self._closing = False
        self._error: str | None = None
        self._journal_end = self._events_size()
        self.n_events = self._count(0, self._journal_end)
        """Number of journal events that are in the store."""
        self.on_upload: Callable[[], None] = lambda: None
        """Callback for each increase of `n_events`."""
        self._thread = threading.Thread(target=self._run, name="store-sync", daemon=True)
        self._thread.start()

    def changed(self, *paths: Path) -> None:
        """Request the upload of these files, or their removal from the store if they no longer exist; do not wait.

        Raises:
            StorageError: the store has failed for too long.
        """
        if self._error is not None:
            raise StorageError(self._error)
        with self._news:
            for path in paths:
                self._changed.pop(path, None)
                self._changed[path] = None
            self._asked += 1
            self._news.notify_all()

    def flush(self) -> None:
        """Wait until everything that was written before this call is in the store, including the journal's last line.

        Raises:
            StorageError: the store has failed for too long.
        """
        self.changed()
        with self._news:
            asked = self._asked
            self._news.wait_for(lambda: self._brought >= asked)
        if self._error is not None:
            raise StorageError(self._error)

    def close(self) -> None:
        """Upload the remaining changes and end the thread. A failure is not raised here."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._news:
                self._news.wait_for(lambda: self._closing or self._asked > self._brought)
                closing, asked = self._closing, self._asked
                batch, self._changed = list(self._changed), {}
            if self._error is None:
                self._error = self._patiently(batch)
            with self._news:
                self._brought = asked
                self._news.notify_all()

    def _patiently(self, batch: list[Path]) -> str | None:
        """Run one round, and retry it while the store fails. Return the reason if it is given up, else None."""
        started = time.monotonic()
        while True:
            try:
                self._round(batch)
            except OSError as error:
                if time.monotonic() - started > PATIENCE_SECONDS:
                    return (
                        f"storage: {error}; files not yet uploaded are lost; resume when the store is available again"
                    )
                time.sleep(2)
            except Exception as error:  # if the thread died, `flush` would wait for ever
                return f"storage: {type(error).__name__}: {first_line(error)}; files not yet uploaded are lost; resume"
            else:
                return None

    def _round(self, batch: list[Path]) -> None:
        contents = {path: path.read_bytes() if path.is_file() else None for path in batch}
        # The journal is read after the files, so it may contain events that the records lack, but never the reverse.
        end = self._events_size()
        if end > self._journal_end:
            with open(self._copy / EVENTS, "rb") as file:
                file.seek(self._journal_end)
                lines = file.read(end - self._journal_end)
            lines = lines[: lines.rfind(b"\n") + 1]
            if lines:
                (self._shared / f"journal/events-{self._journal_end:012d}.jsonl").write(lines)
                self._journal_end += len(lines)
                self.n_events += lines.count(b"\n")
                self.on_upload()
        with ThreadPoolExecutor(MAX_PARALLEL_REQUESTS) as pool:
            list(pool.map(self._bring, contents.items()))

    def _bring(self, item: tuple[Path, bytes | None]) -> None:
        path, content = item
        place = self._shared / path.relative_to(self._copy).as_posix()
        if content is None:
            place.delete()
        else:
            place.write(content)

    def _events_size(self) -> int:
        file = self._copy / EVENTS
        return file.stat().st_size if file.exists() else 0

    def _count(self, start: int, end: int) -> int:
        return (self._copy / EVENTS).read_bytes()[start:end].count(b"\n") if end else 0
