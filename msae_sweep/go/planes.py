"""Conversion of boards to a network's input, 18 planes of 19 × 19, on the network's device."""

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from msae_sweep.go.board import SIZE
from msae_sweep.go.replay import HISTORY

N_PLANES = 2 * HISTORY + 2


def planes(
    boards: Int8[Tensor, "positions 8 361"], black_to_move: Bool[Tensor, " positions"], dtype: torch.dtype
) -> Float[Tensor, "positions 18 19 19"]:
    """Return the network's input as zeros and ones, on the device of `boards`.

    Planes 0–7 are the stones of the side to move, newest position first; planes 8–15 are the opponent's. Plane 16 is
    all ones if black is to move, plane 17 if white is. Row 0 is the top. Leela Zero's own program counts rows from the
    bottom, so a network trained with it needs `.flip(2)` of the planes and returns its points in that order.
    """
    history = boards.reshape(len(boards), HISTORY, SIZE, SIZE)
    x = torch.empty(len(boards), N_PLANES, SIZE, SIZE, dtype=dtype, device=boards.device)
    x[:, :HISTORY] = history == 1
    x[:, HISTORY : 2 * HISTORY] = history == -1
    x[:, 2 * HISTORY] = black_to_move[:, None, None]
    x[:, 2 * HISTORY + 1] = ~black_to_move[:, None, None]
    return x
