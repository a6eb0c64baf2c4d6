"""Activation folder of an extraction: atomic writing of chunks, and conversion to the output formats at the end.

During an extraction, `parts/` holds for each chunk the rows of every block and an index file with everything else about
the chunk. The index file is written last, and a chunk counts as done when its index file exists. A run that was stopped
at any point can therefore be resumed without repeating a chunk and without writing a row twice. At the end the
requested formats are written and `parts/` is deleted.

Only one extraction at a time may write into a folder. Its driver locks the folder with `flock`, and also writes a
heartbeat file for other machines, because `flock` may not be visible to them.
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
from jaxtyping import Float64, Int32

import msae_sweep
from msae_sweep.data.hdf5_writer import write_gzip_dataset
from msae_sweep.errors import ConfigError, SweepError
from msae_sweep.format_version import EXTRACTION, check_format
from msae_sweep.paths import StoragePath, check_folder
from msae_sweep.sweep_folder import driver_lock

FORMATS = ("npy", "h5", "parquet")
INDEX = ("game_id", "position_id", "ply", "point")
"""Columns stored per row beside the activations: int64, int64, int32, int16 (`point` −1: the mean over the board)."""

_INPUTS = {"weights_sha256": "--weights", "games_sha256": "--games"}
"""Keys of the hashes in a manifest, each with the command-line option whose content was hashed."""
_DRIVER = "driver.json"
"""Name of the heartbeat file, which exists while a process writes the folder and names that process."""


class ActivationFolder:
    """Output folder of one extraction. The driver creates and finishes it; the workers write chunks into it."""

    def __init__(self, path: Path, blocks: Sequence[int], formats: Sequence[str]) -> None:
        self.path, self.blocks, self.formats = path, tuple(blocks), tuple(formats)
        self.parts, self.manifest = path / "parts", path / "manifest.json"

    def found(self) -> dict[str, Any]:
        """Return the manifest of the folder's extraction, complete or not; empty if the folder is empty or missing.

        Raises:
            ConfigError: the manifest cannot be read, or the folder contains something other than an extraction.
            FormatError: a newer msae_sweep wrote the folder in another format.
        """
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            assert isinstance(manifest["complete"], bool)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise ConfigError(f"--out: {self.manifest} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AssertionError):
            raise ConfigError(
                f"--out: {self.manifest} is not the manifest of an extraction; give another folder"
            ) from None
        else:
            check_format(manifest, EXTRACTION, self.manifest)
            return dict(manifest)
        if self.path.exists() and (not self.path.is_dir() or any(self._files_of_others())):
            raise ConfigError(f"--out {self.path}: is not empty and contains no extraction; give another folder")
        return {}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Check that an extraction with this `identity` can be started or resumed in the folder; change nothing.

        Raises:
            ConfigError: the folder contains another extraction or something else, or it cannot be written.
        """
        found = self.found()
        if found:
            self._compare(found, identity)
        if not found.get("complete"):
            check_folder("--out", self.path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder against other extractions for the duration of the `with` block.

        Raises:
            ConfigError: another extraction is writing the folder, or the folder cannot be created.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.callback(self._remove_if_empty)
                folder = os.open(self.path, os.O_RDONLY)
                stack.callback(os.close, folder)
                _lock(folder)
                stack.enter_context(driver_lock.hold_lock(StoragePath(self.path / _DRIVER)))
            except (BlockingIOError, SweepError):
                raise ConfigError(
                    f"--out {self.path}: {self._driver()} is writing an extraction there; wait for it, or give another "
                    "folder"
                ) from None
            except OSError as error:
                raise ConfigError(f"--out {self.path}: cannot be created: {error.strerror}") from None
            yield

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Start or resume the extraction; return False if it is complete. The caller must hold the lock (`hold_lock`).

        Raises:
            ConfigError: the folder contains another extraction or something else.
        """
        if found := self.found():
            self._compare(found, identity)
            if found["complete"]:
                return False
            for left_over in self.path.rglob(".*.part"):  # written by a process that was killed meanwhile
                if not left_over.name.startswith(f".{_DRIVER}."):
                    left_over.unlink(missing_ok=True)
            self.parts.mkdir(exist_ok=True)
            return True
        # The manifest is written first, because files in a folder without a manifest are assumed to be foreign.
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_manifest(
            {"format": EXTRACTION, "msae_sweep": msae_sweep.__version__, **identity, "complete": False}
        )
        self.parts.mkdir()
        return True

    def done(self) -> set[int]:
        """Return the numbers of the chunks that are completely written."""
        return {int(file.stem.removeprefix("index_")) for file in self.parts.glob("index_*.npz")}

    def write_chunk(
        self,
        number: int,
        rows: Mapping[int, np.ndarray],
        sums: Mapping[int, Float64[np.ndarray, "2 filters"]],
        index: Mapping[str, np.ndarray],
    ) -> None:
        """Write one chunk atomically; its index file is written last.

        Args:
            number: the chunk's number.
            rows: the rows of each block.
            sums: the sum of each block's rows and the sum of their squares. The device that computes the rows also
                computes the sums; computing them here took ten times as long as the writing.
            index: one value per row for every name in `INDEX`.
        """
        for block, values in rows.items():
            with atomic(self.rows_file(block, number)) as part:
                _save(part, values.dtype, values.shape, [values])
        named = {f"sums{block}": values for block, values in sums.items()}
        with atomic(self.parts / f"index_{number:06d}.npz") as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **{**index, **named})

    def rows_file(self, block: int, number: int) -> Path:
        """Return the path of one block's rows of a chunk during the extraction."""
        return self.parts / f"block{block}_{number:06d}.npy"

    def finish(self, totals: Mapping[str, Any]) -> None:
        """Write the output formats, the statistics and the index of all chunks, then mark the manifest `complete`."""
        numbers = sorted(self.done())
        # The npy format comes last: it moves the rows out of parts/, where the other formats read them. An interrupted
        # earlier call of this method may already have moved some.
        n_rows = 0
        for name in INDEX:
            n_rows = self._write_index(name, numbers)
        statistics = self._statistics(numbers, n_rows)
        for block, values in statistics.items():
            folder = self.path / f"block{block}"
            folder.mkdir(exist_ok=True)
            with atomic(folder / "normalization_stats.npz") as part, part.open("wb") as file:
                np.savez(file, allow_pickle=False, **values)
        if "h5" in self.formats:
            self._write_h5(numbers, n_rows, statistics)
        if "parquet" in self.formats:
            self._write_parquet(numbers)
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
        """Write one index column of all chunks, one chunk in memory at a time, and return the number of rows."""
        n_rows, dtype = 0, np.dtype(np.int64)
        for number in numbers:
            values = self._index(number, name)
            n_rows, dtype = n_rows + len(values), values.dtype
        with atomic(self.path / f"{name}.npy") as part:
            _save(part, dtype, (n_rows,), (self._index(number, name) for number in numbers))
        return n_rows

    def _statistics(self, numbers: Sequence[int], n_rows: int) -> dict[int, dict[str, Any]]:
        """Return mean, std (with n − 1 in the denominator, as in the original series) and count of each block."""
        sums = dict.fromkeys(self.blocks, np.zeros(1))
        for number in numbers:
            with np.load(self.parts / f"index_{number:06d}.npz") as index:
                sums = {block: before + index[f"sums{block}"] for block, before in sums.items()}
        found = {}
        for block, (total, squares) in sums.items():
            mean = total / n_rows
            variance = np.maximum(squares / n_rows - mean**2, 0) * n_rows / max(1, n_rows - 1)
            found[block] = {"mean": mean.astype(np.float32), "std": np.sqrt(variance).astype(np.float32)}
            found[block]["count"] = n_rows
        return found

    def _write_h5(self, numbers: Sequence[int], n_rows: int, statistics: Mapping[int, Mapping[str, Any]]) -> None:
        """Write `activations.h5` in the layout of the original series, with this package's index columns beside it.

        The series has `block{B}` with mean, std and count as attributes. `game_ids` number the games from 0 in the
        order of the rows, and `move_numbers` are the plies.
        """
        target = self.path / "activations.h5"
        if target.exists():
            return
        with atomic(target) as part, h5py.File(part, "w") as file:
            # The space is checked first, because HDF5 reports a full disk with a long message, and again on closing.
            if shutil.disk_usage(self.path).free < sum(file.stat().st_size for file in self.parts.iterdir()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            takes_mean = self._index(numbers[0], "point")[0] == -1
            file.attrs["block_indices"] = list(self.blocks)
            file.attrs["n_positions"] = int(self._index(numbers[-1], "position_id")[-1]) + 1
            file.attrs["spatial_mode"] = "pool" if takes_mean else "flatten"
            if takes_mean:
                file.attrs["pool_mode"] = "mean"
            columns: dict[str, Callable[[], Iterator[np.ndarray]]] = {
                **{f"block{block}": partial(self._rows_of, block, numbers) for block in self.blocks},
                "game_ids": partial(_numbered, partial(self._index_of, "game_id", numbers)),
                "move_numbers": lambda: (plies.astype(np.int16) for plies in self._index_of("ply", numbers)),
                **{name: partial(self._index_of, name, numbers) for name in INDEX},
            }
            for name, parts in columns.items():
                first = next(parts())
                shape = (n_rows, *first.shape[1:])
                write_gzip_dataset(file=file, name=name, shape=shape, dtype=first.dtype, parts=parts())
            for block, values in statistics.items():
                file[f"block{block}"].attrs.update(values)

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
                # No compression: floating-point activations hardly shrink, and uncompressed files are faster to read.
                pq.write_table(pa.table(columns), part, row_group_size=8192, compression="none")

    def _rows_of(self, block: int, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        return (self._rows(block, number) for number in numbers)

    def _index_of(self, name: str, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        return (self._index(number, name) for number in numbers)

    def _rows(self, block: int, number: int) -> np.ndarray:
        rows: np.ndarray = np.load(self.rows_file(block, number))
        return rows

    def _index(self, number: int, name: str) -> np.ndarray:
        with np.load(self.parts / f"index_{number:06d}.npz") as index:
            values: np.ndarray = index[name]
            return values

    def _compare(self, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        if found.get("blocks_numbered_from", 1) != identity.get("blocks_numbered_from"):
            raise ConfigError(
                f"--out {self.path}: its blocks are numbered from 1, as msae_sweep {found.get('msae_sweep', '')} wrote "
                "them; this version numbers them from 0; give another folder"
            )
        for key, value in identity.items():
            if (before := found.get(key)) == value:
                continue
            if key in _INPUTS:
                what = f"was started with other {_INPUTS[key]} ({key} {str(before)[:12]}…, now {str(value)[:12]}…)"
            else:
                what = f"contains another extraction, with {key} {before!r} instead of {value!r}"
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


def _numbered(game_ids: Callable[[], Iterator[np.ndarray]]) -> Iterator[Int32[np.ndarray, " rows"]]:
    """Yield the number of each row's game, from 0 in the order of the rows; all rows of a game are adjacent."""
    last, number = None, -1
    for ids in game_ids():
        begins = ids != np.concatenate([ids[:1] + 1 if last is None else [last], ids[:-1]])
        numbers = number + begins.cumsum()
        last, number = ids[-1], int(numbers[-1])
        yield numbers.astype(np.int32)


def _lock(folder: int) -> None:
    """Lock an open folder; locking a file instead would leave that file in the folder.

    Raises:
        BlockingIOError: another process has locked the folder.
    """
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # Some file systems, such as NFS, have no such locks; there only `driver_lock` protects the folder.


def _save(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write the concatenated `parts` as a .npy file, one part in memory at a time.

    On a full disk `np.save` only reports `480 requested and 200 written`. Here the OSError keeps its errno.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).data)


@contextlib.contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, renamed to `target` on success and deleted on an exception."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
