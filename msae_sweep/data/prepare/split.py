"""Train/validation split of the rows, and moments of the training rows, in numpy alone and equal on every node."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64


def is_validation(ids: Int64[np.ndarray, " rows"], seed: int, val_split: float) -> Bool[np.ndarray, " rows"]:
    """Return whether each row is held out for validation.

    The ids are row numbers, or with `data.split_by: game_id` the rows' game numbers (`PreparationJob.read` in
    `passes.py`), so that all rows of a game get the same decision. The decision is a hash of (id, seed), so it depends
    neither on the order of the rows, nor on how they are cut into ranges, nor on the node.
    """
    with np.errstate(over="ignore"):
        seeded = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
        hashed = _splitmix64(ids.view(np.uint64) ^ seeded)
    return hashed < np.uint64(int(val_split * 2.0**64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply splitmix64, a bijection of 64-bit integers whose output bits look random.

    Source: Steele et al. 2014, OOPSLA.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared deviations per channel, in float64.

    A large mean does not reduce the precision of a merge.
    """

    n: int
    mean: Float64[np.ndarray, " input_dim"]
    m2: Float64[np.ndarray, " input_dim"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "rows input_dim"]) -> "RunningMoments":
        """Return the moments of finite rows; without rows, all moments are 0.

        Values near the limit of float64 overflow to a non-finite std.
        """
        moments = cls(0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
        # The rows are processed in tiles that stay in the CPU cache, so that each row is read from memory once while
        # every sum is float64. Sums are taken relative to the tile's first row, so that a constant channel gives
        # exactly 0, whatever its value.
        for start in range(0, len(x), 1024):
            rows = x[start : start + 1024]
            origin = rows[0].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                tile = np.subtract(rows, origin, dtype=np.float64)
                shift = tile.mean(axis=0)
                tile -= shift
                moments = moments.merge(cls(len(tile), origin + shift, np.einsum("ij,ij->j", tile, tile)))
        return moments

    def merge(self, other: "RunningMoments") -> "RunningMoments":
        """Return the moments of both sets of rows together. Source: Chan, Golub and LeVeque 1979."""
        n = self.n + other.n
        if n == 0:
            return self
        if self.n == 0:
            return other
        with np.errstate(invalid="ignore", over="ignore"):
            delta = other.mean - self.mean
            return RunningMoments(
                n,
                self.mean + delta * (other.n / n),
                self.m2 + other.m2 + delta**2 * (self.n * other.n / n),
            )

    def std(self) -> Float64[np.ndarray, " input_dim"]:
        """Return the population standard deviation per channel; exactly 0 for a constant channel."""
        return np.sqrt(self.m2 / max(self.n, 1))


def standardise(
    x: Float[np.ndarray, "rows input_dim"],
    mean: Float[np.ndarray, " input_dim"],
    std: Float[np.ndarray, " input_dim"],
) -> Float[np.ndarray, "rows input_dim"]:
    """Return (x − mean) / std as float32; channels whose std is 0 become 0, never NaN."""
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=std > 0)
    z = np.empty(x.shape, dtype=np.float32)
    # The rows are processed in tiles that stay in the CPU cache. The difference is taken in float64, so that a large
    # mean costs no precision.
    tile = np.empty((1024, x.shape[1]))
    for start in range(0, len(x), len(tile)):
        rows = x[start : start + len(tile)]
        difference = np.subtract(rows, mean, out=tile[: len(rows)])
        np.multiply(difference, scale, out=z[start : start + len(rows)], casting="same_kind")
    return z
