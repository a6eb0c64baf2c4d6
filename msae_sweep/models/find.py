"""Load a model by name: a file, a sweep folder with a block, or a URI of a run or registered model in MLflow."""

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from msae_sweep.config import MODEL_NAME, registered_name
from msae_sweep.errors import ConfigError, DataError, SweepError
from msae_sweep.paths import StoragePath
from msae_sweep.sae import model_file
from msae_sweep.sae.model_file import ModelFile


class FoundModel(NamedTuple):
    """Model with its block and its origin."""

    file: ModelFile
    block: int | None
    """Block number in the name of the model's file or trial; None if there is none."""
    where: str
    """File or URI, for messages."""


def names_a_folder(what: str) -> bool:
    """Return whether `what` is a folder. A folder can hold models of several blocks, so a block must be chosen."""
    return not what.startswith(("champion:", "models:/", "runs:/")) and StoragePath(what).is_folder()


def find(what: str | Path, block: int | None = None, tracking_uri: str | None = None) -> FoundModel:
    """Load the model that `what` names.

    Args:
        what: a file or folder, on a disk or in an object store: a model file (`.pt` in the notebook's format, or
            `.safetensors` with its `.json`), a sweep folder, or any folder of `msae_block{B}.pt`. Or a model in MLflow:
            `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/m-ID` or `runs:/RUN_ID`. `champion:BLOCK` is short
            for `models:/msae-block{BLOCK}@champion`; for a sweep with another `tracking.model_name` it is
            `champion:NAME:BLOCK`.
        block: block of the model to take from a folder. For anything else, the block that the model must have, which
            is checked if the model's block is known.
        tracking_uri: MLflow tracking URI, as for a sweep.

    Raises:
        ConfigError: `what` or `block` cannot name a model.
        DataError: a file is missing or is not an MSAE model file.
        TrackingError: MLflow has no such model, or does not respond.
    """
    text = str(what)
    if text.startswith("champion:"):
        match = re.fullmatch(r"champion:(?:([A-Za-z0-9._-]+):)?([0-9]+)", text)
        if match is None:
            raise ConfigError(f"{text}: must be champion:BLOCK or champion:NAME:BLOCK, e.g. champion:20")
        text = f"models:/{registered_name(match[1] or MODEL_NAME, int(match[2]))}@champion"
    if text.startswith(("models:/", "runs:/")):
        from msae_sweep.track.logged_models import fetch

        fetched = fetch(text, tracking_uri)
        found = FoundModel(fetched.file, fetched.block, text)
    else:
        found = _at(StoragePath(text), block)
    if block is not None and found.block not in (None, block):
        raise ConfigError(f"{text}: is a model of block {found.block}, not of block {block}")
    return found


def _at(place: StoragePath, block: int | None) -> FoundModel:
    try:
        place.check()
        if place.is_folder():
            place = _in_folder(place, block)
        if not place.is_remote:
            return FoundModel(_loaded(place.path), _block_of(place), str(place))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / place.name
            path.write_bytes(place.read())
            if path.suffix == ".safetensors":
                path.with_suffix(".json").write_bytes((place.parent / f"{place.stem}.json").read())
            return FoundModel(_loaded(path), _block_of(place), str(place))
    except FileNotFoundError:
        raise DataError(f"{place}: no such model file") from None
    except (SweepError, OSError) as error:
        raise DataError(str(error)) from None


def _loaded(path: Path) -> ModelFile:
    return model_file.load_safetensors(path) if path.suffix == ".safetensors" else model_file.load(path)


def _in_folder(folder: StoragePath, block: int | None) -> StoragePath:
    there = [*folder.files(), *(folder / "models").files()]
    files = {int(match[1]): file for file in there if (match := re.fullmatch(r"msae_block(\d+)\.pt", file.name))}
    if not files:
        raise DataError(f"{folder}: contains no models; give a sweep that has ended, or a model file")
    blocks = ", ".join(str(b) for b in sorted(files))
    if block is None and len(files) > 1:
        raise ConfigError(f"{folder}: has models of blocks {blocks}; choose one, e.g. --block {min(files)}")
    if block is not None and block not in files:
        raise ConfigError(f"{folder}: no model of block {block}; found {blocks}")
    return files[min(files) if block is None else block]


def _block_of(file: StoragePath) -> int | None:
    """Return the block in a file name such as `msae_block5.pt`, or in a trial's folder as in `block5-003/model.pt`."""
    match = re.fullmatch(r"msae_block(\d+)", file.stem) or re.fullmatch(r"block(\d+)-\d+", file.parent.name)
    return int(match[1]) if match else None
