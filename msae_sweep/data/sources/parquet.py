"""Reader of activations in Parquet or Arrow files: a fixed-size-list column per block."""

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

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

SUFFIXES = (".parquet", ".pq", ".arrow", ".feather", ".ipc")
"""Suffixes of the files that are read."""


class _Part(NamedTuple):
    """Part of a block that lies in one file."""

    file: StoragePath
    column: str
    schema: pa.Schema
    pieces: tuple[int, ...]
    """Number of rows in each row group (Parquet) or record batch (Arrow)."""


class ParquetSource(Source):
    """Activations in a Parquet or Arrow file, or in a folder of such files.

    The name of a column identifies its block. If a file has only one list column, the name of the file or of its folder
    may identify the block instead. A `game_id` column in the same file gives the groups.

    Small row groups are read together. A row group that is larger than a range is cut into several ranges. Parquet
    cannot be read from the middle of a row group, so each of these ranges decodes the row group from its start: 500,000
    rows in one row group (as pyarrow writes them by default) cost about one second more per range, but never lie in
    memory whole.
    """

    def __init__(self, path: StoragePath) -> None:
        self._path = path

    @cached_property
    def _parts(self) -> dict[int, list[_Part]]:
        is_file = self._path.is_file()
        files = [self._path] if is_file else [p for p in self._path.files(recursive=True) if p.suffix in SUFFIXES]
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
                block = block_number(column)
                if block is None and len(columns) == 1:
                    inside = Path(file.stem) if is_file else file.relative_to(self._path).with_suffix("")
                    block = next((b for part in inside.parts if (b := block_number(part)) is not None), None)
                if block is None:
                    raise DataError(
                        f"{file}: column {column} has no block number in its name; name it block5, or the file "
                        "block5.parquet"
                    )
                if block in blocks:
                    raise DataError(f"{file}: two columns name block {block}; keep one")
                blocks.add(block)
                parts.setdefault(block, []).append(_Part(file, column, schema, pieces))
        return dict(sorted(parts.items()))

    def infos(self) -> dict[int, BlockInfo]:
        """See `Source.infos`."""
        return {block: self._info(block) for block in self._parts}

    def _info(self, block: int) -> BlockInfo:
        parts = self._parts[block]
        first = parts[0].schema.field(parts[0].column).type
        for part in parts:
            kind = part.schema.field(part.column).type
            where = f"{part.file}:{part.column}"
            check_array(where, (sum(part.pieces), kind.list_size), _dtype(kind.value_type))
            if kind != first:
                raise DataError(
                    f"{where}: {kind}, but {parts[0].file.name} has {first}; all files of a block must have one type"
                )
        n_rows = sum(sum(part.pieces) for part in parts)
        where = str(parts[0].file if len(parts) == 1 else self._path)
        grouped = ["game_id" in part.schema.names for part in parts]
        if any(grouped) and not all(grouped):
            missing = parts[grouped.index(False)].file
            raise DataError(f"{missing}: no game_id column, but other files of block {block} have one")
        for part in parts:
            if all(grouped):
                rows = sum(part.pieces)
                check_groups(f"{part.file}:game_id", (rows,), _dtype(part.schema.field("game_id").type), rows)
        return BlockInfo(block, where, n_rows, first.list_size, _dtype(first.value_type).name, all(grouped))

    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """See `Source.row_ranges`. A range ends at the end of a row group, or lies within one row group."""
        ranges: list[RowRange] = []
        first_row = 0
        for part in self._parts[block]:
            start = stop = 0
            for piece in part.pieces:
                stop += piece
                if stop - start >= rows:
                    ranges += split_rows(block, str(part.file), start, stop, first_row, rows)
                    start = stop
            if stop > start:
                ranges += split_rows(block, str(part.file), start, stop, first_row, rows)
            first_row += stop
        return ranges

    def read(self, row_range: RowRange) -> Rows:
        """See `Source.read`."""
        part = next(p for p in self._parts[row_range.block] if str(p.file) == row_range.file)
        width = part.schema.field(part.column).type.list_size
        grouped = "game_id" in part.schema.names
        x: list[np.ndarray] = []
        groups: list[np.ndarray] = []
        for batch in _read(part, row_range, [part.column, *(["game_id"] if grouped else [])]):
            for name in batch.schema.names:
                if batch[name].null_count:
                    where = row_range.name(0, row_range.stop - row_range.start - 1)
                    raise DataError(f"{where}: column {name} has nulls; every row needs a value")
            x.append(batch[part.column].flatten().to_numpy(zero_copy_only=False).reshape(-1, width))
            if grouped:
                groups.append(game_numbers(batch["game_id"].to_numpy(zero_copy_only=False)))
        return Rows(np.concatenate(x), np.concatenate(groups) if grouped else None)

    def index(self, row_range: RowRange) -> dict[str, np.ndarray]:
        """See `Source.index`."""
        part = next(p for p in self._parts[row_range.block] if str(p.file) == row_range.file)
        names = {column: name for column, known in INDEX.items() for name in known if name in part.schema.names}
        if not names:
            return {}
        table = pa.Table.from_batches(_read(part, row_range, list(names.values())))
        return {column: table[name].to_numpy() for column, name in names.items()}

    def fingerprint(self, block: int) -> str:
        """See `Source.fingerprint`."""
        infos = [(part, part.file.info()) for part in self._parts[block]]
        stats = [(part.file.name, part.column, info.size, info.mtime_ns) for part, info in infos]
        return digest(self._info(block)._replace(where=""), stats)

    def files(self, block: int) -> dict[str, list[int]]:
        """See `Source.files`."""
        infos = [(part.file.name, part.file.info()) for part in self._parts[block]]
        return {name: [info.size, info.mtime_ns] for name, info in infos}


def _header(file: StoragePath) -> tuple[pa.Schema, tuple[int, ...]]:
    try:
        if file.suffix in (".parquet", ".pq"):
            with _opened(file) as opened:
                metadata = pq.ParquetFile(opened)
                groups = metadata.metadata
                rows = tuple(groups.row_group(i).num_rows for i in range(groups.num_row_groups))
                return metadata.schema_arrow, rows
        with _opened(file) as opened:
            reader = pa.ipc.open_file(opened)
            rows = tuple(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
            return reader.schema, rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from None


def _read(part: _Part, row_range: RowRange, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the range's rows in batches; rows of a row group that precede the range are decoded and dropped."""
    ends = list(itertools.accumulate(part.pieces))
    pieces = [i for i, end in enumerate(ends) if row_range.start < end and row_range.stop > end - part.pieces[i]]
    at = ends[pieces[0]] - part.pieces[pieces[0]]
    try:
        for batch in _batches(part.file, pieces, columns):
            first, last = max(0, row_range.start - at), min(len(batch), row_range.stop - at)
            if first < last:
                yield batch.slice(first, last - first)
            at += len(batch)
            if at >= row_range.stop:
                return
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{part.file}: cannot be read: {first_line(error)}") from None


def _batches(file: StoragePath, pieces: list[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
    if file.suffix in (".parquet", ".pq"):
        with _opened(file) as opened, pq.ParquetFile(opened) as table:
            yield from table.iter_batches(8192, row_groups=pieces, columns=columns, use_threads=False)
        return
    with _opened(file) as opened:
        reader = pa.ipc.open_file(opened)
        for i in pieces:
            yield reader.get_batch(i).select(columns)


def _opened(file: StoragePath) -> Any:
    return file.open() if file.is_remote else pa.memory_map(str(file.path))


def _dtype(kind: pa.DataType) -> np.dtype:
    """Return the numpy dtype of a column's type; `object` if numpy has no such dtype."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    try:
        return np.dtype(kind.to_pandas_dtype())
    except NotImplementedError:
        return np.dtype(object)
