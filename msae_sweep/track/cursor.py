"""How far a journal was sent, and to where."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SentTrial:
    """What is known of a trial's run."""

    run_id: str
    block: int
    epoch: int = 0
    """Last epoch whose metrics were sent."""


@dataclass
class Cursor:
    """Where the sender stands in the journal; saved after every step, so that a killed sender repeats little: one
    event, or those behind the models that were being uploaded.

    To lose it costs time and nothing else: everything is sent again, and finds itself there already.
    """

    destination: str = ""
    """Tracking URI (without secrets) and experiment for which all this holds."""
    position: int = 0
    """Byte position in the journal behind the last event sent."""
    seq: int = 0
    """Number of that event."""
    refused: int = 0
    """Parts of events that MLflow refused for themselves."""
    sweep_id: str = ""
    run_id: str = ""
    """The sweep's own run."""
    origin: dict[str, str] = field(default_factory=dict)
    """Tags on commit, command and user, which trials share with their sweep."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data manifest of each block, by block number as text."""
    trials: dict[str, SentTrial] = field(default_factory=dict)

    @classmethod
    def load(cls, sweep_folder: Path) -> "Cursor":
        """The saved cursor; a new one where there is none or it cannot be read."""
        try:
            raw = json.loads(_file(sweep_folder).read_text(encoding="utf-8"))
            trials = {trial_id: SentTrial(**trial) for trial_id, trial in raw.pop("trials").items()}
            return cls(**raw, trials=trials)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return cls()

    def save(self, sweep_folder: Path) -> None:
        """Replace the saved cursor in one step."""
        part = _file(sweep_folder).with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(part, _file(sweep_folder))


def _file(sweep_folder: Path) -> Path:
    return sweep_folder / "journal" / "cursor.json"
