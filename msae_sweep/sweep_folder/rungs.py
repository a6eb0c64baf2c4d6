"""Early stopping: at which rungs trials are judged, by which cutoff, and what stopping them saved.

The scheduler and the report both take objectives from `objectives_at_rungs` and cutoffs from `cutoff`, so the report
states the cutoffs that the scheduler used.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msae_sweep.config import AshaConfig
from msae_sweep.sweep_folder.trial_record import TrialRecord

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


def objectives_at_rungs(record: TrialRecord, asha: AshaConfig | None, epochs: int) -> dict[int, float]:
    """Objective at each rung that a trial of at most `epochs` has reached.

    An epoch that is a rung of other trials only is left out: a trial of 9 epochs is not judged at epoch 9, and no trial
    is compared with it there.
    """
    return {r: record.points[r - 1]["objective"] for r in rungs(asha, epochs) if r <= record.epochs}


def cutoff(predecessors: Iterable[Mapping[int, float]], rung: int, reduction_factor: int) -> float | None:
    """Objective that a trial needs at `rung` to go on: the top 1/reduction_factor of its predecessors there.

    Args:
        predecessors: objective by rung of every trial with a smaller number.

    Returns:
        None where no predecessor was judged at `rung`; the trial then passes.
    """
    reached = [objectives[rung] for objectives in predecessors if rung in objectives]
    return float(np.quantile(reached, 1 - 1 / reduction_factor)) if reached else None


class Stop(NamedTuple):
    """A trial that was stopped at a rung."""

    trial_id: str
    rung: int
    """Epoch."""
    objective: float
    cutoff: float
    """Objective that the trial would have needed there to go on."""

    @property
    def shortfall(self) -> float:
        """Amount by which its objective was below the cutoff."""
        return self.cutoff - self.objective


class EarlyStopping(NamedTuple):
    """What early stopping did in one block."""

    rungs: list[int]
    """Every epoch at which some trial is judged, ascending."""
    stops: list[Stop]
    """In the trials' order."""
    epochs_saved: int
    """Epochs that the stopped trials would have trained at the most."""
    epochs_trained: int
    """Of all trials that ended."""
    seconds_saved: float
    """Training time of the saved epochs, each trial at its own pace."""


def summarise_stops(
    records: Sequence[TrialRecord], asha: AshaConfig | None, epochs: Mapping[str, int]
) -> EarlyStopping:
    """The ladder of one group of trials, which are judged only against each other.

    Args:
        epochs: the most epochs of each trial, by trial_id.
    """
    order = sorted(records, key=lambda record: record.index)
    objectives = [objectives_at_rungs(record, asha, epochs[record.trial_id]) for record in order]
    stops, saved, seconds = [], 0, 0.0
    for place, record in enumerate(order):
        if asha is None or not record.reason.startswith(STOPPED_AT):
            continue
        rung = int(record.reason.removeprefix(STOPPED_AT))
        needed = cutoff(objectives[:place], rung, asha.reduction_factor)
        if needed is not None:
            stops.append(Stop(record.trial_id, rung, objectives[place][rung], needed))
        left = epochs[record.trial_id] - rung
        saved, seconds = saved + left, seconds + record.seconds / record.epochs * left
    milestones = sorted({r for record in order for r in rungs(asha, epochs[record.trial_id])})
    return EarlyStopping(milestones, stops, saved, sum(r.epochs for r in order if r.finished), seconds)
