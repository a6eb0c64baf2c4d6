"""R² of principal components: how much of the rows' variance k of them explain, which an SAE with k latents must beat.

Both results follow from sums over rows, so rows are read once, in any order and in parts, and in bounded memory.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

TILE_BYTES = 16 << 20
"""Size in bytes of the rows that are multiplied at once, as float64."""


class Scatter(NamedTuple):
    """Count, mean and sums of products of deviations of a set of rows, in float64."""

    n: int
    mean: Float64[np.ndarray, " input_dim"]
    products: Float64[np.ndarray, "input_dim input_dim"]
    """Σ (x − mean)(x − mean)ᵀ over the rows."""

    @classmethod
    def empty(cls, input_dim: int) -> "Scatter":
        """Return the sums over no rows."""
        return cls(0, np.zeros(input_dim), np.zeros((input_dim, input_dim)))

    @classmethod
    def of(cls, x: Float[np.ndarray, "rows input_dim"]) -> "Scatter":
        """Return the sums over finite rows."""
        input_dim = x.shape[1]
        scatter, size = cls.empty(input_dim), max(1, TILE_BYTES // (8 * input_dim))
        for start in range(0, len(x), size):
            tile = x[start : start + size].astype(np.float64)
            # Deviations from the first row, so that a constant channel has products of exactly 0.
            origin = tile[0].copy()
            tile -= origin
            shift = tile.mean(axis=0)
            tile -= shift
            scatter = scatter.merge(cls(len(tile), origin + shift, tile.T @ tile))
        return scatter

    def merge(self, other: "Scatter") -> "Scatter":
        """Return the sums over both sets of rows. Source: Chan, Golub and LeVeque 1979."""
        n = self.n + other.n
        if not self.n or not other.n:
            return self if not other.n else other
        delta = other.mean - self.mean
        between = np.outer(delta, delta * (self.n * other.n / n))
        return Scatter(n, self.mean + delta * (other.n / n), self.products + other.products + between)


def components_r2(fitted: Scatter, measured: Scatter) -> Float64[np.ndarray, " input_dim"]:
    """Return R² of the first k = 1, 2, …, input_dim principal components of `fitted` on the rows of `measured`.

    A row is reconstructed as x̂_k = m + Σ_{i ≤ k} v_i v_iᵀ (x − m), with the mean m and the components v_i of the fitted
    rows. R²_k = 1 − Σ‖x − x̂_k‖² / Σ‖x − x̄‖² over the measured rows, x̄ per channel, as for an SAE. If both sets of rows
    are the same, no other k-dimensional linear reconstruction has a higher R². The values are NaN if the measured rows
    do not vary.
    """
    total = np.trace(measured.products)
    if not total > 0:
        return np.full(len(measured.mean), np.nan)
    components = np.linalg.eigh(fitted.products).eigenvectors[:, ::-1]
    offset = measured.mean - fitted.mean
    about_m = measured.products + measured.n * np.outer(offset, offset)  # Σ (x − m)(x − m)ᵀ
    captured = np.einsum("ij,ij->j", components, about_m @ components).cumsum()
    r2: np.ndarray = 1 - (np.trace(about_m) - captured) / total
    return r2
