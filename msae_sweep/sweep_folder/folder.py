"""The sweep folder: where everything lies that is needed to resume or report, and how it is written.

{storage}/{name}/
    sweep.yaml                          the resolved search-space file
    identity.json  data.json            command, versions and times of each run; manifest of each block's data
    trials/{trial_id}/trial.json        settings, status and every epoch's metrics (driver)
    trials/{trial_id}/state.pt          training state, while the trial is unfinished (trial)
    trials/{trial_id}/model.pt          best weights so far, in the notebook's format (trial)
    journal/                            what MLflow is to be told, and how far it has been
    tune/                               Ray Tune's own files; nothing here is read back
    summary.json  results/  figures/  models/

In an object store it looks the same, but that journal/events.jsonl lies there in pieces (`store_sync.py`).
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
from msae_sweep.paths import StoragePath
from msae_sweep.sweep_folder import driver_lock, store_sync
from msae_sweep.sweep_folder.trial_record import TrialRecord

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors of the system that say that a disk is full, read-only or broken."""


class SweepFolder:
    """Paths of one sweep and atomic writes into it; picklable, and the same on every node that shares the storage.

    Of a sweep in an object store `path` is a copy on the driver's disk. Others, who get the folder pickled, read and
    write the store itself, and only by `read` and `write`.
    """

    def __init__(self, path: str | Path, shared: StoragePath | None = None) -> None:
        """The folder itself; with `shared`, a copy of what lies there."""
        self.path = Path(path).absolute()
        self._shared = shared
        self._mirror: store_sync.StoreSync | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mirror": None}

    def __str__(self) -> str:
        return str(self.path if self._shared is None else self._shared)

    @classmethod
    def at(cls, where: str | Path) -> "SweepFolder":
        """The sweep at a path or URI; from a store everything small is fetched, into a folder of this process.

        Raises:
            SweepError: the store cannot be reached, or says no.
        """
        place = StoragePath(where)
        if not place.is_remote:
            return cls(place.path)
        place.check()
        copy = tempfile.mkdtemp(prefix="msae_sweep-")
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        store_sync.fetch(place, Path(copy))
        return cls(copy, place)

    @classmethod
    def locate(cls, storage: str, name: str) -> "SweepFolder":
        """The folder of sweep `name` under `storage`.

        Raises:
            SweepError: a store that cannot be reached, or says no.
        """
        return cls.at(str(Path(storage) / name) if "://" not in storage else (StoragePath(storage) / name).uri)

    @property
    def storage(self) -> str:
        """What `locate` finds this folder under, together with `name`."""
        return str(self.path.parent) if self._shared is None else self._shared.parent.uri

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name if self._shared is None else self._shared.name

    @property
    def tune_storage(self) -> dict[str, Any]:
        """Where Ray Tune keeps what it wants to keep, as the arguments of its RunConfig."""
        if self._shared is None:
            return {"storage_path": str(self.path / "tune")}
        from msae_sweep.sweep_folder.tune_filesystem import for_tune

        return {"storage_path": f"{self._shared.inside}/tune", "storage_filesystem": for_tune(self._shared.filesystem)}

    @property
    def config_file(self) -> Path:
        """The resolved search-space file."""
        return self.path / "sweep.yaml"

    def trial(self, trial_id: str) -> Path:
        """Folder of one trial."""
        return self.path / "trials" / trial_id

    def record_file(self, trial_id: str) -> Path:
        """What the driver knows of a trial."""
        return self.trial(trial_id) / "trial.json"

    def state_file(self, trial_id: str) -> Path:
        """Training state of an unfinished trial."""
        return self.trial(trial_id) / "state.pt"

    def model_file(self, trial_id: str) -> Path:
        """Best model of a trial so far."""
        return self.trial(trial_id) / "model.pt"

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where it is not there (yet).

        Raises:
            SweepError: it holds something else.
        """
        file = self.path / name
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise SweepError(
                f"{file} is damaged ({first_line(error)}); `msae-sweep resume {self}` writes it again"
            ) from None
        return found

    def exists(self) -> bool:
        """Whether a sweep was started here: its data could be prepared."""
        return self.config_file.is_file()

    def create(self) -> None:
        """Make the folder.

        Raises:
            SweepError: the place cannot be written.
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
    def driven(self) -> Iterator[None]:
        """While this is open, what is written here goes to the store too; at its end all of it is there.

        Raises:
            SweepError: another process drives this sweep, or the store has failed for too long.
        """
        if self._shared is None:
            yield
            return
        with driver_lock.held(self._shared / "journal" / "driver.json"):
            # Another driver may have gone on with the sweep since it was fetched.
            store_sync.fetch(self._shared, self.path)
            yield from self._mirrored(self._shared)

    def _mirrored(self, shared: StoragePath) -> Iterator[None]:
        self._mirror = store_sync.StoreSync(self.path, shared)
        try:
            yield
            # How far MLflow was told: nothing is lost without it but time.
            self.written(self.path / "journal" / "cursor.json", self.path / "journal" / "refused.jsonl")
            self._mirror.flush()
        finally:
            self._mirror.close()

    def flush(self) -> None:
        """Wait until what was written is where others find it."""
        if self._mirror is not None:
            self._mirror.flush()

    def n_events(self, written: int) -> int:
        """How many of the journal's `written` events are safe from the loss of this machine, if others can be."""
        return written if self._mirror is None else min(written, self._mirror.n_events)

    def on_events(self, call: Callable[[], None]) -> None:
        """Have `call` called when there are more such events."""
        if self._mirror is not None:
            self._mirror.on_events = call

    def clear_trials(self) -> None:
        """Remove what trials left of a sweep that never came to exist: another one may take its name."""
        assert not self.exists(), "a sweep's trials are never removed"
        if (self.path / "trials").exists():
            shutil.rmtree(self.path / "trials")
        if self._shared is not None:
            (self._shared / "trials").delete()

    def write(self, path: Path, content: bytes | memoryview, *, durable: bool = True) -> None:
        """Replace a file in one step: readers see the old one or the new one.

        `durable` waits until it is safe from a power cut, which takes milliseconds.

        Raises:
            StorageError: the disk is full, or the folder is read-only.
            OSError: the store fails, which may pass.
        """
        if self._shared is not None and self._mirror is None:
            self._place(path).write(content)
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                part.write_bytes(content)
                if durable and self._mirror is None:
                    _sync(part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise self.unwritable(path, error) from error
        self.written(path)

    @contextlib.contextmanager
    def storage_errors(self) -> Iterator[None]:
        """Turn what a full disk or a folder that became read-only makes anybody raise into a `StorageError`."""
        try:
            yield
        except OSError as error:
            if error.errno not in _OF_THE_DISK:
                raise
            raise self.unwritable(Path(error.filename or self.path), error) from error

    def unwritable(self, path: Path, error: OSError) -> StorageError:
        """The error to raise where writing `path` failed: what failed, and the way out."""
        reason = error.strerror or first_line(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(folder for folder in (path, *path.parents) if folder.exists())
            with contextlib.suppress(OSError):
                reason += f", {shutil.disk_usage(there).free / 2**20:,.0f} MiB are free"
            reason += "; make room"
        elif error.errno in _OF_THE_DISK:
            reason += "; make it writable"
        return StorageError(f"{path} cannot be written: {reason}, then go on with: msae-sweep resume {self}")

    def written(self, *paths: Path) -> None:
        """Files were written here by other means than `write`, or removed: bring them to where others find them."""
        if self._mirror is not None:
            self._mirror.changed(*paths)

    def read(self, path: Path) -> bytes | None:
        """A file that another process may have written; None where there is none."""
        try:
            return path.read_bytes() if self._shared is None else self._place(path).read()
        except FileNotFoundError:
            return None

    def fetch(self, path: Path) -> Path | None:
        """A file as a path on this machine; None where there is none.

        A file that is only in the store comes as a temporary copy of the same name, alone in a folder. Whoever asked
        for it removes that folder; otherwise every ended trial would leave its model on the driver's disk.
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
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)
        self.written(path)

    def make_durable(self, path: Path) -> None:
        """Wait until a file is safe from a power cut, whoever wrote it.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            _sync(path)
        except OSError as error:
            raise self.unwritable(path, error) from error

    def write_text(self, path: Path, text: str) -> None:
        """`write` for text."""
        self.write(path, text.encode())

    def save_record(self, record: TrialRecord) -> None:
        """Write a trial's `trial.json`."""
        self.write_text(self.record_file(record.trial_id), record.to_json())

    def load_records(self) -> dict[str, TrialRecord]:
        """Every trial that was written so far, by trial_id.

        Raises:
            SweepError: a file is damaged.
        """
        records, damaged = self.read_records()
        for what in damaged.values():
            raise SweepError(f"{what}; `msae-sweep resume {self}` trains this trial again")
        return records

    def read_records(self) -> tuple[dict[str, TrialRecord], dict[str, str]]:
        """Every trial that was written so far, and what is wrong with each file that is damaged, both by trial_id."""
        records, damaged = {}, {}
        for file in sorted(self.path.glob("trials/*/trial.json")):
            try:
                records[file.parent.name] = TrialRecord.from_json(file.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                damaged[file.parent.name] = f"{file} is damaged ({first_line(error)})"
        return records, damaged

    def models(self) -> set[str]:
        """Trials of which a model file is there that is not cut off, as far as its size and its end tell."""
        if self._shared is not None:
            files = (self._shared / "trials").files(recursive=True)
            return {file.parent.name for file, info in files.items() if file.name == "model.pt" and info.size > 0}
        return {file.parent.name for file in self.path.glob("trials/*/model.pt") if zipfile.is_zipfile(file)}

    def _place(self, path: Path) -> StoragePath:
        assert self._shared is not None
        return self._shared / path.relative_to(self.path).as_posix()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
