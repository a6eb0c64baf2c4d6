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

In an object store it looks the same, but that journal/events.jsonl lies there in pieces (`mirror.py`).
"""

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msae_sweep.errors import SweepError, first_line
from msae_sweep.places import Place
from msae_sweep.results import lease, mirror
from msae_sweep.results.record import TrialRecord


class SweepFolder:
    """Paths of one sweep and atomic writes into it; picklable, and the same on every node that shares the storage.

    Of a sweep in an object store `path` is a copy on the driver's disk. Others, who get the folder pickled, read and
    write the store itself, and only by `read` and `write`.
    """

    def __init__(self, path: str | Path, shared: Place | None = None) -> None:
        """The folder itself; with `shared`, a copy of what lies there."""
        self.path = Path(path).absolute()
        self._shared = shared
        self._mirror: mirror.Mirror | None = None

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
        place = Place(where)
        if not place.is_remote:
            return cls(place.path)
        place.check()
        copy = tempfile.mkdtemp(prefix="msae_sweep-")
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        mirror.fetch(place, Path(copy))
        return cls(copy, place)

    @classmethod
    def locate(cls, storage: str, name: str) -> "SweepFolder":
        """The folder of sweep `name` under `storage`.

        Raises:
            SweepError: a store that cannot be reached, or says no.
        """
        return cls.at(str(Path(storage) / name) if "://" not in storage else (Place(storage) / name).uri)

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
            return {"storage_path": str(self.path)}
        from msae_sweep.results.tune_store import for_tune

        return {"storage_path": self._shared.inside, "storage_filesystem": for_tune(self._shared.filesystem)}

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
            raise _not_ours(file, error) from None
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
        with lease.held(self._shared / "journal" / "driver.json"):
            yield from self._mirrored(self._shared)

    def _mirrored(self, shared: Place) -> Iterator[None]:
        self._mirror = mirror.Mirror(self.path, shared)
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

    def write(self, path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
        """Let `write` fill a file beside `path`, then put it in its place: readers see the old file or the new one.

        `durable` waits until it is safe from a power cut, which takes milliseconds.
        """
        if self._shared is not None and self._mirror is None:
            with tempfile.TemporaryDirectory() as folder:
                part = Path(folder) / path.name
                write(part)
                self._place(path).write(part.read_bytes())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write(part)
            if durable and self._mirror is None:
                self.make_durable(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.written(path)

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
        """The same as a path on this machine."""
        if self._shared is not None and not path.exists():
            content = self.read(path)
            if content is None:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return path if path.exists() else None

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)
        self.written(path)

    def make_durable(self, path: Path) -> None:
        """Wait until a file is safe from a power cut, whoever wrote it."""
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def write_text(self, path: Path, text: str) -> None:
        """`write` for text."""
        self.write(path, lambda part: part.write_text(text, encoding="utf-8"))

    def save_record(self, record: TrialRecord) -> None:
        """Write a trial's `trial.json`."""
        self.write_text(self.record_file(record.trial_id), record.to_json())

    def load_records(self) -> dict[str, TrialRecord]:
        """Every trial that was written so far, by trial_id.

        Raises:
            SweepError: a file of one holds something else.
        """
        records = {}
        for file in sorted(self.path.glob("trials/*/trial.json")):
            try:
                record = TrialRecord.from_json(file.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise _not_ours(file, error) from None
            records[record.trial_id] = record
        return records

    def _place(self, path: Path) -> Place:
        assert self._shared is not None
        return self._shared / path.relative_to(self.path).as_posix()


def _not_ours(file: Path, error: Exception) -> SweepError:
    return SweepError(f"{file}: not what a sweep writes there: {first_line(error)}; restore it from a copy")
