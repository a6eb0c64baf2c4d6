"""Manifest that an extraction leaves beside its activations, and what it says about blocks.

Other programs may leave a `manifest.json` as well, to say how they number blocks (`blocks_numbered_from`) and which row
of the board is the network's first (`first_row`).
"""

import json
from collections.abc import Mapping
from typing import Any

from msae_sweep.errors import MsaeSweepError
from msae_sweep.paths import StoragePath


def read_manifest(data: StoragePath) -> dict[str, Any]:
    """Return the manifest of the activations at `data`, which may be the folder, its `activations.h5` or `parquet/`.

    The result is empty if there is none, or if it cannot be read.
    """
    try:
        for place in (data, data.parent):
            if (place / "manifest.json").is_file():
                manifest = json.loads((place / "manifest.json").read())
                return manifest if isinstance(manifest, dict) else {}
    except (MsaeSweepError, OSError, ValueError):
        pass
    return {}


def blocks_numbered_from(manifest: Mapping[str, Any]) -> int:
    """Return the number of the network's first block: 0, or 1 in folders that earlier versions extracted."""
    extracted_by_us = "weights_sha256" in manifest
    return int(manifest.get("blocks_numbered_from", 1 if extracted_by_us else 0))


def numbering_note(path: str) -> str | None:
    """Return a line for the user if the blocks of the activations at `path` are not numbered from 0."""
    first = 0 if path == "planted" else blocks_numbered_from(read_manifest(StoragePath(path)))
    if first == 0:
        return None
    return (
        f"{path}: blocks are numbered from {first} there, as an earlier version extracted them: its block5 is block "
        f"{5 - first} of Leela Zero and of this version"
    )
