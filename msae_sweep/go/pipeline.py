"""Ray Data pipeline that runs networks on positions, over a cluster.

Boards of chunks (CPU tasks) → results of an actor that holds a network. Little data is sent between processes: a game
has 1 KB, a position 3 KB.
"""

import collections
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from jaxtyping import Bool, Int8, Int16, Int64
from ray.data import DataContext

from msae_sweep.errors import MsaeSweepError
from msae_sweep.go.replay import replay
from msae_sweep.go.sampling import Chunk, PositionsChunk, Sampling, points_of, sampled_points
from msae_sweep.go.sgf import Game
from msae_sweep.stderr_filter import without_line

BATCH = {"cuda": 2048, "cpu": 32}
"""Positions per forward pass. On one H200, 2048 was the fastest of the measured sizes, at 20,290 positions/s."""


class ChosenPositions(NamedTuple):
    """Explicitly chosen positions of games, which the pipeline accepts in place of a `Chunk`."""

    number: int
    first_position: int
    n_positions: int
    picks: list[tuple[Game, Int64[np.ndarray, " plies"]]]

    def plies(self, _: Sampling) -> Iterator[tuple[Game, Int64[np.ndarray, " plies"]]]:
        """Yield each game with the plies of its chosen positions."""
        yield from self.picks


AnyChunk = Chunk | ChosenPositions | PositionsChunk


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


def be_quiet() -> None:
    """Turn off Ray Data's progress bars and logs, because this pipeline has its own display; raise original errors."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def run_actor_on_chunks(
    chunks: Sequence[AnyChunk], sampling: Sampling, actor: type, arguments: Sequence[Any]
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
    be_quiet()
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
    chunk: AnyChunk = pickle.loads(batch["chunk"][0])
    found = _of_a_file(chunk, sampling) if isinstance(chunk, PositionsChunk) else _of_games(chunk, sampling)
    n = len(found["ply"])
    assert n == chunk.n_positions, f"chunk {chunk.number}: {n} positions, planned {chunk.n_positions}"
    position_id = np.arange(chunk.first_position, chunk.first_position + n)
    seconds = time.perf_counter() - started
    return {"boards": [pickle.dumps(ChunkBoards(chunk.number, seconds, **found, position_id=position_id))]}


def _of_games(chunk: Chunk | ChosenPositions, sampling: Sampling) -> dict[str, np.ndarray]:
    columns: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for game, plies in chunk.plies(sampling):
        seen = replay(game, plies)
        columns["boards"].append(seen.boards)
        columns["black_to_move"].append(seen.black_to_move)
        columns["points"].append(sampled_points(game, plies, sampling))
        columns["ply"].append(plies)
        columns["game_id"].append(np.full(len(plies), game.game_id))
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _of_a_file(chunk: PositionsChunk, sampling: Sampling) -> dict[str, np.ndarray]:
    # Only a file of positions needs HDF5, whose library would take memory in every process that replays games.
    from msae_sweep.go.positions_file import read_slice

    found = read_slice(chunk.file, chunk.first_position, chunk.first_position + chunk.n_positions)
    keys = [f"{game} {ply}" for game, ply in zip(found.game_id.tolist(), found.ply.tolist(), strict=True)]
    return {**found._asdict(), "points": points_of(keys, sampling)}


def unpack_boards(batch: dict[str, np.ndarray]) -> ChunkBoards:
    """Return the `ChunkBoards` that the function `pack_boards` packed into a row."""
    (packed,) = batch["boards"]
    boards = pickle.loads(packed)
    assert isinstance(boards, ChunkBoards)
    return boards
