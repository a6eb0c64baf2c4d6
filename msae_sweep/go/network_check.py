"""Comparison of a network with the one whose activations a model was trained on, by the extraction's manifest."""

from pathlib import Path
from typing import Any

from msae_sweep.data.sources.extraction_manifest import read_manifest
from msae_sweep.errors import MsaeSweepError
from msae_sweep.go.weights import weights_sha256
from msae_sweep.models.evaluate import data_config_for
from msae_sweep.paths import StoragePath


def network_differences(manifest: dict[str, Any], weights: Path, first_row: str) -> tuple[str, ...]:
    """Return notes on known differences between a network and the one that a model was trained on.

    A difference is reported but is no error, because a network file that was compressed or written again has another
    hash.

    Args:
        manifest: manifest of the activations that the model was trained on; may be empty.
        weights: file of the network.
        first_row: `top` or `bottom`, the board row that is the network's row 0.
    """
    found = []
    if manifest.get("weights_sha256", here := weights_sha256(weights)) != here:
        found.append(
            f"{weights} is not the file that the model's activations were extracted with: sha256 {here[:12]}… instead "
            f"of {manifest['weights_sha256'][:12]}…"
        )
    if (before := manifest.get("first_row", first_row)) != first_row:
        found.append(f"the model's activations were extracted with --first-row {before}, not {first_row}")
    return tuple(found)


def manifest_of_model(model: str) -> dict[str, Any]:
    """Return the manifest of the activations that a model was trained on; empty if none is found.

    Args:
        model: file or URI that the model was loaded from. The sweep around the file names the activations.
    """
    if model.startswith(("models:/", "runs:/")):
        return {}
    try:
        # The model is at {sweep}/models/msae_block5.pt or {sweep}/trials/block5-003/model.pt.
        folders = (folder := StoragePath(model).parent.parent), folder.parent
        sweep = next((folder for folder in folders if (folder / "sweep.yaml").is_file()), None)
        if sweep is None:
            return {}
        return read_manifest(StoragePath(data_config_for(sweep.uri, None, ()).path))
    except (MsaeSweepError, OSError, ValueError):
        return {}
