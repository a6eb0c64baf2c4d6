"""The sender's cursor: how far a journal was sent, and to which destination."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SentTrial:
    """A trial's run in MLflow, and how far its metrics were sent."""

    run_id: str
    block: int
    epoch: int = 0
    """Last epoch whose metrics were sent; 0 before the first."""


@dataclass
class Cursor:
    """Position of the sender in the journal, saved after every step.

    After a kill, the sender therefore repeats little: one event, or the events that follow the models that were being
    uploaded. Losing the cursor costs only time: every event is sent again, and changes nothing that MLflow has already.
    """

    destination: str = ""
    """Tracking URI (without secrets) and experiment that this cursor belongs to."""
    position: int = 0
    """Byte offset in the journal just after the last event sent."""
    seq: int = 0
    """Sequence number of the last event sent."""
    refused: int = 0
    """Number of parts of events that MLflow rejected permanently."""
    sweep_id: str = ""
    run_id: str = ""
    """Run ID of the sweep's own run; empty before it exists."""
    origin: dict[str, str] = field(default_factory=dict)
    """Tags for commit, command and user, which trials share with their sweep."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data manifest of each block, by block number as text."""
    trials: dict[str, SentTrial] = field(default_factory=dict)

    @classmethod
    def load(cls, sweep_folder: Path) -> "Cursor":
        """Return the saved cursor, or a new one if there is none or it cannot be read."""
        try:
            raw = json.loads(_file(sweep_folder).read_text(encoding="utf-8"))
            trials = {trial_id: SentTrial(**trial) for trial_id, trial in raw.pop("trials").items()}
            return cls(**raw, trials=trials)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return cls()

    def save(self, sweep_folder: Path) -> None:
        """Replace the saved cursor atomically."""
        part = _file(sweep_folder).with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(part, _file(sweep_folder))


def _file(sweep_folder: Path) -> Path:
    return sweep_folder / "journal" / "cursor.json"
