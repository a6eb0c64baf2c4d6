"""Selection of an extraction's positions and points, and division into chunks, by games and settings alone."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int16, Int64

from msae_sweep.errors import ConfigError
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
    skip_first: int
    """Number of moves at the beginning of a game whose positions are left out."""
    points: Points
    """Rows taken from a position: the mean over the board, all 361 points, or the given number of random points."""
    seed: int

    @property
    def rows_per_position(self) -> int:
        """Number of rows per position."""
        return {"mean": 1, "all": N_POINTS}.get(str(self.points)) or int(self.points)


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


def make_chunks(games: Sequence[Game], sampling: Sampling) -> list[Chunk]:
    """Divide the sampled positions into chunks, with games sorted by key, which is as good as a random order.

    The same games and settings therefore give the same chunks, independent of how the records are stored and of the
    workers. All chunks but the last have the same size, even where this splits a game, because cuDNN plans its
    convolutions again for every new size.
    """
    most = max(1, min(CHUNK_POSITIONS, CHUNK_ROWS // sampling.rows_per_position))
    chunks: list[Chunk] = []
    members: list[Game] = []
    done = count = skip = 0

    def close() -> None:
        nonlocal done, count, members
        if count:
            chunks.append(Chunk(len(chunks), done, count, members, skip))
        done, count, members = done + count, 0, []

    for game in sorted(games, key=lambda game: game.key):
        n = max(0, game.n_moves - sampling.skip_first)
        n = n if sampling.positions_per_game is None else min(n, sampling.positions_per_game)
        taken = 0
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


def games_sha256(games: Sequence[Game]) -> str:
    """Return a hash of the set of games, independent of how they are stored."""
    return hashlib.sha256("\n".join(sorted(game.key for game in games)).encode()).hexdigest()


def sampled_plies(game: Game, sampling: Sampling) -> Int64[np.ndarray, " plies"]:
    """Return the plies of the positions that are taken from a game."""
    return sample_plies(game, sampling.positions_per_game, sampling.skip_first, sampling.seed)


def sampled_points(
    game: Game, plies: Int64[np.ndarray, " plies"], sampling: Sampling
) -> Int16[np.ndarray, "plies rows"]:
    """Return the points taken from each position, ascending; −1 stands for the mean over the board.

    Random points depend only on (seed, game, ply).
    """
    if sampling.points == "mean":
        return np.full((len(plies), 1), -1, dtype=np.int16)
    if sampling.points == "all":
        return np.broadcast_to(np.arange(N_POINTS, dtype=np.int16), (len(plies), N_POINTS)).copy()
    # Each point draws four bytes; the stable sort breaks ties between equal draws.
    draws = np.stack(
        [
            np.frombuffer(hashlib.shake_128(f"{sampling.seed} {game.key} {ply}".encode()).digest(4 * N_POINTS), "<u4")
            for ply in plies.tolist()
        ]
    )
    chosen = np.argsort(draws, axis=1, kind="stable")[:, : int(sampling.points)]
    return np.sort(chosen, axis=1).astype(np.int16)
