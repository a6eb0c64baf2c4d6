"""Who runs a sweep's sender beside its driver: a process of its own, or a thread.

MLflow's client and the reading of models are a few tenths of a second of Python a trial. In a thread of the driver they
would hold up Ray Tune's loop, which has every trial's next step to decide: so a sweep takes the process.

The two talk in lines of JSON, over the child's standard input and output. To the child: what to send, how many events
there are, that no more will come, and files that it asked for. From it: how the sending stands, and files that it wants
to be there. A driver that dies closes the pipe, and the child ends at once, in the middle of anything: the cursor bears
that. A child that dies is started again.
"""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from msae_sweep.config import TrackingConfig
from msae_sweep.track.sender import LAST_TRIES, LONGEST_PAUSE_SECONDS, Fetch, Sender, TrackingStatus

_CHILD = """
import signal
# Before anything that takes time: whoever stops a sweep means its driver, which still has something to say. Ray's job
# server signals each process that the driver started.
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
from msae_sweep.track.sender_process import main
main()
"""


GoesOn = Callable[[], bool]


class SenderRunner(Protocol):
    """A sender at work."""

    def __init__(
        self, sweep_folder: Path, uri: str, tracking: TrackingConfig, n_events: Callable[[], int], fetch: Fetch
    ) -> None:
        """Begin; see `Sender`."""

    @property
    def status(self) -> TrackingStatus:
        """How it stands; safe to ask from any thread."""

    def wake(self) -> None:
        """There are more events; may be called from any thread."""

    def finish(self, timeout_seconds: float, goes_on: GoesOn = lambda: True) -> None:
        """No more will come: send what is left, at most so long, and less where MLflow keeps failing; then end.

        Args:
            goes_on: asked every second; False ends the waiting.
        """


class SenderThread:
    """In a thread of this process."""

    def __init__(
        self, sweep_folder: Path, uri: str, tracking: TrackingConfig, n_events: Callable[[], int], fetch: Fetch
    ) -> None:
        """Begin; see `Sender`."""
        self._sender = Sender(sweep_folder, uri, tracking, n_events, fetch)
        self._closing, self._wake = threading.Event(), threading.Event()
        # A daemon, so that a sender stuck in a request cannot keep the process alive; the cursor bears being cut off.
        self._thread = threading.Thread(
            target=self._sender.run, args=(self._closing, self._wake), name="mlflow-sender", daemon=True
        )
        self._thread.start()

    @property
    def status(self) -> TrackingStatus:
        """See `SenderRunner`."""
        return self._sender.status

    def wake(self) -> None:
        """See `SenderRunner`."""
        self._wake.set()

    def finish(self, timeout_seconds: float, goes_on: GoesOn = lambda: True) -> None:
        """See `SenderRunner`."""
        self._closing.set()
        self._wake.set()
        _join(self._thread, timeout_seconds, goes_on)


class SenderProcess:
    """In a process of its own. Two threads here talk to it and listen, so that nobody else ever waits for it."""

    def __init__(
        self, sweep_folder: Path, uri: str, tracking: TrackingConfig, n_events: Callable[[], int], fetch: Fetch
    ) -> None:
        """Begin; see `Sender`."""
        self._n_events, self._fetch = n_events, fetch
        # Models on their way are written to files first, which must not outlive a child that was killed.
        self._scratch = tempfile.TemporaryDirectory(prefix="msae-sender-")
        # Through the pipe, not on the command line: a URI may hold a password, and anybody may read command lines.
        self._task = {
            "folder": str(sweep_folder),
            "uri": uri,
            "tracking": tracking.model_dump(mode="json"),
            "scratch": self._scratch.name,
        }
        self._said = TrackingStatus(0, 0, 0, "")
        self._news, self._closing, self._writing = threading.Event(), threading.Event(), threading.Lock()
        self._given_up = False
        self._process = self._start()
        self._listener = threading.Thread(target=self._listen, name="mlflow-sender", daemon=True)
        self._listener.start()
        threading.Thread(target=self._talk, name="mlflow-sender-news", daemon=True).start()

    @property
    def status(self) -> TrackingStatus:
        """See `SenderRunner`."""
        return self._said._replace(pending=max(0, self._n_events() - self._said.sent))

    def wake(self) -> None:
        """See `SenderRunner`."""
        self._news.set()

    def finish(self, timeout_seconds: float, goes_on: GoesOn = lambda: True) -> None:
        """See `SenderRunner`."""
        self._closing.set()
        self._news.set()
        _join(self._listener, timeout_seconds, goes_on)
        self._given_up = True
        self._process.kill()
        self._listener.join()
        self._scratch.cleanup()

    def _start(self) -> subprocess.Popen[str]:
        # The same modules as here, also where the package lies in a folder that only this process was told of.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": self._scratch.name},
            process_group=0,  # what a terminal interrupts
        )
        self._tell(process, self._task | {"events": self._n_events()})
        return process

    def _tell(self, process: subprocess.Popen[str], message: dict[str, Any]) -> None:
        assert process.stdin is not None
        # One that ended reads no more; what it missed, its successor is told.
        with self._writing, contextlib.suppress(OSError, ValueError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    def _talk(self) -> None:
        closing = False
        while not closing:
            self._news.wait()
            self._news.clear()
            closing = self._closing.is_set()  # asked before the number, so that the last one holds every event
            self._tell(self._process, {"events": self._n_events(), "closing": closing})

    def _listen(self) -> None:
        deaths = 0
        while True:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                message = json.loads(line)
                if "wanted" in message:
                    self._tell(self._process, self._fetched(Path(message["wanted"])))
                else:
                    self._said, deaths = TrackingStatus(**message), 0
            code = self._reaped()
            if self._closing.is_set() and (code == 0 or self._given_up or deaths == LAST_TRIES):
                return
            self._said = self._said._replace(last_error=f"the sender's process ended with {code}; it starts again")
            self._closing.wait(min(2.0**deaths, LONGEST_PAUSE_SECONDS))
            deaths += 1
            self._process = self._start()
            # What was told the last one meanwhile.
            self._tell(self._process, {"events": self._n_events(), "closing": self._closing.is_set()})

    def _reaped(self) -> int:
        """Exit status of the child, of which nothing is left afterwards."""
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with self._writing, contextlib.suppress(OSError):
                pipe.close()
        return code

    def _fetched(self, path: Path) -> dict[str, str | None]:
        try:
            found = self._fetch(path)
        except Exception as error:
            return {"fault": f"{type(error).__name__}: {error}"}
        return {"fetched": None if found is None else str(found)}


def _join(thread: threading.Thread, timeout_seconds: float, goes_on: GoesOn) -> None:
    """Wait for a thread's end, at most so long and only while `goes_on` says so."""
    deadline = time.monotonic() + timeout_seconds
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0 and goes_on():
        thread.join(min(left, 1.0))


class _Driver:
    """The driver, as the child knows it."""

    def __init__(self, lines: IO[str], out: IO[str], scratch: str) -> None:
        """`scratch`: what to delete when it is gone."""
        self._lines, self._out, self._scratch = lines, out, scratch
        self.n_events = 0
        self.closing, self.wake = threading.Event(), threading.Event()
        self._answers: queue.SimpleQueue[dict[str, str | None]] = queue.SimpleQueue()

    def hear(self) -> None:
        """Follow what it says, to the end."""
        for line in self._lines:
            message = json.loads(line)
            if "fetched" in message or "fault" in message:
                self._answers.put(message)
                continue
            self.n_events = message.get("events", self.n_events)
            if message.get("closing"):
                self.closing.set()
            self.wake.set()
        self._end_with_it()

    def say(self, status: TrackingStatus) -> None:
        """How the sending stands."""
        self._write(status._asdict())

    def fetch(self, path: Path) -> Path | None:
        """Ask it for a file of the sweep folder."""
        self._write({"wanted": str(path)})
        answer = self._answers.get()
        if "fault" in answer:
            raise OSError(answer["fault"])
        return None if answer["fetched"] is None else Path(answer["fetched"])

    def _write(self, message: dict[str, Any]) -> None:
        try:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()
        except OSError:
            self._end_with_it()

    def _end_with_it(self) -> None:
        """It is gone; what the sender is in the middle of is not to be waited for."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        os._exit(1)


def main() -> None:
    """What the child does."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no message
    # Where Lightning is installed, MLflow would import it before the first model, for a callback that nobody uses here:
    # 10 s.
    sys.modules["pytorch_lightning"] = None  # type: ignore[assignment]
    task = json.loads(sys.stdin.readline())
    driver = _Driver(sys.stdin, out, task["scratch"])
    driver.n_events = task["events"]
    sender = Sender(
        Path(task["folder"]),
        task["uri"],
        TrackingConfig.model_validate(task["tracking"]),
        lambda: driver.n_events,
        driver.fetch,
    )
    driver.say(sender.status)
    threading.Thread(target=driver.hear, daemon=True).start()
    sender.run(driver.closing, driver.wake, driver.say)
    driver.say(sender.status)
    # All is said and on disk. Python would first take MLflow and torch apart, for 2 s in which the sweep waits.
    os._exit(0)
