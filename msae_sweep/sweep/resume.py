"""Reads and checks settings and data of a started sweep, to resume it; the journal replaces damaged files."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msae_sweep.config import SweepConfig, load, parse
from msae_sweep.data.prepare.changes import describe_change
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.data.sources.catalog import open_source
from msae_sweep.errors import ConfigError, SweepError
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.track import journal


def load_config(sweep: str | Path, tracking_uri: str | None = None) -> SweepConfig:
    """Return the configuration of a started sweep from its folder; `tracking_uri` replaces the one in it.

    Raises:
        SweepError: there is no sweep.
        ConfigError: the sweep's tracking URI had a password, which is not kept, and no URI is given.
    """
    return config_of(SweepFolder.at(sweep), tracking_uri)


def config_of(folder: SweepFolder, tracking_uri: str | None = None) -> SweepConfig:
    """Return the configuration of a started sweep, as `load_config` does, from an open `SweepFolder`."""
    if not folder.exists():
        raise SweepError(f"{folder}: no sweep.yaml there; give the folder of a sweep, e.g. sweeps/quickstart")
    config = _config_file(folder)
    uri = tracking_uri or config.tracking.uri
    if uri and uri != tracking_uri and "***" in uri:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise ConfigError(
                f"tracking.uri: the password of {config.tracking.uri} is not kept in {folder}/sweep.yaml; "
                "give --tracking-uri or MLFLOW_TRACKING_URI"
            )
    # The folder may have been moved, or mounted elsewhere, since.
    moved = {"storage": folder.storage, "name": folder.name}
    return config.model_copy(update={**moved, "tracking": config.tracking.model_copy(update={"uri": uri})})


def _config_file(folder: SweepFolder) -> SweepConfig:
    """Return the resolved search-space file; if it is damaged, return the journal's copy."""
    source = f"{folder}/sweep.yaml"
    config: SweepConfig | None = None
    try:
        config = load(folder.config_file, source=source)
        # `to_yaml` writes every key, and this one last: a file that was cut off may still be valid YAML, but lacks it.
        if "storage" in config.model_fields_set:
            return config
        fault = ConfigError(f"{source}: is truncated")
    except ConfigError as error:
        fault = error
    started = last_start(folder)
    try:
        whole = parse(started["config_yaml"] if started else "", source=source)
    except ConfigError:  # the file is not at fault, e.g. another version wrote it
        if config is None:
            raise fault from None
        return config
    logging.getLogger(__name__).warning("%s; the copy in the journal is used instead", fault)
    return whole


def check_same_settings(folder: SweepFolder, config: SweepConfig) -> None:
    """Check that a resumed sweep has the settings it was started with; resources, storage and tracking may change.

    Raises:
        ConfigError: a key has another value than before.
    """
    # The URI that is given now is used, because the one in the folder has lost its password.
    before = config_of(folder, config.tracking.uri)
    for section in ("data", "space", "training", "search", "asha"):
        old, new = (flatten({section: c.model_dump(mode="json")[section]}) for c in (before, config))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{key}: is {new.get(key)!r} but sweep {config.name} was started with {old.get(key)!r}; "
                    "resume with the same file, or give another --name"
                )


def check_same_data(
    folder: SweepFolder, config: SweepConfig, infos: Sequence[BlockInfo], say: Callable[[str], None]
) -> None:
    """Check that a resumed sweep trains on the rows that its finished trials were trained on.

    Raises:
        SweepError: the data has changed since; the message names the change.
    """
    manifests = read_json_or_empty(folder, "data.json") or (last_start(folder) or {}).get("datasets", {})
    origins, source = read_json_or_empty(folder, "origins.json"), open_source(config.data)
    for info in infos:
        if (manifest := manifests.get(str(info.block))) is None:
            continue
        changed = describe_change(source, info, manifest, origins.get(str(info.block), {}), say)
        if changed:
            raise SweepError(
                f"{changed}: this is not the data that sweep {config.name} was started with; restore that data, or "
                "give another --name"
            )


def read_json_or_empty(folder: SweepFolder, name: str) -> dict[str, Any]:
    """Return a JSON file of the sweep; empty if it is missing or damaged, because the resuming run writes it again."""
    try:
        return folder.read_json(name)
    except SweepError:
        return {}


def last_start(folder: SweepFolder) -> dict[str, Any] | None:
    """Return the journal's last `sweep_started` event.

    It repeats sweep.yaml, data.json, and identity.json without its list of runs.
    """
    return journal.last(folder.path, "sweep_started")


def flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with dotted keys: {'a': {'b': 1}} → {'a.b': 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
