"""Console that the commands print on, and the progress of commands that go through rows."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 5.0
"""Minimum interval between two plain lines of progress."""


def open_console() -> "Console":
    """Return a console. In a file or a job's log it is 160 columns wide, so that tables are not squeezed."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


@contextlib.contextmanager
def rows_display(console: "Console") -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress in rows: a live bar on a terminal, plain lines elsewhere.

    It takes the number of rows that are done, of earlier attempts too, and the number of all rows.
    """
    first: list[tuple[float, int]] = []
    said_at = time.monotonic()

    def rate(rows: int) -> float:
        if not first:
            first.append((time.monotonic(), rows))
        seconds = time.monotonic() - first[0][0]
        return (rows - first[0][1]) / seconds if seconds > 0 else 0.0

    if not console.is_terminal:

        def line(rows: int, n_rows: int) -> None:
            nonlocal said_at
            per_second = rate(rows)
            if per_second and time.monotonic() - said_at >= LINE_SECONDS:
                said_at = time.monotonic()
                left = (n_rows - rows) / per_second
                console.print(
                    f"{rows:,} of {n_rows:,} rows · {per_second:,.0f}/s · {left:,.0f} s left", highlight=False
                )

        yield line
        return

    from rich import progress as bars

    columns = (
        bars.TextColumn("rows"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("rows", total=None, rate="")

        def advance(rows: int, n_rows: int) -> None:
            bar.update(task, completed=rows, total=n_rows, rate=f"{rate(rows):,.0f}/s")

        yield advance
