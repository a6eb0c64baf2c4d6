"""One trial as it is known to the driver, and as it lies in the sweep folder."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from msae_sweep.config import TrainingConfig

Status = Literal["pending", "running", "completed", "stopped_early", "diverged", "failed"]
FINAL: tuple[Status, ...] = ("completed", "stopped_early", "diverged", "failed")
"""Statuses after which a trial does not go on; `failed` is tried again by a resumed sweep."""


@dataclass
class TrialRecord:
    """A trial's identity, settings and history."""

    trial_id: str
    """`block5-003`: block and number within it; the same number means the same proposal in every block."""
    block: int
    index: int
    params: dict[str, Any]
    """The values that the search proposed, by training key."""
    seed: int
    status: Status = "pending"
    reason: str = ""
    """Why it ended: `epochs`, `patience`, `asha at epoch 9`, or an error in one line."""
    points: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every epoch, ascending."""
    seconds: float = 0.0
    """Training time, waiting not counted."""

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return len(self.points)

    @property
    def best(self) -> dict[str, float]:
        """Metrics of the epoch with the highest objective; empty before the first."""
        return max(self.points, key=lambda point: point["objective"], default={})

    @property
    def finished(self) -> bool:
        """Whether it has a status that lasts."""
        return self.status in FINAL

    @property
    def has_model(self) -> bool:
        """Whether the trial ended in a way that leaves a model which may be the best."""
        return self.status in ("completed", "stopped_early")

    def add_points(self, points: list[dict[str, float]]) -> list[dict[str, float]]:
        """Append epochs that are not known yet and return them; a restarted trial reports some twice."""
        new = [point for point in points if point["epoch"] > self.epochs]
        self.points.extend(new)
        return new

    def training(self, base: TrainingConfig) -> TrainingConfig:
        """All settings of this trial."""
        return TrainingConfig.model_validate({**base.model_dump(), **self.params, "seed": self.seed})

    def to_json(self) -> str:
        """For `trials/{trial_id}/trial.json`."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> "TrialRecord":
        """Read `to_json` back.

        Raises:
            ValueError, TypeError: it is something else.
        """
        record = cls(**json.loads(text))
        if record.status not in get_args(Status) or not isinstance(record.params, dict):
            raise ValueError(f"status {record.status!r} or params {record.params!r} is none of a trial")
        if not isinstance(record.points, list) or not all(isinstance(point, dict) for point in record.points):
            raise ValueError("its points are not a list of metrics")
        return record


def ranked(records: list[TrialRecord]) -> list[TrialRecord]:
    """Trials with at least one epoch, best objective first; equal ones in their numbers' order."""
    measured = [record for record in records if record.points]
    return sorted(measured, key=lambda record: (-record.best["objective"], record.index))
