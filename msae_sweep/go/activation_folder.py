"""The activation folder of an extraction: chunks that appear whole or not at all, and what is made of them at the end.

While it grows, `parts/` holds per chunk the rows of every block and, written last, an index file with everything else
about the chunk. A chunk counts as done when its index file is there; so a run that is stopped anywhere goes on without
repeating a chunk and without a row twice. At the end the formats that were asked for are made, and `parts/` goes.

One extraction at a time writes into a folder: its driver locks it, and shows other machines, whose locks may not reach
this far, that it lives.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

from msae_sweep.errors import ConfigError, SweepError
from msae_sweep.paths import StoragePath, check_folder
from msae_sweep.sweep_folder import driver_lock

FORMATS = ("npy", "h5", "parquet")
INDEX = ("game_id", "position_id", "ply", "point")
"""Per row, beside the activations: int64, int64, int32, int16 (−1: the mean over the board)."""

_INPUTS = {"weights_sha256": "--weights", "games_sha256": "--games"}
"""Hashes that a manifest has, and the option whose content each tells."""
_DRIVER = "driver.json"
"""Says who writes the folder, while somebody does."""


class OutputFolder:
    """One extraction's folder; the driver begins and ends it, workers write chunks into it."""

    def __init__(self, path: Path, blocks: Sequence[int], formats: Sequence[str]) -> None:
        self.path, self.blocks, self.formats = path, tuple(blocks), tuple(formats)
        self.parts, self.manifest = path / "parts", path / "manifest.json"

    def found(self) -> dict[str, Any]:
        """The manifest of the extraction that the folder holds, whole or not; empty where there is none.

        Raises:
            ConfigError: it holds something else.
        """
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            assert isinstance(manifest["complete"], bool)
            return dict(manifest)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise ConfigError(f"--out: {self.manifest} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AssertionError):
            raise ConfigError(f"--out: {self.manifest} is not an extraction's; give another folder") from None
        if self.path.exists() and (not self.path.is_dir() or any(self._files_of_others())):
            raise ConfigError(f"--out {self.path}: is not empty and holds no extraction; give another folder")
        return {}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Find out whether the folder can be begun or gone on with, as far as `identity` tells; leaves no trace.

        Raises:
            ConfigError: it holds something else or another extraction, or cannot be written.
        """
        found = self.found()
        if found:
            self._compare(found, identity)
        if not found.get("complete"):
            check_folder("--out", self.path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other extractions out of the folder while this is open.

        Raises:
            ConfigError: another one is writing it, or it cannot be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.callback(self._remove_if_empty)
                folder = os.open(self.path, os.O_RDONLY)
                stack.callback(os.close, folder)
                _lock(folder)
                stack.enter_context(driver_lock.held(StoragePath(self.path / _DRIVER)))
            except (BlockingIOError, SweepError):
                raise ConfigError(
                    f"--out {self.path}: {self._driver()} is writing an extraction there; wait for it, or give another "
                    "folder"
                ) from None
            except OSError as error:
                raise ConfigError(f"--out {self.path}: cannot be made: {error.strerror}") from None
            yield

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Create the folder or go on in it; False where it is complete already. It must be `held`.

        Raises:
            ConfigError: it holds something else, or another extraction.
        """
        if found := self.found():
            self._compare(found, identity)
            if found["complete"]:
                return False
            for left_over in self.path.rglob(".*.part"):  # by a process that was killed while it wrote
                if not left_over.name.startswith(f".{_DRIVER}."):
                    left_over.unlink(missing_ok=True)
            self.parts.mkdir(exist_ok=True)
            return True
        # The manifest comes first: what is in a folder without one is somebody else's.
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_manifest({**identity, "complete": False})
        self.parts.mkdir()
        return True

    def done(self) -> set[int]:
        """Numbers of the chunks that are whole."""
        return {int(file.stem.removeprefix("index_")) for file in self.parts.glob("index_*.npz")}

    def write_chunk(
        self,
        number: int,
        rows: Mapping[int, np.ndarray],
        sums: Mapping[int, Float64[np.ndarray, "2 filters"]],
        index: Mapping[str, np.ndarray],
    ) -> None:
        """Write a chunk: every block's rows, their sum and the sum of their squares; a value a row for all of `INDEX`.

        The sums come from where the rows were computed: here they took ten times as long as the writing.
        """
        for block, values in rows.items():
            with atomic(self.rows_file(block, number)) as part:
                _save(part, values.dtype, values.shape, [values])
        named = {f"sums{block}": values for block, values in sums.items()}
        with atomic(self.parts / f"index_{number:06d}.npz") as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **{**index, **named})

    def rows_file(self, block: int, number: int) -> Path:
        """Where a chunk's rows of a block lie while the extraction runs."""
        return self.parts / f"block{block}_{number:06d}.npy"

    def finish(self, totals: Mapping[str, Any]) -> None:
        """Make the formats, the statistics and the index of all chunks; then the manifest says `complete`."""
        numbers = sorted(self.done())
        # What an earlier attempt to finish has moved is not there any more: the npy format comes last.
        if "h5" in self.formats:
            self._write_h5(numbers)
        if "parquet" in self.formats:
            self._write_parquet(numbers)
        sums = dict.fromkeys(self.blocks, np.zeros(1))
        for number in numbers:
            with np.load(self.parts / f"index_{number:06d}.npz") as index:
                sums = {block: before + index[f"sums{block}"] for block, before in sums.items()}
        n_rows = 0
        for name in INDEX:
            n_rows = self._write_index(name, numbers)
        for block, (total, squares) in sums.items():
            mean = total / n_rows
            std = np.sqrt(np.maximum(squares / n_rows - mean**2, 0))
            folder = self.path / f"block{block}"
            folder.mkdir(exist_ok=True)
            with atomic(folder / "normalization_stats.npz") as part, part.open("wb") as file:
                np.savez(file, mean=mean.astype(np.float32), std=std.astype(np.float32))
        if "npy" in self.formats:
            for block in self.blocks:
                for number in numbers:
                    source, target = (
                        self.rows_file(block, number),
                        self.path / f"block{block}" / f"chunk_{number:04d}.npy",
                    )
                    if source.exists():
                        os.replace(source, target)
        found = json.loads(self.manifest.read_text(encoding="utf-8"))
        self._write_manifest({**found, **totals, "rows": n_rows, "complete": True})
        shutil.rmtree(self.parts)

    def _write_index(self, name: str, numbers: Sequence[int]) -> int:
        """One file of a value a row, over all chunks, which need not fit into memory together; says how many rows."""
        n_rows, dtype = 0, np.dtype(np.int64)
        for number in numbers:
            values = self._index(number, name)
            n_rows, dtype = n_rows + len(values), values.dtype
        with atomic(self.path / f"{name}.npy") as part:
            _save(part, dtype, (n_rows,), (self._index(number, name) for number in numbers))
        return n_rows

    def _write_h5(self, numbers: Sequence[int]) -> None:
        target = self.path / "activations.h5"
        if target.exists():
            return
        with atomic(target) as part, h5py.File(part, "w") as file:
            # HDF5 names a full disk in many words, and once more when it closes the file.
            if shutil.disk_usage(self.path).free < sum(file.stat().st_size for file in self.parts.iterdir()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            n_rows = sum(len(self._index(number, "point")) for number in numbers)
            sources: dict[str, Callable[[int], np.ndarray]] = {
                **{f"block{block}": partial(self._rows, block) for block in self.blocks},
                **{name: partial(self._index, name=name) for name in INDEX},
            }
            for name, read in sources.items():
                first = read(numbers[0])
                dataset = file.create_dataset(name, (n_rows, *first.shape[1:]), dtype=first.dtype)
                start = 0
                for number in numbers:
                    rows = read(number)
                    dataset[start : start + len(rows)] = rows
                    start += len(rows)

    def _write_parquet(self, numbers: Sequence[int]) -> None:
        folder = self.path / "parquet"
        folder.mkdir(exist_ok=True)
        for number in numbers:
            target = folder / f"chunk_{number:04d}.parquet"
            if target.exists():
                continue
            columns = {}
            for block in self.blocks:
                rows = self._rows(block, number)
                columns[f"block{block}"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
            columns |= {name: pa.array(self._index(number, name)) for name in INDEX}
            with atomic(target) as part:
                # Uncompressed: activations of floating point hardly shrink, and reading them is faster.
                pq.write_table(pa.table(columns), part, row_group_size=8192, compression="none")

    def _rows(self, block: int, number: int) -> np.ndarray:
        rows: np.ndarray = np.load(self.rows_file(block, number))
        return rows

    def _index(self, number: int, name: str) -> np.ndarray:
        with np.load(self.parts / f"index_{number:06d}.npz") as index:
            values: np.ndarray = index[name]
            return values

    def _compare(self, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        for key, value in identity.items():
            if (before := found.get(key)) == value:
                continue
            if key in _INPUTS:
                what = f"was begun with other {_INPUTS[key]} ({key} {str(before)[:12]}…, here {str(value)[:12]}…)"
            else:
                what = f"holds another extraction: its {key} is {before!r}, here {value!r}"
            raise ConfigError(f"--out {self.path}: {what}; give another folder")

    def _files_of_others(self) -> Iterator[Path]:
        return (file for file in self.path.iterdir() if not file.name.lstrip(".").startswith(_DRIVER))

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _driver(self) -> str:
        try:
            return str(json.loads((self.path / _DRIVER).read_text(encoding="utf-8"))["driver"])
        except (OSError, ValueError, KeyError):
            return "another process"

    def _write_manifest(self, content: Mapping[str, Any]) -> None:
        with atomic(self.manifest) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _lock(folder: int) -> None:
    """Lock an open folder, rather than a file, which would be left in it.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without such locks, as NFS: there the lease alone has to do


def _save(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """One .npy file of parts that need not be in memory together.

    What `np.save` says of a full disk is `480 requested and 200 written`; here it is an OSError with its number.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


@contextlib.contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A file beside `target` that takes its name when all went well, and is gone when not."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
