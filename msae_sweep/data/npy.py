"""The notebook's activation folder: `block{B}/chunk_*.npy`, memory-mapped."""

import re
from functools import cached_property
from pathlib import Path

import numpy as np

from msae_sweep.data.source import BlockInfo, RowRange, Rows, Source, block_of, check_array, cut, digest, group_numbers
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
            block: [(file, len(_open(file))) for file in sorted(folder.glob("chunk_*.npy"), key=_number)]
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
            check_array(str(file), array.shape, array.dtype)
            if array.shape[1] != first.shape[1]:
                raise DataError(
                    f"{file}: width {array.shape[1]}, but {chunks[0][0].name} has {first.shape[1]}; "
                    "all chunks of a block must have the same width"
                )
        n_rows = sum(rows for _, rows in chunks)
        groups = self._groups(block)
        if groups is not None and len(groups) != n_rows:
            raise DataError(
                f"{self._group_file(block)}: {len(groups)} entries, but block {block} has {n_rows} rows; one a row"
            )
        where = str(self._folders[block])
        return BlockInfo(block, where, n_rows, first.shape[1], first.dtype.name, groups is not None)

    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """See `Source`."""
        ranges: list[RowRange] = []
        first_row = 0
        for file, n_rows in self._chunks[block]:
            ranges += cut(block, str(file), n_rows, first_row, rows)
            first_row += n_rows
        return ranges

    def read(self, row_range: RowRange) -> Rows:
        """See `Source`."""
        x = np.array(_open(Path(row_range.file))[row_range.start : row_range.stop])
        groups = self._groups(row_range.block)
        if groups is None:
            return Rows(x, None)
        ours = np.array(groups[row_range.first_row : row_range.first_row + len(x)])
        return Rows(x, group_numbers(str(self._group_file(row_range.block)), ours))

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
                return np.asarray(stats["mean"], dtype=np.float64), np.asarray(stats["std"], dtype=np.float64)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{file}: must hold arrays mean and std: {error}") from None

    def _group_file(self, block: int) -> Path | None:
        candidates = (self._folders[block] / "game_id.npy", self._path / "game_id.npy")
        return next((file for file in candidates if file.is_file()), None)

    def _groups(self, block: int) -> np.ndarray | None:
        file = self._group_file(block)
        if file is None:
            return None
        groups = _open(file)
        if groups.ndim != 1:
            raise DataError(f"{file}: {groups.ndim}-D array; must be 1-D, one entry a row")
        return groups


def _open(file: Path) -> np.ndarray:
    """Memory-map an array; only the header is read here."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        if "mmap length" in reason or "Cannot mmap an empty file" in reason or not file.stat().st_size:
            reason = f"truncated: its header announces more than its {file.stat().st_size} bytes"
        elif "Python objects" in reason or "pickle" in reason:
            reason = "an object array (or no .npy file); activations are plain float arrays"
        raise DataError(f"{file}: cannot be read: {reason}") from None


def _number(file: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", file.stem)
    return (int(numbers[-1]) if numbers else -1, file.name)
