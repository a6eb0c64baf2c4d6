"""A model by whatever names it: a file, a sweep with a block, or MLflow's registry."""

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
    """A model, and what is known of where it is from."""

    file: ModelFile
    block: int | None
    """The block that its name tells."""
    where: str
    """File or URI, for messages."""


def is_folder(what: str) -> bool:
    """Whether `what` names a folder, of whose models one has to be chosen by its block."""
    return not what.startswith(("champion:", "models:/", "runs:/")) and StoragePath(what).is_folder()


def find(what: str | Path, block: int | None = None, tracking_uri: str | None = None) -> FoundModel:
    """Load the model that `what` names.

    Args:
        what: a model file (`.pt` in the notebook's format, or `.safetensors` with its `.json`); a sweep folder, or any
            folder of `msae_block{B}.pt`; on a disk or in an object store; `models:/NAME@ALIAS`, `models:/NAME/VERSION`,
            `models:/m-ID`, `runs:/RUN_ID`; or `champion:BLOCK`, short for `models:/msae-block{BLOCK}@champion`, and
            `champion:NAME:BLOCK` for a sweep with another `tracking.model_name`.
        block: which model of a folder; of anything else, what its block must be where that is known.
        tracking_uri: where MLflow is, as for a sweep.

    Raises:
        ConfigError: `what` or `block` names nothing that can be a model.
        DataError: a file is missing or not an MSAE's.
        TrackingError: MLflow has no such model, or does not answer.
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
        raise ConfigError(f"{text}: a model of block {found.block}, not {block}")
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
        raise DataError(f"{folder}: no models there; give a sweep that has ended, or a model file")
    blocks = ", ".join(str(b) for b in sorted(files))
    if block is None and len(files) > 1:
        raise ConfigError(f"{folder}: has models of blocks {blocks}; say which, e.g. --block {min(files)}")
    if block is not None and block not in files:
        raise ConfigError(f"{folder}: no model of block {block}; found {blocks}")
    return files[min(files) if block is None else block]


def _block_of(file: StoragePath) -> int | None:
    """`msae_block5.pt` tells it, and so does a trial's folder, `block5-003/model.pt`."""
    match = re.fullmatch(r"msae_block(\d+)", file.stem) or re.fullmatch(r"block(\d+)-\d+", file.parent.name)
    return int(match[1]) if match else None
