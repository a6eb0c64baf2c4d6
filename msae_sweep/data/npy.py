"""The notebook's activation folder: `block{B}/chunk_*.npy`."""

import re
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np

from msae_sweep.data.source import (
    BlockInfo,
    RowRange,
    Rows,
    Source,
    block_of,
    check_array,
    check_groups,
    cut,
    digest,
    group_numbers,
)
from msae_sweep.errors import DataError


class NpyFolder(Source):
    """Chunks of a block follow one another in the order of their numbers.

    `game_id.npy` lies in the folder (the same for every block) or in the block's own; one entry a row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _folders(self) -> dict[int, Path]:
        folders: dict[int, Path] = {}
        for folder in sorted(p for p in self._path.iterdir() if p.is_dir()):
            block = block_of(folder.name)
            if block is None or not list(folder.glob("*.npy")):
                continue
            if block in folders:
                raise DataError(f"{folder} and {folders[block]} both name block {block}; keep one")
            folders[block] = folder
        return dict(sorted(folders.items()))

    @cached_property
    def _chunks(self) -> dict[int, list[tuple[Path, int]]]:
        """Files with their row counts, by block."""
        return {
            block: [(file, _n_rows(file)) for file in sorted(folder.glob("chunk_*.npy"), key=_number)]
            for block, folder in self._folders.items()
        }

    def infos(self) -> dict[int, BlockInfo]:
        """See `Source`."""
        return {block: self._info(block) for block in self._folders}

    def _info(self, block: int) -> BlockInfo:
        chunks = self._chunks[block]
        if not chunks:
            raise DataError(f"{self._folders[block]}: no chunk_*.npy there")
        first = _open(chunks[0][0])
        for file, _ in chunks:
            array = _open(file)
            if array.shape[1] != first.shape[1]:
                raise DataError(
                    f"{file}: width {array.shape[1]}, but {chunks[0][0].name} has {first.shape[1]}; "
                    "all chunks of a block must have the same width"
                )
        n_rows = sum(rows for _, rows in chunks)
        group_file = self._group_file(block)
        if group_file is not None:
            groups = _open(group_file)
            check_groups(str(group_file), groups.shape, groups.dtype, n_rows)
        where = str(self._folders[block])
        return BlockInfo(block, where, n_rows, first.shape[1], first.dtype.name, group_file is not None)

    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """See `Source`."""
        ranges: list[RowRange] = []
        first_row = 0
        for file, n_rows in self._chunks[block]:
            ranges += cut(block, str(file), 0, n_rows, first_row, rows)
            first_row += n_rows
        return ranges

    def read(self, row_range: RowRange) -> Rows:
        """See `Source`."""
        x = _read(Path(row_range.file), row_range.start, row_range.stop)
        group_file = self._group_file(row_range.block)
        if group_file is None:
            return Rows(x, None)
        return Rows(x, group_numbers(_open(group_file)[row_range.first_row : row_range.first_row + len(x)]))

    def fingerprint(self, block: int) -> str:
        """See `Source`."""
        files = [file for file, _ in self._chunks[block]]
        files += [
            p for p in (self._group_file(block), self._folders[block] / "normalization_stats.npz") if p and p.exists()
        ]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return digest(self._info(block)._replace(where=""), stats)

    def given_stats(self, block: int) -> tuple[np.ndarray, np.ndarray] | None:
        """See `Source`."""
        file = self._folders[block] / "normalization_stats.npz"
        if not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as stats:
                mean, std = (np.asarray(stats[name], dtype=np.float64) for name in ("mean", "std"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: must hold arrays mean and std: {str(error).splitlines()[0]}") from None
        input_dim = self._info(block).input_dim
        if mean.shape != (input_dim,) or std.shape != (input_dim,):
            raise DataError(f"{file}: mean {mean.shape} and std {std.shape}; both must be ({input_dim},)")
        if not np.isfinite(mean).all() or not np.isfinite(std).all() or (std < 0).any():
            raise DataError(f"{file}: NaN, Inf or a negative std; compute the statistics again")
        return mean, std

    def _group_file(self, block: int) -> Path | None:
        candidates = (self._folders[block] / "game_id.npy", self._path / "game_id.npy")
        return next((file for file in candidates if file.is_file()), None)


def _n_rows(file: Path) -> int:
    array = _open(file)
    check_array(str(file), array.shape, array.dtype)
    return len(array)


def _read(file: Path, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop`, copied."""
    array = _open(file)
    if not array.flags.c_contiguous:
        return np.array(array[start:stop])
    # A plain read: faulting the same bytes in through the map took 25-50 ms for 32 MiB, reading them 11 ms.
    width = array.shape[1]
    offset = array.offset + start * width * array.itemsize
    return np.fromfile(file, array.dtype, (stop - start) * width, offset=offset).reshape(-1, width)


def _open(file: Path) -> np.memmap:
    """Memory-map an array; only the header is read here."""
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if "Python objects" in reason:
            reason = "an object array; activations are plain float arrays"
        elif "mmap" in reason or "EOF" in reason:
            reason = f"truncated: its header announces more than its {file.stat().st_size} bytes"
        elif "magic string" in reason:
            reason = "not an .npy file"
        raise DataError(f"{file}: cannot be read: {reason}") from None


def _number(file: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", file.stem)
    return (int(numbers[-1]) if numbers else -1, file.name)
