"""Tests of reading records as games: accepted and refused records, identical games, and the choice of positions."""

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from sgfmill import sgf, sgf_moves

from msae_sweep.go.records import Record, RefusedRecord
from msae_sweep.go.sgf import Game, read_games, refuse_duplicates, sample_plies


def read(text: str | bytes, name: str = "a.sgf") -> list[Game | RefusedRecord]:
    data = text.encode() if isinstance(text, str) else text
    return list(read_games(Record(name, data)))


def game(text: str | bytes) -> Game:
    (found,) = read(text)
    assert isinstance(found, Game), found
    return found


def refused(text: str | bytes) -> RefusedRecord:
    (found,) = read(text)
    assert isinstance(found, RefusedRecord), found
    return found


def at(point: str) -> int:
    """Return a point by its SGF name, which is its column and then its row from the top."""
    return (ord(point[1]) - 97) * 19 + ord(point[0]) - 97


def test_points_count_row_by_row_from_the_top():
    assert game("(;SZ[19];B[aa];W[sa];B[as];W[ss];B[dc])").moves.tolist() == [0, 18, 342, 360, 41]


def test_a_record_without_a_size_is_19_by_19():
    assert game("(;GM[1];B[ss])").moves.tolist() == [360]
    assert game("(;SZ[19:19];B[ss])").moves.tolist() == [360]


def test_both_ways_to_write_a_pass_are_361():
    assert game("(;;B[aa];W[];B[tt])").moves.tolist() == [0, 361, 361]


def test_whoever_moved_is_to_move_before_that_move():
    found = game("(;;B[aa];W[bb];B[cc])")
    assert found.black_to_move.tolist() == [True, False, True, False]


def test_two_moves_in_a_row_of_one_colour_are_taken_as_they_stand():
    assert game("(;;B[aa];B[bb];W[cc];W[dd])").black_to_move.tolist() == [True, True, False, False, True]


def test_handicap_stones_are_the_setup_and_white_is_first():
    found = game("(;HA[2]AB[dd][pp];W[aa];B[bb])")
    assert np.flatnonzero(found.setup).tolist() == [at("dd"), at("pp")]
    assert found.setup[at("dd")] == 1
    assert found.black_to_move.tolist() == [False, True, False]
    assert found.n_moves == 2


def test_setup_adds_and_empties_before_the_first_move():
    found = game("(;AB[aa:cc]AW[sa];AE[bb];B[ss])")
    assert found.setup.reshape(19, 19)[:3, :3].tolist() == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert found.setup[at("sa")] == -1
    assert np.count_nonzero(found.setup) == 9


@pytest.mark.parametrize("player", ["B", "W", "?"])
def test_the_first_move_says_who_is_first_whatever_pl_says(player):
    assert not game(f"(;PL[{player}]AB[dd];W[aa])").black_to_move[0]


def test_a_setup_in_the_middle_ends_the_main_line():
    found = game("(;;B[aa];W[bb];AE[aa]AW[cc];B[dd])")
    assert found.moves.tolist() == [at("aa"), at("bb")]
    assert not found.setup.any()


def test_an_empty_setup_property_ends_nothing():
    assert game("(;AB[];B[aa];AE[];W[bb])").n_moves == 2


def test_of_variations_the_first_is_read():
    found = game("(;;B[aa](;W[bb](;B[cc])(;B[dd];W[ee]))(;W[ff];B[gg];W[hh]))")
    assert found.moves.tolist() == [at("aa"), at("bb"), at("cc")]


def test_a_move_in_the_root_follows_its_setup():
    found = game("(;AB[dd]W[aa];B[bb])")
    assert found.moves.tolist() == [at("aa"), at("bb")]
    assert found.setup[at("dd")] == 1


def test_a_comment_may_hold_anything():
    assert game(r"(;C[a (;B[zz\]) \\];B[aa]C[;W[x:\]];W[bb])").moves.tolist() == [at("aa"), at("bb")]


def test_property_names_of_old_records_are_known():
    assert game("(;GaMe[1]SiZe[19];Black[aa];White[bb])").moves.tolist() == [at("aa"), at("bb")]


@pytest.mark.parametrize("last", ["B", "W"])
def test_a_point_is_free_again_after_a_capture(last):
    assert game(f"(;;B[aa];W[ba];B[ss];W[ab];{last}[aa])").n_moves == 5


def test_a_forbidden_ko_is_replayed_as_it_stands():
    ko = "(;AB[ba][ab][bc]AW[ca][db][cc][bb];B[cb];W[bb];B[cb])"
    assert game(ko).n_moves == 3


def test_a_suicide_is_replayed_and_its_points_are_free():
    assert game("(;AW[ba][ab][bb];B[aa];W[aa])").n_moves == 2
    assert game("(;AW[ca][ab][bb]AB[ba];B[aa];W[ba];B[ss];W[aa])").n_moves == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("no game", "no SGF game in it"),
        ("(;;B[aa];W[bb]", "the text ends inside the game"),
        ("(;;B[aa];W[b", "the text ends inside the game"),
        ("(;;B[aa]!;W[bb])", "the text ends inside the game"),
        ("(;;B[aa];W[aa])", "move 2: W[aa] is on an occupied point"),
        ("(;AB[dd];W[dd])", "move 1: W[dd] is on an occupied point"),
        ("(;;B[aa];W[zz])", "move 2: W[zz] is not a point of a 19 × 19 board"),
        ("(;;B[K10])", "move 1: B[K10] is not a point of a 19 × 19 board"),
        ("(;;B[aa]W[bb])", "a node with 2 moves and 0 without a value; must be one move per node"),
        ("(;;B[aa][bb])", "a node with 2 moves and 0 without a value; must be one move per node"),
        ("(;;B;W[aa])", "a node with 0 moves and 1 without a value; must be one move per node"),
        ("(;[aa];B[aa])", "a value without a property after node 1"),
        ("(;(B[aa]))", "a property outside a node after node 1"),
        ("(;SZ[19]C[only a comment])", "no moves"),
        ("(;AB[aa][bb])", "no moves"),
        ("(;AB[zz];W[aa])", "AB[zz] … are not points of a 19 × 19 board"),
        ("(;AB[aa]AW[aa];W[bb])", "the setup gives one point two contents"),
        ("(;AB[ba][ab]AW[aa];W[bb])", "the setup leaves stones without liberties"),
        ("(;HA[4];W[aa])", "a handicap of 4, but no handicap stones"),
        ("(;SZ[x];B[aa])", "SZ[x] is not a board size"),
        ("(;GM[2];B[aa])", "not a game of Go: GM[2]"),
    ],
)
def test_a_broken_record_is_named_with_its_reason(text, reason):
    assert refused(text) == RefusedRecord("a.sgf", "broken", reason)


@pytest.mark.parametrize("size", ["13", "9", "19:18", "21"])
def test_other_sizes_are_not_broken_but_a_kind_of_their_own(size):
    assert refused(f"(;SZ[{size}];B[aa];W[aa])") == RefusedRecord(
        "a.sgf", "size", f"SZ[{size}]; only 19 × 19 boards are supported"
    )


def test_a_handicap_may_be_played_as_moves():
    assert game("(;HA[2];B[dd];B[pp];W[aa])").black_to_move.tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    "data",
    [
        "(;PB[Müller];B[aa];W[bb])".encode("latin-1"),
        "(;PB[囲碁];B[aa];W[bb])".encode(),
        "(;CA[UTF-8]PB[Müller];B[aa];W[bb])".encode("latin-1"),
        "\ufeff(;CA[UTF-8]PB[囲碁];B[aa];W[bb])".encode(),
        "\ufeff(;PB[囲碁];B[aa];W[bb])".encode("utf-16-le"),
        "\ufeff(;PB[囲碁];B[aa];W[bb])".encode("utf-16-be"),
        "(;CA[Shift_JIS]PB[表]C[ソ];B[aa]C[能];W[bb])".encode("shift_jis"),
        "(;CA[GBK]PB[榎];B[aa]C[俓];W[bb])".encode("gbk"),
        "(;CA[gb2312]PB[俓]C[乗];B[aa]C[腯];W[bb])".encode("gbk"),
        "(;CA[GBK]PB[腾讯世];B[aa]C[腾];W[bb])".encode(),
        "(;CA[Big5]PB[許功蓋];B[aa]C[功];W[bb])".encode("big5"),
        b"(;CA[no such];B[aa];W[bb])",
        b"(;CA[rot13]PB[x];B[aa];W[bb])",
        b"(;PB[\xff\xfe\x00];B[aa];W[bb])",
        b"mail header\r\n\r\n(;B[aa]\r\n\r\n;W[bb])\x1a",
    ],
)
def test_moves_are_read_whatever_the_names_are_written_in(data):
    assert game(data).moves.tolist() == [at("aa"), at("bb")]


def test_games_of_one_file_are_numbered_from_the_second_on():
    found = read("(;GM[1];B[aa])\n(;GM[1];B[bb])(;SZ[9];B[cc])")
    assert [each.name for each in found] == ["a.sgf", "a.sgf#2", "a.sgf#3"]
    assert [isinstance(each, Game) for each in found] == [True, True, False]


@pytest.mark.parametrize("broken", ["(;GM[1];B[aa]", "(;GM[1];B[aa](;W[bb]", "(;FF[4]C[;B[aa])", "(;GM[1];B[aa] ? )"])
def test_a_broken_game_does_not_cost_the_games_around_it(broken):
    found = read(f"(;GM[1];B[bb])\n{broken}\n(;GM[1];B[cc])\n( ;FF[4]GM[1];B[dd])")
    moves = [each.moves.tolist() for each in found if isinstance(each, Game)]
    assert moves == [[at("bb")], [at("cc")], [at("dd")]]
    assert [(each.name, each.kind) for each in found if isinstance(each, RefusedRecord)] == [("a.sgf#2", "broken")]


def test_no_bytes_are_fatal():
    rng = random.Random(0)
    good = b"(;GM[1]SZ[19]AB[dd][pp:qq]HA[2];W[aa](;B[bb]C[x\\]y];W[tt])(;B[cc]))"
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b"()[];\\:BWaz09\x00\xff" + good)
        for found in read_games(Record("a", bytes(data[: rng.randint(0, 99)]))):
            assert isinstance(found, Game | RefusedRecord)


def test_the_key_sees_size_setup_and_moves_and_nothing_else():
    plain = game("(;;B[aa];W[])")
    assert game("(;PB[x]DT[2020]C[y]RE[B+R];B[aa]C[z];W[tt])").key == plain.key
    others = ["(;;B[aa])", "(;;B[ab];W[])", "(;;B[aa];B[])", "(;AB[cc];B[aa];W[])", "(;AW[cc];B[aa];W[])"]
    assert len({game(text).key for text in others} | {plain.key}) == 6


def test_duplicates_are_dropped_and_say_of_which():
    one, other, again = read("(;PB[x];B[aa])", "1")[0], read("(;;B[bb])", "2")[0], read("(;PB[y];B[aa])", "3")[0]
    assert list(refuse_duplicates([one, other, again])) == [
        one,
        other,
        RefusedRecord("3", "duplicate", "the same setup and moves as 1"),
    ]


def test_the_key_and_the_sample_are_the_same_on_every_machine():
    """The values are fixed: a changed key would rename every game, move it between splits and sample it anew."""
    found = game("(;HA[2]AB[dd][pp];W[as];B[br];W[cq];B[dp];W[eo];B[fn];W[];B[hl])")
    assert found.key == "afd6f93a5cdc1e96bdda365f18ddf17e"
    assert found.game_id == 6335294315357409099
    assert sample_plies(found, 3, seed=7).tolist() == [2, 4, 7]


def test_the_game_id_is_a_positive_int64():
    ids = [game(f"(;;B[{a}{b}])").game_id for a in "abcdefghijklmnopqrs" for b in "abcdefghijklmnopqrs"]
    assert len(set(ids)) == 361
    assert all(0 <= number < 2**63 for number in ids)
    assert max(ids) > 2**62


def test_a_game_is_small_and_survives_a_pickle():
    found = game("(;" + "".join(f";{'BW'[i % 2]}[]" for i in range(200)) + ")")
    assert len(pickle.dumps(found)) < 2000
    again = pickle.loads(pickle.dumps(found))
    assert again.key == found.key
    assert np.array_equal(again.moves, found.moves)
    assert np.array_equal(again.setup, found.setup)


LONG = "(;" + "".join(f";{'BW'[i % 2]}[]" for i in range(100)) + ")"


def test_all_positions_but_the_last_are_candidates():
    assert sample_plies(game(LONG), None).tolist() == list(range(100))
    assert sample_plies(game(LONG), 1000, min_move=20).tolist() == list(range(20, 100))
    assert sample_plies(game(LONG), 5, min_move=100).tolist() == []
    assert sample_plies(game(LONG), 5, min_move=1000).tolist() == []


def test_a_sample_is_sorted_distinct_and_of_the_asked_size():
    plies = sample_plies(game(LONG), 10, min_move=30)
    assert len(set(plies.tolist())) == 10
    assert plies.tolist() == sorted(plies.tolist())
    assert plies.min() >= 30


def test_a_larger_sample_keeps_the_smaller_one():
    small, large = (set(sample_plies(game(LONG), n, seed=3).tolist()) for n in (5, 50))
    assert small < large


def test_samples_differ_by_seed_and_by_game():
    one, other = game(LONG), game(LONG.replace(";B[];W[];B[]", ";B[aa];W[];B[]", 1))
    assert sample_plies(one, 10, seed=0).tolist() != sample_plies(one, 10, seed=1).tolist()
    assert sample_plies(one, 10, seed=0).tolist() != sample_plies(other, 10, seed=0).tolist()


def test_every_ply_is_as_likely_as_any_other():
    found, counts = game(LONG), np.zeros(100)
    for seed in range(2000):
        counts[sample_plies(found, 10, seed=seed)] += 1
    # The counts follow Binomial(2000, 0.1), which is 200 ± 13.4. The limit is five standard deviations.
    assert np.abs(counts - 200).max() < 67


def test_a_record_is_read_without_torch():
    code = "import sys, msae_sweep.go.sgf; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_real_games_are_read_as_sgfmill_reads_them(real_records, real_games):
    assert real_games.keys() == real_records.keys()
    for number in sorted(real_games)[::20]:
        _, plays = sgf_moves.get_setup_and_moves(sgf.Sgf_game.from_bytes(real_records[number].data))
        points = [361 if play is None else (18 - play[0]) * 19 + play[1] for _, play in plays]
        assert real_games[number].moves.tolist() == points
        assert real_games[number].black_to_move[:-1].tolist() == [colour == "b" for colour, _ in plays]


def test_real_games_are_all_different(real_games):
    assert len({found.game_id for found in real_games.values()}) == len(real_games)
