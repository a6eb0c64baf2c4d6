"""Summarise a finished sweep in one dictionary: `summary.json`, and the notebook's `results/reconstruction.json`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from msae_sweep.sweep_folder.trial_record import TrialRecord, ranked

NESTEDNESS = 1.0
"""Share of a level's latents that are also among the next level's. The levels are the first latents of one sorted code,
so the share is 1 by construction, and no pass over rows measures it."""
GAP_MEANING = (
    "The series asks for a large gap, so that a larger k really adds something; but a better reconstruction at small k "
    "makes the gap smaller, so a strong MSAE fails it."
)
NESTEDNESS_MEANING = (
    "The share of a level's latents that are also among the next level's; it is 1 by construction, because all levels "
    "are read from one sorted code, and is not measured."
)
WISH_MEANING = "The series hopes for this R² and does not require it."


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


class FurtherCriterion(NamedTuple):
    """Further criterion of the original series, applied to a trial's best epoch. It does not count for passing."""

    name: str
    value: float
    met: bool
    meaning: str
    """Sentence that says what the criterion means."""


def further_criteria(metrics: Mapping[str, float], k_levels: Sequence[int]) -> list[FurtherCriterion]:
    """Return the further criteria of the original series, applied to `metrics`.

    They are R² (k=128) − R² (k=16) > 0.25, nestedness > 0.80 and, as a wish, R² (k=128) > 0.92. Other levels take the
    place of 128 and 16 as in `success_criteria`. A single level has no gap and no nestedness, and one that is used in
    place of 16 has no criterion here.
    """
    largest, smallest = k_levels[-1], k_levels[0]
    found = []
    if largest != smallest:
        gap = metrics[f"r2_k{largest}"] - metrics[f"r2_k{smallest}"]
        found = [
            FurtherCriterion(f"R² (k={largest}) − R² (k={smallest}) > 0.25", gap, gap > 0.25, GAP_MEANING),
            FurtherCriterion("Nestedness > 0.80", NESTEDNESS, NESTEDNESS > 0.80, NESTEDNESS_MEANING),
        ]
    if largest**2 > 16 * 128 or largest != smallest:
        r2 = metrics[f"r2_k{largest}"]
        found.append(FurtherCriterion(f"R² (k={largest}) > 0.92 (a wish)", r2, r2 > 0.92, WISH_MEANING))
    return found


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
    records: list[TrialRecord],
    k_levels: Mapping[str, Sequence[int]],
    manifest: Mapping[str, Any],
    pca_r2: Sequence[float] = (),
) -> dict[str, Any]:
    """Return a block's entry in `summary.json`.

    `best` is the best trial's trial_id, or None if no trial was completed or stopped early. `trials` begins with these
    trials, best first. `best_by_k_levels` holds the best trial for each set of levels, because objectives of different
    levels cannot be compared. `pca_r2` holds R² of as many principal components as latents at every level of a trial.

    Args:
        pca_r2: R² of k = 1, 2, … principal components on the validation rows; empty if it was not measured.
    """
    levels = sorted({k for record in records for k in k_levels[record.trial_id]})
    order = [record for record in ranked(records) if record.has_model]
    rest = [record for record in records if record not in order]
    best = order[0] if order else None
    by_levels: dict[str, str] = {}
    for record in order:
        by_levels.setdefault(str(list(k_levels[record.trial_id])), record.trial_id)
    criteria = success_criteria(best.best, k_levels[best.trial_id]) if best else []
    further = further_criteria(best.best, k_levels[best.trial_id]) if best else []
    return {
        "best": best.trial_id if best else None,
        "best_by_k_levels": by_levels,
        "success_criteria": {c.name: {"value": c.value, "passed": c.passed} for c in criteria},
        "further_criteria": {c.name: {"value": c.value, "met": c.met, "meaning": c.meaning} for c in further},
        "pca_r2": {f"k{k}": pca_r2[k - 1] for k in levels if k <= len(pca_r2)},
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


def hierarchy(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `results/hierarchy.json` as notebook 03 of the original series writes it, but without `feature_stability`.

    It maps `nestedness` to block → `k16_in_k32` …, `reconstruction_gap` to block → gap, and `reconstruction_r2` to
    block → `k16` …. R² is on validation rows, and nestedness is not measured; see `NESTEDNESS`.
    """
    result: dict[str, dict[str, Any]] = {"nestedness": {}, "reconstruction_gap": {}, "reconstruction_r2": {}}
    for name, r2 in reconstruction(summary).items():
        levels = sorted(r2, key=lambda level: int(level[1:]))
        result["nestedness"][name] = {
            "_".join((low, "in", high)): NESTEDNESS for low, high in itertools.pairwise(levels)
        }
        result["reconstruction_gap"][name] = r2[levels[-1]] - r2[levels[0]]
        result["reconstruction_r2"][name] = {level: r2[level] for level in levels}
    return result
