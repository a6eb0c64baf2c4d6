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
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msae_sweep.errors import SweepError
from msae_sweep.results.record import TrialRecord


class SweepFolder:
    """Paths of one sweep and atomic writes into it; picklable, and the same on every node that shares the storage."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @classmethod
    def locate(cls, storage: str, name: str) -> "SweepFolder":
        """The folder of sweep `name` under `storage`.

        Raises:
            SweepError: `storage` is a URI; a path that every node shares is needed so far.
        """
        if "://" in storage:
            raise SweepError(f"storage: {storage} is a URI; give a path that every node shares, e.g. /shared/sweeps")
        return cls(Path(storage) / name)

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
        """A JSON file of the folder; empty where it is not there (yet)."""
        try:
            found: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
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
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise SweepError(f"storage: {self.path} cannot be written: {error.strerror}") from None

    def clear_trials(self) -> None:
        """Remove what trials left of a sweep that never came to exist: another one may take its name."""
        assert not self.exists(), "a sweep's trials are never removed"
        if (self.path / "trials").exists():
            shutil.rmtree(self.path / "trials")

    def write(self, path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
        """Let `write` fill a file beside `path`, then put it in its place: readers see the old file or the new one.

        `durable` waits until it is safe from a power cut, which takes milliseconds.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write(part)
            if durable:
                self.make_durable(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

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
        """Every trial that was written so far, by trial_id."""
        files = sorted(self.path.glob("trials/*/trial.json"))
        records = [TrialRecord.from_json(file.read_text(encoding="utf-8")) for file in files]
        return {record.trial_id: record for record in records}
