"""Selection of an extraction's positions and points, and division into chunks, by games and settings alone."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int16, Int64

from msae_sweep.errors import ConfigError, DataError
from msae_sweep.go.board import N_POINTS
from msae_sweep.go.sgf import Game, sample_plies

CHUNK_POSITIONS = 2048
"""Maximum number of positions in a chunk; their boards take 6 MB, and a fast GPU needs about 0.1 s for them."""
CHUNK_ROWS = 65_536
"""Maximum number of rows in a chunk if positions have many: 34 MB per block as float16 with 256 channels."""


Points = Literal["mean", "all"] | int


class Sampling(NamedTuple):
    """Settings that determine which rows are taken from the games."""

    positions_per_game: int | None
    """Maximum number of positions taken from a game; None takes all."""
    min_move: int
    """Minimum number of moves before a position."""
    points: Points
    """Rows taken from a position: the mean over the board, all 361 points, or the given number of random points."""
    seed: int
    max_move: int | None = None
    """Maximum number of moves before a position; None sets no limit."""
    consecutive: bool = False
    """Whether a game's positions follow one another from a random one on, rather than being drawn one by one."""

    @property
    def rows_per_position(self) -> int:
        """Number of rows per position."""
        return {"mean": 1, "all": N_POINTS}.get(str(self.points)) or int(self.points)

    @property
    def positions_per_chunk(self) -> int:
        """Number of positions in every chunk but the last."""
        return max(1, min(CHUNK_POSITIONS, CHUNK_ROWS // self.rows_per_position))

    def n_positions(self, game: Game) -> int:
        """Return the number of positions that are taken from a game."""
        stop = game.n_moves if self.max_move is None else min(game.n_moves, self.max_move + 1)
        n_candidates = max(0, stop - self.min_move)
        return n_candidates if self.positions_per_game is None else min(n_candidates, self.positions_per_game)


class Chunk(NamedTuple):
    """Group of positions whose rows are written together, atomically."""

    number: int
    first_position: int
    """Number of positions in all earlier chunks, which is the `position_id` of this chunk's first position."""
    n_positions: int
    games: list[Game]
    """Games of the chunk in order. The chunk takes only as many positions of the last game as `n_positions` allows."""
    skip: int
    """Number of positions of the first game that belong to the previous chunk."""

    def plies(self, sampling: Sampling) -> Iterator[tuple[Game, Int64[np.ndarray, " plies"]]]:
        """Yield each game with the plies of its positions in this chunk."""
        skip, left = self.skip, self.n_positions
        for game in self.games:
            plies = sampled_plies(game, sampling)[skip : skip + left]
            yield game, plies
            skip, left = 0, left - len(plies)


class PositionsChunk(NamedTuple):
    """Group of positions of a file of positions; see `positions_file`."""

    number: int
    first_position: int
    """Index of the first position in the file."""
    n_positions: int
    file: Path


def make_positions_chunks(file: Path, n_positions: int, sampling: Sampling) -> list[PositionsChunk]:
    """Divide the positions of a file of positions into chunks, in their order."""
    most = sampling.positions_per_chunk
    return [
        PositionsChunk(number, first, min(most, n_positions - first), file)
        for number, first in enumerate(range(0, n_positions, most))
    ]


def make_chunks(games: Sequence[Game], sampling: Sampling) -> list[Chunk]:
    """Divide the sampled positions into chunks, with games sorted by key, which is as good as a random order.

    The same games and settings therefore give the same chunks, independent of how the records are stored and of the
    workers. All chunks but the last have the same size, even where this splits a game, because cuDNN plans its
    convolutions again for every new size.
    """
    most = sampling.positions_per_chunk
    chunks: list[Chunk] = []
    members: list[Game] = []
    done = count = skip = 0

    def close() -> None:
        nonlocal done, count, members
        if count:
            chunks.append(Chunk(len(chunks), done, count, members, skip))
        done, count, members = done + count, 0, []

    for game in sorted(games, key=lambda game: game.key):
        n, taken = sampling.n_positions(game), 0
        while taken < n:
            if not members:
                skip = taken
            members.append(game)
            step = min(n - taken, most - count)
            taken, count = taken + step, count + step
            if count == most:
                close()
    close()
    return chunks


def parse_points(text: str) -> Points:
    """Parse the value of `--points`.

    Raises:
        ConfigError: `text` is not mean, all, or a number from 1 to 361.
    """
    if text == "mean":
        return "mean"
    if text == "all":
        return "all"
    if text.isdigit() and 1 <= int(text) <= N_POINTS:
        return int(text)
    raise ConfigError(f"--points: {text} must be mean, all, or 1 to {N_POINTS}")


def check_sampling(sampling: Sampling) -> None:
    """Raise ConfigError if the settings contradict one another."""
    points = sampling.points
    if isinstance(points, int) and not 1 <= points <= N_POINTS:
        raise ConfigError(f"--points: {points} must be mean, all, or 1 to {N_POINTS}")
    if sampling.max_move is not None and sampling.max_move < sampling.min_move:
        raise ConfigError(f"--max-move: {sampling.max_move} must be at least --min-move {sampling.min_move}")
    if sampling.consecutive and sampling.positions_per_game is None:
        raise ConfigError("--consecutive: needs --positions-per-game, the number of positions that follow one another")


def no_positions(where: Path, sampling: Sampling) -> DataError:
    """Return the error that no game has a position which is taken."""
    last = "" if sampling.max_move is None else f" to --max-move {sampling.max_move}"
    return DataError(f"{where}: no game has a position at --min-move {sampling.min_move}{last} moves")


def games_sha256(games: Sequence[Game]) -> str:
    """Return a hash of the set of games, independent of how they are stored."""
    return hashlib.sha256("\n".join(sorted(game.key for game in games)).encode()).hexdigest()


def sampled_plies(game: Game, sampling: Sampling) -> Int64[np.ndarray, " plies"]:
    """Return the plies of the positions that are taken from a game."""
    return sample_plies(
        game,
        sampling.positions_per_game,
        min_move=sampling.min_move,
        seed=sampling.seed,
        max_move=sampling.max_move,
        consecutive=sampling.consecutive,
    )


def sampled_points(
    game: Game, plies: Int64[np.ndarray, " plies"], sampling: Sampling
) -> Int16[np.ndarray, "plies rows"]:
    """Return the points taken from each position of a game: random ones depend only on (seed, game, ply)."""
    return points_of([f"{game.key} {ply}" for ply in plies.tolist()], sampling)


def points_of(keys: Sequence[str], sampling: Sampling) -> Int16[np.ndarray, "positions rows"]:
    """Return the points taken from each position, ascending; −1 stands for the mean over the board.

    Random points depend only on the seed and the position's key.
    """
    if sampling.points == "mean":
        return np.full((len(keys), 1), -1, dtype=np.int16)
    if sampling.points == "all":
        return np.broadcast_to(np.arange(N_POINTS, dtype=np.int16), (len(keys), N_POINTS)).copy()
    # Each point draws four bytes; the stable sort breaks ties between equal draws.
    draws = np.stack(
        [
            np.frombuffer(hashlib.shake_128(f"{sampling.seed} {key}".encode()).digest(4 * N_POINTS), "<u4")
            for key in keys
        ]
    )
    chosen = np.argsort(draws, axis=1, kind="stable")[:, : int(sampling.points)]
    return np.sort(chosen, axis=1).astype(np.int16)
