"""Tasks on one row range: measure it (pass 1), standardise it (pass 2), or read back its shard.

The tasks are plain functions of a batch `{"i": [number of the range]}`, the form in which Ray Data calls them. This
module does not import Ray.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.data.prepare.split import RunningMoments, is_validation, standardise
from msae_sweep.data.sources.base import BlockInfo, RowRange, Source


class PreparationJob(NamedTuple):
    """Arguments that the tasks of both passes share; they are sent to the workers."""

    source: Source
    ranges: list[RowRange]
    split_by: str
    seed: int
    val_split: float

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows of range i, a mask of the held-out rows, and a mask of the finite rows."""
        row_range = self.ranges[i]
        x, groups = self.source.read(row_range)
        ids = groups if self.split_by == "game_id" else np.arange(row_range.first_row, row_range.first_row + len(x))
        assert ids is not None, "split by game_id is only chosen where the source has groups"
        finite = np.isfinite(x).all(axis=1)
        return x, is_validation(ids, self.seed, self.val_split), finite


def rows_per_range(info: BlockInfo) -> int:
    """Return the number of rows in a range: a 64th of the block, but at least 32 and at most 64 MiB of float32.

    The number depends on the data alone, because the order of streaming depends on it. Measured on two cores at
    500,000 × 256: ranges of 8 MiB take 7.1 s in total, because each task has an overhead of some 20 ms.
    """
    row_bytes = 4 * info.input_dim
    return max(1, min(max(info.n_rows // 64, (32 << 20) // row_bytes), (64 << 20) // row_bytes))


def range_digest(x: np.ndarray, held_out: np.ndarray) -> str:
    """Return a digest that changes with any bit of a range's rows and with any row's side of the split."""
    sha = hashlib.sha256(np.ascontiguousarray(x).data)
    sha.update(np.ascontiguousarray(held_out).data)
    return sha.hexdigest()


def measure_range(batch: dict[str, np.ndarray], job: PreparationJob) -> dict[str, object]:
    """Return a range's digest, its row counts, where its non-finite rows are, and the moments of its training rows.

    `bad_first` and `bad_last` are the positions of the first and last non-finite row in the range, or -1 if there is
    none. Only finite rows count towards `n_train`, `n_val` and the moments.
    """
    i = int(batch["i"][0])
    x, held_out, finite = job.read(i)
    bad = np.flatnonzero(~finite)
    n, mean, m2 = RunningMoments.of(x[~held_out & finite])
    return {
        "i": [i],
        "digest": [range_digest(x, held_out)],
        "n_train": [n],
        "n_val": [int((held_out & finite).sum())],
        "n_bad": [len(bad)],
        "bad_first": [int(bad[0]) if len(bad) else -1],
        "bad_last": [int(bad[-1]) if len(bad) else -1],
        "mean": mean[np.newaxis],
        "m2": m2[np.newaxis],
    }


def standardise_range(
    batch: dict[str, np.ndarray], job: PreparationJob, folder: ShardFolder, mean: np.ndarray, std: np.ndarray
) -> dict[str, np.ndarray]:
    """Standardise the range's finite rows, training rows first; write them to `folder` and return them as a shard."""
    i = int(batch["i"][0])
    x, held_out, finite = job.read(i)
    order = np.concatenate([np.flatnonzero(~held_out & finite), np.flatnonzero(held_out & finite)])
    z = standardise(x[order], mean, std)
    folder.save_shard(i, z)
    return _shard(z, i)


def read_shard(batch: dict[str, np.ndarray], folder: ShardFolder) -> dict[str, np.ndarray]:
    """Return a range's shard, which an earlier preparation wrote to `folder`."""
    i = int(batch["i"][0])
    return _shard(folder.shard(i), i)


def _shard(z: np.ndarray, i: int) -> dict[str, np.ndarray]:
    return {"x": z, "shard": np.full(len(z), i, dtype=np.int32)}
