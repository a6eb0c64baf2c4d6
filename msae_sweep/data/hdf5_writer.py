"""Writing of gzip-compressed HDF5 datasets, with the compression on all cores.

HDF5 itself compresses on one core, and reads a chunk back where a write covers only part of it. Here whole chunks are
compressed by threads (zlib releases Python's lock) and written as they are. A reader sees an ordinary gzip dataset.
"""

import collections
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import h5py
import numpy as np

GZIP_LEVEL = 4
"""Compression level of the original series' files."""
CHUNK_ROWS = 10_000
"""Rows in a chunk of the original series' files."""


def write_gzip_dataset(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[np.ndarray]
) -> h5py.Dataset:
    """Create a gzip dataset from the rows of `parts`, of any sizes, and return it.

    At most two chunks per core are in memory.

    Args:
        file: open HDF5 file.
        name: name of the dataset.
        shape: shape of the whole dataset; the parts have as many rows together.
        dtype: type of the dataset and of all parts.
        parts: the rows in order.
    """
    chunk_shape = (min(CHUNK_ROWS, shape[0]), *shape[1:])
    dataset = file.create_dataset(
        name, shape, dtype=dtype, chunks=chunk_shape, compression="gzip", compression_opts=GZIP_LEVEL
    )
    n_threads = os.cpu_count() or 1
    pending: collections.deque[Future[bytes]] = collections.deque()
    written = 0

    def write_oldest() -> None:
        nonlocal written
        dataset.id.write_direct_chunk((written * chunk_shape[0], *(0 for _ in shape[1:])), pending.popleft().result())
        written += 1

    with ThreadPoolExecutor(n_threads) as pool:
        for chunk in _chunks(parts, chunk_shape, dtype):
            pending.append(pool.submit(zlib.compress, chunk.data, GZIP_LEVEL))
            if len(pending) >= 2 * n_threads:
                write_oldest()
        while pending:
            write_oldest()
    return dataset


def _chunks(parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """Yield the rows of `parts` as arrays of `shape`; the last array is padded with zeros, as HDF5 stores it."""
    chunk, filled = np.zeros(shape, dtype), 0
    for part in parts:
        start = 0
        while start < len(part):
            step = min(len(part) - start, shape[0] - filled)
            chunk[filled : filled + step] = part[start : start + step]
            start, filled = start + step, filled + step
            if filled == shape[0]:
                yield chunk
                chunk, filled = np.zeros(shape, dtype), 0
    if filled:
        yield chunk
