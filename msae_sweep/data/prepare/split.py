"""Which side a row is on, and the statistics of the training side: numpy only, the same on every node."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64


def is_validation(ids: Int64[np.ndarray, " rows"], seed: int, val_split: float) -> Bool[np.ndarray, " rows"]:
    """Whether each row (or group) is held out: a hash of (id, seed), so neither order nor cutting nor nodes matter."""
    with np.errstate(over="ignore"):
        seeded = _splitmix64(np.array([seed % 2**64], dtype=np.uint64))
        hashed = _splitmix64(ids.view(np.uint64) ^ seeded)
    return hashed < np.uint64(int(val_split * 2.0**64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers whose output bits look random. Source: Steele et al. 2014, OOPSLA."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RunningMoments(NamedTuple):
    """Count, mean and summed squared deviation per channel, in float64; merging loses no digits to a large mean."""

    n: int
    mean: Float64[np.ndarray, " input_dim"]
    m2: Float64[np.ndarray, " input_dim"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "rows input_dim"]) -> "RunningMoments":
        """Of some finite rows; none give zeros. Values near the end of float64 overflow to a non-finite std."""
        moments = cls(0, np.zeros(x.shape[1]), np.zeros(x.shape[1]))
        # In tiles that stay in the cache: each is read from memory once, and every sum is float64. Sums are taken about
        # the tile's first row: a constant channel comes out with exactly 0, whatever its value.
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
        """Of both sets of rows. Source: Chan, Golub and LeVeque 1979."""
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
        """Population standard deviation; exactly 0 where a channel is constant."""
        return np.sqrt(self.m2 / max(self.n, 1))


def standardise(
    x: Float[np.ndarray, "rows input_dim"],
    mean: Float[np.ndarray, " input_dim"],
    std: Float[np.ndarray, " input_dim"],
) -> Float[np.ndarray, "rows input_dim"]:
    """(x − mean) / std as float32; channels whose std is 0 become 0, never NaN."""
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=std > 0)
    z = np.empty(x.shape, dtype=np.float32)
    # In tiles that stay in the cache: the difference is taken in float64, where a large mean costs no digits.
    tile = np.empty((1024, x.shape[1]))
    for start in range(0, len(x), len(tile)):
        rows = x[start : start + len(tile)]
        difference = np.subtract(rows, mean, out=tile[: len(rows)])
        np.multiply(difference, scale, out=z[start : start + len(rows)], casting="same_kind")
    return z
