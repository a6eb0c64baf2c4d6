"""The sweep's side of tracking: says what happened, and never waits for MLflow.

Each call appends an event to the journal in the sweep folder (well under a millisecond) and returns; a process beside
the driver sends it.
MLflow being slow, down, or wrong costs no trial anything. The one error that a call can raise is the `OSError` of a
sweep folder that cannot be written, where nothing else of the sweep could be kept either.
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
"""A sweep that ends says after so many seconds without a word from MLflow that it waits, and gives it up after so many;
one request may take 20 s. A server that is slow, but takes one event after the other, is waited for."""


class SyncReport(NamedTuple):
    """What became of a journal."""

    sent: int
    """Events that MLflow has now."""
    pending: int
    """Events that it has not."""
    refused: int
    """Parts of events that it will never take."""
    reason: str
    """Why some are pending, in one line; empty otherwise."""

    def __str__(self) -> str:
        line = f"{self.sent} events sent to MLflow, {self.pending} left"
        line += f" ({self.reason})" if self.pending else ""
        return f"{line}, {self.refused} refused: see journal/refused.jsonl" if self.refused else line


class Shared(Protocol):
    """A sweep folder that is a copy of one in an object store."""

    def n_events(self, written: int) -> int:
        """How many of the journal's `written` events the store has."""

    def on_events(self, call: Callable[[], None]) -> None:
        """Have `call` called when it has more."""

    def fetch(self, path: Path) -> Path | None:
        """A file of the folder, or a temporary copy of it alone in a folder; None where there is none."""


class Tracker:
    """Writes a sweep's journal and has it sent. `start` makes one; it is for one thread, and `close` ends it."""

    def __init__(self, sweep_folder: Path, sweep_id: str, written: Journal, sending: SenderRunner, where: str) -> None:
        """`where`: MLflow's address, without secrets."""
        self._folder, self._sweep_id, self._journal, self._sending = sweep_folder, sweep_id, written, sending
        self._where = where

    @classmethod
    def start(
        cls,
        sweep_folder: Path,
        tracking: TrackingConfig,
        *,
        sweep_id: str,
        shared: Shared | None = None,
        sending: type[SenderRunner] | None = None,
        written: Journal | None = None,
    ) -> "Tracker":
        """Begin to track a sweep, or go on with one: then with the same folder and `sweep_id`.

        Args:
            sending: who runs the sender, by default a process of its own.
            written: the sweep's journal, where this process has it open already.

        Raises:
            ConfigError: a tracking URI that MLflow cannot use.
            SweepError: another process runs this sweep.
        """
        uri = resolve_uri(tracking.uri)
        sweep_folder = Path(sweep_folder).absolute()
        written = written or Journal(sweep_folder)
        begin = sending or SenderProcess
        if shared is None:
            sent: SenderRunner = begin(sweep_folder, uri, tracking, lambda: written.seq, lambda path: path)
        else:
            # What MLflow was told must never be lost, or a resumed sweep would tell it differently.
            sent = begin(sweep_folder, uri, tracking, lambda: shared.n_events(written.seq), shared.fetch)
            shared.on_events(sent.wake)
        return cls(sweep_folder, sweep_id, written, sent, redact(uri))

    @property
    def status(self) -> TrackingStatus:
        """How the sending stands, for a live display."""
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
        """The sweep begins, or goes on. A run that exists keeps its params; changed ones become a tag.

        Args:
            params: the resolved configuration, flattened: `training.epochs` ….
            tags: `git_commit`, `command`, versions and the like; user, torch and mlflow are added.
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
        """A trial begins, or goes on after a resume; `params` are all its settings, defaults too."""
        self._append("trial_started", trial_id=trial_id, block=block, params=dict(params))

    def metrics(self, *, trial_id: str, points: Sequence[Mapping[str, Any]]) -> None:
        """Epochs of a trial, ascending, each with `epoch`, `time_ms` and its metrics; those said before are dropped."""
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
        """A trial ended.

        Args:
            status: completed, stopped_early, diverged or failed.
            best: metrics of its best epoch, with `epoch`; empty where it finished none.
            model_file: that epoch's model in the notebook's format; it is read when its turn to be sent comes.
            tags: more to put on the run, e.g. device and kernel.
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
        """The sweep ended, for good (`completed`) or to be resumed (`interrupted`).

        Args:
            artifacts: files of the sweep folder to go with its run, at the same relative paths.
            champions: each block's best trial, to be registered as `{model_name}-block{B}` with the alias
                `champion`.
            metrics: of the sweep's own run, e.g. `block5/r2_k128`.
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
        """More files of the sweep folder to go with its run, also after its end, at the same relative paths."""
        self._append("artifacts", files=[self._relative(path) for path in files])

    def close(self, *, timeout_seconds: float, say: Callable[[str], object] = lambda line: None) -> SyncReport:
        """Wait until everything is sent, at most so long, and less where MLflow keeps failing; then let go.

        What is pending then is sent by `sync`, or when the sweep is resumed.

        Args:
            say: told in one line when MLflow has been silent for some seconds.
        """
        self._sending.finish(timeout_seconds, _Patience(self, self._where, say).lasts)
        self._journal.close()
        return _report(self.status, or_else=f"not done after {timeout_seconds:g} s")

    def _append(self, event: str, *, durable: bool = False, **fields: Any) -> None:
        self._journal.append(event, durable=durable, **fields)
        self._sending.wake()

    def _relative(self, path: Path) -> str:
        """Relative to the sweep folder, so that a folder that was moved can still be sent."""
        return path.absolute().relative_to(self._folder).as_posix()


class _Patience:
    """How long a closing tracker waits for a silent MLflow."""

    def __init__(self, tracker: Tracker, where: str, say: Callable[[str], object]) -> None:
        self._tracker, self._where, self._say = tracker, where, say
        self._sent, self._since, self._said = tracker.status.sent, time.monotonic(), False

    def lasts(self) -> bool:
        """Whether to wait on: it has sent something lately, or not yet failed."""
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
    """Send what a sweep's journal holds and MLflow has not; may be repeated, also after a driver was killed.

    Args:
        uri: where to; as in `resolve_uri`. Another place than before gets the whole sweep.
        on_progress: called after every step and every failure.

    Raises:
        ConfigError: a tracking URI that MLflow cannot use.
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
