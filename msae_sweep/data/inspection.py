"""Summary of stored activations: one table row per block, computed in one streaming pass."""

from typing import NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Table

from msae_sweep.config import DataConfig
from msae_sweep.data.sources.base import BlockInfo, Source
from msae_sweep.data.sources.catalog import open_source, select_blocks

COMPONENTS = (16, 32, 64, 128)
"""Numbers of principal components whose R² is shown; they are the notebook's k levels."""

_SMALLEST_EXPONENT = -1074
"""Exponent of the smallest positive float64: every positive float64 is at least two to this power."""


class BlockReport(NamedTuple):
    """Findings of one pass over a block."""

    info: BlockInfo
    n_groups: int | None
    """Number of distinct games, or None if the block has no game_id."""
    mean_range: tuple[float, float]
    """Smallest and largest channel mean over the finite rows."""
    std_range: tuple[float, float]
    """Smallest and largest channel standard deviation over the finite rows."""
    n_constant: int
    """Number of channels that are constant over the finite rows."""
    n_nonfinite: int
    """Number of rows with NaN or Inf. Except for `info` and `n_groups`, all other fields leave these rows out."""
    zeros: float
    """Share of the finite rows' values that are exactly 0."""
    explained: dict[int, float]
    """R² of the first k principal components of the standardised rows, by k ≤ input_dim: the share of the variance that
    they explain. They are fitted to these rows themselves, so it is an upper bound: no other k directions that are the
    same for every row explain more."""


def inspect(config: DataConfig) -> list[BlockReport]:
    """Read every wanted block once, a few megabytes at a time, and return a report per block.

    Raises:
        DataError: the data cannot be opened or read. Non-finite rows raise no error here; they are counted.
    """
    source = open_source(config)
    return [_inspect_block(source, info) for info in select_blocks(source.infos(), config)]


def render(reports: list[BlockReport]) -> Group:
    """Return two tables with a row per block: the data's shape, and R² of principal components."""
    shape, spectrum = Table(title="Activations", title_justify="left"), Table(title_justify="left")
    spectrum.title = "R² of k principal components"
    columns = ("block", "rows", "dim", "dtype", "groups", "mean", "std", "constant", "non-finite", "zeros")
    for heading in columns:
        shape.add_column(heading, justify="right")
    for heading in ("block", *(f"R² k={k}" for k in COMPONENTS)):
        spectrum.add_column(heading, justify="right")
    for report in reports:
        info = report.info
        cells = (
            str(info.block),
            f"{info.n_rows:,}",
            str(info.input_dim),
            info.dtype,
            "–" if report.n_groups is None else f"{report.n_groups:,}",
            "{:.3g} … {:.3g}".format(*report.mean_range),
            "{:.3g} … {:.3g}".format(*report.std_range),
            str(report.n_constant),
            f"{report.n_nonfinite:,}",
            f"{report.zeros:.0%}",
        )
        shape.add_row(*cells)
        shares = (f"{report.explained[k]:.4f}" if k in report.explained else "–" for k in COMPONENTS)
        spectrum.add_row(str(info.block), *shares)
    return Group(shape, spectrum, "The components are fitted to these rows themselves, standardised.")


def _inspect_block(source: Source, info: BlockInfo) -> BlockReport:
    dim = info.input_dim
    n_finite = n_zeros = 0
    # Sums are taken relative to the first finite row, so that a mean far from 0 costs no precision and a constant
    # channel gives exactly 0.
    origin: np.ndarray | None = None
    total, products = np.zeros(dim), np.zeros((dim, dim))
    # Each channel is divided by a power of two above its largest value, so that squares of values near float64's limits
    # neither overflow nor underflow. Division by a power of two is exact, so it changes no digit of any sum.
    exponent = np.full(dim, _SMALLEST_EXPONENT)
    groups: set[int] = set()
    for row_range in source.row_ranges(info.block, max(1, (16 << 20) // (8 * dim))):
        x, numbers = source.read(row_range)
        if numbers is not None:
            groups.update(np.unique(numbers).tolist())
        x = x[np.isfinite(x).all(axis=1)].astype(np.float64)
        if not len(x):
            continue
        n_finite += len(x)
        n_zeros += int((x == 0).sum())
        largest = np.abs(x).max(axis=0)
        grown = np.where(largest > 0, np.maximum(exponent, np.frexp(largest)[1]), exponent)
        if (shift := exponent - grown).any():
            total, products = np.ldexp(total, shift), np.ldexp(products, np.add.outer(shift, shift))
            origin = None if origin is None else np.ldexp(origin, shift)
            exponent = grown
        x = np.ldexp(x, -exponent)
        if origin is None:
            origin = x[0].copy()
        x -= origin
        total += x.sum(axis=0)
        products += x.T @ x
    n = max(n_finite, 1)
    mean = total / n
    covariance = products / n - np.outer(mean, mean)
    std = np.sqrt(np.maximum(np.diag(covariance), 0))
    centre = np.ldexp(mean if origin is None else mean + origin, exponent)
    varies = std > 0
    correlation = covariance[np.ix_(varies, varies)] / np.outer(std[varies], std[varies])
    spectrum = np.linalg.eigvalsh(correlation)[::-1].cumsum() if varies.any() else np.zeros(0)
    std = np.ldexp(std, exponent)
    return BlockReport(
        info=info,
        n_groups=len(groups) if info.has_groups else None,
        mean_range=(float(centre.min()), float(centre.max())),
        std_range=(float(std.min()), float(std.max())),
        n_constant=int((~varies).sum()),
        n_nonfinite=info.n_rows - n_finite,
        zeros=n_zeros / (n * dim),
        explained={
            c: float(spectrum[min(c, len(spectrum)) - 1] / spectrum[-1])
            for c in COMPONENTS
            if c <= dim and len(spectrum)
        },
    )
