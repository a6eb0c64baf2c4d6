"""Streaming computation of each latent's strongest positions, at most one per game, over any number of positions."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msae_sweep.go.board import N_POINTS


class TopPositions(NamedTuple):
    """Positions of each latent's `n` largest values, descending, each of a different game; value 0 is an empty entry.

    `merge` is order-independent, and merging two parts gives the result over both. A position is dropped from a part
    only if a better position of its game, or `n` better ones of other games, are in the part; the whole has them too.
    """

    value: Float[Tensor, "hidden_dim n"]
    game_id: Int[Tensor, "hidden_dim n"]
    ply: Int[Tensor, "hidden_dim n"]

    def merge(self, other: "TopPositions") -> "TopPositions":
        """Return the strongest positions of both."""
        n = self.value.shape[1]
        both = TopPositions(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))
        # Equal values are sorted by game and ply, so that the result does not depend on the order of the parts.
        both = both._reordered(both.ply.argsort(dim=1, stable=True))
        both = both._reordered(both.game_id.argsort(dim=1, stable=True))
        both = both._reordered(both.value.argsort(dim=1, stable=True, descending=True))
        both = both._replace(value=both.value.masked_fill(_repeats(both.game_id), 0))
        return both._reordered(both.value.argsort(dim=1, stable=True, descending=True)[:, :n])

    def _reordered(self, order: Int[Tensor, "hidden_dim m"]) -> "TopPositions":
        return TopPositions(*(tensor.gather(1, order) for tensor in self))


def top_positions(
    value: Float[Tensor, "positions hidden_dim"],
    game_id: Int[Tensor, " positions"],
    ply: Int[Tensor, " positions"],
    n: int,
) -> TopPositions:
    """Return the strongest of the given positions; all positions of one game must be consecutive."""
    games, inverse = torch.unique_consecutive(game_id, return_inverse=True)
    hidden_dim = value.shape[1]
    best = value.new_zeros(len(games), hidden_dim)
    best.scatter_reduce_(0, inverse[:, None].expand_as(value), value, "amax")
    # For each game, take the first position that reaches the game's largest value; "amin" discards later ones.
    at = torch.full((len(games), hidden_dim), len(value), device=value.device)
    number = torch.arange(len(value), device=value.device)[:, None].expand_as(value)
    reaches = value == best[inverse]
    at.scatter_reduce_(0, inverse[:, None].expand_as(value), number.masked_fill(~reaches, len(value)), "amin")
    # Equal values are sorted by game, as in `merge`.
    by_game = games.argsort()
    best, at = best[by_game].T, at[by_game].T
    which = best.argsort(dim=1, stable=True, descending=True)[:, :n]
    position = at.gather(1, which)
    found = TopPositions(best.gather(1, which), game_id[position], ply[position])
    empty = TopPositions(*(torch.zeros(hidden_dim, n, dtype=t.dtype, device=t.device) for t in found))
    return empty.merge(found)


class FiringStatistics(NamedTuple):
    """Number of activations and energy of each latent over all processed points; the statistics of parts add up."""

    points: Int[Tensor, " hidden_dim"]
    """Number of points at which the latent is active."""
    energy: Float[Tensor, " hidden_dim"]
    """Σ z² in float64: as decoder rows have unit norm, the squared norm of what the latent adds to reconstructions."""

    def add(self, other: "FiringStatistics") -> "FiringStatistics":
        """Return the statistics over both parts."""
        return FiringStatistics(self.points + other.points, self.energy + other.energy)


def board_maxima(
    values: Float[Tensor, "rows k"], indices: Int[Tensor, "rows k"], hidden_dim: int
) -> tuple[Float[Tensor, "positions hidden_dim"], FiringStatistics]:
    """Return each latent's largest value on each board, and the firing statistics.

    `values` and `indices` are the sorted codes of whole boards, 361 rows per position.
    """
    positions = len(values) // N_POINTS
    largest = values.new_zeros(positions, hidden_dim)
    largest.scatter_reduce_(1, indices.view(positions, -1), values.view(positions, -1), "amax")
    flat, used = indices.flatten(), values.flatten().double()
    points = torch.zeros(hidden_dim, dtype=torch.int64, device=values.device).index_add_(0, flat, (used > 0).long())
    energy = torch.zeros(hidden_dim, dtype=torch.float64, device=values.device).index_add_(0, flat, used.square())
    return largest, FiringStatistics(points, energy)


def _repeats(sorted_game_id: Int[Tensor, "hidden_dim m"]) -> Bool[Tensor, "hidden_dim m"]:
    """Return a mask that is true where the same game already occurs further left in the row."""
    order = sorted_game_id.argsort(dim=1, stable=True)
    games = sorted_game_id.gather(1, order)
    repeated = torch.zeros_like(games, dtype=torch.bool)
    repeated[:, 1:] = games[:, 1:] == games[:, :-1]
    return torch.zeros_like(repeated).scatter(1, order, repeated)
