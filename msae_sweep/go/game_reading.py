"""Reading of games over a cluster: records → games, either all of them, a random sample, or the first ones.

A unit is read in one task, and its games are parsed in many.
"""

import collections
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

from msae_sweep.errors import DataError, MsaeSweepError
from msae_sweep.go.game_choice import ALL_GAMES, GameChoice
from msae_sweep.go.games_read import BytesRead, GamesRead, Numbered, Report, first_usable
from msae_sweep.go.pipeline import be_quiet
from msae_sweep.go.random_games import GAMES_A_TASK, sampled_games
from msae_sweep.go.records import ReadUnit, Record, RefusedRecord, read_unit
from msae_sweep.go.sgf import Game, parse_game

_DAMAGED: Literal["damaged"] = "damaged"
"""Kind of the row that stands in the place of games which cannot be read."""


def read_all_games(
    units: list[ReadUnit],
    where: Path,
    choice: GameChoice = ALL_GAMES,
    seed: int = 0,
    report: Report = lambda _: None,
) -> GamesRead:
    """Return the games that `choice` selects from all records, and counts of the refused ones.

    Args:
        units: the units to read.
        where: the path of all units, for error messages.
        choice: the games that are wanted.
        seed: the seed of a random sample.
        report: called with the number of bytes that have been read.

    Raises:
        DataError: no game is usable, or an archive or compressed file is damaged.
    """
    be_quiet()
    progress = BytesRead(units, report)
    try:
        if choice.max_games is not None:
            found = sampled_games(units, choice.max_games, seed, progress)
        else:
            found = _in_stored_order(units, choice.first_games, progress)
    except ray.exceptions.RayTaskError as error:
        # Our own errors are raised unwrapped, because Ray's traceback of the worker would hide the message.
        if isinstance(error.cause, MsaeSweepError | OSError):
            raise error.cause from None
        raise
    if choice.first_games is None:
        progress.finish()
    if not found.games:
        reasons = f"; the first broken one: {found.examples[0]}" if found.examples else ""
        raise DataError(f"{where}: no usable game ({found.counted()}){reasons}")
    return found


def _in_stored_order(units: list[ReadUnit], first_games: int | None, progress: BytesRead) -> GamesRead:
    parsed = parsed_games(units)
    if first_games is not None:
        parsed.context.execution_options.preserve_order = True
        games, refusals = first_usable(_outcomes(parsed, progress), first_games)
        choice = "the first ones in stored order, which are no random sample; before them "
        return GamesRead(games, refusals.counts, refusals.examples, choice if len(games) == first_games else "")
    # Sorted by number, so that of two equal games the same one is kept every time.
    outcomes = sorted(_outcomes(parsed, progress), key=lambda outcome: outcome[0])
    games, refusals = first_usable(outcomes, None)
    return GamesRead(games, refusals.counts, refusals.examples)


def _outcomes(parsed: ray.data.Dataset, progress: BytesRead) -> Iterator[Numbered]:
    """Yield the number of each game, and the game or the reason why it is refused.

    Raises:
        DataError: the games from here on are missing, because the file is damaged.
    """
    for row in parsed.iter_rows():
        if row["kind"] == _DAMAGED:
            raise DataError(row["reason"])
        if row["n_bytes"]:
            progress.add(row["n_bytes"])
        yield tuple(row["number"]), _unpacked(row)


def parsed_games(units: list[ReadUnit]) -> ray.data.Dataset:
    """Return a dataset of the parsed games of all units, with the columns of `_parse`."""
    be_quiet()
    records = ray.data.from_items(
        [{"unit": json.dumps(unit)} for unit in units], override_num_blocks=max(1, min(len(units), 200))
    ).map_batches(_read, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
    # `_read` and `_parse` request different resources, because with equal ones Ray would fuse them into one task per
    # unit, and one CPU would parse a whole file.
    games = records.map_batches(_parse, batch_size=None, batch_format="pyarrow")
    # Small blocks split the records of a file among many parsing tasks.
    games.context.target_max_block_size = 1 << 17
    return games


def _read(batch: Any) -> Iterator[dict[str, list[Any]]]:
    """Yield the games of a unit in groups, so that a file of any size can be read.

    The column `n_bytes` has the number of bytes that were read from the disk since the row before.
    """
    (unit,) = batch["unit"].to_pylist()
    columns: dict[str, list[Any]] = collections.defaultdict(list)
    read: list[int] = []
    for record in _read_or_say_why_not(ReadUnit(*json.loads(unit)), read.append):
        kind, reason, data = (
            (record.kind, record.reason, b"") if isinstance(record, RefusedRecord) else ("", "", record.data)
        )
        row = {"number": list(record.number), "name": record.name, "n_bytes": sum(read)}
        for column, value in {**row, "data": data, "kind": kind, "reason": reason}.items():
            columns[column].append(value)
        read.clear()
        if len(columns["name"]) == GAMES_A_TASK:
            yield dict(columns)
            columns.clear()
    if columns:
        yield dict(columns)


def _read_or_say_why_not(unit: ReadUnit, count: Callable[[int], None]) -> Iterator[Record | RefusedRecord]:
    """Yield the games of a unit, and if it is damaged the reason in the place of those that are missing.

    An error that is raised here would reach the driver before the games that were read. It may want no more than those.
    """
    try:
        yield from read_unit(unit, count)
    except DataError as error:
        yield RefusedRecord(unit.name, _DAMAGED, str(error))


def _parse(batch: Any) -> dict[str, list[Any]]:
    """Parse records into columns with one row per game or refused record.

    Every row has a number and a name. A game also has a key and its arrays as bytes; a refused record has a kind and a
    reason.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("number", "name", "n_bytes", "key", "kind", "reason", "setup", "moves", "black")
    }

    def add(**values: Any) -> None:
        row = {"key": "", "kind": "", "reason": "", "setup": b"", "moves": b"", "black": b"", **values}
        for column in columns:
            columns[column].append(row[column])

    for row in batch.to_pylist():
        given = {name: row[name] for name in ("number", "name", "n_bytes")}
        outcome = (
            RefusedRecord(row["name"], row["kind"], row["reason"])
            if row["kind"]
            else parse_game(Record(row["name"], row["data"]))
        )
        if isinstance(outcome, RefusedRecord):
            add(**given, kind=outcome.kind, reason=outcome.reason)
        else:
            add(
                **given,
                key=outcome.key,
                setup=outcome.setup.tobytes(),
                moves=outcome.moves.tobytes(),
                black=outcome.black_to_move.tobytes(),
            )
    return columns


def _unpacked(row: dict[str, Any]) -> Game | RefusedRecord:
    if row["kind"]:
        return RefusedRecord(row["name"], row["kind"], row["reason"])
    return Game(
        row["name"],
        row["key"],
        np.frombuffer(row["setup"], np.int8),
        np.frombuffer(row["moves"], np.int16),
        np.frombuffer(row["black"], np.bool_),
    )
