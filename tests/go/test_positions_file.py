"""Tests of the original series' file of positions: what is read, written, and refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from msae_sweep.errors import DataError
from msae_sweep.go.planes import planes
from msae_sweep.go.positions_file import PositionsSlice, network_input, open_positions, read_slice, write_positions
from msae_sweep.go.records import Record
from msae_sweep.go.replay import replay
from msae_sweep.go.sgf import Game, read_games

GAMES = [
    "(;GM[1];B[aa];W[sa];B[as];W[dd];B[];W[pp];B[qq])",
    "(;GM[1]HA[2]AB[dd][pp];W[ab];B[ac];W[ss];B[bb];W[ca])",
]


def of_games() -> PositionsSlice:
    """Return all positions of both games, in which row and column, colour and history differ everywhere."""
    parts = []
    for number, text in enumerate(GAMES):
        (game,) = read_games(Record("a", text.encode()))
        assert isinstance(game, Game)
        plies = np.arange(game.n_moves)
        parts.append((*replay(game, plies), plies, np.full(len(plies), 1000 - number)))
    return PositionsSlice(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def test_a_position_is_the_networks_input_counted_from_the_bottom():
    found = of_games()
    x = planes(torch.from_numpy(found.boards), torch.from_numpy(found.black_to_move), torch.float32)
    assert np.array_equal(network_input(found.boards, found.black_to_move), x.flip(2).numpy())
    assert not np.array_equal(x.flip(2), x)


def write(path: Path) -> PositionsSlice:
    found = of_games()
    slices = [PositionsSlice(*(column[at] for column in found)) for at in (slice(0, 5), slice(5, 12))]
    write_positions(path, slices, len(found.ply), {"seed": 3})
    return found


def test_what_was_written_is_read_in_any_slices(tmp_path):
    path = tmp_path / "positions.hdf5"
    found = write(path)
    opened = open_positions(path)
    assert (opened.n_positions, opened.n_games) == (12, 2)
    for start, stop in ((0, 12), (0, 1), (3, 8), (11, 12)):
        part = read_slice(path, start, stop)
        assert np.array_equal(part.boards, found.boards[start:stop])
        assert np.array_equal(part.black_to_move, found.black_to_move[start:stop])
        assert part.ply.tolist() == found.ply[start:stop].tolist()
    assert read_slice(path, 0, 12).game_id.tolist() == [0] * 7 + [1] * 5, "games are numbered from 0 in their order"


def test_the_file_has_the_series_form(tmp_path):
    path = tmp_path / "positions.hdf5"
    write(path)
    with h5py.File(path) as file:
        forms = {name: (dataset.shape, dataset.dtype.name) for name, dataset in file.items()}
        assert forms == {
            "positions": ((12, 18, 19, 19), "float32"),
            "game_ids": ((12,), "int32"),
            "move_numbers": ((12,), "int16"),
        }
        assert file["positions"].compression == "gzip"
        assert {name: int(value) for name, value in file.attrs.items()} == {
            "seed": 3, "n_games": 2, "n_positions": 12, "board_size": 19,
        }  # fmt: skip


def test_a_file_that_takes_integers_of_another_size_is_read_too(tmp_path):
    path = tmp_path / "positions.hdf5"
    found = write(path)
    with h5py.File(path, "r+") as file:
        for name, dtype in (("positions", np.uint8), ("game_ids", np.int64), ("move_numbers", np.int32)):
            values = file[name][:].astype(dtype)
            del file[name]
            file[name] = values
    assert np.array_equal(read_slice(path, 0, 12).boards, found.boards)


def changed(name: str, change):
    def apply(file: h5py.File) -> None:
        values = change(file[name][:])
        del file[name]
        file[name] = values

    return apply


def one_value(position: int, plane: int, value: float):
    def change(x: np.ndarray) -> np.ndarray:
        x[position, plane, 3, 3] = value
        return x

    return changed("positions", change)


def without(name: str):
    def apply(file: h5py.File) -> None:
        del file[name]

    return apply


def both_sides(x: np.ndarray) -> np.ndarray:
    x[7, 2, 4, 5] = x[7, 10, 4, 5] = 1
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("positions"), "has no dataset positions, only game_ids, move_numbers; must have positions, game_ids"),
        (without("game_ids"), "has no dataset game_ids, only move_numbers, positions"),
        (without("move_numbers"), "has no dataset move_numbers"),
        (changed("positions", lambda x: x[:, :17]), r"shape \(12, 17, 19, 19\); must be \(n, 18, 19, 19\)"),
        (changed("positions", lambda x: x[:0]), r"shape \(0, 18, 19, 19\); must be .* with n of at least 1"),
        (changed("positions", lambda x: x.reshape(12, -1)), r"shape \(12, 6498\)"),
        (changed("game_ids", lambda x: x[:5]), r"game_ids has shape \(5,\) and type int32; must be \(12,\)"),
        (changed("move_numbers", lambda x: x.astype(np.float32)), "move_numbers has shape .* and type float32"),
        (one_value(4, 9, 0.5), "position 4 has a value other than 0 and 1 in its planes"),
        (one_value(4, 9, float("nan")), "position 4 has a value other than 0 and 1 in its planes"),
        (changed("positions", both_sides), "position 7 has stones of both sides on one point"),
        (one_value(2, 17, 1), "position 2 does not have ones in one of planes 16 and 17"),
    ],
)
def test_a_file_of_another_form_is_one_line(change, message, tmp_path):
    path = tmp_path / "positions.hdf5"
    write(path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=rf"positions\.hdf5: {message}|positions\.hdf5: .*{message}") as caught:
        open_positions(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no HDF5 at all" * 100])
def test_a_file_that_is_no_hdf5_is_one_line(content, tmp_path):
    path = tmp_path / "positions.hdf5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"positions\.hdf5: (is no readable HDF5 file|cannot be read: No such file)"
    ) as caught:
        open_positions(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_slice_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "positions.hdf5"
    write(path)
    with h5py.File(path) as file:
        offset = file["positions"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"positions\.hdf5: positions 3 to 6 cannot be read: ") as caught:
        read_slice(path, 3, 7)
    assert "\n" not in str(caught.value)


def test_a_game_that_is_too_long_for_the_format_is_one_line(tmp_path):
    found = of_games()
    with pytest.raises(DataError, match="move 32768 exceeds 32767"):
        write_positions(tmp_path / "a", [found._replace(ply=found.ply + 32768 - found.ply.max())], 12, {})
