"""Tests of dividing SGF text into games, however it is cut into pieces."""

import random
import tracemalloc

import pytest

from msae_sweep.go import sgf_stream
from msae_sweep.go.sgf_stream import TooLong, split_games


def split(text: bytes, size: int | None = None, limit: int = 1 << 20) -> list[bytes | TooLong]:
    size = size or max(1, len(text))
    return list(split_games((text[at : at + size] for at in range(0, len(text), size)), limit))


GAMES = [
    b"(;GM[1]SZ[19];B[aa];W[bb])",
    b"(;GM[1]C[closing ) and opening ( (;GM[1\\] in a value];B[cc])",
    b"(;FF[4]C[a backslash at the end \\\\];B[dd](;W[ee])(;W[ff](;B[gg])))",
    b"(;B[no head])",
    b"( ;\nGM [1];B[hh];W[])",
    b"(;PB[\xe5\x9b\xb2\xe7\xa2\x81]C[[[[ unescaped];B[ii])",
]


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7, 40])
@pytest.mark.parametrize("between", [b"", b"\n", b"\r\n junk ) ] (not a game) \n"])
def test_games_are_found_wherever_the_text_is_cut(size, between):
    text = between + between.join(GAMES) + between
    assert split(text, size) == GAMES


def test_the_quick_look_and_the_exact_one_agree(monkeypatch):
    rng = random.Random(0)
    alphabet = [b"(;GM[1]", b"(;", b"(", b")", b"[", b"]", b"\\", b";B[aa]", b"C[x(;GM[1]y)]", b" ", *GAMES]
    texts = [b"".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(3000)]
    quick = [split(text) for text in texts]
    assert sum(len(games) > 1 for games in quick) > 1000
    monkeypatch.setattr(sgf_stream, "_is_one_game", lambda _: False)
    # A `]` outside of a value makes a game broken in any case; only where it ends may then differ.
    for text, games in zip(texts, quick, strict=True):
        if b"]" not in sgf_stream.re.sub(rb"\[[^\]\\]*(?:\\.[^\]\\]*)*\]", b"", text):
            assert split(text) == games, text


@pytest.mark.parametrize("broken", [b"(;GM[1];B[aa]", b"(;GM[1];B[aa](;W[bb]", b"(;GM[1];B[aa];W[bb"])
@pytest.mark.parametrize("size", [None, 5])
def test_a_game_that_is_not_closed_does_not_take_the_next_ones_with_it(broken, size):
    after = [b"(;GM[1]C[x];B[cc])", b"(;FF[4]GM[1];B[dd])"]
    found = split(GAMES[0] + broken + b"\n" + b"\n".join(after), size)
    assert found[0] == GAMES[0]
    assert found[-1] == after[-1]
    assert len(found) == (4 if broken.endswith(b"]") else 3), "the value ends where the next game's first one does"


def test_an_open_value_at_the_end_of_the_file_costs_only_its_game():
    assert split(b"(;GM[1];B[aa])(;GM[1]C[open (;GM(;B") == [b"(;GM[1];B[aa])", b"(;GM[1]C[open (;GM(;B"]


@pytest.mark.parametrize("size", [None, 64])
def test_a_game_that_is_too_long_is_named_and_its_variations_are_no_games(size):
    long = b"(;GM[1];B[aa]" + b"(;W[bb];B[cc])" * 100 + b")"
    last = b"(;GM[1];B[dd])"
    assert split(GAMES[0] + long + last, size, limit=200) == [GAMES[0], TooLong(200), last]


def test_a_long_file_is_divided_with_a_piece_and_a_game_in_memory():
    def pieces():
        for _ in range(300):
            yield b"(;GM[1]" + b";B[aa]" * 5_000 + b")\n(;GM[1]" + b";B[aa]C[\\]]" * 5_000 + b")"

    tracemalloc.start()
    lengths = [len(game) for game in split_games(pieces())]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lengths == [30_008, 55_008] * 300
    assert peak < 1e6 < sum(lengths) / 20


def test_a_file_of_utf16_or_shift_jis_is_read_in_pieces():
    for charset, head in (("utf-16", ""), ("shift_jis", "CA[Shift_JIS]")):
        # The second byte of 表 in Shift-JIS is a backslash, that of ゼ is a closing bracket.
        games = [f"(;GM[1]{head}PB[表]C[ゼ];B[aa];W[{'abc'[i]}b])" for i in range(3)]
        data = "".join(games).encode(charset)
        assert split(data, 4096 if charset == "shift_jis" else 7) == [game.encode() for game in games]
