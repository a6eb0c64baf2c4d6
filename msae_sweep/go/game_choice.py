"""Choice of games by their numbers: a random sample that is found while reading, with little in memory."""

import hashlib
import heapq
from typing import NamedTuple

from msae_sweep.errors import ConfigError
from msae_sweep.go.records import Record


class GameChoice(NamedTuple):
    """Settings that determine which of the stored games are used. Without any, all are."""

    max_games: int | None = None
    """Size of a uniform random sample of the usable games; None draws no sample."""
    first_games: int | None = None
    """Number of usable games after which reading stops, in stored order; None reads to the end."""

    def check(self) -> None:
        """Raise ConfigError if both a sample and the first games are wanted."""
        if self.max_games is not None and self.first_games is not None:
            raise ConfigError(
                "--first-games: cannot be given together with --max-games; --max-games draws a random sample of all "
                "games, --first-games stops reading early"
            )


ALL_GAMES = GameChoice()
"""Choice of all stored games."""


class Candidate(NamedTuple):
    """Game that may be in the sample, which consists of the usable games of the smallest priorities."""

    priority: int
    """Hash of the seed and the game's number, 64 bits."""
    record: Record


def priority_of(seed: int, number: tuple[int, int, int]) -> int:
    """Return a game's priority, which depends on the seed and on its number alone."""
    text = f"{seed} {number[0]} {number[1]} {number[2]}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class SmallestPriorities:
    """Collection of the `n` candidates of the smallest priorities among all that were added, in any order."""

    def __init__(self, n: int, below: int | None = None) -> None:
        self.n = n
        self._below = 1 << 64 if below is None else below
        # heapq pops the smallest entry, so all numbers are negated. No two games have the same number.
        self._heap: list[tuple[int, tuple[int, int, int], Record]] = []

    @property
    def below(self) -> int:
        """Priority from which on a game is certainly not among the smallest."""
        return self._below

    def add(self, priority: int, record: Record) -> None:
        """Add a candidate; keep it only if it is among the smallest so far."""
        if priority >= self._below:
            return
        file, member, game = record.number
        heapq.heappush(self._heap, (-priority, (-file, -member, -game), record))
        if len(self._heap) > self.n:
            heapq.heappop(self._heap)
        if len(self._heap) == self.n:
            self._below = min(self._below, 1 - self._heap[0][0])

    def in_order(self) -> list[Candidate]:
        """Return the candidates by ascending priority."""
        return [Candidate(-priority, record) for priority, _, record in sorted(self._heap, reverse=True)]
