"""Reading of a random sample of games over a cluster, with little in memory, however many games there are.

The reading tasks only pass on the games of the smallest priorities, so that neither a worker nor the driver holds more
than a multiple of the sample.
"""

import collections
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ray

from msae_sweep.go.game_choice import Candidate, SmallestPriorities, priority_of
from msae_sweep.go.games_read import BytesRead, GamesRead, Numbered, Refusals, first_usable
from msae_sweep.go.records import ReadUnit, Record, RefusedRecord, read_unit
from msae_sweep.go.sgf import parse_game

GAMES_A_TASK = 128
"""Games per parsing task. One file of some thousand games then occupies many CPUs; a task takes about 0.1 s."""
_MARGIN = 64
"""Minimum number of games that are passed on beyond those that are wanted, because some are refused."""
_UNITS_A_TASK = 256
"""Maximum number of units in a reading task of a sample, so that many loose files do not need a task each."""
_BYTES_A_TASK = 32 * 2**20
"""Number of bytes after which a reading task of a sample gets no further unit."""
_BYTES_A_REPORT = 4 * 2**20
"""Number of bytes after which a reading task of a sample tells how far it is. Ray repeats a lost task, which must then
yield as often as before, so this is not a time."""


class _Drawn(NamedTuple):
    """Result of reading some units for a sample."""

    candidates: list[Candidate]
    """Games of the smallest priorities, ascending."""
    n_games: int
    """Number of games that were read."""
    refused: collections.Counter[str]
    examples: list[str]


def sampled_games(units: list[ReadUnit], max_games: int, seed: int, progress: BytesRead) -> GamesRead:
    """Return the usable games of the smallest priorities.

    Only the games of the smallest priorities are passed on and parsed, some more than wanted. If too many of them are
    refused, everything is read again and more are passed on, so that the result is always exact.
    """
    n = max_games + max(_MARGIN, max_games // 8)
    while True:
        drawn = _drawn(units, n, seed, progress)
        games, refusals = first_usable(_parsed(drawn.candidates), max_games)
        if len(games) == max_games or n >= drawn.n_games:
            break
        # A quarter more than the share of usable games suggests.
        n = min(drawn.n_games, max(2 * n, 5 * n * max_games // (4 * max(1, len(games)))))
        progress.done = 0
    for example in drawn.examples:
        refusals.examples.append(example)
    counts = refusals.counts + drawn.refused
    choice = f"sampled from {drawn.n_games:,}; among those that were looked at " if drawn.n_games > len(games) else ""
    return GamesRead(games, counts, refusals.examples[:5], choice)


def _drawn(units: list[ReadUnit], n: int, seed: int, progress: BytesRead) -> _Drawn:
    """Return the `n` games of the smallest priorities of all units."""
    smallest, n_games, refusals = SmallestPriorities(n), 0, Refusals()
    waiting = collections.deque(_groups(units))
    running: list[Any] = []
    task = ray.remote(_draw).options(num_returns="streaming", num_cpus=1)
    at_once = max(1, int(ray.cluster_resources()["CPU"]))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                # Later tasks know a bound from the earlier ones. It changes how much they pass on, not what is drawn.
                running.append(task.remote(waiting.popleft(), n, seed, smallest.below))
            (ready,), running = ray.wait(running, num_returns=1)
            try:
                told = ray.get(next(ready))
            except StopIteration:
                continue
            running.append(ready)
            if isinstance(told, int):
                progress.add(told)
                continue
            for priority, record in told.candidates:
                smallest.add(priority, record)
            n_games += told.n_games
            refusals.counts += told.refused
            refusals.examples += told.examples
    finally:
        for left in running:
            ray.cancel(left)
    return _Drawn(smallest.in_order(), n_games, refusals.counts, refusals.examples[:5])


def _draw(units: Sequence[ReadUnit], n: int, seed: int, below: int) -> Iterator[int | _Drawn]:
    """Yield the numbers of bytes read since the last yield, and at the end the games of the smallest priorities.

    Args:
        units: the units to read.
        n: maximum number of games.
        seed: the seed of the priorities.
        below: priority from which on a game is not wanted.
    """
    smallest, n_games, refusals = SmallestPriorities(n, below), 0, Refusals()
    n_bytes = 0

    def count(more: int) -> None:
        nonlocal n_bytes
        n_bytes += more

    for unit in units:
        for record in read_unit(unit, count):
            if isinstance(record, RefusedRecord):
                refusals.add(record)
            else:
                n_games += 1
                smallest.add(priority_of(seed, record.number), record)
            if n_bytes >= _BYTES_A_REPORT:
                yield n_bytes
                n_bytes = 0
    yield n_bytes
    yield _Drawn(smallest.in_order(), n_games, refusals.counts, refusals.examples)


def _groups(units: Iterable[ReadUnit]) -> Iterator[list[ReadUnit]]:
    """Yield the units of each reading task."""
    group: list[ReadUnit] = []
    n_bytes = 0
    for unit in units:
        group.append(unit)
        # A part of a zip counts like a whole file, because its members may lie anywhere in the file.
        n_bytes += os.path.getsize(unit.file) if os.path.exists(unit.file) else 0
        if len(group) == _UNITS_A_TASK or n_bytes >= _BYTES_A_TASK:
            yield group
            group, n_bytes = [], 0
    if group:
        yield group


def _parsed(candidates: Sequence[Candidate]) -> Iterator[Numbered]:
    """Yield the parsed candidates in their order. A bounded number of tasks runs ahead."""
    task = ray.remote(_parse_records)
    ahead = 2 * max(1, int(ray.cluster_resources()["CPU"]))
    running: collections.deque[Any] = collections.deque()
    for start in range(0, len(candidates), GAMES_A_TASK):
        running.append(task.remote([candidate.record for candidate in candidates[start : start + GAMES_A_TASK]]))
        if len(running) == ahead:
            yield from pickle.loads(ray.get(running.popleft()))
    while running:
        yield from pickle.loads(ray.get(running.popleft()))


def _parse_records(records: Sequence[Record]) -> bytes:
    # Pickled here, because arrays that Ray unpickles stay in its object store.
    return pickle.dumps([(record.number, parse_game(record)) for record in records])
