"""Built-in synthetic activations with a known solution: sparse non-negative combinations of a random dictionary."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from msae_sweep.config import PlantedConfig
from msae_sweep.data.sources.base import BlockInfo, RowRange, Rows, Source, digest, split_rows

DEFAULT_BLOCKS = (5, 20)
_TILE_ROWS = 1024


class _Truth(NamedTuple):
    """Parameters that one block's rows are generated from."""

    dictionary: Float[np.ndarray, "dictionary_size input_dim"]
    frequencies: Float[np.ndarray, " dictionary_size"]
    scale: Float[np.ndarray, " input_dim"]
    offset: Float[np.ndarray, " input_dim"]
    noise: float


class PlantedSource(Source):
    """Planted activations: row r of block B depends on (seed, B, r) alone, however the rows are cut into ranges.

    A direction fires in a row either by itself or together with the row's whole group (`rows_per_group` rows, a
    stand-in for one game); both are equally likely. Its magnitude is 0.5 plus an exponential variable of mean 0.5.
    Channels differ in scale and have an offset, so that standardising matters.
    """

    def __init__(self, config: PlantedConfig, blocks: tuple[int, ...] | None = None) -> None:
        self._config, self._blocks = config, blocks or DEFAULT_BLOCKS

    def infos(self) -> dict[int, BlockInfo]:
        """See `Source.infos`."""
        shape = self._config.rows, self._config.input_dim
        return {b: BlockInfo(b, f"planted block {b}", *shape, "float32", True) for b in sorted(self._blocks)}

    def row_ranges(self, block: int, rows: int) -> list[RowRange]:
        """See `Source.row_ranges`."""
        return list(split_rows(block, f"planted block {block}", 0, self._config.rows, 0, rows))

    def read(self, row_range: RowRange) -> Rows:
        """See `Source.read`."""
        config, truth = self._config, _truth(self._config, row_range.block)
        # Rows are generated in tiles of whole groups, and each tile has its own random generator. A range generates
        # every tile that it overlaps.
        tile_rows = config.rows_per_group * -(-_TILE_ROWS // config.rows_per_group)
        tiles = range(row_range.start // tile_rows, -(-row_range.stop // tile_rows))
        x = np.concatenate([_tile(config, truth, row_range.block, tile, tile_rows) for tile in tiles])
        first = tiles.start * tile_rows
        rows = np.arange(row_range.start, row_range.stop)
        return Rows(x[rows - first], rows // config.rows_per_group)

    def fingerprint(self, block: int) -> str:
        """See `Source.fingerprint`."""
        return digest("planted 1", self._config.model_dump(), block)

    def files(self, block: int) -> dict[str, list[int]]:
        """See `Source.files`."""
        return {}


def true_dictionary(config: PlantedConfig, block: int) -> Float[np.ndarray, "dictionary_size input_dim"]:
    """Return the directions of a block in raw units, not normalised."""
    truth = _truth(config, block)
    return truth.dictionary * truth.scale


def recovery(
    W_dec: Float[np.ndarray, "hidden_dim input_dim"],
    std: Float[np.ndarray, " input_dim"],
    dictionary: Float[np.ndarray, "dictionary_size input_dim"],
) -> float:
    """Return the mean max cosine: the cosine of each true direction with its closest decoder row, averaged.

    A value of 1 is perfect recovery. Decoder rows are in standardised space, so the raw dictionary is divided by `std`
    first.
    Source: Sharkey et al. 2022, "Taking features out of superposition with sparse autoencoders".
    """
    truth = dictionary / std
    truth = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    rows = W_dec / np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), 1e-12)
    return float((truth @ rows.T).max(axis=1).mean())


def _truth(config: PlantedConfig, block: int) -> _Truth:
    rng = np.random.default_rng([config.seed % 2**64, block])
    dictionary = rng.standard_normal((config.dictionary_size, config.input_dim))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    frequencies = _frequencies(config)
    scale = np.exp(0.5 * rng.standard_normal(config.input_dim))
    offset = 2 * rng.standard_normal(config.input_dim)
    # E[m²] of a magnitude m = 0.5 + Exp(0.5) is 1.25; a unit direction spreads this power over the channels.
    power = (frequencies * 1.25).sum() / config.input_dim
    return _Truth(dictionary, frequencies, scale, offset, config.noise * float(np.sqrt(power)))


def _frequencies(config: PlantedConfig) -> Float[np.ndarray, " dictionary_size"]:
    """Return min(c · i^-power, 0.5) for the directions i = 1, 2, …

    The factor c is chosen such that `active` directions (at most 0.49 · dictionary_size) fire in a row on average.
    """
    shape = np.arange(1, config.dictionary_size + 1) ** -config.power
    active = min(config.active, 0.49 * config.dictionary_size)
    low, high = 0.0, 0.5 / float(shape.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * shape, 0.5).sum() < active else (low, middle)
    return np.minimum(low * shape, 0.5)


def _tile(
    config: PlantedConfig, truth: _Truth, block: int, tile: int, rows: int
) -> Float[np.ndarray, "rows input_dim"]:
    rng = np.random.default_rng([config.seed % 2**64, block, tile])
    # A direction fires alone with probability `half`, and with its group with probability `half`; together these give
    # 1 − (1 − half)², which is its frequency.
    half = 1 - np.sqrt(1 - truth.frequencies)
    groups = rows // config.rows_per_group
    together = rng.random((groups, config.dictionary_size)) < half
    active = np.repeat(together, config.rows_per_group, axis=0) | (rng.random((rows, config.dictionary_size)) < half)
    magnitudes = 0.5 + rng.exponential(0.5, active.shape)
    signal = (active * magnitudes) @ truth.dictionary
    noisy = signal + truth.noise * rng.standard_normal(signal.shape)
    return (noisy * truth.scale + truth.offset).astype(np.float32)
