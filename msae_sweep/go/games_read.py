"""Results and counts of reading games, for `game_reading` and `random_games`."""

import collections
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

from msae_sweep.go.progress_bar import BytesProgress
from msae_sweep.go.records import ReadUnit, RefusedRecord
from msae_sweep.go.sgf import Game, refuse_duplicates

Report = Callable[[BytesProgress], None]

_READING = "reading games"

Numbered = tuple[tuple[int, ...], Game | RefusedRecord]
"""Number of a stored game, and the game or the reason why it is refused."""


class GamesRead(NamedTuple):
    """Games read from the records, and counts of the refused ones."""

    games: list[Game]
    """Games without duplicates, in stored order; those of a random sample by ascending priority."""
    refused: collections.Counter[str]
    """Number of refused records and games by kind: broken, size, duplicate."""
    examples: list[str]
    """Names of at most five broken ones, each with the reason."""
    choice: str = ""
    """Description of the choice of games as text; empty if all games were read."""

    def counted(self) -> str:
        """Return the choice and the counts of refused games as text."""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.refused.items())) or "none refused"
        return f"{self.choice}{counts}"


class Refusals:
    """Counts of refused games, with some examples."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: list[str] = []

    def add(self, refused: RefusedRecord) -> None:
        """Count a refused record, and keep its reason if it is among the first broken ones."""
        self.counts[refused.kind] += 1
        if refused.kind == "broken" and len(self.examples) < 5:
            self.examples.append(f"{refused.name}: {refused.reason}")


class BytesRead:
    """Sum of the bytes that all tasks have read, which is reported whenever it grows."""

    def __init__(self, units: Iterable[ReadUnit], report: Report) -> None:
        files = {unit.file for unit in units}
        self.total = sum(os.path.getsize(file) for file in files if os.path.exists(file))
        self.done, self.report = 0, report
        report(BytesProgress(_READING, 0, self.total))

    def add(self, n_bytes: int) -> None:
        """Add the bytes that a task has read."""
        self.done += n_bytes
        self.report(BytesProgress(_READING, min(self.done, self.total), self.total))

    def finish(self) -> None:
        """Report that everything is read. Some bytes of a file, such as a zip's directory, were not counted."""
        self.report(BytesProgress(_READING, self.total, self.total))


def first_usable(outcomes: Iterable[Numbered], n_games: int | None) -> tuple[list[Game], Refusals]:
    """Return the first `n_games` usable games that differ, and count what is refused before them."""
    games: list[Game] = []
    refusals = Refusals()
    if n_games == 0:
        return games, refusals
    for outcome in refuse_duplicates(outcome for _, outcome in outcomes):
        if isinstance(outcome, RefusedRecord):
            refusals.add(outcome)
            continue
        games.append(outcome)
        if len(games) == n_games:
            break
    return games, refusals
