"""What a sweep leaves behind when it ends: summary, reconstruction, figure, each block's best model."""

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
"""What goes with the sweep's MLflow run, relative to the sweep folder."""
FIGURE = "figures/msae_training.png"
REPORT = "report/report.html"
"""The same, once they are drawn."""


class FinalFiles(NamedTuple):
    """What `write` leaves."""

    summary: dict[str, Any]
    """As `summary.json` holds it."""
    histories: dict[str, dict[str, Any]]
    """Of each block's best trial, as `figures.training_figure` takes them; empty where no trial has ended."""


def write(
    config: SweepConfig,
    folder: SweepFolder,
    records: Sequence[TrialRecord],
    manifests: Mapping[int, Mapping[str, Any]],
    *,
    seconds: float,
) -> FinalFiles:
    """Write everything that follows from the records; an interrupted sweep gets it too, for what there is.

    The blocks' best models are there: `lost_models` found none.

    Args:
        seconds: wall time of this run, without preparation.
    """
    levels = {record.trial_id: record.training(config.training).levels for record in records}
    blocks = {
        f"block{block}": block_entry([r for r in records if r.block == block], levels, manifest)
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
        histories[name] = {**model.history, "best_epoch": best["best_epoch"]}
        target = folder.path / "models" / f"msae_{name}.pt"
        tensors, beside = model_file.to_safetensors(model)
        folder.write(target, content)
        folder.write(target.with_suffix(".safetensors"), tensors)
        folder.write(target.with_suffix(".json"), beside)
    folder.write_text(folder.path / "results" / "reconstruction.json", json.dumps(reconstruction(summary), indent=2))
    folder.write_text(folder.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    return FinalFiles(summary, histories)


def write_figure(folder: SweepFolder, png: bytes) -> Path:
    """Write the notebook's figure; returns its file."""
    target = folder.path / FIGURE
    folder.write(target, png)
    return target


def champions(summary: Mapping[str, Any]) -> dict[int, str]:
    """Each block's best trial, by block number."""
    named = {int(name.removeprefix("block")): block["best"] for name, block in summary["blocks"].items()}
    return {block: best for block, best in named.items() if best is not None}


def block_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of each block's best trial as `block5/r2_k128` …, for the sweep's own MLflow run."""
    metrics: dict[str, float] = {}
    for name, block in summary["blocks"].items():
        if best := best_entry(block):
            metrics |= {f"{name}/{key}": value for key, value in best["metrics"].items()}
        if "dictionary_recovery" in block:
            metrics[f"{name}/dictionary_recovery"] = block["dictionary_recovery"]
    return metrics
