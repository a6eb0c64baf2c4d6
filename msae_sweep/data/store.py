"""Prepared shards on disk: a folder per block and key, whole once its manifest stands in it. Knows nothing of Ray."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32

from msae_sweep.errors import SweepError


class ShardFolder:
    """`shard-{i}.npy` per range of the source, `stats.npy`, and `manifest.json`, written last.

    Every file appears whole or not at all, so that two sweeps may prepare the same data at once: both write the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder.

        Raises:
            SweepError: not possible there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepError(f"storage: {self.path} cannot be made: {error.strerror}") from None

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished preparation whose files are all there; None where it must be made (again)."""
        try:
            manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return None
        row_bytes = 4 * manifest["input_dim"]
        sizes = {self._shard(i): (n_train + n_val) * row_bytes for i, n_train, n_val in manifest["shards"]}
        sizes[self.path / "stats.npy"] = 2 * row_bytes
        whole = all(file.is_file() and file.stat().st_size >= size for file, size in sizes.items())
        return manifest if whole else None

    def save_manifest(self, manifest: dict[str, Any]) -> None:
        """Mark the preparation as finished."""
        self._write(self.path / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))

    def shard(self, i: int) -> Float32[np.ndarray, "rows input_dim"]:
        """Shard `i`."""
        return np.load(self._shard(i), allow_pickle=False)

    def save_shard(self, i: int, z: Float32[np.ndarray, "rows input_dim"]) -> None:
        """Write shard `i`."""
        self._write(self._shard(i), lambda file: np.save(file, z, allow_pickle=False))

    def stats(self) -> tuple[Float32[np.ndarray, " input_dim"], Float32[np.ndarray, " input_dim"]]:
        """Mean and std, as `save_stats` had them."""
        mean, std = np.load(self.path / "stats.npy", allow_pickle=False)
        return mean, std

    def save_stats(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Write mean and std as float32."""
        both = np.stack([mean, std]).astype(np.float32)
        self._write(self.path / "stats.npy", lambda file: np.save(file, both, allow_pickle=False))

    def _shard(self, i: int) -> Path:
        return self.path / f"shard-{i:05d}.npy"

    def _write(self, file: Path, write: Callable[[BinaryIO], object]) -> None:
        part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
        try:
            with open(part, "wb") as opened:
                write(opened)
            os.replace(part, file)
        except OSError as error:
            part.unlink(missing_ok=True)
            # numpy reports a short write, which is a full disk, without the system's word for it.
            reason = error.strerror or f"no space left ({error})"
            raise SweepError(f"storage: {file} cannot be written: {reason}") from None
