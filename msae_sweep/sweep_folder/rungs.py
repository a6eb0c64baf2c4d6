"""Early stopping: the rungs at which trials are judged, their cutoffs, and the training that stopping saved.

The scheduler and the report both take objectives from `objectives_at_rungs` and cutoffs from `cutoff`, so the report
states the cutoffs that the scheduler used.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msae_sweep.config import AshaConfig
from msae_sweep.sweep_folder.trial_record import TrialRecord

STOPPED_AT = "asha at epoch "
"""Beginning of a stopped trial's `reason`; the rung follows it."""


def rungs(asha: AshaConfig | None, epochs: int) -> list[int]:
    """Return the epochs below `epochs` at which trials are judged: grace_epochs × reduction_factor^i."""
    milestones = []
    milestone = asha.grace_epochs if asha else epochs
    while asha and milestone < epochs:
        milestones.append(milestone)
        milestone *= asha.reduction_factor
    return milestones


def objectives_at_rungs(record: TrialRecord, asha: AshaConfig | None, epochs: int) -> dict[int, float]:
    """Return the objective at each rung that a trial of at most `epochs` has reached.

    An epoch that is a rung of other trials only is left out: a trial of 9 epochs is not judged at epoch 9, and no trial
    is compared with it there.
    """
    return {r: record.points[r - 1]["objective"] for r in rungs(asha, epochs) if r <= record.epochs}


def cutoff(predecessors: Iterable[Mapping[int, float]], rung: int, reduction_factor: int) -> float | None:
    """Return the cutoff at `rung`: the objective that a trial needs there to continue.

    It is the lower bound of the top 1/reduction_factor of the trial's predecessors at this rung.

    Args:
        predecessors: objectives by rung, for every trial with a smaller number.

    Returns:
        The (1 − 1/reduction_factor) quantile of the predecessors' objectives at `rung`, or None if no predecessor was
        judged there; the trial then passes.
    """
    reached = [objectives[rung] for objectives in predecessors if rung in objectives]
    return float(np.quantile(reached, 1 - 1 / reduction_factor)) if reached else None


class Stop(NamedTuple):
    """Trial that was stopped at a rung."""

    trial_id: str
    rung: int
    """Epoch at which the trial was stopped."""
    objective: float
    cutoff: float
    """Objective that the trial would have needed at this rung to continue."""

    @property
    def shortfall(self) -> float:
        """Amount by which the objective was below the cutoff."""
        return self.cutoff - self.objective


class EarlyStopping(NamedTuple):
    """Effect of early stopping on one group of trials that are judged against each other."""

    rungs: list[int]
    """Every epoch at which some trial is judged, ascending."""
    stops: list[Stop]
    """Stopped trials, in the order of trial numbers."""
    epochs_saved: int
    """Maximum number of further epochs that the stopped trials would have trained."""
    epochs_trained: int
    """Number of epochs that were trained by all trials that have ended."""
    seconds_saved: float
    """Estimated training time of the saved epochs in seconds, from each trial's own mean time per epoch."""


def summarise_stops(
    records: Sequence[TrialRecord], asha: AshaConfig | None, epochs: Mapping[str, int]
) -> EarlyStopping:
    """Summarise early stopping in one group of trials, which are judged only against each other.

    Args:
        epochs: maximum number of epochs of each trial, by trial_id.
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
