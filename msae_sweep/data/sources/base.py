"""Where activations come from: one interface over the notebook's folder, HDF5, Parquet or Arrow, and planted data.

A source knows its blocks from headers alone and reads one row range at a time, so that nothing is ever loaded whole.
Sources are picklable: Ray's workers open the files themselves.
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

FLOATS = ("float16", "float32", "float64")
"""Types that activations may have."""


class BlockInfo(NamedTuple):
    """What the headers say of one block."""

    block: int
    where: str
    """The file, dataset or column, for messages."""
    n_rows: int
    input_dim: int
    dtype: str
    has_groups: bool
    """Whether every row has a game_id."""


class RowRange(NamedTuple):
    """Rows `start` to `stop` of one file, which are the block's rows from `first_row` on."""

    block: int
    file: str
    start: int
    stop: int
    first_row: int

    def name(self, first: int, last: int) -> str:
        """How messages name the rows `first` to `last` (inclusive, counted within the range)."""
        rows = f"row {self.start + first}" if first == last else f"rows {self.start + first}-{self.start + last}"
        return f"{self.file} {rows}"


class Rows(NamedTuple):
    """One row range's content."""

    x: Float[np.ndarray, "rows input_dim"]
    """In the source's own type."""
    groups: Int64[np.ndarray, " rows"] | None
    """The game of each row, where the source has them."""


class Source(ABC):
    """Activations of several blocks."""

    @abstractmethod
    def infos(self) -> dict[int, BlockInfo]:
        """Every block found, ascending; headers are checked here.

        Raises:
            DataError: a file is broken, or does not hold what its place says.
        """

    @abstractmethod
    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """Ranges of about `rows` rows that cover the block in order; none spans two files."""

    @abstractmethod
    def read(self, row_range: RowRange) -> Rows:
        """Read one range."""

    @abstractmethod
    def fingerprint(self, block: int) -> str:
        """Changes when the block's rows may have changed; read from names, sizes, times and headers."""

    @abstractmethod
    def files(self, block: int) -> dict[str, list[int]]:
        """Files that the block's rows come from: name → [size in bytes, time of the last change in ns]."""

    def given_stats(self, block: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and std that came with the data, if any.

        Raises:
            DataError: they do not fit the block, or cannot be statistics.
        """
        return None


def block_of(name: str) -> int | None:
    """The block that the name of a folder, dataset or column tells: `block5`, `block_05`, `blocks/5/act`, `5`."""
    named = re.findall(r"(?:block|layer|resblock)s?[^0-9a-z]?0*(\d+)", name.lower())
    numbers = named or re.findall(r"\d+", name)
    return int(numbers[0]) if len(set(numbers)) == 1 else None


def check_array(where: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Whether an array can hold activations.

    Raises:
        DataError: not 2-D, no rows or columns, or not a float type.
    """
    if len(shape) != 2:
        raise DataError(f"{where}: {len(shape)}-D array of shape {shape}; must be 2-D [rows, input_dim]")
    if 0 in shape:
        raise DataError(f"{where}: empty array of shape {shape}; must hold rows")
    if dtype.name not in FLOATS:
        raise DataError(f"{where}: dtype {dtype.name}; must be one of {', '.join(FLOATS)}")


def check_groups(where: str, shape: tuple[int, ...], dtype: np.dtype, n_rows: int) -> None:
    """Whether an array can hold the game of each of a block's rows.

    Raises:
        DataError: not one entry a row, or neither whole numbers nor text.
    """
    if len(shape) != 1:
        raise DataError(f"{where}: {len(shape)}-D array; must be 1-D, one entry a row")
    if shape[0] != n_rows:
        raise DataError(f"{where}: {shape[0]} entries, but the block has {n_rows} rows; one a row")
    if dtype.kind not in "iuSUO":
        raise DataError(f"{where}: game_id of dtype {dtype}; must be whole numbers or text")


def group_numbers(groups: np.ndarray) -> Int64[np.ndarray, " rows"]:
    """Games as int64; a name becomes a number by a hash, so that it is the same in every file and on every node."""
    if groups.dtype.kind in "iu":
        return groups.astype(np.int64)
    names, inverse = np.unique(groups.astype(str), return_inverse=True)
    hashed = [int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big", signed=True) for n in names]
    return np.array(hashed, dtype=np.int64)[inverse]


def cut(block: int, file: str, start: int, stop: int, first_row: int, rows: int) -> Iterable[RowRange]:
    """Equal ranges of about `rows` rows over rows `start` to `stop` of a file whose first row is `first_row`."""
    n_ranges = max(1, round((stop - start) / rows))
    ends = [start + (stop - start) * i // n_ranges for i in range(n_ranges + 1)]
    for first, last in itertools.pairwise(ends):
        yield RowRange(block, file, first, last, first_row + first)


def digest(*parts: object) -> str:
    """Sixteen hex digits over the parts' text."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
