"""Early stopping as a ladder of rungs: where trials are judged, by which bar, and what stopping them saved.

Verdicts are a pure function of what the records keep, so that a report can give each one again, with its reason.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msae_sweep.config import AshaConfig
from msae_sweep.results.record import TrialRecord

STOPPED_AT = "asha at epoch "
"""How the reason of a stopped trial begins; the rung follows."""


def rungs(asha: AshaConfig | None, epochs: int) -> list[int]:
    """Epochs at which trials of at most `epochs` are judged: grace × factor^i below `epochs`."""
    milestones = []
    milestone = asha.grace_epochs if asha else epochs
    while asha and milestone < epochs:
        milestones.append(milestone)
        milestone *= asha.reduction_factor
    return milestones


def bar(reached: Sequence[float], reduction_factor: int) -> float:
    """What the objective must be at a rung that predecessors `reached` with these: their top 1/reduction_factor."""
    return float(np.quantile(reached, 1 - 1 / reduction_factor))


class Stop(NamedTuple):
    """A trial that was stopped at a rung."""

    trial_id: str
    rung: int
    """Epoch."""
    objective: float
    bar: float
    """What it would have needed there to go on."""

    @property
    def missing(self) -> float:
        """By how much its objective would have had to be higher."""
        return self.bar - self.objective


class Ladder(NamedTuple):
    """What early stopping did in one block."""

    rungs: list[int]
    stops: list[Stop]
    """In the trials' order."""
    epochs_saved: int
    """Epochs that the stopped trials would have trained at the most."""
    epochs_trained: int
    """Of all trials that ended."""
    seconds_saved: float
    """Training time of the saved epochs, each trial at its own pace."""


def climb(records: Sequence[TrialRecord], asha: AshaConfig | None, epochs: Mapping[str, int]) -> Ladder:
    """The ladder of one group of trials, which are judged only against each other.

    Args:
        epochs: the most epochs of each trial, by trial_id.
    """
    order = sorted(records, key=lambda record: record.index)
    stops, saved, seconds = [], 0, 0.0
    for place, record in enumerate(order):
        if asha is None or not record.reason.startswith(STOPPED_AT):
            continue
        rung = int(record.reason.removeprefix(STOPPED_AT))
        reached = [r.points[rung - 1]["objective"] for r in order[:place] if r.epochs >= rung]
        objective = record.points[rung - 1]["objective"]
        stops.append(Stop(record.trial_id, rung, objective, bar(reached, asha.reduction_factor)))
        left = epochs[record.trial_id] - rung
        saved, seconds = saved + left, seconds + record.seconds / record.epochs * left
    milestones = sorted({r for record in order for r in rungs(asha, epochs[record.trial_id])})
    return Ladder(milestones, stops, saved, sum(r.epochs for r in order if r.finished), seconds)
