"""Tests that games become planes: captures, history, sides, and the real games against a plain, slow replay."""

import numpy as np
import pytest
import torch
from sgfmill import boards as slow_boards

from msae_sweep.go.planes import planes
from msae_sweep.go.records import Record
from msae_sweep.go.replay import replay
from msae_sweep.go.sgf import Game, read_games, sample_plies


def game(text: str) -> Game:
    (found,) = read_games(Record("a.sgf", text.encode()))
    assert isinstance(found, Game), found
    return found


def all_plies(found: Game) -> np.ndarray:
    return np.arange(found.n_moves + 1)


def slow_positions(found: Game) -> list[np.ndarray]:
    """Return the board after each move by sgfmill's own rules, with row 0 at the top: 1 black, −1 white, 0 empty."""
    board = slow_boards.Board(19)
    stones = [(18 - p // 19, p % 19, found.setup[p]) for p in range(361)]
    board.apply_setup([(r, c) for r, c, s in stones if s == 1], [(r, c) for r, c, s in stones if s == -1], [])
    taken = []
    for move, black in [(361, True), *zip(found.moves, found.black_to_move[:-1], strict=True)]:
        if move != 361:
            board.play(18 - int(move) // 19, int(move) % 19, "b" if black else "w")
        values = {None: 0, "b": 1, "w": -1}
        taken.append(np.array([[values[board.get(18 - r, c)] for c in range(19)] for r in range(19)]))
    return taken


def slow_planes(found: Game, ply: int, positions: list[np.ndarray]) -> np.ndarray:
    """Return one position's 18 planes, computed literally from their definition."""
    own, opponent = (1, -1) if found.black_to_move[ply] else (-1, 1)
    x = np.zeros((18, 19, 19))
    for ago in range(8):
        if ply - ago >= 0:
            x[ago] = positions[ply - ago] == own
            x[8 + ago] = positions[ply - ago] == opponent
    x[16 if own == 1 else 17] = 1
    return x


def fast_planes(found: Game, plies: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    seen = replay(found, plies)
    return planes(torch.from_numpy(seen.boards), torch.from_numpy(seen.black_to_move), dtype)


def assert_equal_to_the_slow_way(found: Game, plies: np.ndarray) -> None:
    positions = slow_positions(found)
    expected = np.stack([slow_planes(found, int(ply), positions) for ply in plies])
    assert np.array_equal(fast_planes(found, plies).numpy(), expected)


def after(text: str, ply: int = -1) -> dict[str, int]:
    """Return the stones by their SGF names after `ply` moves (by default at the end): 1 black, −1 white."""
    found = game(text)
    seen = replay(found, all_plies(found)[[ply]])
    stones = seen.boards[0, 0] * (1 if seen.black_to_move[0] else -1)
    return {chr(97 + p % 19) + chr(97 + p // 19): int(stones[p]) for p in np.flatnonzero(stones)}


AWKWARD = {
    "capture in the corner": "(;;B[ab];W[aa];B[ba])",
    "capture of two groups at once": "(;AW[aa][ca]AB[ab][cb][da];B[ba])",
    "capture by a stone without liberties": "(;AW[ba][ab][ac]AB[ca][bb];B[aa];W[ba])",
    "capture of many": "(;AB[ba:bi]AW[aa:ai][ca:ci];W[ss];B[aj];W[bj])",
    "suicide of one": "(;AW[ba][ab];B[aa];W[bb])",
    "suicide of three": "(;AW[da][ab][bb][cb]AB[aa][ba];B[ca];W[aa])",
    "suicide in the middle": "(;AB[jj][jk]AW[ij][ik][ji][kj][kk][jm][il][kl];B[jl];W[jj])",
    "ko taken and taken back": "(;AB[ba][ab][bc]AW[ca][db][cc][bb];B[cb];W[bb];B[cb])",
    "snapback": "(;AW[ab][bb][cb][ca]AB[ac][bc][cc][db][da];B[ba];W[aa];B[ba])",
    "passes": "(;;B[aa];W[];B[tt];W[bb])",
    "handicap": "(;HA[2]AB[dd][pp];W[aa];B[bb])",
    "one colour in a row": "(;;B[aa];B[bb];B[cc];W[dd];W[ee])",
    "longer than the history": "(;" + "".join(f";{'BW'[i % 2]}[a{chr(97 + i)}]" for i in range(12)) + ")",
}


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_awkward_games_are_as_in_the_slow_way(text):
    found = game(text)
    assert_equal_to_the_slow_way(found, all_plies(found))


def test_random_play_to_full_boards_is_as_in_the_slow_way():
    """Random moves fill the board and capture large groups over and over, including suicides."""
    rng = np.random.default_rng(0)
    found = game("(;;B[aa])")
    board, moves = slow_boards.Board(19), []
    for turn in range(1500):
        empty = [(r, c) for r in range(19) for c in range(19) if board.get(r, c) is None]
        row, column = empty[rng.integers(len(empty))]
        board.play(row, column, "bw"[turn % 2])
        moves.append((18 - row) * 19 + column)
    found = found._replace(moves=np.array(moves, np.int16), black_to_move=np.arange(len(moves) + 1) % 2 == 0)
    assert_equal_to_the_slow_way(found, np.arange(0, 1501, 7))


def test_a_captured_stone_is_gone():
    assert after("(;;B[ab];W[aa];B[ba])") == {"ab": 1, "ba": 1}


def test_a_suicide_takes_the_whole_own_group_and_nothing_else():
    assert after("(;AW[da][ab][bb][cb]AB[aa][ba];B[ca])") == {"da": -1, "ab": -1, "bb": -1, "cb": -1}


def test_a_capture_comes_before_a_suicide():
    stones = after(AWKWARD["capture by a stone without liberties"], 1)
    assert stones == {"aa": 1, "ca": 1, "bb": 1, "ab": -1, "ac": -1}


def test_a_ko_takes_one_stone_each_time():
    ko = "(;AB[ba][ab][bc]AW[ca][db][cc][bb];B[cb];W[bb];B[cb])"
    assert ["bb" in after(ko, ply) for ply in range(4)] == [True, False, True, False]
    assert ["cb" in after(ko, ply) for ply in range(4)] == [False, True, False, True]


def test_a_snapback_takes_back_the_stones_that_took():
    snapback = AWKWARD["snapback"]
    assert after(snapback, 1)["ba"] == 1
    assert "ba" not in after(snapback, 2)
    assert after(snapback, 3) == dict.fromkeys(("ac", "bc", "cc", "db", "da", "ba"), 1)


def test_the_planes_of_the_first_position_are_black_to_move_and_nothing_else():
    x = fast_planes(game("(;;B[aa])"), np.array([0]))
    assert x[0, 16].eq(1).all()
    assert x.sum() == 361


def test_the_side_to_move_comes_first_whichever_it_is():
    x = fast_planes(game("(;;B[aa];W[bb])"), np.array([1, 2]))
    assert (x[0, 0].sum(), x[0, 8, 0, 0], x[0, 17].sum()) == (0, 1, 361)
    assert (x[1, 0, 0, 0], x[1, 8, 1, 1], x[1, 16].sum()) == (1, 1, 361)


def test_history_goes_back_seven_moves_and_is_empty_before_the_start():
    found = game(AWKWARD["longer than the history"])
    x = fast_planes(found, np.array([3, 12]))
    assert (x[:, :8] + x[:, 8:16]).sum((2, 3)).tolist() == [[3, 2, 1, 0, 0, 0, 0, 0], [12, 11, 10, 9, 8, 7, 6, 5]]


def test_a_pass_repeats_the_board():
    x = fast_planes(game("(;;B[aa];W[])"), np.array([2]))
    assert x[0, :3].sum((1, 2)).tolist() == [1, 1, 0]


def test_before_the_first_move_only_the_setup_itself_is_seen():
    x = fast_planes(game("(;HA[2]AB[dd][pp];W[aa])"), np.array([0, 1]))
    assert x[0, :16].sum((1, 2)).tolist() == [0] * 8 + [2] + [0] * 7
    assert x[1, :16].sum((1, 2)).tolist() == [2, 2] + [0] * 6 + [1, 0] + [0] * 6


def test_row_zero_is_the_top():
    x = fast_planes(game("(;;B[sa];W[aa])"), np.array([1]))
    assert torch.nonzero(x[0, 8]).tolist() == [[0, 18]]


def test_plies_may_come_in_any_order_and_not_at_all():
    found = game(AWKWARD["longer than the history"])
    shuffled = np.array([5, 0, 12, 5])
    assert torch.equal(fast_planes(found, shuffled), fast_planes(found, all_plies(found))[shuffled])
    assert fast_planes(found, np.array([], dtype=np.int64)).shape == (0, 18, 19, 19)


@pytest.mark.parametrize("ply", [-1, 13])
def test_a_ply_outside_the_game_is_a_bug_of_the_caller(ply):
    with pytest.raises(AssertionError, match="must be 0 to 12"):
        replay(game(AWKWARD["longer than the history"]), np.array([ply]))


def test_boards_travel_as_one_byte_a_point():
    seen = replay(game("(;;B[aa])"), np.array([0, 1]))
    assert (seen.boards.dtype, seen.boards.shape) == (np.int8, (2, 8, 361))
    assert (seen.black_to_move.dtype, seen.black_to_move.tolist()) == (np.bool_, [True, False])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_planes_are_zeros_and_ones_in_any_dtype(dtype):
    found = game(AWKWARD["capture of many"])
    x = fast_planes(found, all_plies(found), dtype)
    assert x.dtype == dtype
    assert torch.equal(x.float(), fast_planes(found, all_plies(found)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_planes_are_the_same_on_the_gpu():
    rng = np.random.default_rng(0)
    boards = torch.from_numpy(rng.integers(-1, 2, size=(1000, 8, 361), dtype=np.int8))
    black_to_move = torch.from_numpy(rng.random(1000) < 0.5)
    on_gpu = planes(boards.cuda(), black_to_move.cuda(), torch.float16)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), planes(boards, black_to_move, torch.float16))


def test_real_games_are_as_in_the_slow_way(real_games):
    for number in sorted(real_games)[::100]:
        assert_equal_to_the_slow_way(real_games[number], sample_plies(real_games[number], 40))


@pytest.mark.parametrize(("network", "top1"), [("lz-6x64", 62 / 120), ("lz-40x256", 35 / 60)])
def test_the_references_policy_hits_our_next_moves_as_often_as_it_was_recorded(reference, real_games, network, top1):
    """Points, plies and orientation are the reference's. Read in any other way, they would hit almost no move."""
    arrays = reference(network).arrays
    played = [
        int(real_games[number].moves[ply])
        for number, ply in zip(arrays["game_id"].tolist(), arrays["ply"].tolist(), strict=True)
    ]
    assert (arrays["policy_logits"].argmax(1) == played).mean() == pytest.approx(top1)


def test_the_references_best_points_are_empty_on_our_boards(reference):
    arrays, x = reference("lz-6x64")
    best = arrays["policy_logits"].argmax(1)
    occupied = (x[:, 0] + x[:, 8]).flatten(1)[torch.arange(len(best)), torch.from_numpy(best).clamp(max=360)]
    assert not occupied.any()
