"""Prepared shards on disk: a folder per block and key, which is complete once it contains its manifest.

This module does not import Ray.
"""

import io
import json
import os
import uuid
from typing import Any

import numpy as np
from jaxtyping import Float32

from msae_sweep.errors import SweepError
from msae_sweep.paths import StoragePath


class ShardFolder:
    """Folder of a prepared block: shards, statistics, origin and manifest.

    The files are one `shard-{i}.npy` per range of the source that has usable rows, `stats.npy`, `origin.json` and
    `manifest.json`. The manifest is written last. Every file is written atomically, so two sweeps may prepare the same
    data at the same time: both write the same content.
    """

    def __init__(self, path: StoragePath) -> None:
        self.path = path

    def create(self) -> None:
        """Create the folder; in an object store there is nothing to create.

        Raises:
            SweepError: the folder cannot be created.
        """
        if self.path.is_remote:
            return
        try:
            self.path.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepError(f"storage: {self.path} cannot be created: {error.strerror}") from None

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of a finished preparation, or None if the block must be prepared (again).

        It must be prepared again if a shard or the statistics are missing or shorter than the manifest requires.
        """
        try:
            manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        row_bytes = 4 * manifest["input_dim"]
        sizes = {self._shard(i): (n_train + n_val) * row_bytes for i, n_train, n_val in manifest["shards"]}
        sizes[self.path / "stats.npy"] = 2 * row_bytes
        found = self.path.files()
        whole = all(file in found and found[file].size >= size for file, size in sizes.items())
        return manifest if whole else None

    def save_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, which marks the preparation as finished."""
        self._write_json("manifest.json", manifest)

    def origin(self) -> dict[str, Any]:
        """Return what `save_origin` wrote; an empty dict if an earlier version prepared the rows."""
        try:
            found: dict[str, Any] = json.loads((self.path / "origin.json").read())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def save_origin(self, origin: dict[str, Any]) -> None:
        """Write the list of the source's files and the digest of their rows."""
        self._write_json("origin.json", origin)

    def shard(self, i: int, rows: slice = slice(None)) -> Float32[np.ndarray, "rows input_dim"]:
        """Return shard `i`, or only the given rows of it; from a disk, no other rows are read."""
        return _loaded(self._shard(i), rows)

    def save_shard(self, i: int, z: Float32[np.ndarray, "rows input_dim"]) -> None:
        """Write shard `i`."""
        self._write(self._shard(i), z)

    def stats(self) -> tuple[Float32[np.ndarray, " input_dim"], Float32[np.ndarray, " input_dim"]]:
        """Return mean and std as `save_stats` wrote them."""
        mean, std = _loaded(self.path / "stats.npy")
        return mean, std

    def save_stats(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Write mean and std as float32."""
        self._write(self.path / "stats.npy", np.stack([mean, std]).astype(np.float32))

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        try:
            (self.path / name).write(json.dumps(content, indent=1).encode())
        except OSError as error:
            raise SweepError(f"storage: {self.path}: cannot be written: {error.strerror or error}") from None

    def _shard(self, i: int) -> StoragePath:
        return self.path / f"shard-{i:05d}.npy"

    def _write(self, file: StoragePath, array: np.ndarray) -> None:
        try:
            if file.is_remote:
                content = io.BytesIO()
                np.save(content, array, allow_pickle=False)
                file.write(content.getbuffer())
                return
            part = file.path.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
            try:
                with open(part, "wb") as opened:
                    np.save(opened, array, allow_pickle=False)
                os.replace(part, file.path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            # numpy reports a short write, which means a full disk, without the system's error message.
            short = "requested" in str(error) and "written" in str(error)
            reason = f"no space left ({error})" if short else error.strerror or str(error)
            raise SweepError(f"storage: {file} cannot be written: {reason}") from None


def _loaded(file: StoragePath, rows: slice = slice(None)) -> np.ndarray:
    array: np.ndarray
    if file.is_remote:
        array = np.load(io.BytesIO(file.read()), allow_pickle=False)[rows]
    elif rows == slice(None):
        array = np.load(file.path, allow_pickle=False)
    else:
        array = np.array(np.load(file.path, mmap_mode="r", allow_pickle=False)[rows])
    return array
