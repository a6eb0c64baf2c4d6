"""Sender that sends a sweep's journal to MLflow, and retries after a pause whenever MLflow fails."""

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
"""Time for which new events are collected before they are sent together.

This makes one `log_batch` per trial instead of one per report."""
LONGEST_PAUSE_SECONDS = 30.0
"""Longest pause after a failure. Pauses double from one second up to this."""
LAST_TRIES = 3
"""Number of failures in a row after which a sender that was asked to finish gives up."""
Fetch = Callable[[Path], Path | None]
"""Function that returns a file of the sweep folder as a path on this machine.

The path is the file's own, or that of a temporary copy alone in a folder, or None if there is no such file."""
_MOST_TOGETHER = 200
"""Largest number of `metrics` events that are sent together."""
UPLOADS_AT_ONCE = 4
"""Number of models that are uploaded to a server in parallel.

With one upload at a time, a server on PostgreSQL and an S3 store received 0.52 trials/s, and two thirds of the two
cores that all of them shared were idle. A SQLite file gets one upload at a time, because it allows one writer and there
is no server to wait for."""


class TrackingStatus(NamedTuple):
    """Progress of sending a journal to MLflow."""

    sent: int
    """Number of events that were sent."""
    pending: int
    """Number of events that may be sent and were not sent yet."""
    refused: int
    """Number of parts of events that MLflow will never accept; `journal/refused.jsonl` lists them."""
    last_error: str
    """Last error in one line; empty if sending succeeds."""


class Sender:
    """Sends the journal's events after the cursor to MLflow. At most one sender per sweep sends at a time."""

    def __init__(
        self,
        sweep_folder: Path,
        uri: str,
        tracking: TrackingConfig,
        n_events: Callable[[], int],
        fetch: Fetch = lambda path: path,
    ) -> None:
        """Load the cursor, without connecting to MLflow yet.

        Args:
            n_events: returns the number of events in the journal that may be sent.
            fetch: see `Fetch`.
        """
        self._fetch = fetch
        self._folder, self._uri, self._tracking, self._n_events = sweep_folder, uri, tracking, n_events
        self._destination = f"{redact(uri)} {tracking.experiment}"
        self._cursor = self._load_cursor()
        self._lock: IO[str] | None = None
        self._uploads = Uploads(UPLOADS_AT_ONCE if uri.startswith("http") else 1)
        self._refusal_lock = threading.Lock()
        self._recorded_refusals: set[tuple[int, str]] = set()
        self._handlers: EventHandlers | None = None
        self._last_error = ""

    @property
    def status(self) -> TrackingStatus:
        """Progress of the sending. It may be read from any thread."""
        sent = self._cursor.seq
        return TrackingStatus(sent, max(0, self._n_events() - sent), self._cursor.refused, self._last_error)

    def run(
        self,
        closing: threading.Event,
        wake: threading.Event,
        on_progress: Callable[[TrackingStatus], None] = lambda status: None,
    ) -> None:
        """Send new events until `closing` is set. Then send what is left, unless MLflow fails three times in a row.

        Args:
            closing: set by the caller when no more events will be appended.
            wake: set by the caller after an event was appended.
            on_progress: called after every step and every failure.
        """
        failures = 0
        while True:
            is_last = closing.is_set()  # read before sending, so that the last pass sees every event
            wake.clear()
            try:
                self._send(on_progress)
            except Exception as error:
                # No error is fatal here, because the events are on disk and the trials continue.
                self._handlers, self._last_error = None, one_line(error)
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
                    logged_models.export_ahead()
                wake.wait()
                closing.wait(COALESCE_SECONDS)
        if self._lock is not None:
            self._lock.close()

    def _send(self, on_progress: Callable[[TrackingStatus], None]) -> None:
        if self._lock is None:
            self._lock = journal.lock(self._folder)
        if self._handlers is None:
            self._handlers = self._connect()
        register_as = self._tracking.model_name if self._tracking.register_models else None
        try:
            for entries in self._groups():
                if self._needs_all_before(entries):
                    self._advance_cursor(0, on_progress)
                upload = self._handlers.apply(entries, register_as=register_as)
                self._uploads.add(entries[-1], upload)
                self._advance_cursor(self._uploads.at_once, on_progress)
            self._advance_cursor(0, on_progress)
        finally:
            # After a failure, no upload may still be running when the events are sent again.
            self._uploads.drop()

    def _needs_all_before(self, entries: list[Entry]) -> bool:
        """Return whether events must wait until all earlier ones are sent, uploads included.

        This is so if they may need any trial's model, or if they belong to a trial whose model is being uploaded.
        """
        of_trials = all(entry.kind in ("trial_started", "metrics", "trial_ended") for entry in entries)
        return not of_trials or self._uploads.concern({str(entry.event.get("trial_id")) for entry in entries})

    def _advance_cursor(self, at_most: int, on_progress: Callable[[TrackingStatus], None]) -> None:
        """Move the cursor past the events that are sent, and wait while more than `at_most` uploads are running."""
        for entry in self._uploads.done(at_most):
            self._cursor.position, self._cursor.seq = entry.end, entry.seq
            self._cursor.save(self._folder)
            on_progress(self.status)

    def _connect(self) -> EventHandlers:
        """Connect to MLflow and look up the sweep's runs.

        This is repeated after every failure, so that no run is created twice.
        """
        client = connect(self._uri)
        runs = Runs(client, self._tracking.experiment, artifact_root(self._uri))
        self._cursor = self._load_cursor()  # loaded again, because the lock is held now
        if self._cursor.run_id and not runs.is_alive(self._cursor.run_id):
            # The database was replaced or the sweep's run was deleted, so every event has to be sent again.
            self._cursor = Cursor(self._destination)
        return EventHandlers(client, runs, self._cursor, self._folder, self._refused, self._fetch)

    def _load_cursor(self) -> Cursor:
        """Return the saved cursor if it belongs to this destination and this journal, else a new one."""
        cursor = Cursor.load(self._folder)
        fits = cursor.destination == self._destination and cursor.seq <= self._n_events()
        return cursor if fits else Cursor(self._destination)

    def _groups(self) -> Iterator[list[Entry]]:
        """Yield consecutive `metrics` events together, and every other event alone."""
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
        """Record a part of an event that MLflow will never accept. Log a warning for the first one."""
        if _is_exiting():
            raise TrackingError("the process is ending")
        with self._refusal_lock:  # uploads call this from threads of their own
            # After a failed upload, the events that follow it are sent again, and their parts are rejected again.
            if (entry.seq, part) not in self._recorded_refusals:
                self._recorded_refusals.add((entry.seq, part))
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
    """Return whether Python is shutting down. Thread pools then fail, and uploads with them, with misleading errors."""
    return not threading.main_thread().is_alive()
