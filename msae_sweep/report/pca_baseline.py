"""R² of as many principal components as latents, for the blocks of a sweep; measured once, then read from its folder.

The principal components are those of a block's standardised training rows. Their R² is measured on the validation rows.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.data.principal_components import Scatter, components_r2
from msae_sweep.errors import DataError, SweepError, first_line
from msae_sweep.paths import StoragePath
from msae_sweep.sweep_folder.folder import SweepFolder

CACHE = "results/pca_r2_by_k.json"
"""Path of the cache inside the sweep folder: block → `data` (the manifest's key), `n_fitted`, `r2` at k = 1, 2, …"""
MOST_ROWS_FITTED = 100_000
"""Largest number of training rows that the components are fitted to. They are spread evenly over the shards."""
MOST_PRODUCTS_FITTED = 2 * 10**10
"""Number of multiplications (rows × input_dim²) above which the components are fitted to fewer rows, but never to fewer
than `ROWS_PER_CHANNEL` for each channel. It takes effect above 447 channels."""
ROWS_PER_CHANNEL = 10
MOST_CHANNELS = 4096
"""Largest width of rows that is measured. The eigenvectors of wider ones would take minutes."""
MOST_PRODUCTS_AT_ONCE = 2 * 10**11
"""Largest number of multiplications at a sweep's end, for all blocks. They take about 20 s of one core."""

Run = Callable[[Sequence[Callable[[], "_Measured"]]], Callable[[], list["_Measured"]]]
"""Function that starts jobs. It returns a function that waits for their results and returns them in the same order."""


class PcaBaselines(NamedTuple):
    """R² of principal components on the validation rows of a sweep's blocks."""

    by_block: dict[int, list[float]]
    """R² of k = 1, 2, … principal components, by block."""
    missing: dict[int, str]
    """Reason why a block has none, by block."""


class _Measured(NamedTuple):
    """Result of measuring one block: its entry in the cache, or the reason why there is none."""

    entry: dict[str, Any] | None
    why_not: str = ""


def _run_here(jobs: Sequence[Callable[[], _Measured]]) -> Callable[[], list[_Measured]]:
    return lambda: [job() for job in jobs]


def pca_baselines(
    folder: SweepFolder,
    storage: str,
    manifests: Mapping[int, Mapping[str, Any]],
    *,
    most_products: float = float("inf"),
    run: Run = _run_here,
) -> PcaBaselines:
    """Return R² of principal components for every block, from the cache or measured on the prepared rows.

    Args:
        storage: `storage` of the sweep's configuration; see `find_shards`.
        most_products: largest number of multiplications in all; blocks beyond it are left out.
        run: function that starts the measurements, one per block; by default they run in this process.
    """
    try:
        known: dict[str, Any] = folder.read_json(CACHE)
    except SweepError:  # the file is damaged; it is written again
        known = {}
    missing: dict[int, str] = {}
    jobs: dict[int, Callable[[], _Measured]] = {}
    spent = 0.0
    for block, manifest in manifests.items():
        if known.get(str(block), {}).get("data") == manifest["key"]:
            continue
        known.pop(str(block), None)
        dim = manifest["input_dim"]
        products = (_rows_fitted(manifest) + manifest["n_val"]) * dim**2
        if dim > MOST_CHANNELS:
            missing[block] = f"rows of more than {MOST_CHANNELS} channels are not measured"
        elif spent + products > most_products:
            missing[block] = "they were left out to end the sweep sooner; `msae-sweep report` measures them"
        else:
            spent += products
            try:
                shards = find_shards(folder, storage, manifest)
            except DataError as error:
                missing[block] = str(error)
            else:
                jobs[block] = partial(_measure, shards, dict(manifest))
    for block, result in zip(jobs, run(list(jobs.values()))(), strict=True):
        if result.entry is None:
            missing[block] = result.why_not
        else:
            known[str(block)] = result.entry
    if jobs:
        folder.write_text(folder.path / CACHE, json.dumps(known))
    return PcaBaselines({block: known[str(block)]["r2"] for block in manifests if str(block) in known}, missing)


def find_shards(folder: SweepFolder, storage: str, manifest: Mapping[str, Any]) -> ShardFolder:
    """Return the prepared shards that a manifest describes.

    They are looked for beside the sweep folder, because it may have been moved or mounted elsewhere, and then in
    `storage`, where they were made.

    Raises:
        DataError: the shards no longer exist.
    """
    name = f"block{manifest['block']}-{manifest['key']}"
    for place in dict.fromkeys((folder.storage, storage)):
        shards = ShardFolder(StoragePath(place) / "prepared" / name)
        if shards.manifest() is not None:
            return shards
    raise DataError(f"the prepared rows ({name}) are no longer in {StoragePath(folder.storage) / 'prepared'}")


def _rows_fitted(manifest: Mapping[str, Any]) -> int:
    """Return the number of training rows to fit the components to; see the constants above."""
    dim = manifest["input_dim"]
    affordable = max(MOST_PRODUCTS_FITTED // dim**2, ROWS_PER_CHANNEL * dim)
    return int(min(MOST_ROWS_FITTED, affordable, manifest["n_train"]))


def _measure(shards: ShardFolder, manifest: Mapping[str, Any]) -> _Measured:
    """Fit the components of a block to its training rows, and measure them on its validation rows."""
    step = -(-manifest["n_train"] // _rows_fitted(manifest))
    fitted = measured = Scatter.empty(manifest["input_dim"])
    first = 0  # the training rows 0, step, 2 step, … of the whole block are taken
    try:
        for number, n_train, n_val in manifest["shards"]:
            if first < n_train:
                fitted = fitted.merge(Scatter.of(shards.shard(number, slice(first, n_train, step))))
            first = (first - n_train) % step
            if n_val:
                measured = measured.merge(Scatter.of(shards.shard(number, slice(n_train, n_train + n_val))))
    except (OSError, ValueError) as error:
        return _Measured(None, f"the prepared rows cannot be read: {first_line(error)}")
    r2 = [round(float(value), 6) for value in components_r2(fitted, measured)]
    if not math.isfinite(r2[0]):
        return _Measured(None, "the validation rows do not vary")
    return _Measured({"data": manifest["key"], "n_fitted": fitted.n, "r2": r2})
