"""Which positions and points an extraction takes, cut into chunks that depend on games and settings alone."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int16, Int64

from msae_sweep.errors import ConfigError
from msae_sweep.go.board import N_POINTS
from msae_sweep.go.sgf import Game, sample_plies

CHUNK_POSITIONS = 2048
"""Positions of a chunk: 6 MB of boards on their way to the network, a tenth of a second of a fast GPU."""
CHUNK_ROWS = 65_536
"""Rows of a chunk at the most, where every position gives many: 34 MB a block as float16 at 256 channels."""


Points = Literal["mean", "all"] | int


class Sampling(NamedTuple):
    """Which rows are taken from the games."""

    positions_per_game: int | None
    """None takes all."""
    skip_first: int
    """Moves at a game's beginning whose positions are left out."""
    points: Points
    """Rows of a position: the mean over the board, all 361 points, or so many random ones."""
    seed: int

    @property
    def rows_per_position(self) -> int:
        """Rows that a position gives."""
        return {"mean": 1, "all": N_POINTS}.get(str(self.points)) or int(self.points)


class Chunk(NamedTuple):
    """Positions whose rows are written together, whole or not at all."""

    number: int
    first_position: int
    """Positions in the chunks before it; `position_id` counts on from here."""
    n_positions: int
    games: list[Game]
    """Games in their order; of the last, the chunk has as many positions as are left for it."""
    skip: int
    """Positions of the first game that the chunk before has."""

    def plies(self, sampling: Sampling) -> Iterator[tuple[Game, Int64[np.ndarray, " plies"]]]:
        """The chunk's positions, game by game."""
        skip, left = self.skip, self.n_positions
        for game in self.games:
            plies = plies_of(game, sampling)[skip : skip + left]
            yield game, plies
            skip, left = 0, left - len(plies)


def cut(games: Sequence[Game], sampling: Sampling) -> list[Chunk]:
    """Chunks of positions, of games in the order of their keys, which is as good as random.

    So the same games and settings give the same chunks, however the records lie and whoever works on them. All chunks
    but the last have the same size, whatever games they cut in two: cuDNN plans its convolutions for every size anew.
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


def points_asked_for(text: str) -> Points:
    """The points that `text` names.

    Raises:
        ConfigError: it names none.
    """
    if text == "mean":
        return "mean"
    if text == "all":
        return "all"
    if text.isdigit() and 1 <= int(text) <= N_POINTS:
        return int(text)
    raise ConfigError(f"--points: {text} must be mean, all, or 1 to {N_POINTS}")


def games_sha256(games: Sequence[Game]) -> str:
    """Hash of what the games are, not of how they are stored."""
    return hashlib.sha256("\n".join(sorted(game.key for game in games)).encode()).hexdigest()


def plies_of(game: Game, sampling: Sampling) -> Int64[np.ndarray, " plies"]:
    """The positions that are taken from a game."""
    return sample_plies(game, sampling.positions_per_game, sampling.skip_first, sampling.seed)


def points_of(game: Game, plies: Int64[np.ndarray, " plies"], sampling: Sampling) -> Int16[np.ndarray, "plies rows"]:
    """The points that are taken from each position, ascending; −1 stands for the mean over the board.

    Random points follow from (seed, game, ply) alone.
    """
    if sampling.points == "mean":
        return np.full((len(plies), 1), -1, dtype=np.int16)
    if sampling.points == "all":
        return np.broadcast_to(np.arange(N_POINTS, dtype=np.int16), (len(plies), N_POINTS)).copy()
    # Four bytes a point: two equal draws are told apart by the stable sort.
    draws = np.stack(
        [
            np.frombuffer(hashlib.shake_128(f"{sampling.seed} {game.key} {ply}".encode()).digest(4 * N_POINTS), "<u4")
            for ply in plies.tolist()
        ]
    )
    chosen = np.argsort(draws, axis=1, kind="stable")[:, : int(sampling.points)]
    return np.sort(chosen, axis=1).astype(np.int16)
