"""Activations in Parquet or Arrow files: a fixed-size-list column per block."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from msae_sweep.data.source import BlockInfo, RowRange, Rows, Source, block_of, check_array, digest, group_numbers
from msae_sweep.errors import DataError

SUFFIXES = (".parquet", ".pq", ".arrow", ".feather", ".ipc")
"""Endings of the files that are read."""


class _Part(NamedTuple):
    """One file's share of a block."""

    file: Path
    column: str
    schema: pa.Schema
    pieces: tuple[int, ...]
    """Rows of each row group (Parquet) or record batch (Arrow)."""


class ParquetTables(Source):
    """The column's name tells the block; where a file has one list column, its own or its folder's name may tell it.

    A `game_id` column beside it gives the groups. Row groups are read whole, never twice in a pass.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _parts(self) -> dict[int, list[_Part]]:
        files = (
            [self._path] if self._path.is_file() else sorted(p for p in self._path.rglob("*") if p.suffix in SUFFIXES)
        )
        parts: dict[int, list[_Part]] = {}
        for file in files:
            schema, pieces = _header(file)
            columns = [f.name for f in schema if pa.types.is_fixed_size_list(f.type)]
            if not columns:
                lists = [f.name for f in schema if pa.types.is_list(f.type) or pa.types.is_large_list(f.type)]
                hint = f" (column {lists[0]} has lists of varying size)" if lists else ""
                raise DataError(
                    f"{file}: no fixed-size-list column{hint}; activations are fixed_size_list<float>[input_dim]"
                )
            blocks: set[int] = set()
            for column in columns:
                block = block_of(column)
                if block is None and len(columns) == 1:
                    inside = file.relative_to(self._path).with_suffix("") if self._path.is_dir() else Path(file.stem)
                    block = next((b for part in inside.parts if (b := block_of(part)) is not None), None)
                if block is None:
                    raise DataError(
                        f"{file}: column {column} tells no block; name it block5, or the file block5.parquet"
                    )
                if block in blocks:
                    raise DataError(f"{file}: two columns name block {block}; keep one")
                blocks.add(block)
                parts.setdefault(block, []).append(_Part(file, column, schema, pieces))
        return dict(sorted(parts.items()))

    def infos(self) -> dict[int, BlockInfo]:
        """See `Source`."""
        return {block: self._info(block) for block in self._parts}

    def _info(self, block: int) -> BlockInfo:
        parts = self._parts[block]
        first = parts[0].schema.field(parts[0].column).type
        for part in parts:
            kind = part.schema.field(part.column).type
            where = f"{part.file}:{part.column}"
            dtype = np.dtype(kind.value_type.to_pandas_dtype())
            check_array(where, (sum(part.pieces), kind.list_size), dtype)
            if kind != first:
                raise DataError(
                    f"{where}: {kind}, but {parts[0].file.name} has {first}; all files of a block must have the same"
                )
        n_rows = sum(sum(part.pieces) for part in parts)
        where = str(parts[0].file if len(parts) == 1 else self._path)
        dtype = np.dtype(first.value_type.to_pandas_dtype())
        grouped = ["game_id" in part.schema.names for part in parts]
        if any(grouped) and not all(grouped):
            missing = parts[grouped.index(False)].file
            raise DataError(f"{missing}: no game_id column, but other files of block {block} have one")
        return BlockInfo(block, where, n_rows, first.list_size, dtype.name, all(grouped))

    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """See `Source`; ranges end where row groups do, so a large row group is one range."""
        ranges: list[RowRange] = []
        first_row = 0
        for part in self._parts[block]:
            start = stop = 0
            for piece in part.pieces:
                stop += piece
                if stop - start >= rows:
                    ranges.append(RowRange(block, str(part.file), start, stop, first_row + start))
                    start = stop
            if stop > start:
                ranges.append(RowRange(block, str(part.file), start, stop, first_row + start))
            first_row += stop
        return ranges

    def read(self, row_range: RowRange) -> Rows:
        """See `Source`."""
        part = next(p for p in self._parts[row_range.block] if str(p.file) == row_range.file)
        ends = np.cumsum(part.pieces)
        pieces = [i for i, end in enumerate(ends) if row_range.start < end <= row_range.stop]
        grouped = "game_id" in part.schema.names
        table = _read(part.file, pieces, [part.column, *(["game_id"] if grouped else [])])
        column = table[part.column]
        if column.null_count:
            raise DataError(
                f"{row_range.name(0, len(table) - 1)}: column {part.column} has nulls; every row needs a list"
            )
        width = part.schema.field(part.column).type.list_size
        x = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]).reshape(
            -1, width
        )
        groups = group_numbers(str(part.file), table["game_id"].to_numpy()) if grouped else None
        return Rows(x, groups)

    def fingerprint(self, block: int) -> str:
        """See `Source`."""
        stats = [(p.file.name, p.column, p.file.stat().st_size, p.file.stat().st_mtime_ns) for p in self._parts[block]]
        return digest(self._info(block)._replace(where=""), stats)


def _header(file: Path) -> tuple[pa.Schema, tuple[int, ...]]:
    try:
        if file.suffix in (".parquet", ".pq"):
            metadata = pq.ParquetFile(file)
            groups = metadata.metadata
            return metadata.schema_arrow, tuple(groups.row_group(i).num_rows for i in range(groups.num_row_groups))
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            rows = tuple(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
            return reader.schema, rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None


def _read(file: Path, pieces: list[int], columns: list[str]) -> Any:
    try:
        if file.suffix in (".parquet", ".pq"):
            return pq.ParquetFile(file).read_row_groups(pieces, columns=columns)
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            return pa.Table.from_batches([reader.get_batch(i) for i in pieces]).select(columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from None
