"""The archive that the original notebook's last cell makes: a sweep's models, results and figure in one zip file."""

import json
import os
import shutil
import time
import uuid
import zipfile
from pathlib import Path
from typing import NamedTuple

from msae_sweep.errors import ConfigError, DataError, SweepError, first_line
from msae_sweep.paths import StoragePath, check_folder
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.summary import best_entry, hierarchy, reconstruction

FIGURE = "figures/msae_training.png"


class Archive(NamedTuple):
    """Archive that was written."""

    path: Path
    names: list[str]
    """Names of the files in it, e.g. `models/msae_block5.pt`."""
    without: list[str]
    """Names of files that the notebook's archive has and this one lacks, because the sweep has not written them."""


def export_archive(sweep: str | Path, out: str | Path, *, block: int | None = None, k: int | None = None) -> Archive:
    """Write the models of all blocks of a sweep, its results and its figure into a new zip file.

    The files are `models/msae_block{B}.pt` as they lie in the sweep folder, without compression, the notebook's
    `results/reconstruction.json`, `results/hierarchy.json` (see `hierarchy`), and `figures/msae_training.png`. The zip
    file appears once it is complete.

    Args:
        sweep: path or URI of a sweep folder.
        out: path that ends in `.zip` and does not exist yet.
        block: must be None, because the archive has all blocks.
        k: must be None, because the models keep every k.

    Raises:
        ConfigError: `sweep` is no sweep folder, `block` or `k` is given, or `out` exists already or cannot be written.
        DataError: the sweep has no models yet, or a file of it cannot be read.
    """
    out = Path(out).expanduser()
    if block is not None:
        raise ConfigError("--block: a .zip holds every block of a sweep; leave out --block, or write a .pt")
    if k is not None:
        raise ConfigError("--k: notebook keeps every k; leave out --k")
    if out.exists():
        raise ConfigError(f"--out: {out} exists; give another path")
    check_folder("--out", out.parent)
    texts, files, without = _content(sweep)
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "x") as archive:
            for name, file in files.items():
                _add(archive, name, file)
            for name, text in texts.items():
                archive.writestr(_entry(name, zipfile.ZIP_DEFLATED), text)
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror or first_line(error)}") from None
    finally:
        part.unlink(missing_ok=True)
    return Archive(out, [*files, *texts], without)


def _content(sweep: str | Path) -> tuple[dict[str, str], dict[str, StoragePath], list[str]]:
    """Return the texts to write, the files to copy, both by name, and the names of files that are missing."""
    try:
        folder, place = SweepFolder.at(sweep), StoragePath(sweep)
        if not folder.exists():
            raise ConfigError(f"{sweep}: is not a sweep folder; a .zip holds a whole sweep, a .pt one model")
        summary = folder.read_json("summary.json")
        named = [name for name, block in summary.get("blocks", {}).items() if best_entry(block)]
        if not named:
            raise DataError(f"{sweep}: has no models yet; a sweep writes them when it ends")
        files = {f"models/msae_{name}.pt": place / "models" / f"msae_{name}.pt" for name in named}
        for file in files.values():
            if not file.is_file():
                raise DataError(f"{file} is missing; `msae-sweep resume {sweep}` writes it again")
        without = [] if (place / FIGURE).is_file() else [FIGURE]
        files |= {} if without else {FIGURE: place / FIGURE}
    except SweepError as error:
        raise DataError(str(error)) from None
    texts = {"reconstruction": reconstruction(summary), "hierarchy": hierarchy(summary)}
    return {f"results/{name}.json": json.dumps(content, indent=2) for name, content in texts.items()}, files, without


def _add(archive: zipfile.ZipFile, name: str, file: StoragePath) -> None:
    """Copy a file into the archive without compression: weights and PNGs hardly become smaller.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        source = file.open()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or first_line(error)}") from None
    with source, archive.open(_entry(name, zipfile.ZIP_STORED), "w", force_zip64=True) as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _entry(name: str, compression: int) -> zipfile.ZipInfo:
    """Return the description of a file that everybody may read once it is unpacked."""
    entry = zipfile.ZipInfo(name, time.localtime()[:6])
    entry.compress_type = compression
    entry.external_attr = 0o644 << 16
    return entry
