import itertools

import pytest
import torch

from msae_sweep.go.board import N_POINTS
from msae_sweep.go.top_positions import FiringStatistics, board_maxima, top_positions


def plain(value, game_id, ply, n):
    """Return (value, game, ply) of each latent's top positions, strongest first, with at most one per game."""
    found = []
    for latent in range(value.shape[1]):
        column = sorted(
            (-value[i, latent].item(), game_id[i].item(), ply[i].item())
            for i in range(len(value))
            if value[i, latent] > 0
        )
        games, kept = set(), []
        for negative, game, at in column:
            if game not in games and len(kept) < n:
                kept.append((-negative, game, at))
                games.add(game)
        found.append(kept)
    return found


def as_lists(found):
    return [
        [(v, g, p) for v, g, p in zip(*(t[latent].tolist() for t in found), strict=True) if v > 0]
        for latent in range(len(found.value))
    ]


def case(seed, n_games=7, hidden=5):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (n_games,), generator=generator)
    game_id = torch.repeat_interleave(torch.randperm(n_games, generator=generator), lengths)
    ply = torch.cat([torch.arange(length) for length in lengths.tolist()])
    # There are only few different values, so that there are many ties, and zeros.
    value = torch.randint(0, 4, (len(game_id), hidden), generator=generator).float()
    return value, game_id, ply


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("seed", range(4))
def test_the_strongest_positions_are_those_of_a_plain_search_one_a_game(seed, n):
    value, game_id, ply = case(seed)
    assert as_lists(top_positions(value, game_id, ply, n)) == plain(value, game_id, ply, n)


def test_parts_merge_to_the_whole_in_any_order_also_where_a_game_is_cut_in_two():
    value, game_id, ply = case(11)
    cuts = [0, 4, 9, 15, len(value)]
    parts = [top_positions(value[a:b], game_id[a:b], ply[a:b], 3) for a, b in itertools.pairwise(cuts)]
    for order in itertools.permutations(range(4)):
        merged = parts[order[0]]
        for i in order[1:]:
            merged = merged.merge(parts[i])
        assert as_lists(merged) == plain(value, game_id, ply, 3)


def test_maxima_and_firing_are_taken_over_the_points_of_each_position():
    generator = torch.Generator().manual_seed(0)
    codes = torch.relu(torch.randn(2 * N_POINTS, 6, generator=generator) - 1)
    values, indices = codes.topk(4, dim=1)
    codes = torch.zeros_like(codes).scatter(1, indices, values)
    largest, firing = board_maxima(values, indices, 6)
    torch.testing.assert_close(largest, codes.view(2, N_POINTS, 6).amax(dim=1))
    assert torch.equal(firing.points, (codes > 0).sum(dim=0))
    torch.testing.assert_close(firing.energy, codes.double().square().sum(dim=0))
    twice = firing.add(FiringStatistics(*firing))
    assert torch.equal(twice.points, 2 * firing.points)
