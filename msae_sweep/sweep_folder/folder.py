"""Read and write a sweep folder, which holds everything that is needed to resume or report a sweep.

{storage}/{name}/
    sweep.yaml                          the resolved search-space file
    identity.json                       format of the folder; command, versions and times of each run
    data.json  origins.json             each block's manifest; files, sizes and times of its source (see `changes.py`)
    trials/{trial_id}/trial.json        settings, status and every epoch's metrics (driver)
    trials/{trial_id}/state.pt          training state, until the trial has ended without failing (trial)
    trials/{trial_id}/model.pt          best weights so far, in the notebook's format (trial)
    journal/                            events for MLflow, and how far they have been sent
    tune/                               Ray Tune's own files, which are never read back
    summary.json  results/  figures/  models/  report/

In an object store the layout is the same, except that journal/events.jsonl is stored in pieces (`store_sync.py`).
"""

import atexit
import contextlib
import errno
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msae_sweep.errors import StorageError, SweepError, first_line
from msae_sweep.format_version import SWEEP_FOLDER, check_format
from msae_sweep.paths import StoragePath
from msae_sweep.sweep_folder import driver_lock, store_sync
from msae_sweep.sweep_folder.trial_record import TrialRecord

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Error numbers of the operating system for a disk that is full, read-only or broken."""


class SweepFolder:
    """Paths of one sweep, and atomic writes to them. Picklable, and valid on every node that shares the storage.

    For a sweep in an object store, `path` is a copy on the driver's disk. Other processes get the folder pickled; they
    read and write the store directly, and may use only `read` and `write`.
    """

    def __init__(self, path: str | Path, shared: StoragePath | None = None) -> None:
        """Take the folder at `path`; if `shared` is given, `path` is a local copy of the sweep at `shared`."""
        self.path = Path(path).absolute()
        self._shared = shared
        self._store_sync: store_sync.StoreSync | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store_sync": None}

    def __str__(self) -> str:
        return str(self.path if self._shared is None else self._shared)

    @classmethod
    def at(cls, where: str | Path) -> "SweepFolder":
        """Open the sweep at a path or URI.

        From an object store all small files are fetched into a temporary folder, which is removed when this process
        exits.

        Raises:
            SweepError: the store cannot be reached, or refuses access.
            FormatError: a newer msae_sweep wrote the folder in another format.
        """
        place = StoragePath(where)
        if not place.is_remote:
            folder = cls(place.path)
            folder._check_format()
            return folder
        place.check()
        copy = tempfile.mkdtemp(prefix="msae_sweep-")
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        store_sync.fetch(place, Path(copy))
        folder = cls(copy, place)
        folder._check_format()
        return folder

    @classmethod
    def locate(cls, storage: str, name: str) -> "SweepFolder":
        """Open the folder of sweep `name` under `storage`, a folder or URI.

        Raises:
            SweepError: the store cannot be reached, or refuses access.
        """
        return cls.at(str(Path(storage) / name) if "://" not in storage else (StoragePath(storage) / name).uri)

    @property
    def storage(self) -> str:
        """Folder or URI that contains this sweep folder; `locate` finds the sweep by it and `name`."""
        return str(self.path.parent) if self._shared is None else self._shared.parent.uri

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.path.name if self._shared is None else self._shared.name

    @property
    def tune_storage(self) -> dict[str, Any]:
        """Arguments of Ray Tune's RunConfig that place Tune's own files."""
        if self._shared is None:
            return {"storage_path": str(self.path / "tune")}
        from msae_sweep.sweep_folder.tune_filesystem import tune_filesystem_view

        return {
            "storage_path": f"{self._shared.inside}/tune",
            "storage_filesystem": tune_filesystem_view(self._shared.filesystem),
        }

    @property
    def config_file(self) -> Path:
        """Path of the resolved search-space file."""
        return self.path / "sweep.yaml"

    def trial(self, trial_id: str) -> Path:
        """Return the folder of one trial."""
        return self.path / "trials" / trial_id

    def record_file(self, trial_id: str) -> Path:
        """Return the path of a trial's record, which the driver writes."""
        return self.trial(trial_id) / "trial.json"

    def state_file(self, trial_id: str) -> Path:
        """Return the path of the training state of an unfinished trial."""
        return self.trial(trial_id) / "state.pt"

    def model_file(self, trial_id: str) -> Path:
        """Return the path of a trial's best model so far."""
        return self.trial(trial_id) / "model.pt"

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the folder; empty if the file does not exist (yet).

        Raises:
            SweepError: the file cannot be read, or is not valid JSON.
        """
        file = self.path / name
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise SweepError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise SweepError(
                f"{file} is damaged ({first_line(error)}); `msae-sweep resume {self}` writes it again"
            ) from None
        return found

    def exists(self) -> bool:
        """Return whether a sweep was started here: `sweep.yaml` is written once the data has been prepared."""
        return self.config_file.is_file()

    def create(self) -> None:
        """Create the folder and check that it can be written.

        Raises:
            SweepError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._shared is None:
                with tempfile.TemporaryFile(dir=self.path):
                    pass
            else:
                (self._shared / "writable").write(b"")
                (self._shared / "writable").delete()
        except OSError as error:
            raise SweepError(f"storage: {self} cannot be written: {error.strerror or error}") from None

    @contextlib.contextmanager
    def lock_and_sync(self) -> Iterator[None]:
        """Hold the driver lock and upload everything written to this folder while the context is open.

        On exit all of it is in the object store. For a sweep on a disk, this does nothing.

        Raises:
            SweepError: another process drives this sweep, or the store has failed for too long.
        """
        if self._shared is None:
            yield
            return
        with driver_lock.hold_lock(self._shared / "journal" / "driver.json"):
            # Another driver may have continued the sweep since this copy was fetched.
            store_sync.fetch(self._shared, self.path)
            self._check_format()
            yield from self._synced_with(self._shared)

    def _synced_with(self, shared: StoragePath) -> Iterator[None]:
        self._store_sync = store_sync.StoreSync(self.path, shared)
        try:
            yield
            # These files say how far events were sent to MLflow. Without them a resumed sweep would only lose time.
            self.queue_upload(self.path / "journal" / "cursor.json", self.path / "journal" / "refused.jsonl")
            self._store_sync.flush()
        finally:
            self._store_sync.close()

    def flush(self) -> None:
        """Wait until everything written so far is in the object store, if the sweep is in one."""
        if self._store_sync is not None:
            self._store_sync.flush()

    def n_sendable(self, written: int) -> int:
        """Return how many of the journal's `written` events may be sent to MLflow.

        For a sweep in an object store these are the events that have been uploaded, which survive the loss of this
        machine. On a disk they are all events.
        """
        return written if self._store_sync is None else min(written, self._store_sync.n_events)

    def on_upload(self, call: Callable[[], None]) -> None:
        """Register `call`, to be called whenever `n_sendable` has increased by an upload."""
        if self._store_sync is not None:
            self._store_sync.on_upload = call

    def clear_trials(self) -> None:
        """Delete trial files of a sweep that ended before it was started, because another sweep may take its name."""
        assert not self.exists(), "a sweep's trials are never removed"
        if (self.path / "trials").exists():
            shutil.rmtree(self.path / "trials")
        if self._shared is not None:
            (self._shared / "trials").delete()

    def write(self, path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
        """Write a file atomically: readers see either the old content or the new.

        Args:
            durable: wait until the file would survive a power cut, which takes milliseconds. This applies to a sweep on
                a disk only.

        Raises:
            StorageError: the disk is full, or the folder is read-only.
            OSError: the object store fails, perhaps only for a while.
        """
        if self._shared is not None and self._store_sync is None:
            self._place(path).write(content)
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                part.write_bytes(content)
                if durable and self._store_sync is None:
                    _sync(part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise self.write_error(path, error) from error
        self.queue_upload(path)

    @contextlib.contextmanager
    def storage_errors(self) -> Iterator[None]:
        """Convert each `OSError` of a full, read-only or broken disk within the context into a `StorageError`."""
        try:
            yield
        except OSError as error:
            if error.errno not in _OF_THE_DISK:
                raise
            raise self.write_error(Path(error.filename or self.path), error) from error

    def write_error(self, path: Path, error: OSError) -> StorageError:
        """Return the error to raise after a failed write of `path`. Its message gives the cause and the remedy."""
        reason = error.strerror or first_line(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(folder for folder in (path, *path.parents) if folder.exists())
            with contextlib.suppress(OSError):
                reason += f", {shutil.disk_usage(there).free / 2**20:,.0f} MiB are free"
            reason += "; make space"
        elif error.errno in _OF_THE_DISK:
            reason += "; make it writable"
        return StorageError(f"{path} cannot be written: {reason}, then continue with: msae-sweep resume {self}")

    def queue_upload(self, *paths: Path) -> None:
        """Queue files for upload to the object store, if any, that were removed or were not written by `write`."""
        if self._store_sync is not None:
            self._store_sync.changed(*paths)

    def read(self, path: Path) -> bytes | None:
        """Return the content of a file that another process may have written; None if there is no file."""
        try:
            return path.read_bytes() if self._shared is None else self._place(path).read()
        except FileNotFoundError:
            return None

    def fetch(self, path: Path) -> Path | None:
        """Return a path on this machine with the content of the file at `path`; None if there is no file.

        A file that is only in the object store is returned as a temporary copy with the same name, alone in a folder.
        The caller removes that folder; otherwise every ended trial would leave its model on the driver's disk.
        """
        if path.exists() or self._shared is None:
            return path if path.exists() else None
        content = self.read(path)
        if content is None:
            return None
        copy = Path(tempfile.mkdtemp(dir=self.path, prefix="fetched-")) / path.name
        copy.write_bytes(content)
        return copy

    def remove(self, path: Path) -> None:
        """Remove a file if it exists."""
        path.unlink(missing_ok=True)
        self.queue_upload(path)

    def make_durable(self, path: Path) -> None:
        """Wait until a file would survive a power cut (fsync). Any process may have written the file.

        Raises:
            StorageError: the file cannot be written to the disk.
        """
        try:
            _sync(path)
        except OSError as error:
            raise self.write_error(path, error) from error

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file atomically, as `write` does."""
        self.write(path, text.encode())

    def save_record(self, record: TrialRecord) -> None:
        """Write the `trial.json` of a trial."""
        self.write_text(self.record_file(record.trial_id), record.to_json())

    def load_records(self) -> dict[str, TrialRecord]:
        """Return the records of all trials that were written so far, by trial_id.

        Raises:
            SweepError: a record is damaged.
        """
        records, damaged = self.read_records()
        for what in damaged.values():
            raise SweepError(f"{what}; `msae-sweep resume {self}` trains this trial again")
        return records

    def read_records(self) -> tuple[dict[str, TrialRecord], dict[str, str]]:
        """Return the records written so far, and what is wrong with each damaged record file, both by trial_id."""
        records, damaged = {}, {}
        for file in sorted(self.path.glob("trials/*/trial.json")):
            try:
                records[file.parent.name] = TrialRecord.from_json(file.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                damaged[file.parent.name] = f"{file} is damaged ({first_line(error)})"
        return records, damaged

    def models(self) -> set[str]:
        """Return the ids of trials whose model file exists and does not look cut off.

        On a disk the end of the file is checked, in an object store only that the file is not empty.
        """
        if self._shared is not None:
            files = (self._shared / "trials").files(recursive=True)
            return {file.parent.name for file, info in files.items() if file.name == "model.pt" and info.size > 0}
        return {file.parent.name for file in self.path.glob("trials/*/model.pt") if zipfile.is_zipfile(file)}

    def _check_format(self) -> None:
        with contextlib.suppress(SweepError):  # an identity.json that cannot be read is reported by those who need it
            check_format(self.read_json("identity.json"), SWEEP_FOLDER, f"{self}/identity.json")

    def _place(self, path: Path) -> StoragePath:
        assert self._shared is not None
        return self._shared / path.relative_to(self.path).as_posix()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
