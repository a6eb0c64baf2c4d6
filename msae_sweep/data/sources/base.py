"""Interface of all activation sources: the notebook's folder, HDF5, Parquet or Arrow, and planted data.

A source finds its blocks by reading file headers only, and reads one row range at a time, so no block is ever loaded
whole. Sources are picklable, because Ray's workers open the files themselves.
"""

import hashlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from msae_sweep.errors import DataError

INDEX = {"game_id": ("game_id", "game_ids"), "position_id": ("position_id",), "ply": ("ply", "move_numbers"),
         "point": ("point",)}  # fmt: skip
"""Columns that tell where a row comes from, each with the names under which files hold it; the original series writes
`game_ids` and `move_numbers`."""

FLOATS = ("float16", "float32", "float64")
"""Names of the dtypes that activations may have."""


class BlockInfo(NamedTuple):
    """Properties of one block, read from file headers."""

    block: int
    where: str
    """Location of the block (a folder, a file, or a dataset in a file), for messages."""
    n_rows: int
    input_dim: int
    dtype: str
    has_groups: bool
    """True if every row has a game_id."""


class RowRange(NamedTuple):
    """Rows `start` to `stop` (exclusive) of one file, the first of which is row `first_row` of the block."""

    block: int
    file: str
    start: int
    stop: int
    first_row: int

    def name(self, first: int, last: int) -> str:
        """Return the text by which messages name rows `first` to `last` (inclusive, counted within the range)."""
        rows = f"row {self.start + first}" if first == last else f"rows {self.start + first}-{self.start + last}"
        return f"{self.file} {rows}"


class Rows(NamedTuple):
    """Content of one row range."""

    x: Float[np.ndarray, "rows input_dim"]
    """Activations, in the source's own dtype."""
    groups: Int64[np.ndarray, " rows"] | None
    """Game number of each row, or None if the source has no game_id."""


class Source(ABC):
    """Activations of several blocks in one place."""

    @abstractmethod
    def infos(self) -> dict[int, BlockInfo]:
        """Check the headers of every block found, and return the blocks in ascending order.

        Raises:
            DataError: a file is broken, or does not hold what its name and location announce.
        """

    @abstractmethod
    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """Return ranges of about `rows` rows that cover the block in order; no range spans two files."""

    @abstractmethod
    def read(self, row_range: RowRange) -> Rows:
        """Read the rows of one range."""

    @abstractmethod
    def fingerprint(self, block: int) -> str:
        """Return a digest that changes when the block's rows may have changed.

        It is computed from file names, sizes, modification times and headers; no rows are read.
        """

    @abstractmethod
    def files(self, block: int) -> dict[str, list[int]]:
        """Return the files that the block's rows come from: name → [size in bytes, modification time in ns]."""

    def index(self, row_range: RowRange) -> dict[str, np.ndarray]:
        """Return the columns of `INDEX` that lie beside the rows, for the rows of one range.

        Raises:
            DataError: a column does not have one entry per row of the block.
        """
        return {}

    def given_stats(self, block: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the mean and std that came with the data, or None if there are none.

        Raises:
            DataError: the arrays do not fit the block, or cannot be a mean and a std.
        """
        return None


def block_number(name: str) -> int | None:
    """Return the block number in the name of a folder, dataset or column; None if there is none, or more than one.

    Examples of names of block 5: `block5`, `block_05`, `blocks/5/act`, `5`.
    """
    named = re.findall(r"(?:block|layer|resblock)s?[^0-9a-z]?0*(\d+)", name.lower())
    numbers = named or re.findall(r"\d+", name)
    return int(numbers[0]) if len(set(numbers)) == 1 else None


def check_array(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise an error if an array cannot hold activations.

    Raises:
        DataError: the array is not 2-D, has no rows or columns, or its dtype is not one of `FLOATS`.
    """
    if len(shape) != 2:
        raise DataError(f"{where}: {len(shape)}-D array of shape {shape}; must be 2-D [rows, input_dim]")
    if 0 in shape:
        raise DataError(f"{where}: empty array of shape {shape}; must contain rows")
    if dtype.name not in FLOATS:
        raise DataError(f"{where}: dtype {dtype.name}; must be one of {', '.join(FLOATS)}")


def check_groups(where: str, shape: tuple[int, ...], dtype: np.dtype, n_rows: int) -> None:
    """Raise an error if an array cannot hold the game_id of each of a block's rows.

    Raises:
        DataError: the array does not have one entry per row, or holds neither whole numbers nor text.
    """
    if len(shape) != 1:
        raise DataError(f"{where}: {len(shape)}-D array; must be 1-D, with one entry per row")
    if shape[0] != n_rows:
        raise DataError(f"{where}: {shape[0]} entries, but the block has {n_rows} rows; must be one entry per row")
    if dtype.kind not in "iuSUO":
        raise DataError(f"{where}: game_id of dtype {dtype}; must be whole numbers or text")


def game_numbers(groups: np.ndarray) -> Int64[np.ndarray, " rows"]:
    """Return games as int64; text is hashed, so that a game has the same number in every file and on every node."""
    if groups.dtype.kind in "iu":
        return groups.astype(np.int64)
    names, inverse = np.unique(groups.astype(str), return_inverse=True)
    hashed = [int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big", signed=True) for n in names]
    return np.array(hashed, dtype=np.int64)[inverse]


def split_rows(block: int, file: str, start: int, stop: int, first_row: int, rows: int) -> Iterable[RowRange]:
    """Yield equal ranges of about `rows` rows that cover rows `start` to `stop` of a file.

    `first_row` is the row number of the file's first row within the block.
    """
    n_ranges = max(1, round((stop - start) / rows))
    ends = [start + (stop - start) * i // n_ranges for i in range(n_ranges + 1)]
    for first, last in itertools.pairwise(ends):
        yield RowRange(block, file, first, last, first_row + first)


def digest(*parts: object) -> str:
    """Return the first sixteen hex digits of a SHA-256 hash over the parts' `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
