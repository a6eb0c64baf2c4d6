"""Dense latents of all rows in the original series' file, for `msae-sweep encode --format notebook`.

The file has one float32 dataset `block{B}` [rows, hidden_dim] with ReLU(pre_acts) before any top-k, in gzip chunks. An
attribute of the file says which model and data it was made from, so that a finished command may be repeated.
While it is being made, each chunk is a compressed file in a folder beside it: an interrupted run continues after its
last chunk, and the HDF5 file itself is only assembled from them at the end.
"""

import collections
import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
from jaxtyping import Float32

from msae_sweep.data.hdf5_writer import CHUNK_ROWS, GZIP_LEVEL
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.models.encode import EncodingPlan
from msae_sweep.paths import StoragePath, check_file
from msae_sweep.sae.model import MSAE

_CHUNK_ELEMENTS = 2**28
"""Largest number of elements in a chunk: 1 GiB in float32. HDF5 allows less than 4 GiB."""
_HEADER_BYTES = 1 << 20
"""Bytes that an HDF5 file takes at most beside its chunks."""
_IDENTITY = "msae_sweep"
"""Name of the file's attribute that says which model and data it was made from, as JSON."""


class DenseFile:
    """The original series' file of one block, which is being written on a disk."""

    def __init__(self, out: Path, plan: EncodingPlan) -> None:
        is_file = out.suffix in (".h5", ".hdf5") and not out.is_dir()
        self.path = out if is_file else out / f"block{plan.rows.info.block}_features.h5"
        self.plan = plan
        self._parts = self.path.with_name(f".{self.path.name}.parts")
        self._identity = {key: value for key, value in plan.identity.items() if key not in ("k", "n_parts")}
        n_rows, hidden_dim = plan.rows.info.n_rows, int(plan.config["hidden_dim"])
        self.chunk_shape = (max(1, min(CHUNK_ROWS, n_rows, _CHUNK_ELEMENTS // hidden_dim)), hidden_dim)
        self.n_chunks = -(-n_rows // self.chunk_shape[0])

    def is_complete(self) -> bool:
        """Return whether the file exists already, made from the same model and data.

        Raises:
            ConfigError: something else is there, or the file cannot be written.
        """
        if self.path.is_file():
            try:
                with h5py.File(self.path) as file:
                    same = file.attrs.get(_IDENTITY) == json.dumps(self._identity)
            except OSError:
                same = False
            if not same:
                raise ConfigError(f"--out: {self.path} exists and was not made from this model and data")
            return True
        check_file("--out", self.path)
        return False

    def begin(self) -> int:
        """Create the folder of finished chunks, or check that it answers the same question; return their number.

        Raises:
            ConfigError: the folder was begun with another model or other data.
        """
        identity = self._parts / "identity.json"
        if not identity.exists():
            StoragePath(identity).write(json.dumps(self._identity).encode())
            return 0
        found = json.loads(identity.read_text(encoding="utf-8"))
        for key, value in self._identity.items():
            if found.get(key) != value:
                raise ConfigError(f"--out: {self._parts} was begun with another {key}; delete it, or give another path")
        return next(i for i in range(self.n_chunks + 1) if not self._chunk(i).exists())

    def write(self, i: int, chunk: Float32[np.ndarray, "rows hidden_dim"]) -> None:
        """Write chunk `i`, compressed; the last chunk is padded with zeros, as HDF5 stores it."""
        if len(chunk) < self.chunk_shape[0]:
            chunk = np.concatenate([chunk, np.zeros((self.chunk_shape[0] - len(chunk), chunk.shape[1]), np.float32)])
        StoragePath(self._chunk(i)).write(zlib.compress(np.ascontiguousarray(chunk).data, GZIP_LEVEL))

    def finish(self) -> None:
        """Assemble the HDF5 file from the chunks, and delete them.

        Raises:
            OSError: the disk has no room for the file beside its chunks.
        """
        block, part = self.plan.rows.info.block, self.path.with_name(f".{self.path.name}.part")
        # HDF5's own error for a full disk has no number and leaves a broken file.
        size = sum(self._chunk(i).stat().st_size for i in range(self.n_chunks)) + _HEADER_BYTES
        if size > shutil.disk_usage(self.path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with h5py.File(part, "w") as file:
                file.attrs[_IDENTITY] = json.dumps(self._identity)
                dataset = file.create_dataset(
                    f"block{block}",
                    (self.plan.rows.info.n_rows, self.chunk_shape[1]),
                    dtype=np.float32,
                    chunks=self.chunk_shape,
                    compression="gzip",
                    compression_opts=GZIP_LEVEL,
                )
                dataset.attrs.update(
                    {"block_idx": block, "hidden_dim": self.chunk_shape[1], "input_dim": self.plan.config["input_dim"]}
                )
                for i in range(self.n_chunks):
                    dataset.id.write_direct_chunk((i * self.chunk_shape[0], 0), self._chunk(i).read_bytes())
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        shutil.rmtree(self._parts)

    def _chunk(self, i: int) -> Path:
        return self._parts / f"chunk_{i:05d}"


def write_dense(
    file: DenseFile,
    model: MSAE,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda rows, n_rows: None,
) -> bool:
    """Write the dense latents of all rows, continuing where an earlier call was interrupted; return False if they were
    complete.

    Raises:
        ConfigError: something else is there, or was begun there, or the file cannot be written.
        DataError: a row contains NaN or Inf, or the disk is full; finished chunks are kept.
    """
    if file.is_complete():
        return False
    n_rows, done = file.plan.rows.info.n_rows, file.begin()
    at_once = max(1, (os.cpu_count() or 1))
    writing: collections.deque[Future[None]] = collections.deque()
    try:
        on_progress(done * file.chunk_shape[0], n_rows)
        with ThreadPoolExecutor(at_once) as pool:
            for i, chunk in enumerate(_chunks(file, model.on(device), done), start=done):
                writing.append(pool.submit(file.write, i, chunk))
                while len(writing) > at_once:
                    writing.popleft().result()
                on_progress(min(n_rows, (i + 1) * file.chunk_shape[0]), n_rows)
            for written in writing:
                written.result()
        file.finish()
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("finished chunks are kept; run the same command to continue")
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{file.path}: {reason}; finished chunks are kept; run the same command to continue") from None
    return True


@torch.no_grad()
def _chunks(file: DenseFile, model: MSAE, first_chunk: int) -> Iterator[Float32[np.ndarray, "rows hidden_dim"]]:
    """Yield the dense latents chunk by chunk, from the given chunk on."""
    rows_wanted, start = file.chunk_shape[0], first_chunk * file.chunk_shape[0]
    parts: list[np.ndarray] = []
    held = 0
    for i, row_range in enumerate(file.plan.rows.job.ranges):
        n = row_range.stop - row_range.start
        if row_range.first_row + n <= start:
            continue
        x = file.plan.rows.read(i).x[max(0, start - row_range.first_row) :]
        while len(x):
            step = min(len(x), rows_wanted - held)
            rows = torch.from_numpy(x[:step]).to(model.W_enc.device)
            parts.append(torch.relu((rows - model.pre_bias) @ model.W_enc.T).cpu().numpy())
            x, held = x[step:], held + step
            if held == rows_wanted:
                yield np.concatenate(parts)
                parts, held = [], 0
    if held:
        yield np.concatenate(parts)
