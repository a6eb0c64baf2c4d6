"""Writes the files that a sweep leaves when it ends: summary, reconstruction, figure, each block's best model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msae_sweep.config import SweepConfig
from msae_sweep.data.sources import planted
from msae_sweep.sae import model_file
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.summary import best_entry, block_entry, reconstruction
from msae_sweep.sweep_folder.trial_record import TrialRecord

ARTIFACTS = ("summary.json", "results/reconstruction.json")
"""Artifacts of the sweep's MLflow run, as paths relative to the sweep folder."""
FIGURE = "figures/msae_training.png"
REPORT = "report/report.html"
"""Path of the report's page, relative to the sweep folder; it and `FIGURE` become artifacts once they are drawn."""


class FinalFiles(NamedTuple):
    """Return value of `write`."""

    summary: dict[str, Any]
    """Content of `summary.json`."""
    histories: dict[str, dict[str, Any]]
    """Training history of each block's best trial, as `training_figure` takes them; blocks without one are left out."""


def write(
    config: SweepConfig,
    folder: SweepFolder,
    records: Sequence[TrialRecord],
    manifests: Mapping[int, Mapping[str, Any]],
    pca_r2: Mapping[int, Sequence[float]],
    *,
    seconds: float,
) -> FinalFiles:
    """Write all files that follow from the records; an interrupted sweep gets them too, for what it has reached.

    The models of the blocks' best trials must be readable; `lost_models` checks this before.

    Args:
        pca_r2: R² of k = 1, 2, … principal components, by block; a block for which it is not known is left out.
        seconds: wall time of this run in seconds; the preparation counts only where it runs alongside the trials.
    """
    levels = {record.trial_id: record.training(config.training).levels for record in records}
    blocks = {
        f"block{block}": block_entry([r for r in records if r.block == block], levels, manifest, pca_r2.get(block, ()))
        for block, manifest in manifests.items()
    }
    summary: dict[str, Any] = {
        "name": config.name,
        "seconds": round(seconds, 1),
        "training": config.training.model_dump(mode="json"),
        "blocks": blocks,
    }
    histories = {}
    for name, block in blocks.items():
        if (best := best_entry(block)) is None:
            continue
        file = folder.model_file(best["trial_id"])
        content = folder.read(file)
        assert content is not None, f"{file} was there a moment ago"
        model = model_file.load(file, content)
        if config.data.path == "planted":
            dictionary = planted.true_dictionary(config.data.planted, int(name.removeprefix("block")))
            block["dictionary_recovery"] = planted.recovery(model.model.W_dec.detach().numpy(), model.std, dictionary)
        histories[name] = {**model.history, "best_epoch": best["best_epoch"], "pca_r2": block["pca_r2"]}
        target = folder.path / "models" / f"msae_{name}.pt"
        tensors, beside = model_file.to_safetensors(model)
        folder.write(target, content)
        folder.write(target.with_suffix(".safetensors"), tensors)
        folder.write(target.with_suffix(".json"), beside)
    folder.write_text(folder.path / "results" / "reconstruction.json", json.dumps(reconstruction(summary), indent=2))
    folder.write_text(folder.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    return FinalFiles(summary, histories)


def write_figure(folder: SweepFolder, png: bytes) -> Path:
    """Write the notebook's figure and return its path."""
    target = folder.path / FIGURE
    folder.write(target, png)
    return target


def champions(summary: Mapping[str, Any]) -> dict[int, str]:
    """Return the trial_id of each block's best trial, by block number; blocks without one are left out."""
    named = {int(name.removeprefix("block")): block["best"] for name, block in summary["blocks"].items()}
    return {block: best for block, best in named.items() if best is not None}


def block_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of each block's best trial as `block5/r2_k128` …, for the sweep's own MLflow run.

    The principal components' R² is among them as `block5/pca_r2_k128` ….
    """
    metrics: dict[str, float] = {}
    for name, block in summary["blocks"].items():
        if best := best_entry(block):
            metrics |= {f"{name}/{key}": value for key, value in best["metrics"].items()}
        metrics |= {f"{name}/pca_r2_{k}": value for k, value in block["pca_r2"].items()}
        if "dictionary_recovery" in block:
            metrics[f"{name}/dictionary_recovery"] = block["dictionary_recovery"]
    return metrics
