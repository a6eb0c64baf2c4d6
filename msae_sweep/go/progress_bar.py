"""Progress display for running games through a network: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

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


LINE_SECONDS = 5.0
"""Minimum interval between two plain lines."""


def _rate(per_second: float) -> str:
    """Return the rate as text; empty before the first positions are completed."""
    return f"{per_second:,.0f}/s" if per_second else ""


@contextlib.contextmanager
def progress_display(console: Console) -> Iterator[Callable[[GamesProgress], None]]:
    """Yield a function that displays the progress passed to it, for the duration of the `with` block."""
    started: list[tuple[float, int]] = []
    said_device, said_at = "", 0.0

    def rate(progress: GamesProgress) -> float:
        if not started:
            started.append((time.monotonic(), progress.positions))
        seconds = time.monotonic() - started[0][0]
        return (progress.positions - started[0][1]) / seconds if seconds > 0 else 0.0

    def say_device(progress: GamesProgress) -> None:
        nonlocal said_device
        if progress.device and progress.device != said_device:
            said_device = progress.device
            console.print(f"network on {progress.device}", highlight=False)

    if not console.is_terminal:

        def line(progress: GamesProgress) -> None:
            nonlocal said_at
            per_second = rate(progress)
            say_device(progress)
            if time.monotonic() - said_at < LINE_SECONDS and progress.positions < progress.n_positions:
                return
            said_at = time.monotonic()
            text = f"{progress.positions:,} of {progress.n_positions:,} positions"
            if per_second:
                text += f" · {per_second:,.0f}/s"
                if left := progress.n_positions - progress.positions:
                    text += f" · {left / per_second:,.0f} s left"
            console.print(text, highlight=False)

        yield line
        return

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task("positions", total=None, rate="")

        def advance(progress: GamesProgress) -> None:
            per_second = rate(progress)
            say_device(progress)
            bar.update(task, completed=progress.positions, total=progress.n_positions, rate=_rate(per_second))

        yield advance
