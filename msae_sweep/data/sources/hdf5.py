"""Reader of activations in one HDF5 file: a 2-D dataset per block, under any name that identifies the block."""

from functools import cached_property
from typing import Any

import h5py

from msae_sweep.data.sources.base import (
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

_GAMES = ("game_id", "game_ids")
"""Names of the dataset with the game of each row."""


class Hdf5Source(Source):
    """Activations in an HDF5 file.

    The dataset `game_id` lies at the root, for all blocks, or in the group of a block's dataset, for that block. The
    original series calls it `game_ids`.
    """

    def __init__(self, path: StoragePath) -> None:
        self._path = path

    @cached_property
    def _datasets(self) -> dict[int, str]:
        """Name of the activation dataset of each block, by block number."""
        names: list[tuple[str, int]] = []

        def visit(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset) and name.rsplit("/", 1)[-1] not in _GAMES:
                names.append((name, len(node.shape or ())))

        with self._open() as file:
            file.visititems(visit)
        found: dict[int, list[tuple[str, int]]] = {}
        for name, n_dims in names:
            block = block_number(name)
            if block is not None:
                found.setdefault(block, []).append((name, n_dims))
        chosen = {}
        for block, candidates in sorted(found.items()):
            # Beside the activations, a group may hold 1-D datasets such as position numbers or statistics.
            tables = [name for name, n_dims in candidates if n_dims == 2] or [candidates[0][0]]
            if len(tables) > 1:
                raise DataError(f"{self._path}: datasets {' and '.join(tables)} both name block {block}; keep one")
            chosen[block] = tables[0]
        if not chosen:
            raise DataError(
                f"{self._path}: no dataset with a block number in its name (such as block5); "
                f"found {', '.join(name for name, _ in names) or 'none'}"
            )
        return chosen

    def infos(self) -> dict[int, BlockInfo]:
        """See `Source.infos`."""
        with self._open() as file:
            return {block: self._info(file, block) for block in self._datasets}

    def _info(self, file: h5py.File, block: int) -> BlockInfo:
        dataset, groups = file[self._datasets[block]], self._groups(file, block)
        where = f"{self._path}:{dataset.name}"
        # The shape of a dataset with a null dataspace is None.
        check_array(where, dataset.shape or (), dataset.dtype)
        if groups is not None:
            check_groups(f"{self._path}:{groups.name}", groups.shape or (), groups.dtype, len(dataset))
        return BlockInfo(block, where, dataset.shape[0], dataset.shape[1], dataset.dtype.name, groups is not None)

    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """See `Source.row_ranges`."""
        return list(split_rows(block, f"{self._path}:{self._datasets[block]}", 0, self.infos()[block].n_rows, 0, rows))

    def read(self, row_range: RowRange) -> Rows:
        """See `Source.read`."""
        rows = slice(row_range.start, row_range.stop)
        with self._open() as file:
            groups = self._groups(file, row_range.block)
            try:
                x = file[self._datasets[row_range.block]][rows]
                return Rows(x, None if groups is None else game_numbers(groups[rows]))
            except OSError as error:
                where = row_range.name(0, row_range.stop - row_range.start - 1)
                raise DataError(f"{where}: cannot be read: {first_line(error)}") from None

    def fingerprint(self, block: int) -> str:
        """See `Source.fingerprint`."""
        file = self._path.info()
        info = self.infos()[block]._replace(where=self._datasets[block])
        return digest(info, file.size, file.mtime_ns)

    def files(self, block: int) -> dict[str, list[int]]:
        """See `Source.files`."""
        file = self._path.info()
        return {self._path.name: [file.size, file.mtime_ns]}

    def _open(self) -> h5py.File:
        try:
            return h5py.File(self._path.open() if self._path.is_remote else self._path.path, "r")
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read as HDF5: {first_line(error)}") from None

    def _groups(self, file: h5py.File, block: int) -> h5py.Dataset | None:
        parent = self._datasets[block].rpartition("/")[0]
        candidates = [f"{folder}{name}" for folder in ((f"{parent}/", "") if parent else ("",)) for name in _GAMES]
        return next((file[name] for name in candidates if isinstance(file.get(name), h5py.Dataset)), None)
