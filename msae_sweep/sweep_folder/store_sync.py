"""A sweep folder in an object store: the driver works on a copy on its disk, and a thread brings what changes across.

A store cannot append, cannot rename, and may take seconds a request. So nothing of the sweep waits for it: what the
driver writes is written to the copy, and goes to the store in rounds. A round takes every file that changed as it then
stands, and first of all the journal's new lines, as one more piece of it: so what is in the store at any moment is the
sweep as it stood at some moment, and no record says that a trial ended of which the journal does not know.
Workers write their models and states straight into the store.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msae_sweep.errors import StorageError, SweepError, first_line
from msae_sweep.paths import StoragePath

AT_ONCE = 16
"""Requests to the store at a time."""

LISTINGS = 4
"""How often at the most the store is looked through for what changed during the fetching: a driver may be at work."""

PATIENCE_SECONDS = 600.0
"""How long a store may fail before the sweep ends; trials go on meanwhile."""

EVENTS = "journal/events.jsonl"
LARGE = ("model.pt", "state.pt")
"""Names of what is fetched only when it is asked for."""


def fetch(shared: StoragePath, copy: Path) -> None:
    """Bring everything small of a sweep into `copy`; nothing where there is no sweep.

    Raises:
        SweepError: the store fails.
    """
    contents: dict[Path, bytes] = {}
    known: dict[Path, tuple[int, int]] = {}
    try:
        # A file that changes while it is read may come torn, so what has changed since is read again.
        for _ in range(LISTINGS):
            files = _small_files(shared)
            changed = {way: file for way, (file, *seen) in files.items() if known.get(way) != tuple(seen)}
            if not changed:
                break
            with ThreadPoolExecutor(AT_ONCE) as pool:
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
        # Two drivers may have cut the same lines in different places.
        if start <= len(events) < start + len(content):
            events += content[len(events) - start :]
    if events:
        (copy / EVENTS).parent.mkdir(parents=True, exist_ok=True)
        (copy / EVENTS).write_bytes(events)


def _small_files(shared: StoragePath) -> dict[Path, tuple[StoragePath, int, int]]:
    """By their way from `shared`, with size and time."""
    tops = ("sweep.yaml", "identity.json", "data.json", "summary.json", "trials", "journal", "results")
    found = {file.relative_to(shared): (file, info) for file, info in shared.files(recursive=True).items()}
    return {
        way: (file, info.size, info.mtime_ns)
        for way, (file, info) in found.items()
        if way.parts[0] in tops and way.name not in LARGE
    }


class StoreSync:
    """Brings what changes in `copy` to `shared`, in a thread."""

    def __init__(self, copy: Path, shared: StoragePath) -> None:
        self._copy, self._shared = copy, shared
        self._changed: dict[Path, None] = {}
        self._news = threading.Condition()
        self._asked = 0
        """Counts what was asked of the thread; a round that begins at some count has brought all until then."""
        self._brought = 0
        self._closing = False
        self._error: str | None = None
        self._journal_end = self._events_size()
        self.n_events = self._count(0, self._journal_end)
        """Events of the journal that the store has."""
        self.on_events: Callable[[], None] = lambda: None
        """Called when there are more of them."""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def changed(self, *paths: Path) -> None:
        """Bring these files across, or remove them there if they are gone; returns at once.

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
        """Wait until everything that was written before this call is there, the journal's last line too.

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
        """Bring what is left across and end; a failure is no more news then."""
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
        """One round, tried again while the store fails; returns why it is given up."""
        started = time.monotonic()
        while True:
            try:
                self._round(batch)
            except OSError as error:
                if time.monotonic() - started > PATIENCE_SECONDS:
                    return f"storage: {error}; what is on its way is lost, resume when the store is back"
                time.sleep(2)
            except Exception as error:  # a thread that ended would have everybody wait for ever
                return f"storage: {type(error).__name__}: {first_line(error)}; what is on its way is lost, resume it"
            else:
                return None

    def _round(self, batch: list[Path]) -> None:
        contents = {path: path.read_bytes() if path.is_file() else None for path in batch}
        # After the contents: the journal may know more than the records do, never less.
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
                self.on_events()
        with ThreadPoolExecutor(AT_ONCE) as pool:
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
