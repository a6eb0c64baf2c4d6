"""Record of one trial, which the driver keeps in memory and in the trial's `trial.json`."""

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from msae_sweep.config import TrainingConfig

Status = Literal["pending", "running", "completed", "stopped_early", "diverged", "failed"]
FINAL_STATUSES: tuple[Status, ...] = ("completed", "stopped_early", "diverged", "failed")
"""Statuses of a trial that has ended. A resumed sweep runs `failed` trials again."""


@dataclass
class TrialRecord:
    """Identity, settings and history of one trial."""

    trial_id: str
    """Block and number within the block, e.g. `block5-003`. In random and grid search, trials with the same number have
    the same proposal in every block."""
    block: int
    index: int
    params: dict[str, Any]
    """Values that the search proposed, by training key."""
    seed: int
    status: Status = "pending"
    reason: str = ""
    """Reason why the trial ended: `epochs`, `patience`, `asha at epoch 9`, or an error in one line."""
    points: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every epoch, in ascending order of epochs."""
    seconds: float = 0.0
    """Training time in seconds, without waiting."""
    unknown: dict[str, Any] = field(default_factory=dict)
    """Keys of the file that this version does not know; they are written back."""

    @property
    def epochs(self) -> int:
        """Number of epochs trained so far."""
        return len(self.points)

    @property
    def best(self) -> dict[str, float]:
        """Metrics of the epoch with the highest objective; empty before the first epoch."""
        return max(self.points, key=lambda point: point["objective"], default={})

    @property
    def finished(self) -> bool:
        """True if the trial has ended, also if it failed."""
        return self.status in FINAL_STATUSES

    @property
    def has_model(self) -> bool:
        """True if the trial was completed or stopped early, so that its model may be the best."""
        return self.status in ("completed", "stopped_early")

    def add_points(self, points: list[dict[str, float]]) -> list[dict[str, float]]:
        """Append the epochs that are new and return them. A restarted trial reports some epochs twice."""
        new = [point for point in points if point["epoch"] > self.epochs]
        self.points.extend(new)
        return new

    def training(self, base: TrainingConfig) -> TrainingConfig:
        """Return all training settings of this trial; `base` are the settings that all trials share."""
        return TrainingConfig.model_validate({**base.model_dump(), **self.params, "seed": self.seed})

    def to_json(self) -> str:
        """Return the content of `trials/{trial_id}/trial.json`."""
        known = {key: value for key, value in vars(self).items() if key != "unknown"}
        return json.dumps({**known, **self.unknown})

    @classmethod
    def from_json(cls, text: str) -> "TrialRecord":
        """Return the record that `to_json` has written as `text`.

        Raises:
            ValueError, TypeError: the text is not the record of a trial.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("it is not a mapping")
        known = {key: raw.pop(key) for key in [f.name for f in fields(cls) if f.name != "unknown"] if key in raw}
        record = cls(**known, unknown=raw)
        if record.status not in get_args(Status) or not isinstance(record.params, dict):
            raise ValueError(f"status {record.status!r} or params {record.params!r} is not valid for a trial")
        if not isinstance(record.points, list) or not all(isinstance(point, dict) for point in record.points):
            raise ValueError("its points are not a list of metrics")
        return record


def ranked(records: list[TrialRecord]) -> list[TrialRecord]:
    """Return the trials with at least one epoch, best objective first; ties are in the order of trial numbers."""
    measured = [record for record in records if record.points]
    return sorted(measured, key=lambda record: (-record.best["objective"], record.index))
