"""For every latent the positions at which it is strongest, at most one of a game: kept while any number stream by."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msae_sweep.go.board import N_POINTS


class TopPositions(NamedTuple):
    """Of every latent the `n` positions of largest value, descending, each of another game; value 0 is an empty place.

    Two of them merge into what one over both would have been, in any order: a position that falls out of a part is
    beaten there by `n` of other games, and so it is in the whole.
    """

    value: Float[Tensor, "hidden_dim n"]
    game_id: Int[Tensor, "hidden_dim n"]
    ply: Int[Tensor, "hidden_dim n"]

    def merge(self, other: "TopPositions") -> "TopPositions":
        """The strongest of both."""
        n = self.value.shape[1]
        both = TopPositions(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))
        # Equal values by game and ply, so that the order in which parts arrive changes nothing.
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
    """The strongest of some positions; those of a game must follow one another."""
    games, inverse = torch.unique_consecutive(game_id, return_inverse=True)
    hidden_dim = value.shape[1]
    best = value.new_zeros(len(games), hidden_dim)
    best.scatter_reduce_(0, inverse[:, None].expand_as(value), value, "amax")
    # The first position of a game that reaches its best: a later one is written over by it.
    at = torch.full((len(games), hidden_dim), len(value), device=value.device)
    number = torch.arange(len(value), device=value.device)[:, None].expand_as(value)
    reaches = value == best[inverse]
    at.scatter_reduce_(0, inverse[:, None].expand_as(value), number.masked_fill(~reaches, len(value)), "amin")
    # Equal values by game, as in `merge`.
    by_game = games.argsort()
    best, at = best[by_game].T, at[by_game].T
    which = best.argsort(dim=1, stable=True, descending=True)[:, :n]
    position = at.gather(1, which)
    found = TopPositions(best.gather(1, which), game_id[position], ply[position])
    empty = TopPositions(*(torch.zeros(hidden_dim, n, dtype=t.dtype, device=t.device) for t in found))
    return empty.merge(found)


class FiringStatistics(NamedTuple):
    """How much every latent does over all points seen; sums of parts add up."""

    points: Int[Tensor, " hidden_dim"]
    """Points at which it is active."""
    energy: Float[Tensor, " hidden_dim"]
    """Σ z², float64: with decoder rows of unit norm, what it adds to reconstructions, squared."""

    def add(self, other: "FiringStatistics") -> "FiringStatistics":
        """Over both parts."""
        return FiringStatistics(self.points + other.points, self.energy + other.energy)


def board_maxima(
    values: Float[Tensor, "rows k"], indices: Int[Tensor, "rows k"], hidden_dim: int
) -> tuple[Float[Tensor, "positions hidden_dim"], FiringStatistics]:
    """From the sorted codes of whole boards, 361 rows a position: each latent's largest value, and how much it does."""
    positions = len(values) // N_POINTS
    largest = values.new_zeros(positions, hidden_dim)
    largest.scatter_reduce_(1, indices.view(positions, -1), values.view(positions, -1), "amax")
    flat, used = indices.flatten(), values.flatten().double()
    points = torch.zeros(hidden_dim, dtype=torch.int64, device=values.device).index_add_(0, flat, (used > 0).long())
    energy = torch.zeros(hidden_dim, dtype=torch.float64, device=values.device).index_add_(0, flat, used.square())
    return largest, FiringStatistics(points, energy)


def _repeats(sorted_game_id: Int[Tensor, "hidden_dim m"]) -> Bool[Tensor, "hidden_dim m"]:
    """Whether a game stands further left already."""
    order = sorted_game_id.argsort(dim=1, stable=True)
    games = sorted_game_id.gather(1, order)
    repeated = torch.zeros_like(games, dtype=torch.bool)
    repeated[:, 1:] = games[:, 1:] == games[:, :-1]
    return torch.zeros_like(repeated).scatter(1, order, repeated)
