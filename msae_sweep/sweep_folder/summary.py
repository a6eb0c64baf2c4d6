"""Summarise a finished sweep in one dictionary: `summary.json`, and the notebook's `results/reconstruction.json`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from msae_sweep.sweep_folder.trial_record import TrialRecord, ranked


class Criterion(NamedTuple):
    """Success criterion of the notebook, applied to a trial's best epoch."""

    name: str
    value: float
    passed: bool


def success_criteria(metrics: Mapping[str, float], k_levels: Sequence[int]) -> list[Criterion]:
    """Return the success criteria R² (k=128) > 0.85, R² (k=16) > 0.40 and dead latents < 30%, applied to `metrics`.

    If a sweep has other levels, the largest is used in place of 128 and the smallest in place of 16. A single level is
    used in place of the nearer of the two by ratio: of 16 up to k = 45, of 128 from k = 46.
    """
    largest, smallest = k_levels[-1], k_levels[0]
    bounds = [(largest, 0.85), (smallest, 0.40)]
    if largest == smallest:
        bounds = [(largest, 0.85 if largest**2 > 16 * 128 else 0.40)]
    r2 = [(k, bound, metrics[f"r2_k{k}"]) for k, bound in bounds]
    dead = metrics["dead_ratio"]
    return [
        *(Criterion(f"R² (k={k}) > {bound:.2f}", value, value > bound) for k, bound, value in r2),
        Criterion("Dead latents < 30%", dead, dead < 0.30),
    ]


def trial_entry(record: TrialRecord) -> dict[str, Any]:
    """Return a trial's entry in `summary.json`. Its `metrics` are from the best epoch, as are the saved weights."""
    return {
        "trial_id": record.trial_id,
        "status": record.status,
        "reason": record.reason,
        "epochs": record.epochs,
        "best_epoch": int(record.best["epoch"]) if record.points else None,
        "seed": record.seed,
        "params": record.params,
        "metrics": {key: value for key, value in record.best.items() if math.isfinite(value)},
        "seconds": round(record.seconds, 3),
    }


def block_entry(
    records: list[TrialRecord], k_levels: Mapping[str, Sequence[int]], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a block's entry in `summary.json`.

    `best` is the best trial's trial_id, or None if no trial was completed or stopped early. `trials` begins with these
    trials, best first. `best_by_k_levels` holds the best trial for each set of levels, because objectives of different
    levels cannot be compared.
    """
    order = [record for record in ranked(records) if record.has_model]
    rest = [record for record in records if record not in order]
    best = order[0] if order else None
    by_levels: dict[str, str] = {}
    for record in order:
        by_levels.setdefault(str(list(k_levels[record.trial_id])), record.trial_id)
    criteria = success_criteria(best.best, k_levels[best.trial_id]) if best else []
    return {
        "best": best.trial_id if best else None,
        "best_by_k_levels": by_levels,
        "success_criteria": {c.name: {"value": c.value, "passed": c.passed} for c in criteria},
        "data": dict(manifest),
        "trials": [trial_entry(record) for record in (*order, *rest)],
    }


def best_entry(block: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the entry of the best trial in a block of a summary; None if there is no best trial."""
    return next((trial for trial in block["trials"] if trial["trial_id"] == block["best"]), None)


def best_entries(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a block's best trials, one for each set of k_levels, smallest k first."""
    winners = [trial for trial in block["trials"] if trial["trial_id"] in block["best_by_k_levels"].values()]
    return sorted(winners, key=lambda trial: [int(key[4:]) for key in trial["metrics"] if key.startswith("r2_k")])


def reconstruction(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the notebook's `results/reconstruction.json`: block → `k16` … `k128` → R² of the block's best trial."""
    return {
        name: {key.removeprefix("r2_"): value for key, value in best["metrics"].items() if key.startswith("r2_k")}
        for name, block in summary["blocks"].items()
        if (best := best_entry(block))
    }
