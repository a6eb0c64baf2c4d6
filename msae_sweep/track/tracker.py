"""Tracker of a sweep, which records events in the journal and never waits for MLflow.

Each call appends an event to the journal in the sweep folder (well under a millisecond) and returns. A process beside
the driver sends the event. If MLflow is slow, down, or wrong, no trial is delayed. The only error that a call can raise
is the `OSError` of a sweep folder that cannot be written; then nothing else of the sweep could be stored either.
"""

import contextlib
import getpass
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from msae_sweep.config import TrackingConfig
from msae_sweep.track import journal
from msae_sweep.track.journal import Journal
from msae_sweep.track.sender import Fetch, Sender, TrackingStatus
from msae_sweep.track.sender_process import SenderProcess, SenderRunner
from msae_sweep.track.uri import redact, resolve_uri

SAY_SECONDS, SILENT_SECONDS = 5.0, 30.0
"""Limits at a sweep's end, in seconds in which no event was sent. After SAY_SECONDS a message says that the sweep waits
for MLflow. After SILENT_SECONDS it stops waiting if the last attempt failed; one request may take 20 s. It goes on
waiting for a server that is slow but accepts one event after the other."""


class SyncReport(NamedTuple):
    """Result of sending a journal to MLflow."""

    sent: int
    """Number of events that MLflow has now."""
    pending: int
    """Number of events that MLflow does not have yet."""
    refused: int
    """Number of parts of events that MLflow will never accept."""
    reason: str
    """Reason in one line why events are pending; empty if none are."""

    def __str__(self) -> str:
        line = f"{self.sent} events sent to MLflow, {self.pending} left"
        line += f" ({self.reason})" if self.pending else ""
        return f"{line}, {self.refused} refused: see journal/refused.jsonl" if self.refused else line


class SharedFolder(Protocol):
    """Interface of a sweep folder that may be a copy of one in an object store."""

    def n_sendable(self, written: int) -> int:
        """Return how many of the journal's `written` events may be sent: those that are in the object store already."""

    def on_upload(self, call: Callable[[], None]) -> None:
        """Register `call` to be called when more events are in the object store."""

    def fetch(self, path: Path) -> Path | None:
        """Return the path of a file of the folder, or of a temporary copy of it alone in a folder; None if missing."""


class Tracker:
    """Writes a sweep's journal and runs the sender that sends it.

    Create a tracker with `start`, use it in one thread only, and end it with `close`.
    """

    def __init__(self, sweep_folder: Path, sweep_id: str, written: Journal, sending: SenderRunner, where: str) -> None:
        """Store the parts that `start` creates.

        Args:
            where: MLflow's address, without secrets.
        """
        self._folder, self._sweep_id, self._journal, self._sending = sweep_folder, sweep_id, written, sending
        self._where = where

    @classmethod
    def start(
        cls,
        sweep_folder: Path,
        tracking: TrackingConfig,
        *,
        sweep_id: str,
        shared: SharedFolder | None = None,
        sending: type[SenderRunner] | None = None,
        written: Journal | None = None,
    ) -> "Tracker":
        """Start to track a sweep, or continue with a resumed one, which must have the same folder and `sweep_id`.

        Args:
            shared: the sweep folder, if it may be a copy of one in an object store.
            sending: class that runs the sender; by default `SenderProcess`, which uses a child process.
            written: the sweep's journal, if this process has it open already.

        Raises:
            ConfigError: MLflow cannot use the tracking URI.
            SweepError: another process runs this sweep.
        """
        uri = resolve_uri(tracking.uri)
        sweep_folder = Path(sweep_folder).absolute()
        written = written or Journal(sweep_folder)
        begin = sending or SenderProcess
        if shared is None:
            sent: SenderRunner = begin(sweep_folder, uri, tracking, lambda: written.seq, lambda path: path)
        else:
            # An event may be sent only when it is in the object store. Otherwise it could be lost after MLflow got it,
            # and the resumed sweep would send MLflow something else.
            sent = begin(sweep_folder, uri, tracking, lambda: shared.n_sendable(written.seq), shared.fetch)
            shared.on_upload(sent.wake)
        return cls(sweep_folder, sweep_id, written, sent, redact(uri))

    @property
    def status(self) -> TrackingStatus:
        """Progress of the sending, for a live display."""
        return self._sending.status

    def sweep_started(
        self,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        config_yaml: str,
        datasets: Mapping[int, Mapping[str, Any]],
    ) -> None:
        """Record that the sweep starts or is resumed. An existing run keeps its params; changed params become a tag.

        Args:
            params: the resolved configuration, flattened: `training.epochs` ….
            tags: `git_commit`, `command`, versions and the like. The user and the versions of torch and mlflow are
                added here.
            datasets: data manifest of each block.
        """
        known = {package: version(package) for package in ("torch", "mlflow")}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            known["user"] = getpass.getuser()
        self._append(
            "sweep_started",
            durable=True,
            sweep_id=self._sweep_id,
            name=name,
            params=dict(params),
            tags={**known, **tags},
            config_yaml=config_yaml,
            datasets={str(block): dict(manifest) for block, manifest in datasets.items()},
        )

    def trial_started(self, *, trial_id: str, block: int, params: Mapping[str, Any]) -> None:
        """Record that a trial starts, or continues after a resume. `params` are all its settings, defaults included."""
        self._append("trial_started", trial_id=trial_id, block=block, params=dict(params))

    def metrics(self, *, trial_id: str, points: Sequence[Mapping[str, Any]]) -> None:
        """Record epochs of a trial, ascending, each with `epoch`, `time_ms` and its metrics.

        Epochs that were recorded before are not sent to MLflow again.
        """
        self._append("metrics", trial_id=trial_id, points=[dict(point) for point in points])

    def trial_ended(
        self,
        *,
        trial_id: str,
        status: str,
        reason: str,
        best: Mapping[str, float],
        model_file: Path | None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Record that a trial ended.

        Args:
            status: completed, stopped_early, diverged or failed.
            best: metrics of the trial's best epoch, with `epoch`; empty if it finished no epoch.
            model_file: model of that epoch in the notebook's format. The file is read only when this event is sent.
            tags: additional tags for the run, e.g. device and kernel.
        """
        self._append(
            "trial_ended",
            durable=True,
            trial_id=trial_id,
            status=status,
            reason=reason,
            best=dict(best),
            model_file=self._relative(model_file) if model_file else None,
            tags=dict(tags or {}),
        )

    def sweep_ended(
        self,
        *,
        status: str,
        artifacts: Iterable[Path],
        champions: Mapping[int, str],
        metrics: Mapping[str, float],
    ) -> None:
        """Record that the sweep ended, either finally (`completed`) or to be resumed later (`interrupted`).

        Args:
            artifacts: files of the sweep folder to be logged as artifacts of its run, at the same relative paths.
            champions: best trial of each block. Its model is registered as `{model_name}-block{B}` with the alias
                `champion`.
            metrics: metrics of the sweep's own run, e.g. `block5/r2_k128`.
        """
        self._append(
            "sweep_ended",
            durable=True,
            status=status,
            reason="",
            artifacts=[self._relative(path) for path in artifacts],
            champions={str(block): trial_id for block, trial_id in champions.items()},
            metrics=dict(metrics),
            tags={f"champion.block{block}": trial_id for block, trial_id in champions.items()},
        )

    def artifacts(self, files: Iterable[Path]) -> None:
        """Record more files of the sweep folder to be logged as artifacts of its run, at the same relative paths.

        This is possible after the sweep's end too.
        """
        self._append("artifacts", files=[self._relative(path) for path in files])

    def close(self, *, timeout_seconds: float, say: Callable[[str], object] = lambda line: None) -> SyncReport:
        """Wait until every event is sent, then stop the sender and close the journal.

        The wait lasts at most `timeout_seconds`, and less if MLflow keeps failing. Events that are still pending then
        can be sent with `sync`, or are sent when the sweep is resumed.

        Args:
            say: called with a one-line message when the sending has made no progress for some seconds.
        """
        self._sending.finish(timeout_seconds, _Patience(self, self._where, say).lasts)
        self._journal.close()
        return _report(self.status, or_else=f"not done after {timeout_seconds:g} s")

    def _append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        self._journal.append(event, durable=durable, **fields)
        self._sending.wake()

    def _relative(self, path: Path) -> str:
        """Return a path relative to the sweep folder, so that the journal of a moved folder can still be sent."""
        return path.absolute().relative_to(self._folder).as_posix()


class _Patience:
    """Decides how long a closing tracker waits for an MLflow that does not answer."""

    def __init__(self, tracker: Tracker, where: str, say: Callable[[str], object]) -> None:
        self._tracker, self._where, self._say = tracker, where, say
        self._sent, self._since, self._said = tracker.status.sent, time.monotonic(), False

    def lasts(self) -> bool:
        """Return whether to continue to wait: an event was sent recently, or the last attempt has not failed."""
        status = self._tracker.status
        if status.sent != self._sent:
            self._sent, self._since = status.sent, time.monotonic()
        silent = time.monotonic() - self._since
        if silent >= SAY_SECONDS and status.pending and not self._said:
            self._said = True
            self._say(
                f"waiting for MLflow at {self._where}: no answer yet; {status.pending} events are safe in the sweep's "
                "journal and can be sent later"
            )
        return silent < SILENT_SECONDS or not status.last_error


def sync(
    sweep_folder: Path,
    uri: str | None = None,
    tracking: TrackingConfig | None = None,
    *,
    fetch: Fetch = lambda path: path,
    on_progress: Callable[[TrackingStatus], None] = lambda status: None,
) -> SyncReport:
    """Send the events of a sweep's journal that MLflow does not have. May be repeated, also after a driver was killed.

    Args:
        uri: destination, as in `resolve_uri`. A destination other than the last one gets the whole sweep.
        fetch: see `Fetch` in sender.
        on_progress: called after every step and every failure.

    Raises:
        ConfigError: MLflow cannot use the tracking URI.
    """
    sweep_folder = Path(sweep_folder).absolute()
    n_events = sum(1 for _ in journal.read(sweep_folder))
    if not n_events:
        return SyncReport(0, 0, 0, "")
    sender = Sender(sweep_folder, resolve_uri(uri), tracking or TrackingConfig(), lambda: n_events, fetch)
    finish = threading.Event()
    finish.set()
    sender.run(finish, threading.Event(), on_progress)
    return _report(sender.status)


def _report(status: TrackingStatus, or_else: str = "") -> SyncReport:
    reason = (status.last_error or or_else) if status.pending else ""
    return SyncReport(status.sent, status.pending, status.refused, reason)
