"""Sends a sweep's journal to MLflow, as far and as soon as MLflow lets it."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from msae_sweep.config import TrackingConfig
from msae_sweep.errors import TrackingError
from msae_sweep.track import journal, logged_models
from msae_sweep.track.connection import connect, one_line
from msae_sweep.track.cursor import Cursor
from msae_sweep.track.event_handlers import EventHandlers
from msae_sweep.track.journal import Entry
from msae_sweep.track.runs import Runs
from msae_sweep.track.uploads import Uploads
from msae_sweep.track.uri import artifact_root, redact

COALESCE_SECONDS = 1.0
"""Events of this time are sent together: one `log_batch` a trial instead of one a report."""
LONGEST_PAUSE_SECONDS = 30.0
"""Pauses after failures double from one second up to this."""
LAST_TRIES = 3
"""Failures in a row after which a sender that is asked to finish gives up."""
Fetch = Callable[[Path], Path | None]
"""Gives a file of the sweep folder as a path on this machine: itself, a temporary copy alone in a folder, or None."""
_MOST_TOGETHER = 200
"""Events of metrics sent in one go."""
UPLOADS_AT_ONCE = 4
"""Models on their way to a server. One after another, 0.52 trials/s went to a server on PostgreSQL and an S3 store, and
two thirds of the two cores that all of them shared were idle. A SQLite file has one writer, and nobody to wait for."""


class TrackingStatus(NamedTuple):
    """How the sending stands."""

    sent: int
    pending: int
    refused: int
    """Parts of events that MLflow will never take; see `journal/refused.jsonl`."""
    last_error: str
    """One line; empty while all goes well."""


class Sender:
    """Reads the journal behind the cursor and replays it; one at a time for a sweep."""

    def __init__(
        self,
        sweep_folder: Path,
        uri: str,
        tracking: TrackingConfig,
        n_events: Callable[[], int],
        fetch: Fetch = lambda path: path,
    ) -> None:
        """Connect to nothing yet.

        Args:
            n_events: how many events the journal has that may be sent.
        """
        self._fetch = fetch
        self._folder, self._uri, self._tracking, self._n_events = sweep_folder, uri, tracking, n_events
        self._destination = f"{redact(uri)} {tracking.experiment}"
        self._cursor = self._load_cursor()
        self._lock: IO[str] | None = None
        self._uploads = Uploads(UPLOADS_AT_ONCE if uri.startswith("http") else 1)
        self._refusing = threading.Lock()
        self._told: set[tuple[int, str]] = set()
        self._replay: EventHandlers | None = None
        self._last_error = ""

    @property
    def status(self) -> TrackingStatus:
        """Safe to ask from any thread."""
        sent = self._cursor.seq
        return TrackingStatus(sent, max(0, self._n_events() - sent), self._cursor.refused, self._last_error)

    def run(
        self,
        closing: threading.Event,
        wake: threading.Event,
        on_progress: Callable[[TrackingStatus], None] = lambda status: None,
    ) -> None:
        """Send whatever comes until `closing` is set; then what is left, unless MLflow fails three times in a row.

        Args:
            wake: set by whoever appended an event.
            on_progress: called after every step and every failure.
        """
        failures = 0
        while True:
            is_last = closing.is_set()  # asked before sending, so that the last pass sees every event
            wake.clear()
            try:
                self._send(on_progress)
            except Exception as error:
                # Whatever it was, the events lie on disk and trials go on.
                self._replay, self._last_error = None, one_line(error)
                failures += 1
                on_progress(self.status)
                if is_last and failures >= LAST_TRIES:
                    break
                pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_SECONDS)
                if is_last:
                    time.sleep(pause)
                elif closing.wait(pause):
                    failures = 0
            else:
                if failures:
                    failures, self._last_error = 0, ""
                    on_progress(self.status)
                if is_last:
                    break
                if not closing.is_set():
                    logged_models.get_ready()
                wake.wait()
                closing.wait(COALESCE_SECONDS)
        if self._lock is not None:
            self._lock.close()

    def _send(self, on_progress: Callable[[TrackingStatus], None]) -> None:
        if self._lock is None:
            self._lock = journal.lock(self._folder)
        if self._replay is None:
            self._replay = self._connect()
        register_as = self._tracking.model_name if self._tracking.register_models else None
        try:
            for entries in self._groups():
                if self._needs_all_before(entries):
                    self._move_on(0, on_progress)
                upload = self._replay.apply(entries, register_as=register_as)
                self._uploads.add(entries[-1], upload)
                self._move_on(self._uploads.at_once, on_progress)
            self._move_on(0, on_progress)
        finally:
            # After a failure nothing may still be on its way when the events are sent again.
            self._uploads.drop()

    def _needs_all_before(self, entries: list[Entry]) -> bool:
        """Whether an event asks for models that may be under way, or goes on with a trial whose model is."""
        of_trials = all(entry.kind in ("trial_started", "metrics", "trial_ended") for entry in entries)
        return not of_trials or self._uploads.concern({str(entry.event.get("trial_id")) for entry in entries})

    def _move_on(self, at_most: int, on_progress: Callable[[TrackingStatus], None]) -> None:
        """Move the cursor behind what is sent, and wait while more than `at_most` uploads are under way."""
        for entry in self._uploads.done(at_most):
            self._cursor.position, self._cursor.seq = entry.end, entry.seq
            self._cursor.save(self._folder)
            on_progress(self.status)

    def _connect(self) -> EventHandlers:
        """Anew after every failure: then the runs are looked up, and none is created twice."""
        client = connect(self._uri)
        runs = Runs(client, self._tracking.experiment, artifact_root(self._uri))
        self._cursor = self._load_cursor()  # again, now under the lock
        if self._cursor.run_id and not runs.is_alive(self._cursor.run_id):
            # The database was replaced or the sweep's run deleted: everything has to be sent anew.
            self._cursor = Cursor(self._destination)
        return EventHandlers(client, runs, self._cursor, self._folder, self._refused, self._fetch)

    def _load_cursor(self) -> Cursor:
        """The saved cursor, if it is of this destination and of this journal."""
        cursor = Cursor.load(self._folder)
        fits = cursor.destination == self._destination and cursor.seq <= self._n_events()
        return cursor if fits else Cursor(self._destination)

    def _groups(self) -> Iterator[list[Entry]]:
        """Consecutive events of metrics together, every other event alone."""
        group: list[Entry] = []
        last = self._n_events()
        for entry in journal.read(self._folder, self._cursor.position, self._cursor.seq):
            if entry.seq > last:
                break
            if group and (entry.kind != "metrics" or len(group) >= _MOST_TOGETHER):
                yield group
                group = []
            if entry.kind == "metrics":
                group.append(entry)
            else:
                yield [entry]
        if group:
            yield group

    def _refused(self, entry: Entry, part: str, reason: str) -> None:
        """Write down what MLflow will never take, and say so once."""
        if _is_exiting():
            raise TrackingError("the process is ending")
        with self._refusing:  # uploads have threads of their own
            # What lies behind a model that failed is sent, and refused, again.
            if (entry.seq, part) not in self._told:
                self._told.add((entry.seq, part))
                self._write_refused(entry, part, reason)

    def _write_refused(self, entry: Entry, part: str, reason: str) -> None:
        if not self._cursor.refused:
            logging.getLogger(__name__).warning(
                "MLflow refused part of event %d (%s): %s; all such parts are listed in %s",
                *(entry.seq, part, reason, self._folder / "journal" / "refused.jsonl"),
            )
        self._cursor.refused += 1
        line = {"seq": entry.seq, "event": entry.kind, "part": part, "reason": reason}
        with open(self._folder / "journal" / "refused.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _is_exiting() -> bool:
    """Whether Python is shutting down: then thread pools, and with them uploads, fail in ways that say nothing."""
    return not threading.main_thread().is_alive()
