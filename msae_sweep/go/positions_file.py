"""The original series' file of positions, `positions.hdf5`: reading, checking and writing.

The file has three datasets: `positions`, float32 [n, 18, 19, 19], which is the network's input as `planes` makes it,
but with row 0 at the *bottom* of the board, as Leela Zero counts; `game_ids`, int32 [n]; and `move_numbers`, int16 [n],
the number of moves before each position. A position takes 26 KB, so the file is read and written in slices.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import Bool, Float32, Int8, Int64

from msae_sweep.data.hdf5_writer import write_gzip_dataset
from msae_sweep.errors import DataError, first_line
from msae_sweep.go.board import N_POINTS, SIZE
from msae_sweep.go.replay import HISTORY

_SHAPE = (2 * HISTORY + 2, SIZE, SIZE)
POSITION_BYTES = 4 * math.prod(_SHAPE)
"""Size of a position before compression."""
_HDF5_CHUNK = 256
"""Positions per chunk of a written file, 6.7 MB before compression."""
_CACHE_BYTES = 64 * 2**20
"""Size of HDF5's cache, which keeps a chunk that two slices share. The default holds no chunk of this size."""


class PositionsFile(NamedTuple):
    """File of positions whose form has been checked."""

    path: Path
    n_positions: int
    n_games: int
    sha256: str
    """Hash of the file's bytes."""


class PositionsSlice(NamedTuple):
    """Some of a file's positions, in the form in which `replay` makes them."""

    boards: Int8[np.ndarray, "positions 8 361"]
    black_to_move: Bool[np.ndarray, " positions"]
    ply: Int64[np.ndarray, " positions"]
    game_id: Int64[np.ndarray, " positions"]


def open_positions(path: Path) -> PositionsFile:
    """Check the form of a file of positions, and its first positions.

    Raises:
        DataError: the file cannot be read, is no HDF5 file, lacks a dataset, or a dataset has another form.
    """
    try:
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        with h5py.File(path, "r") as file:
            n = _check_form(path, file)
            n_games = len(np.unique(file["game_ids"][:]))
    except OSError as error:
        raise DataError(f"{path}: is no readable HDF5 file: {first_line(error)}") from None
    read_slice(path, 0, min(n, _HDF5_CHUNK))
    return PositionsFile(path, n, n_games, sha256)


def read_slice(path: Path, start: int, stop: int) -> PositionsSlice:
    """Read the positions from `start` to before `stop`.

    Raises:
        DataError: the slice cannot be read, or a position is not a network's input.
    """
    try:
        with h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES) as file:
            x = file["positions"][start:stop]
            ply, game_id = (file[name][start:stop].astype(np.int64) for name in ("move_numbers", "game_ids"))
    except (OSError, KeyError) as error:
        raise DataError(f"{path}: positions {start} to {stop - 1} cannot be read: {first_line(error)}") from None
    return PositionsSlice(*_boards(x, path, start), ply, game_id)


def network_input(
    boards: Int8[np.ndarray, "positions 8 361"], black_to_move: Bool[np.ndarray, " positions"]
) -> Float32[np.ndarray, "positions 18 19 19"]:
    """Return the network's input with row 0 at the bottom, as the file holds it."""
    history = boards.reshape(-1, HISTORY, SIZE, SIZE)[:, :, ::-1]
    x = np.empty((len(boards), *_SHAPE), np.float32)
    x[:, :HISTORY] = history == 1
    x[:, HISTORY : 2 * HISTORY] = history == -1
    x[:, 2 * HISTORY] = black_to_move[:, None, None]
    x[:, 2 * HISTORY + 1] = ~black_to_move[:, None, None]
    return x


def write_positions(path: Path, slices: Iterable[PositionsSlice], n_positions: int, attributes: dict[str, Any]) -> None:
    """Write a file of positions, one slice in memory at a time. The caller makes this atomic.

    Args:
        path: the file.
        slices: consecutive slices, in which the positions of each game follow one another.
        n_positions: number of positions in all slices.
        attributes: attributes of the file.

    Raises:
        DataError: a game has more moves than the file's int16 can hold.
    """
    names: dict[int, int] = {}
    game_ids: list[np.ndarray] = []
    move_numbers: list[np.ndarray] = []

    def inputs() -> Iterator[np.ndarray]:
        for part in slices:
            if part.ply.max() > np.iinfo(np.int16).max:
                raise DataError(f"{path}: move {part.ply.max()} exceeds 32767, the format's largest; give --max-move")
            game_ids.append(np.array([names.setdefault(game, len(names)) for game in part.game_id.tolist()], np.int32))
            move_numbers.append(part.ply.astype(np.int16))
            yield network_input(part.boards, part.black_to_move)

    with h5py.File(path, "w") as file:
        write_gzip_dataset(
            file=file,
            name="positions",
            shape=(n_positions, *_SHAPE),
            dtype=np.dtype(np.float32),
            parts=inputs(),
            chunk_rows=_HDF5_CHUNK,
        )
        file["game_ids"], file["move_numbers"] = np.concatenate(game_ids), np.concatenate(move_numbers)
        assert len(file["game_ids"]) == n_positions, f"{len(file['game_ids'])} positions instead of {n_positions}"
        file.attrs.update({**attributes, "n_games": len(names), "n_positions": n_positions, "board_size": SIZE})


def _check_form(path: Path, file: Any) -> int:
    """Return the number of positions, or raise DataError if a dataset is missing or has another form."""
    for name in ("positions", "game_ids", "move_numbers"):
        if not isinstance(file.get(name), h5py.Dataset):
            found = ", ".join(sorted(file)) or "nothing"
            raise DataError(f"{path}: has no dataset {name}, only {found}; must have positions, game_ids, move_numbers")
    positions = file["positions"]
    if positions.ndim != 4 or positions.shape[1:] != _SHAPE or not len(positions):
        raise DataError(f"{path}: positions has shape {positions.shape}; must be (n, 18, 19, 19) with n of at least 1")
    if positions.dtype.kind not in "fiub":
        raise DataError(f"{path}: positions has type {positions.dtype}; must be float32")
    for name in ("game_ids", "move_numbers"):
        dataset = file[name]
        if dataset.shape != (len(positions),) or dataset.dtype.kind not in "iu":
            raise DataError(
                f"{path}: {name} has shape {dataset.shape} and type {dataset.dtype}; must be ({len(positions)},), one "
                "integer per position"
            )
    return len(positions)


def _boards(
    x: np.ndarray, path: Path, start: int
) -> tuple[Int8[np.ndarray, "positions 8 361"], Bool[np.ndarray, " positions"]]:
    """Return the boards and the sides to move of the network's input `x`, whose row 0 is the bottom."""

    def check(right: Bool[np.ndarray, "positions values"], what: str) -> None:
        if not right.all():
            raise DataError(f"{path}: position {start + int(np.argmin(right.all(axis=1)))} {what}")

    n = len(x)
    flat = x.reshape(n, -1)
    check((flat == 0) | (flat == 1), "has a value other than 0 and 1 in its planes")
    stones = x.astype(np.int8)
    own, others, sides = (
        stones[:, :HISTORY],
        stones[:, HISTORY : 2 * HISTORY],
        stones[:, 2 * HISTORY :].reshape(n, 2, -1),
    )
    check((own + others).reshape(n, -1) <= 1, "has stones of both sides on one point")
    # Plane 16 is all ones if black is to move, plane 17 if white is.
    to_move = sides[:, 0, :1] == 1
    check(
        (sides[:, 0] == to_move) & (sides[:, 1] == ~to_move),
        "does not have ones in one of planes 16 and 17 and zeros in the other, for the side to move",
    )
    return np.ascontiguousarray((own - others)[:, :, ::-1]).reshape(n, HISTORY, N_POINTS), to_move[:, 0]
