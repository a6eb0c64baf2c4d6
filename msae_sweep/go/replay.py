"""Replay of games into the boards of their positions.

This module uses only numpy, because each of the many processes that replay games needs 180 MB less memory without
torch. The eight int8 boards of a position take 2.9 KB; `planes` converts them to the network's 18 planes, which take
26 KB in float32.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int8

from msae_sweep.go.board import N_POINTS, Board
from msae_sweep.go.sgf import Game

HISTORY = 8


class Positions(NamedTuple):
    """Positions of a game, each from the perspective of the side to move."""

    boards: Int8[np.ndarray, "positions 8 361"]
    """Boards at the position and 1 to 7 moves before it: 1 own stone, −1 opponent's, 0 empty; rows from the top."""
    black_to_move: Bool[np.ndarray, " positions"]


def replay(game: Game, plies: Int[np.ndarray, " positions"]) -> Positions:
    """Return the positions after `plies` moves. Plies are 0 to n_moves, in any order.

    A pass repeats the board. The history before ply 0 is empty, even if ply 0 has setup stones, because Leela Zero
    restarts its history after handicap stones. Source: leela-zero, `GameState::anchor_game_history`.
    """
    plies = np.asarray(plies, dtype=np.int64)
    assert ((plies >= 0) & (plies <= game.n_moves)).all(), f"plies of {game.name} must be 0 to {game.n_moves}"
    boards = _boards(game)
    at = plies[:, None] - np.arange(HISTORY)  # [positions, 8]
    black_to_move = game.black_to_move[plies]
    sign = np.where(black_to_move, 1, -1).astype(np.int8)[:, None] * (at >= 0)
    return Positions(boards[np.maximum(at, 0)] * sign[:, :, None], black_to_move)


def _boards(game: Game) -> Int8[np.ndarray, "n_moves+1 361"]:
    """Return the board before the first move and after each move: 1 black, −1 white, 0 empty."""
    board = Board(game.setup.tobytes())
    taken = [bytes(board.stones)]
    for point, black in zip(game.moves.tolist(), game.black_to_move.tolist(), strict=False):
        legal = board.play(point, black)
        assert legal, f"{game.name}: a Game's moves are legal, they were played when it was read"
        taken.append(bytes(board.stones))
    return np.frombuffer(b"".join(taken), dtype=np.int8).reshape(-1, N_POINTS)
