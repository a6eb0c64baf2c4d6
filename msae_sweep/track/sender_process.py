"""The child process that runs a sweep's sender beside its driver.

MLflow's client and the reading of models take a few tenths of a second of Python per trial. In a thread of the driver
they would delay Ray Tune's loop, which decides the next step of every trial. A sweep therefore uses the child process.

The driver and the child exchange lines of JSON over the child's standard input and output. The driver sends the task,
the number of events in the journal, a message that no more events will come, and the paths of files that the child
asked for. The child sends the progress and requests for files. If the driver dies, its pipe closes, and the child ends
at once, whatever it is doing; the saved cursor makes that safe. If the child dies, the driver starts it again.
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
    """Interface of the classes that run a sender beside the driver."""

    def __init__(
        self, sweep_folder: Path, uri: str, tracking: TrackingConfig, n_events: Callable[[], int], fetch: Fetch
    ) -> None:
        """Start the sender. The arguments are those of `Sender`."""

    @property
    def status(self) -> TrackingStatus:
        """Progress of the sending. It may be read from any thread."""

    def wake(self) -> None:
        """Notify the sender of new events. This may be called from any thread."""

    def finish(self, timeout_seconds: float, goes_on: GoesOn = lambda: True) -> None:
        """Send the remaining events and end; no events may follow.

        The wait lasts at most `timeout_seconds`, and less if MLflow keeps failing.

        Args:
            goes_on: called every second; if it returns False, the wait ends.
        """


class SenderProcess:
    """Runs the sender in a child process.

    One thread here writes to the child and another one reads from it, so that no other thread waits for the child.
    """

    def __init__(
        self, sweep_folder: Path, uri: str, tracking: TrackingConfig, n_events: Callable[[], int], fetch: Fetch
    ) -> None:
        """Start the sender. The arguments are those of `Sender`."""
        self._n_events, self._fetch = n_events, fetch
        # The child writes models to temporary files before it uploads them. They must not outlive a killed child.
        self._scratch = tempfile.TemporaryDirectory(prefix="msae-sender-")
        # Sent through the pipe and not on the command line: a URI may hold a password, and any user can read command
        # lines.
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
        """Progress of the sending. It may be read from any thread."""
        return self._said._replace(pending=max(0, self._n_events() - self._said.sent))

    def wake(self) -> None:
        """Notify the sender of new events. This may be called from any thread."""
        self._news.set()

    def finish(self, timeout_seconds: float, goes_on: GoesOn = lambda: True) -> None:
        """Send the remaining events and end, as described in `SenderRunner.finish`."""
        self._closing.set()
        self._news.set()
        _join(self._listener, timeout_seconds, goes_on)
        self._given_up = True
        self._process.kill()
        self._listener.join()
        self._scratch.cleanup()

    def _start(self) -> subprocess.Popen[str]:
        # The child imports the same modules as this process, even from a folder that only this process's path has.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": self._scratch.name},
            process_group=0,  # a group of its own, because a terminal's Ctrl-C goes to a whole process group
        )
        self._tell(process, self._task | {"events": self._n_events()})
        return process

    def _tell(self, process: subprocess.Popen[str], message: dict[str, Any]) -> None:
        assert process.stdin is not None
        # A child that has ended no longer reads. Its successor gets the messages that it missed.
        with self._writing, contextlib.suppress(OSError, ValueError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    def _talk(self) -> None:
        closing = False
        while not closing:
            self._news.wait()
            self._news.clear()
            closing = self._closing.is_set()  # read first, so that the last number counts every event
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
            self._said = self._said._replace(last_error=f"the sender process ended with {code}; it is restarted")
            self._closing.wait(min(2.0**deaths, LONGEST_PAUSE_SECONDS))
            deaths += 1
            self._process = self._start()
            # The new child must get what was meanwhile sent to its predecessor.
            self._tell(self._process, {"events": self._n_events(), "closing": self._closing.is_set()})

    def _reaped(self) -> int:
        """Wait for the child to end, close its pipes, and return its exit status."""
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
    """Wait until a thread ends, at most `timeout_seconds` and only while `goes_on` returns True."""
    deadline = time.monotonic() + timeout_seconds
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0 and goes_on():
        thread.join(min(left, 1.0))


class _Driver:
    """The child's connection to the driver."""

    def __init__(self, lines: IO[str], out: IO[str], scratch: str) -> None:
        """Wrap the child's input and output.

        Args:
            lines: messages from the driver, one a line.
            out: file to which messages for the driver are written.
            scratch: folder of temporary files, which is deleted if the driver ends.
        """
        self._lines, self._out, self._scratch = lines, out, scratch
        self.n_events = 0
        self.closing, self.wake = threading.Event(), threading.Event()
        self._answers: queue.SimpleQueue[dict[str, str | None]] = queue.SimpleQueue()

    def receive(self) -> None:
        """Handle the driver's messages until the driver closes the pipe; then end this process."""
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

    def send_status(self, status: TrackingStatus) -> None:
        """Send the progress of the sending to the driver."""
        self._write(status._asdict())

    def fetch(self, path: Path) -> Path | None:
        """Ask the driver for a file of the sweep folder, and return its path, or None if there is no such file.

        Raises:
            OSError: the driver could not fetch the file.
        """
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
        """End this process at once because the driver has ended. Do not wait for what the sender is doing."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        os._exit(1)


def main() -> None:
    """Run the child process: read the task, and send events until the driver asks to finish."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to stderr, so that it cannot be taken for a message
    # If Lightning is installed, MLflow would import it before the first model, for a callback that is not used here.
    # That import takes 10 s.
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
    driver.send_status(sender.status)
    threading.Thread(target=driver.receive, daemon=True).start()
    sender.run(driver.closing, driver.wake, driver.send_status)
    driver.send_status(sender.status)
    # All messages are sent and all files are on disk. A normal exit would first tear down MLflow and torch, which takes
    # 2 s for which the sweep would wait.
    os._exit(0)
