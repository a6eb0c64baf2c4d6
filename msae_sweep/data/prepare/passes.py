"""What one task does with one row range: measure it (pass 1), standardise it (pass 2), or read back its shard.

Plain functions of a batch `{"i": [number of the range]}`, as Ray Data calls them; they know nothing of Ray.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.data.prepare.split import RunningMoments, is_validation, standardise
from msae_sweep.data.sources.base import BlockInfo, RowRange, Source


class Job(NamedTuple):
    """What the tasks of both passes need; travels to the workers."""

    source: Source
    ranges: list[RowRange]
    split_by: str
    seed: int
    val_split: float

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of range i, whether each is held out, and whether each is finite."""
        row_range = self.ranges[i]
        x, groups = self.source.read(row_range)
        ids = groups if self.split_by == "game_id" else np.arange(row_range.first_row, row_range.first_row + len(x))
        assert ids is not None, "split by game_id is only chosen where the source has groups"
        finite = np.isfinite(x).all(axis=1)
        return x, is_validation(ids, self.seed, self.val_split), finite


def rows_per_range(info: BlockInfo) -> int:
    """A 64th of the block, but 32 to 64 MiB of float32; by the data alone, as the order of streaming depends on it.

    Measured on two cores at 500,000 × 256: 8 MiB ranges take 7.1 s in all, as each task costs some 20 ms of its own.
    """
    row_bytes = 4 * info.input_dim
    return max(1, min(max(info.n_rows // 64, (32 << 20) // row_bytes), (64 << 20) // row_bytes))


def range_digest(x: np.ndarray, held_out: np.ndarray) -> str:
    """Changes with any bit of a range's rows, and with the side that a row is on."""
    sha = hashlib.sha256(np.ascontiguousarray(x).data)
    sha.update(np.ascontiguousarray(held_out).data)
    return sha.hexdigest()


def measure(batch: dict[str, np.ndarray], job: Job) -> dict[str, object]:
    """Digest, counts, the place of non-finite rows (-1: none), and the moments of the finite training rows."""
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
    batch: dict[str, np.ndarray], job: Job, folder: ShardFolder, mean: np.ndarray, std: np.ndarray
) -> dict[str, np.ndarray]:
    """The range's finite rows standardised, training rows first; written to `folder`, and returned as a shard."""
    i = int(batch["i"][0])
    x, held_out, finite = job.read(i)
    order = np.concatenate([np.flatnonzero(~held_out & finite), np.flatnonzero(held_out & finite)])
    z = standardise(x[order], mean, std)
    folder.save_shard(i, z)
    return _shard(z, i)


def read_shard(batch: dict[str, np.ndarray], folder: ShardFolder) -> dict[str, np.ndarray]:
    """A shard that was written before."""
    i = int(batch["i"][0])
    return _shard(folder.shard(i), i)


def _shard(z: np.ndarray, i: int) -> dict[str, np.ndarray]:
    return {"x": z, "shard": np.full(len(z), i, dtype=np.int32)}
