"""Progress display of a running sweep: a live table on a terminal, occasional plain status lines elsewhere."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from msae_sweep.config import SweepConfig
from msae_sweep.sweep.time_left import TimeLeft
from msae_sweep.sweep_folder.rungs import STOPPED_AT
from msae_sweep.sweep_folder.trial_record import TrialRecord, ranked

LINE_SECONDS = 15.0
"""Minimum seconds between two plain status lines; a line for every trial that ends comes in addition."""
MOST_ROWS = 8
"""Maximum number of running trials, and of blocks, in the live view; a terminal with few lines shows fewer.

The live view only counts the others.
"""


class Display:
    """Display of trial records; it reads the records and does not change them.

    Tune's loop adds records while rich's thread draws them, so drawing starts from a copy of the list that is taken
    under a lock.
    """

    def __init__(self, console: Console, config: SweepConfig, n_trials: int, note: Callable[[], str]) -> None:
        """Prepare the display; entering it as a context manager starts the live table.

        Args:
            n_trials: number of trials of the whole sweep.
            note: returns a line about tracking, or an empty string if there is nothing to report.
        """
        self._console, self._name, self._n_trials, self._note = console, config.name, n_trials, note
        self._lock = threading.Lock()
        self._records: dict[str, TrialRecord] = {}
        self._estimate = TimeLeft(config, n_trials, time.monotonic)
        self._started = time.monotonic()
        self._last_line = 0.0
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, records: Iterable[TrialRecord]) -> None:
        """Show these records from now on; epochs that they already hold do not count towards the speed."""
        with self._lock:
            self._records = {record.trial_id: record for record in records}
            self._estimate.take(self._records.values())

    def print_line(self, line: str) -> None:
        """Print a line above the table."""
        self._console.print(line, highlight=False)

    def trial_ended(self, record: TrialRecord) -> None:
        """Print that a trial ended; may be called from any thread."""
        best = record.best
        score = f"objective {best['objective']:.4f}, dead {best['dead_ratio']:.1%}" if best else "no epoch finished"
        style = "red" if record.status in ("failed", "diverged") else None
        self._console.print(f"{record.trial_id} {_ending(record)}: {score}", highlight=False, style=style)

    def update(self, record: TrialRecord | None = None) -> None:
        """Update the display with `record`; without a terminal, print a status line at most every `LINE_SECONDS`."""
        if record is not None:
            with self._lock:
                self._records[record.trial_id] = record
                self._estimate.update(record)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(self._status_line(), highlight=False)

    def _copy(self) -> list[TrialRecord]:
        with self._lock:
            return list(self._records.values())

    def _status_line(self) -> str:
        records = self._copy()
        counts = Counter(record.status for record in records)
        counts["pending"] += self._n_trials - sum(counts.values())
        parts = [", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items() if count)]
        with self._lock:
            left, rate = self._estimate.seconds(records), self._estimate.rows_per_second
        if rate is not None:
            parts.append(f"{rate:,.0f} rows/s")
        elapsed = f"{_clock(time.monotonic() - self._started)} elapsed"
        parts.append(f"{elapsed}, about {_clock(left)} left" if left is not None else elapsed)
        return f"{self._name}: {' · '.join([*parts, *filter(None, [self._note()])])}"

    def _render(self) -> Group:
        records = self._copy()
        tables = [self._blocks(records)]
        if running := [record for record in records if record.status == "running"]:
            tables.append(self._running(running, records))
        return Group(*tables, Text(self._status_line()))

    @property
    def _n_rows(self) -> int:
        """Rows of each table that fit: a block may take two lines; headings, captions and the status line take 14."""
        return max(1, min(MOST_ROWS, (self._console.height - 14) // 3))

    def _blocks(self, records: Sequence[TrialRecord]) -> Table:
        """Return the table of each block's best trial so far."""
        table = Table(title=f"Sweep {self._name}", title_justify="left")
        for heading in (
            "block",
            "best trial",
            "objective",
            "R² by k",
            "dead",
            "lr",
            "expansion",
            "weighting",
            "epochs",
        ):
            table.add_column(heading, no_wrap=heading == "best trial")
        blocks: dict[int, list[TrialRecord]] = {}
        for record in records:
            blocks.setdefault(record.block, []).append(record)
        for block, members in sorted(blocks.items())[: self._n_rows]:
            order = ranked(members)
            if not order:
                table.add_row(str(block), "–")
                continue
            winner, best = order[0], order[0].best
            r2 = [f"{k[3:]} {v:.3f}" for k, v in best.items() if k.startswith("r2_k")]
            # On a narrow terminal, each level would take a line of its own.
            levels = " ".join(r2 if self._console.width >= 120 else dict.fromkeys([r2[0], r2[-1]]))
            cells = (
                str(block),
                winner.trial_id,
                f"{best['objective']:.4f}",
                levels,
                f"{best['dead_ratio']:.1%}",
                f"{winner.params.get('learning_rate', best['learning_rate']):.1e}",
                str(winner.params.get("expansion_factor", "")),
                str(winner.params.get("weighting", "")),
                self._epochs(winner),
            )
            table.add_row(*cells)
        if (more := len(blocks) - self._n_rows) > 0:
            table.caption = f"and {more} more blocks"
        return table

    def _running(self, running: Sequence[TrialRecord], records: Sequence[TrialRecord]) -> Table:
        """Return the table of running trials: first those that train, then those that wait at a rung."""
        with self._lock:
            waits = {record.trial_id: self._estimate.is_waiting(record, records) for record in running}
        table = Table(title="Running", title_justify="left", caption_justify="left")
        for heading in ("trial", "epoch", "objective", ""):
            table.add_column(heading, no_wrap=True)
        order = sorted(running, key=lambda record: (waits[record.trial_id], record.index, record.block))
        for record in order[: self._n_rows]:
            last = record.points[-1] if record.points else None
            doing = "waits at a rung" if waits[record.trial_id] else "trains" if last else "starts"
            objective = f"{last['objective']:.4f}" if last else "–"
            table.add_row(record.trial_id, self._epochs(record), objective, doing)
        if (more := len(order) - self._n_rows) > 0:
            table.caption = f"and {more} more"
        return table

    def _epochs(self, record: TrialRecord) -> str:
        with self._lock:
            return f"{record.epochs}/{self._estimate.epochs_of(record)}"


def _ending(record: TrialRecord) -> str:
    """Return how a trial ended, e.g. `completed after 12 epochs (patience)` or `stopped early by ASHA at epoch 1`."""
    if record.reason.startswith(STOPPED_AT):
        return f"stopped early by ASHA at epoch {record.reason.removeprefix(STOPPED_AT)}"
    why = f" ({record.reason})" if record.reason not in ("epochs", record.status, "") else ""
    return f"{record.status} after {record.epochs} epoch{'' if record.epochs == 1 else 's'}{why}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
