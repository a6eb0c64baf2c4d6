"""Boards → a Go network's input: 18 planes of 19 × 19, made where the network is."""

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from msae_sweep.go.board import SIZE
from msae_sweep.go.replay import HISTORY

N_PLANES = 2 * HISTORY + 2


def planes(
    boards: Int8[Tensor, "positions 8 361"], black_to_move: Bool[Tensor, " positions"], dtype: torch.dtype
) -> Float[Tensor, "positions 18 19 19"]:
    """The network's input, 0 and 1, on the device of `boards`.

    Planes 0–7 are the side to move's stones, newest first, 8–15 the opponent's, 16 all ones if black is to move, 17 if
    white is. Row 0 is the top. Leela Zero's own program counts rows from the bottom: a network that was trained by it
    wants `.flip(2)`, and gives its points in that order.
    """
    history = boards.reshape(len(boards), HISTORY, SIZE, SIZE)
    x = torch.empty(len(boards), N_PLANES, SIZE, SIZE, dtype=dtype, device=boards.device)
    x[:, :HISTORY] = history == 1
    x[:, HISTORY : 2 * HISTORY] = history == -1
    x[:, 2 * HISTORY] = black_to_move[:, None, None]
    x[:, 2 * HISTORY + 1] = ~black_to_move[:, None, None]
    return x
