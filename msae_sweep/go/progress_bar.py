"""How far games have gone through a network: a live bar, or plain lines where nobody watches a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich import progress as bars
from rich.console import Console


class GamesProgress(NamedTuple):
    """How far games have gone through a network."""

    positions: int
    """Positions that are done, those of earlier attempts included."""
    n_positions: int
    rows: int
    device: str
    """On what the network runs, and how; empty before the first chunk."""


LINE_SECONDS = 5.0
"""Between two plain lines, at the least."""


def _rate(per_second: float) -> str:
    """Empty before the first positions are done."""
    return f"{per_second:,.0f}/s" if per_second else ""


@contextlib.contextmanager
def showing(console: Console) -> Iterator[Callable[[GamesProgress], None]]:
    """A function that takes an extraction's progress and shows it while this is open."""
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
