"""Measurement of R² at every k, not only at the trained levels: one sorted code gives the whole curve of a model."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.errors import DataError
from msae_sweep.models.trial_models import load_model
from msae_sweep.report.pca_baseline import find_shards
from msae_sweep.report.sweep_data import Curve, Group, Sweep, Trial
from msae_sweep.sae.evaluation import evaluate

CACHE = "results/r2_by_k.json"
"""Path of the cache inside the sweep folder: trial_id → `epoch`, `data` (the manifest's key), `n_rows`, and `r2` at
k = 1, 2, …"""
ROWS_TOGETHER = 16_384
"""Smallest number of rows that are measured together. On a GPU, the launches for a few thousand rows take as long."""
MOST_PRODUCTS_AT_ONCE = 2 * 10**12
"""Largest number of multiplications for the curves of a report at a sweep's end, about a minute on two cores."""


class Curves(NamedTuple):
    """R² curves of one sweep's trials."""

    by_trial: dict[str, Curve]
    missing: dict[int, str]
    """Maps a block to the reason why its curves have the trained levels only."""


def trials_with_curves(group: Group) -> list[Trial]:
    """Return the trials whose curves a report shows: the best of all, and the best of each weighting."""
    candidates = [group.best, *(group.best_with(weighting=weighting) for weighting in ("uniform", "reverse"))]
    return list({trial.trial_id: trial for trial in candidates if trial}.values())


def curves(sweep: Sweep, *, most_products: float = float("inf")) -> Curves:
    """Return R² at every k of the trials with curves, from the cache or measured on the prepared validation rows.

    A curve that cannot be measured has the trained levels only, e.g. because the prepared rows no longer exist, or
    because measuring would take more than `most_products` multiplications in all. Newly measured curves are cached.
    """
    known: dict[str, Any] = sweep.folder.read_json(CACHE)
    by_trial, missing, spent, before = {}, {}, 0.0, dict(known)
    for group in sweep.groups:
        manifest = sweep.manifests.get(group.block)
        for trial in trials_with_curves(group):
            entry = known.get(trial.trial_id)
            if not _fits(entry, trial, manifest):
                entry = None
                try:
                    if manifest is None:
                        raise DataError("the sweep has not recorded which data it prepared")
                    shards = find_shards(sweep.folder, sweep.config.storage, manifest)
                    spent += manifest["n_val"] * (trial.hidden_dim or 0) * 2 * manifest["input_dim"]
                    if spent > most_products:
                        raise DataError(
                            "other k were left out to end the sweep sooner; `msae-sweep report` measures them"
                        )
                    entry = known[trial.trial_id] = _measure(sweep, trial, shards, manifest)
                except DataError as error:
                    missing[group.block] = str(error)
            by_trial[trial.trial_id] = (
                Curve(tuple(range(1, len(entry["r2"]) + 1)), entry["r2"], True)
                if entry
                else Curve(trial.levels, trial.r2, False)
            )
    if known != before:
        sweep.folder.write_text(sweep.folder.path / CACHE, json.dumps(known))
    return Curves(by_trial, missing)


def _fits(entry: Mapping[str, Any] | None, trial: Trial, manifest: Mapping[str, Any] | None) -> bool:
    """Return whether a cached curve belongs to this model and this data."""
    return (
        entry is not None
        and entry["epoch"] == trial.best["epoch"]
        and (manifest is None or entry["data"] == manifest["key"])
    )


def _measure(sweep: Sweep, trial: Trial, shards: ShardFolder, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Measure R² at every k of a trial's model, and return the entry for the cache.

    Raises:
        DataError: the trial's model cannot be read.
    """
    model = load_model(sweep.folder, trial.trial_id).model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluation = evaluate(model, _validation_rows(shards, manifest), device)
    return {
        "epoch": trial.best["epoch"],
        "data": manifest["key"],
        "n_rows": evaluation.n_rows,
        "r2": [round(value, 6) for value in evaluation.r2],
    }


def _validation_rows(shards: ShardFolder, manifest: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the block's validation rows. Shards with few rows are combined to at least `ROWS_TOGETHER` rows."""
    together: list[Tensor] = []
    for number, n_train, n_val in manifest["shards"]:
        if n_val:
            together.append(torch.from_numpy(shards.shard(number, slice(n_train, n_train + n_val))))
        if sum(len(rows) for rows in together) >= ROWS_TOGETHER:
            yield torch.cat(together)
            together = []
    if together:
        yield torch.cat(together)
