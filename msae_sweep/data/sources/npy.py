"""Reader of the notebook's activation folder: `block{B}/chunk_*.npy`."""

import io
import re
import zipfile
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from msae_sweep.data.sources.base import (
    INDEX,
    BlockInfo,
    RowRange,
    Rows,
    Source,
    block_number,
    check_array,
    check_groups,
    digest,
    game_numbers,
    split_rows,
)
from msae_sweep.errors import DataError, first_line
from msae_sweep.paths import StoragePath

_COLUMN_BYTES = 8 << 20
"""Number of bytes per request when an array in Fortran (column-major) order is read from an object store."""


class NpySource(Source):
    """Activations in one folder per block, whose chunks follow one another in the order of their numbers.

    `game_id.npy` has one entry per row. It lies either in the activation folder, for all blocks, or in the folder of a
    block, for that block.
    """

    def __init__(self, path: StoragePath) -> None:
        self._path = path

    @cached_property
    def _folders(self) -> dict[int, StoragePath]:
        folders: dict[int, StoragePath] = {}
        for folder in self._path.folders():
            block = block_number(folder.name)
            if block is None or not any(file.suffix == ".npy" for file in folder.files()):
                continue
            if block in folders:
                raise DataError(f"{folder} and {folders[block]} both name block {block}; keep one")
            folders[block] = folder
        return dict(sorted(folders.items()))

    @cached_property
    def _chunks(self) -> dict[int, list["_Array"]]:
        """Headers of each block's chunks, by block number."""
        return {
            block: [
                _checked(file, info.size)
                for file, info in sorted(folder.files().items(), key=lambda item: _number(item[0]))
                if re.fullmatch(r"chunk_.*\.npy", file.name)
            ]
            for block, folder in self._folders.items()
        }

    @cached_property
    def _groups(self) -> dict[int, "_Array | None"]:
        """Header of the `game_id.npy` that applies to each block, or None if there is none, by block number."""
        return {block: self._group_file(block) for block in self._folders}

    def infos(self) -> dict[int, BlockInfo]:
        """See `Source.infos`."""
        return {block: self._info(block) for block in self._folders}

    def _info(self, block: int) -> BlockInfo:
        chunks, groups = self._chunks[block], self._groups[block]
        if not chunks:
            raise DataError(f"{self._folders[block]}: contains no chunk_*.npy")
        first = chunks[0]
        for chunk in chunks:
            if chunk.width != first.width:
                raise DataError(
                    f"{chunk.file}: width {chunk.width}, but {first.file.name} has {first.width}; "
                    "all chunks of a block must have the same width"
                )
        n_rows = sum(chunk.n_rows for chunk in chunks)
        if groups is not None:
            check_groups(str(groups.file), groups.shape, groups.dtype, n_rows)
        where = str(self._folders[block])
        return BlockInfo(block, where, n_rows, first.width, first.dtype.name, groups is not None)

    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """See `Source.row_ranges`."""
        ranges: list[RowRange] = []
        first_row = 0
        for chunk in self._chunks[block]:
            ranges += split_rows(block, str(chunk.file), 0, chunk.n_rows, first_row, rows)
            first_row += chunk.n_rows
        return ranges

    def read(self, row_range: RowRange) -> Rows:
        """See `Source.read`."""
        x = _read(_header(self._path.like(row_range.file)), row_range.start, row_range.stop)
        groups = self._groups[row_range.block]
        if groups is None:
            return Rows(x, None)
        return Rows(x, game_numbers(_read(groups, row_range.first_row, row_range.first_row + len(x))))

    def index(self, row_range: RowRange) -> dict[str, np.ndarray]:
        """See `Source.index`."""
        n_rows = sum(chunk.n_rows for chunk in self._chunks[row_range.block])
        stop = row_range.first_row + row_range.stop - row_range.start
        found = {}
        for column, names in INDEX.items():
            file = self._beside(row_range.block, names)
            if file is None:
                continue
            if file.shape != (n_rows,):
                raise DataError(f"{file.file}: shape {file.shape}; must be ({n_rows},), one entry per row")
            found[column] = _read(file, row_range.first_row, stop)
        return found

    def fingerprint(self, block: int) -> str:
        """See `Source.fingerprint`."""
        stats = [(name, info.size, info.mtime_ns) for name, info in self._file_infos(block)]
        return digest(self._info(block)._replace(where=""), stats)

    def files(self, block: int) -> dict[str, list[int]]:
        """See `Source.files`."""
        return {name: [info.size, info.mtime_ns] for name, info in self._file_infos(block)}

    def _file_infos(self, block: int) -> list[tuple[str, Any]]:
        folder, groups = self._folders[block], self._groups[block]
        found = folder.files()
        known = [(chunk.file.name, found[chunk.file]) for chunk in self._chunks[block]]
        if groups is not None:
            known.append((groups.file.name, found.get(groups.file) or groups.file.info()))
        if (file := folder / "normalization_stats.npz") in found:
            known.append((file.name, found[file]))
        return known

    def given_stats(self, block: int) -> tuple[np.ndarray, np.ndarray] | None:
        """See `Source.given_stats`."""
        file = self._folders[block] / "normalization_stats.npz"
        if not file.is_file():
            return None
        try:
            with np.load(io.BytesIO(file.read()), allow_pickle=False) as stats:
                mean, std = (np.asarray(stats[name], dtype=np.float64) for name in ("mean", "std"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: must contain the arrays mean and std: {first_line(error)}") from None
        input_dim = self._info(block).input_dim
        if mean.shape != (input_dim,) or std.shape != (input_dim,):
            raise DataError(f"{file}: mean {mean.shape} and std {std.shape}; both must be ({input_dim},)")
        if not np.isfinite(mean).all() or not np.isfinite(std).all() or (std < 0).any():
            raise DataError(f"{file}: NaN, Inf or a negative std; compute the statistics again")
        return mean, std

    def _group_file(self, block: int) -> "_Array | None":
        return self._beside(block, ("game_id",))

    def _beside(self, block: int, names: tuple[str, ...]) -> "_Array | None":
        """Return the header of the first file of these names in the block's folder or in the activation folder."""
        for name in names:
            for file in (self._folders[block] / f"{name}.npy", self._path / f"{name}.npy"):
                if (info := file.info()).is_file:
                    return _header(file, info.size)
        return None


class _Array(NamedTuple):
    """Header of an .npy file."""

    file: StoragePath
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int
    """Offset of the first value in the file, in bytes."""

    @property
    def n_rows(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1]


def _checked(file: StoragePath, size: int) -> _Array:
    array = _header(file, size)
    check_array(str(file), array.shape, array.dtype)
    return array


def _header(file: StoragePath, size: int | None = None) -> _Array:
    """Read the header of an .npy file.

    Raises:
        DataError: the file cannot be read as .npy, holds Python objects, or its `size` in bytes (if given) is smaller
            than the array that the header announces.
    """
    try:
        with open(file.path, "rb") if not file.is_remote else file.open() as opened:
            # A single read fetches the start of the file: numpy would request it from an object store piece by piece.
            start = io.BytesIO(opened.read(1 << 16))
        version = np.lib.format.read_magic(start)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(start)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(start)
        else:
            raise ValueError(f"version {version[0]}.{version[1]} of .npy, which is for structured arrays")
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if "EOF" in reason:
            reason = "truncated: it ends inside its header"
        elif "magic string" in reason:
            reason = "not an .npy file"
        raise DataError(f"{file}: cannot be read: {reason}") from None
    if dtype.hasobject:
        raise DataError(f"{file}: cannot be read: an object array; activations are plain float arrays")
    array = _Array(file, shape, dtype, fortran_order, start.tell())
    n_bytes = start.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size is not None and size < n_bytes:
        raise DataError(f"{file}: cannot be read: truncated: its header describes more data than its {size} bytes")
    return array


def _read(array: _Array, start: int, stop: int) -> np.ndarray:
    """Return a copy of rows `start` to `stop`."""
    if array.fortran_order and len(array.shape) > 1:
        return _read_columns(array, start, stop)
    width = int(np.prod(array.shape[1:], dtype=np.int64))
    with _opened(array.file) as opened:
        found = _numbers(array, opened, start * width, (stop - start) * width)
    return found.reshape(stop - start, *array.shape[1:])


def _read_columns(array: _Array, start: int, stop: int) -> np.ndarray:
    """Return a copy of rows `start` to `stop` of a two-dimensional array in Fortran (column-major) order.

    From a disk, only these rows are read. In an object store, a request takes longer than the transfer of a few
    megabytes, so each request reads as many whole columns as fit into `_COLUMN_BYTES`.
    """
    n_rows, width = array.shape
    at_once = max(1, _COLUMN_BYTES // (n_rows * array.dtype.itemsize)) if array.file.is_remote else 1
    columns = np.empty((width, stop - start), array.dtype)
    with _opened(array.file) as opened:
        for first in range(0, width, at_once):
            n_columns = min(at_once, width - first)
            found = _numbers(array, opened, first * n_rows + start, (n_columns - 1) * n_rows + stop - start)
            for column in range(n_columns):
                columns[first + column] = found[column * n_rows :][: stop - start]
    return np.ascontiguousarray(columns.T)


def _opened(file: StoragePath) -> Any:
    return file.open() if file.is_remote else open(file.path, "rb")


def _numbers(array: _Array, opened: Any, first: int, count: int) -> np.ndarray:
    """Return `count` values of the file, beginning with value number `first`.

    Raises:
        DataError: the file ends before the last of these values.
    """
    file, dtype = array.file, array.dtype
    opened.seek(array.offset + first * dtype.itemsize)
    if not file.is_remote:
        # A plain read is faster than a memory map: for 32 MiB, page faults took 25-50 ms and a read took 11 ms.
        found = np.fromfile(opened, dtype, count)
    else:
        content = opened.read(count * dtype.itemsize)
        found = np.frombuffer(content, dtype, len(content) // dtype.itemsize).copy()
    if len(found) < count:
        raise DataError(
            f"{file}: cannot be read: truncated: its header describes more data than its {file.info().size} bytes"
        )
    return found


def _number(file: StoragePath) -> tuple[int, str]:
    numbers = re.findall(r"\d+", file.stem)
    return (int(numbers[-1]) if numbers else -1, file.name)
