"""Ray Data pipeline that reads games and runs networks on their positions, over a cluster.

records → games (CPU tasks) → boards of chunks (CPU tasks) → results of an actor that holds a network. Little data is
sent between processes: a game has 1 KB, a position 3 KB.
"""

import collections
import json
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from jaxtyping import Bool, Int8, Int16, Int64
from ray.data import DataContext

from msae_sweep.errors import DataError, MsaeSweepError
from msae_sweep.go.records import ReadUnit, Record, RefusedRecord, read_unit
from msae_sweep.go.replay import replay
from msae_sweep.go.sampling import Chunk, Sampling, sampled_points
from msae_sweep.go.sgf import Game, read_games, refuse_duplicates
from msae_sweep.stderr_filter import without_line

BATCH = {"cuda": 2048, "cpu": 32}
"""Positions per forward pass. On one H200, 2048 was the fastest of the measured sizes, at 20,290 positions/s."""

_GAMES_A_TASK = 128
"""Records per parsing task. One tar of some thousand games then occupies many CPUs; a task takes about 0.1 s."""


class ChosenPositions(NamedTuple):
    """Explicitly chosen positions of games, which the pipeline accepts in place of a `Chunk`."""

    number: int
    first_position: int
    n_positions: int
    picks: list[tuple[Game, Int64[np.ndarray, " plies"]]]

    def plies(self, _: Sampling) -> Iterator[tuple[Game, Int64[np.ndarray, " plies"]]]:
        """Yield each game with the plies of its chosen positions."""
        yield from self.picks


class ChunkBoards(NamedTuple):
    """Boards of a chunk's positions, from which the network's planes are made, with the positions' index columns."""

    number: int
    """Number of the chunk."""
    seconds: float
    """Seconds that the CPU task needed to make the boards."""
    boards: Int8[np.ndarray, "positions 8 361"]
    black_to_move: Bool[np.ndarray, " positions"]
    points: Int16[np.ndarray, "positions points"]
    """Requested points of the board for each position; −1 stands for the mean over the board."""
    ply: Int64[np.ndarray, " positions"]
    game_id: Int64[np.ndarray, " positions"]
    position_id: Int64[np.ndarray, " positions"]


class GamesRead(NamedTuple):
    """Games read from the records, and counts of the refused ones."""

    games: list[Game]
    """Games without duplicates, sorted by name."""
    refused: collections.Counter[str]
    """Number of refused records and games by kind: broken, size, duplicate."""
    examples: list[str]
    """Names of at most five broken ones, each with the reason."""

    def counted(self) -> str:
        """Return the counts of refused games as text."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.refused.items())) or "none refused"


def read_all_games(units: list[ReadUnit], where: Path) -> GamesRead:
    """Return the games of all records, and counts of the refused ones.

    Raises:
        DataError: no game is usable.
    """
    outcomes = [_unpacked(row) for row in parsed_games(units).iter_rows()]
    outcomes.sort(key=lambda outcome: outcome.name)
    games: list[Game] = []
    refused: collections.Counter[str] = collections.Counter()
    examples: list[str] = []
    for outcome in refuse_duplicates(outcomes):
        if isinstance(outcome, Game):
            games.append(outcome)
        else:
            refused[outcome.kind] += 1
            if outcome.kind == "broken" and len(examples) < 5:
                examples.append(f"{outcome.name}: {outcome.reason}")
    found = GamesRead(games, refused, examples)
    if not games:
        reasons = f"; the first broken one: {examples[0]}" if examples else ""
        raise DataError(f"{where}: no usable game ({found.counted()}){reasons}")
    return found


def parsed_games(units: list[ReadUnit]) -> ray.data.Dataset:
    """Return a dataset of the parsed games of all units, with the columns of `_parse`."""
    _be_quiet()
    records = ray.data.from_items(
        [{"unit": json.dumps(unit)} for unit in units], override_num_blocks=max(1, min(len(units), 200))
    ).map_batches(_read, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
    # `_read` and `_parse` request different resources, because with equal ones Ray would fuse them into one task per
    # unit, and one CPU would parse a whole tar.
    games = records.map_batches(_parse, batch_size=None, batch_format="pyarrow")
    # Small blocks split the records of a tar among many parsing tasks.
    games.context.target_max_block_size = 1 << 17
    return games


def _be_quiet() -> None:
    """Turn off Ray Data's progress bars and logs, because this pipeline has its own display; raise original errors."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _read(batch: Any) -> Iterator[dict[str, list[Any]]]:
    """Yield the records of a unit in groups, so that an archive of any size can be read."""
    (unit,) = batch["unit"].to_pylist()
    columns: dict[str, list[Any]] = collections.defaultdict(list)
    for record in read_unit(ReadUnit(*json.loads(unit))):
        kind, reason, data = (
            (record.kind, record.reason, b"") if isinstance(record, RefusedRecord) else ("", "", record.data)
        )
        for column, value in (("name", record.name), ("data", data), ("kind", kind), ("reason", reason)):
            columns[column].append(value)
        if len(columns["name"]) == _GAMES_A_TASK:
            yield dict(columns)
            columns.clear()
    if columns:
        yield dict(columns)


def _parse(batch: Any) -> dict[str, list[Any]]:
    """Parse records into columns with one row per game or refused record.

    Every row has a name. A game also has a key and its arrays as bytes; a refused record has a kind and a reason.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("name", "key", "kind", "reason", "setup", "moves", "black")}

    def add(name: str, **values: str | bytes) -> None:
        row = {"name": name, "key": "", "kind": "", "reason": "", "setup": b"", "moves": b"", "black": b"", **values}
        for column in columns:
            columns[column].append(row[column])

    for row in batch.to_pylist():
        if row["kind"]:
            add(row["name"], kind=row["kind"], reason=row["reason"])
            continue
        for outcome in read_games(Record(row["name"], row["data"])):
            if isinstance(outcome, RefusedRecord):
                add(outcome.name, kind=outcome.kind, reason=outcome.reason)
            else:
                add(
                    outcome.name,
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


def run_actor_on_chunks(
    chunks: Sequence[Chunk | ChosenPositions], sampling: Sampling, actor: type, arguments: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Yield the result of `actor` for the boards of each chunk, as the chunks are completed.

    If the cluster has GPUs, each actor holds one GPU and is called by several threads concurrently. Otherwise a single
    actor uses all CPUs except a share for making boards. A list among `arguments` contains object references, so that a
    large object is transferred only once.

    Raises:
        MsaeSweepError, OSError: as raised in a worker.
    """
    if not chunks:
        return
    n_gpus = int(ray.cluster_resources().get("GPU", 0))
    n_cpus = int(ray.cluster_resources()["CPU"])
    # A GPU's actor holds three chunks: one is computed, one is queued behind it, and one is written.
    threads = 3 if n_gpus else 1
    resources = {"num_gpus": 1, "num_cpus": 1} if n_gpus else {"num_cpus": max(0.5, n_cpus - 0.5)}
    pool = ray.data.ActorPoolStrategy(
        size=max(1, n_gpus), max_concurrent_calls_per_actor=threads, enable_true_multi_threading=True
    )
    _be_quiet()
    try:
        positions = ray.data.from_items(
            [{"chunk": pickle.dumps(chunk)} for chunk in chunks], override_num_blocks=len(chunks)
        ).map_batches(pack_boards, fn_args=(sampling,), batch_size=1, num_cpus=1 if n_gpus else 0.5)
        results = positions.map_batches(
            actor,
            fn_constructor_args=arguments,
            batch_size=1,  # one chunk; Ray requires a batch size for actors with GPUs
            compute=pool,
            **resources,
        )
        rows = iter(results.iter_rows())
        # Ray's C++ prints this for every pool of actors that may be restarted. The driver holds the arguments.
        with without_line(b"has constructor arguments in the object store and max_restarts > 0"):
            first = next(rows)
        yield first
        yield from rows
    except ray.exceptions.RayTaskError as error:
        # Our own errors are raised unwrapped, because Ray's traceback of the worker would hide the message.
        if isinstance(error.cause, MsaeSweepError | OSError):
            raise error.cause from None
        raise


def pack_boards(batch: dict[str, np.ndarray], sampling: Sampling) -> dict[str, list[bytes]]:
    """Make the boards and index columns of a chunk, pickled as `ChunkBoards` into one row, for `unpack_boards`.

    2048 positions take 6 MB.
    """
    started = time.perf_counter()
    chunk: Chunk | ChosenPositions = pickle.loads(batch["chunk"][0])
    columns: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for game, plies in chunk.plies(sampling):
        seen = replay(game, plies)
        columns["boards"].append(seen.boards)
        columns["black_to_move"].append(seen.black_to_move)
        columns["points"].append(sampled_points(game, plies, sampling))
        columns["ply"].append(plies)
        columns["game_id"].append(np.full(len(plies), game.game_id))
    found = {name: np.concatenate(parts) for name, parts in columns.items()}
    n = len(found["ply"])
    assert n == chunk.n_positions, f"chunk {chunk.number}: {n} positions, planned {chunk.n_positions}"
    position_id = np.arange(chunk.first_position, chunk.first_position + n)
    seconds = time.perf_counter() - started
    return {"boards": [pickle.dumps(ChunkBoards(chunk.number, seconds, **found, position_id=position_id))]}


def unpack_boards(batch: dict[str, np.ndarray]) -> ChunkBoards:
    """Return the `ChunkBoards` that the function `pack_boards` packed into a row."""
    (packed,) = batch["boards"]
    boards = pickle.loads(packed)
    assert isinstance(boards, ChunkBoards)
    return boards
