"""Replacement for `SenderProcess` in tests."""

import threading
from collections.abc import Callable
from pathlib import Path

from msae_sweep.config import TrackingConfig
from msae_sweep.track.sender import Fetch, Sender, TrackingStatus
from msae_sweep.track.sender_process import GoesOn, _join


class SenderThread:
    """Runs the sender in a thread of this process, which spares a test the seconds that a child process imports for."""

    def __init__(
        self, sweep_folder: Path, uri: str, tracking: TrackingConfig, n_events: Callable[[], int], fetch: Fetch
    ) -> None:
        """Start the sender. The arguments are those of `Sender`."""
        self._sender = Sender(sweep_folder, uri, tracking, n_events, fetch)
        self._closing, self._wake = threading.Event(), threading.Event()
        # A daemon thread, so that a sender stuck in a request cannot keep the process alive. Because of the saved
        # cursor, the sender may be interrupted at any point.
        self._thread = threading.Thread(
            target=self._sender.run, args=(self._closing, self._wake), name="mlflow-sender", daemon=True
        )
        self._thread.start()

    @property
    def status(self) -> TrackingStatus:
        """Progress of the sending. It may be read from any thread."""
        return self._sender.status

    def wake(self) -> None:
        """Notify the sender of new events. This may be called from any thread."""
        self._wake.set()

    def finish(self, timeout_seconds: float, goes_on: GoesOn = lambda: True) -> None:
        """Send the remaining events and end, as described in `SenderRunner.finish`."""
        self._closing.set()
        self._wake.set()
        _join(self._thread, timeout_seconds, goes_on)
