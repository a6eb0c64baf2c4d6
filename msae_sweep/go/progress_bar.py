"""Progress display for reading games and running them through a network: live bars on a terminal, else plain lines."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from rich import filesize
from rich import progress as bars
from rich.console import Console


class GamesProgress(NamedTuple):
    """Progress of running the positions of games through a network."""

    positions: int
    """Number of completed positions, including those of earlier attempts."""
    n_positions: int
    rows: int
    device: str
    """Device on which the network runs, with its operations and the reason; empty before the first chunk."""


class BytesProgress(NamedTuple):
    """Progress of reading or writing files before positions run through a network."""

    what: str
    """What is being done, such as `reading games`."""
    n_bytes: int
    """Number of bytes read from the disk, or of the content that is written."""
    total: int
    """Number of bytes of all files."""


LINE_SECONDS = 5.0
"""Minimum interval between two plain lines."""


class ProgressDisplay(Protocol):
    """Display of an extraction's progress."""

    def __call__(self, progress: GamesProgress) -> None:
        """Display the progress of positions."""

    def show_bytes(self, progress: BytesProgress) -> None:
        """Display the progress of what comes before the positions."""


@contextlib.contextmanager
def progress_display(console: Console) -> Iterator[ProgressDisplay]:
    """Yield a display of the progress passed to it, for the duration of the `with` block."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[done]}"),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as bar:
        yield _Bars(console, bar)


class _Rate:
    """Speed since the first call, and the device, which is said once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: tuple[float, int] | None = None
        self.device = ""

    def per_second(self, progress: GamesProgress) -> float:
        """Return the positions per second; 0 before the first positions are completed."""
        if self.started is None:
            self.started = time.monotonic(), progress.positions
        seconds = time.monotonic() - self.started[0]
        return (progress.positions - self.started[1]) / seconds if seconds > 0 else 0.0

    def say_device(self, progress: GamesProgress) -> None:
        """Print the device when it is first known."""
        if progress.device and progress.device != self.device:
            self.device = progress.device
            self.console.print(f"network on {progress.device}", highlight=False)


class _Lines:
    """Plain lines, at least `LINE_SECONDS` apart. What is done within this time is not said in bytes at all."""

    def __init__(self, console: Console) -> None:
        self.console, self.rate = console, _Rate(console)
        self.said_at = 0.0
        self.bytes_said_at: float | None = None

    def __call__(self, progress: GamesProgress) -> None:
        per_second = self.rate.per_second(progress)
        self.rate.say_device(progress)
        if time.monotonic() - self.said_at < LINE_SECONDS and progress.positions < progress.n_positions:
            return
        self.said_at = time.monotonic()
        text = f"{progress.positions:,} of {progress.n_positions:,} positions"
        if per_second:
            text += f" · {per_second:,.0f}/s"
            if left := progress.n_positions - progress.positions:
                text += f" · {left / per_second:,.0f} s left"
        self.console.print(text, highlight=False)

    def show_bytes(self, progress: BytesProgress) -> None:
        """Print a line if the last one, or the first call, was long enough ago."""
        if self.bytes_said_at is None:
            self.bytes_said_at = time.monotonic()
        if time.monotonic() - self.bytes_said_at >= LINE_SECONDS:
            self.bytes_said_at = time.monotonic()
            self.console.print(f"{progress.what}: {_of_bytes(progress)}", highlight=False)


class _Bars:
    """Live bars, one for each thing that is done."""

    def __init__(self, console: Console, bar: bars.Progress) -> None:
        self.rate, self.bar = _Rate(console), bar
        self.tasks: dict[str, bars.TaskID] = {}

    def __call__(self, progress: GamesProgress) -> None:
        per_second = self.rate.per_second(progress)
        self.rate.say_device(progress)
        self.bar.update(
            self._task("positions"),
            completed=progress.positions,
            total=progress.n_positions,
            done=f"{progress.positions:,}/{progress.n_positions:,}",
            rate=f"{per_second:,.0f}/s" if per_second else "",
        )

    def show_bytes(self, progress: BytesProgress) -> None:
        """Move the bar of what is being read or written."""
        task = self._task(progress.what)
        self.bar.update(task, completed=progress.n_bytes, total=progress.total, done=_of_bytes(progress))

    def _task(self, what: str) -> bars.TaskID:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=None, done="", rate="")
        return self.tasks[what]


def _of_bytes(progress: BytesProgress) -> str:
    """Return done and total in one unit, such as `1.2 of 9.8 GB`."""
    unit, suffix = filesize.pick_unit_and_suffix(progress.total, ["bytes", "kB", "MB", "GB", "TB"], 1000)
    digits = 0 if unit == 1 else 1
    return f"{progress.n_bytes / unit:,.{digits}f} of {progress.total / unit:,.{digits}f} {suffix}"
