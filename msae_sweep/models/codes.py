"""Reader of the codes that `msae-sweep encode` writes (`msae_sweep.open_codes`), as sparse or dense arrays."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, UInt

from msae_sweep.errors import ConfigError, DataError, first_line
from msae_sweep.format_version import CODES, check_format
from msae_sweep.paths import StoragePath

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MANIFEST = "_codes.json"
"""Name of the manifest in a folder of codes. Readers of Parquet folders leave out files whose names begin with _."""
BATCH_ROWS = 8192
"""Number of rows that `Codes.batches` yields at a time by default."""


def part_name(i: int) -> str:
    """Return the file name of part `i` of a folder of codes."""
    return f"part_{i:05d}.parquet"


def open_codes(path: str | Path) -> "Codes":
    """Open a folder of codes, on a disk or in an object store. Only its manifest and file headers are read.

    Raises:
        DataError: there are no codes, or their encoding is unfinished.
        FormatError: a newer msae_sweep wrote them in another format.
    """
    return Codes(path)


class Codes:
    """Codes of all rows of one block, sorted by value within each row: the first k entries are the code at level k."""

    def __init__(self, path: str | Path) -> None:
        self._place = StoragePath(path)
        manifest = self._place / MANIFEST
        try:
            content: dict[str, Any] = json.loads(manifest.read())
            check_format(content, CODES, str(manifest))
            complete, n_parts = content["complete"], content["n_parts"]
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            raise DataError(f"{path}: holds no codes; give a folder that `msae-sweep encode` wrote") from None
        if not complete:
            raise DataError(
                f"{path}: its encoding is unfinished; run the same `msae-sweep encode` again to complete it"
            )
        self.manifest = content
        """Content of `_codes.json`: model, data, block and sizes."""
        self._starts = [0]
        for i in range(n_parts):
            self._starts.append(self._starts[-1] + int(self._opened(i).metadata.num_rows))
        self.columns = tuple(name for name in self._opened(0).schema_arrow.names if name not in ("indices", "values"))
        """Index columns of the rows: those of game_id, position_id, ply and point that the data had."""

    def __repr__(self) -> str:
        return f"Codes(n_rows={self.n_rows}, hidden_dim={self.hidden_dim}, k={self.k}, path={str(self._place)!r})"

    def __len__(self) -> int:
        return self.n_rows

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self._starts[-1]

    @property
    def hidden_dim(self) -> int:
        """Number of latents of the model."""
        return int(self.manifest["hidden_dim"])

    @property
    def k(self) -> int:
        """Largest level that the codes hold."""
        return int(self.manifest["k"])

    @property
    def k_levels(self) -> tuple[int, ...]:
        """Levels at which the model was trained."""
        return tuple(self.manifest["k_levels"])

    def column(self, name: str) -> np.ndarray:
        """Return an index column, one of `columns`, for all rows.

        Raises:
            ConfigError: the codes have no such column.
        """
        if name not in self.columns:
            raise ConfigError(f"column {name}: must be one of {', '.join(self.columns) or 'none'}")
        return np.concatenate([self._table(i, [name])[name].to_numpy() for i in range(len(self._starts) - 1)])

    def entries(
        self, start: int = 0, stop: int | None = None, k: int | None = None
    ) -> tuple[Float32[np.ndarray, "rows k"], UInt[np.ndarray, "rows k"]]:
        """Return values, descending, and latents of the rows `start` to `stop`; values are 0 where fewer are active.

        By default `k` is the largest level of the codes.

        Raises:
            ConfigError: `k` is not 1 to that level, or the rows do not exist.
        """
        k = self.k if k is None else k
        stop = self.n_rows if stop is None else stop
        if not 1 <= k <= self.k:
            raise ConfigError(f"k: {k} must be 1 to {self.k}, the largest level of these codes")
        if not 0 <= start <= stop <= self.n_rows:
            raise ConfigError(f"rows {start} to {stop}: must lie within 0 to {self.n_rows}")
        values, indices = [], []
        for i, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if first < stop and last > start:
                rows = slice(max(start - first, 0), min(stop, last) - first)
                table = self._table(i, ["values", "indices"])
                values.append(self._lists(table["values"])[rows, :k])
                indices.append(self._lists(table["indices"])[rows, :k])
        if not values:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.uint16)
        return np.concatenate(values), np.concatenate(indices)

    def dense(
        self, start: int = 0, stop: int | None = None, k: int | None = None
    ) -> Float32[np.ndarray, "rows hidden_dim"]:
        """Return the rows `start` to `stop` as a dense array; see `entries` for arguments and errors."""
        values, indices = self.entries(start, stop, k)
        rows = np.zeros((len(values), self.hidden_dim), np.float32)
        np.put_along_axis(rows, indices.astype(np.int64), values, axis=1)
        return rows

    def csr(self, start: int = 0, stop: int | None = None, k: int | None = None) -> "csr_array":
        """Return the rows `start` to `stop` as a SciPy CSR array [rows, hidden_dim] of the active latents.

        See `entries` for arguments and errors.
        """
        from scipy.sparse import csr_array

        values, indices = self.entries(start, stop, k)
        active = values > 0
        ends = np.concatenate([[0], active.sum(axis=1).cumsum()])
        shape = (len(values), self.hidden_dim)
        found = csr_array((values[active], indices[active].astype(np.int32), ends), shape=shape)
        found.sort_indices()
        return found

    def batches(
        self, rows: int = BATCH_ROWS, k: int | None = None
    ) -> Iterator[tuple[Float32[np.ndarray, "rows k"], UInt[np.ndarray, "rows k"]]]:
        """Yield the `entries` of all rows in order, `rows` at a time."""
        for start in range(0, self.n_rows, rows):
            yield self.entries(start, min(start + rows, self.n_rows), k)

    def _opened(self, i: int) -> pq.ParquetFile:
        file = self._place / part_name(i)
        try:
            return pq.ParquetFile(file.inside, filesystem=file.filesystem)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file}: cannot be read: {first_line(error)}") from None

    def _table(self, i: int, columns: list[str]) -> pa.Table:
        return self._opened(i).read(columns)

    def _lists(self, column: pa.ChunkedArray) -> np.ndarray:
        return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, self.k)
