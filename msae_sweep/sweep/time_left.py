"""Estimates how much longer a sweep takes, and how many rows per second it trains.

Remaining work is counted in expected epochs, because early stopping ends most trials at their first rungs. Without any
known scores, the i-th of several trials passes a rung with the probability that it ranks above the cutoff of its
predecessors there. As more verdicts are known, the estimate follows the share of trials that did pass. The work is
divided by the speed at which all trials together have trained since the first of them began. The time to start Ray and
workers and to prepare data is therefore left out, and trials that run in parallel are accounted for.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from msae_sweep.config import AshaConfig, SweepConfig
from msae_sweep.sweep_folder.rungs import objectives_at_rungs, rungs
from msae_sweep.sweep_folder.trial_record import TrialRecord

PRIOR_VERDICTS = 6.0
"""Weight of the prior pass probability at a rung, as a number of verdicts; chosen by hand."""
PRIOR_SECONDS, PRIOR_BUSY = 20.0, 0.85
"""Prior of the speed: every running trial trains for the share `PRIOR_BUSY` of the time.

The prior counts like a measurement over `PRIOR_SECONDS`. Both values were chosen by hand.
"""
WINDOW_SECONDS = 60.0
"""Length of the time window, up to now, over which rows per second are measured, in seconds."""


class Length(NamedTuple):
    """Properties of a trial that the estimate needs besides its record."""

    group: str
    """Name of the group of trials that early stopping compares with each other."""
    epochs: int
    """Maximum number of epochs that the trial trains."""
    shape: Any
    """Key of trials whose epochs are taken to last equally long."""


class Work(NamedTuple):
    """Remaining work of one trial, in epochs or in seconds."""

    expected: float
    most: float
    """Remaining work if the trial passes every rung."""
    probability: float
    """Probability that the trial passes every rung."""

    def times(self, factor: float) -> "Work":
        """Return the work in another unit; `factor` converts the old unit into it."""
        return Work(self.expected * factor, self.most * factor, self.probability)


def _tail(work: Sequence[Work], n_at_once: float) -> float:
    """Return the expected extra seconds at the end, when some workers have no trial while a last one is completed.

    With k workers, a list of jobs takes at most its work / k + (1 − 1/k) × its longest job (Graham 1966). Half of the
    second term is expected.
    """
    last = work[-max(1, round(n_at_once)) :]
    none = math.prod(1 - one.probability for one in last)
    return 0.5 * (1 - 1 / n_at_once) * (1 - none) * max((one.most for one in last), default=0.0)


def pass_probability(n_before: float, reduction_factor: int) -> float:
    """Return the probability that a trial passes a rung at which `n_before` predecessors were judged.

    All orders of the objectives are assumed to be equally likely. The cutoff is the quantile 1 − 1/f of n values, at
    position h = (n − 1)(1 − 1/f) from below, and a further value is equally likely to fall into each of the
    n + 1 gaps: (n − h) / (n + 1). The probability falls from 1 for the first trial towards 1/f.
    """
    if n_before < 1:
        return 1 - n_before / 2  # n = 1 gives 1/2
    return (1 + (n_before - 1) / reduction_factor) / (n_before + 1)


class TimeLeft:
    """Estimator of speed and remaining time, from the epochs that trials report.

    All methods must be called from one thread or under one lock.
    """

    def __init__(self, config: SweepConfig, n_trials: int, clock: Callable[[], float]) -> None:
        """Create an estimator that has seen no records.

        Args:
            n_trials: number of trials of the whole sweep; those without a record are still to be proposed.
            clock: returns the current time in seconds.
        """
        self._config, self._n_trials, self._clock = config, n_trials, clock
        self._lengths: dict[str, Length] = {}
        self._seen: dict[str, int] = {}
        self._cost: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """Number of epochs trained and seconds that they took, by shape."""
        self._started: float | None = None
        self._heard = 0.0
        self._worked = 0.0
        """Seconds of training since the start, summed over all trials."""
        self._rows: deque[tuple[float, float]] = deque()

    def take(self, records: Iterable[TrialRecord]) -> None:
        """Add records of an earlier run: they show how long an epoch takes, but do not count towards the speed."""
        for record in records:
            self._learn(record)
        self._started, self._worked = None, 0.0
        self._rows.clear()

    def update(self, record: TrialRecord) -> None:
        """Add the new epochs of a record to the measured speed."""
        seconds, rows = self._learn(record)
        if not seconds:
            return
        now = self._clock()
        if self._started is None:
            self._started = now - seconds
        self._heard, self._worked = now, self._worked + seconds
        self._rows.append((now, rows))
        while len(self._rows) > 2 and self._rows[0][0] < now - WINDOW_SECONDS:
            self._rows.popleft()

    @property
    def rows_per_second(self) -> float | None:
        """Training rows per second of all trials together; None until two reports are known."""
        if len(self._rows) < 2 or self._rows[-1][0] <= self._rows[0][0]:
            return None
        return sum(rows for _, rows in list(self._rows)[1:]) / (self._rows[-1][0] - self._rows[0][0])

    def seconds(self, records: Sequence[TrialRecord]) -> float | None:
        """Return the seconds that the rest of the sweep is expected to take; None before this run's first epoch."""
        if self._started is None or self._heard <= self._started:
            return None
        work = self._work_left(records)
        # A few reports say little about the speed, while the number of trials that train in parallel is known.
        n_training = sum(record.status == "running" and not self.is_waiting(record, records) for record in records)
        expected = max(1, n_training) * PRIOR_BUSY
        speed = (self._worked + PRIOR_SECONDS * expected) / (self._heard - self._started + PRIOR_SECONDS)
        whole = sum(one.expected for one in work) / speed
        left = max(whole + _tail(work, max(1.0, speed)), max((one.expected for one in work), default=0.0))
        return max(0.0, left - (self._clock() - self._heard))

    def is_waiting(self, record: TrialRecord, records: Iterable[TrialRecord]) -> bool:
        """Return whether a trial waits at a rung for its verdict, as a predecessor has not reached that rung."""
        length = self._length(record)
        if record.epochs not in rungs(self._config.asha, length.epochs):
            return False
        return any(
            other.index < record.index
            and not other.finished
            and record.epochs not in self._at_rungs(other)
            and self._length(other).group == length.group
            for other in records
        )

    def epochs_of(self, record: TrialRecord) -> int:
        """Return the maximum number of epochs that a trial trains."""
        return self._length(record).epochs

    def _learn(self, record: TrialRecord) -> tuple[float, float]:
        """Add the new epochs of a record; return their training seconds and rows."""
        before = self._seen.get(record.trial_id, 0)
        points = record.points[before:]
        if not points:
            return 0.0, 0.0
        self._seen[record.trial_id] = before + len(points)
        rows_before = record.points[before - 1].get("samples_seen", 0.0) if before else 0.0
        rows = points[-1].get("samples_seen", 0.0) - rows_before
        rate = points[-1].get("samples_per_second", 0.0)
        seconds = rows / rate if rate > 0 and rows > 0 else float(len(points))
        cost = self._cost[self._length(record).shape]
        cost[0], cost[1] = cost[0] + len(points), cost[1] + seconds
        return seconds, rows

    def _length(self, record: TrialRecord) -> Length:
        known = self._lengths.get(record.trial_id)
        if known is None:
            training = record.training(self._config.training)
            group = f"block{record.block} k={training.levels}"
            shape = record.block, training.expansion_factor, training.batch_size
            known = self._lengths[record.trial_id] = Length(group, training.epochs, shape)
        return known

    def _at_rungs(self, record: TrialRecord) -> dict[int, float]:
        return objectives_at_rungs(record, self._config.asha, self._length(record).epochs)

    def _epoch_seconds(self, shape: Any) -> float:
        """Return the mean seconds per epoch of trials of that shape, or of all trials if the shape has none yet."""
        known = self._cost.get(shape)
        epochs, seconds = known if known else map(sum, zip(*self._cost.values(), strict=True))
        return seconds / epochs

    def _work_left(self, records: Sequence[TrialRecord]) -> list[Work]:
        """Return the remaining work of every trial that has not ended, in seconds and in the order of trial numbers."""
        groups: dict[str, list[TrialRecord]] = defaultdict(list)
        for record in sorted(records, key=lambda record: record.index):
            groups[self._length(record).group].append(record)
        odds = _Odds(self._config.asha, self._share_of_last_epoch(records))
        work: list[tuple[int, Work]] = []
        for members in groups.values():
            reached: dict[int, float] = defaultdict(float)
            for record in members:
                length = self._length(record)
                is_judged = record.finished or not self.is_waiting(record, members)
                left = odds.epochs_left(record, length.epochs, reached, is_judged=is_judged)
                if not record.finished:
                    work.append((record.index, left.times(self._epoch_seconds(length.shape))))
        if n_unknown := self._n_trials - len(records):
            ended = [record.epochs for record in records if record.finished]
            mean = sum(ended) / len(ended) if ended else max(self._length(r).epochs for r in records)
            work += [(self._n_trials, Work(mean, mean, 0.0).times(self._epoch_seconds(None)))] * n_unknown
        return [one for _, one in sorted(work, key=lambda item: item[0])]

    def _share_of_last_epoch(self, records: Iterable[TrialRecord]) -> float:
        """Return the share of their maximum epochs that completed trials trained; patience ends some of them sooner."""
        whole = [record for record in records if record.status == "completed"]
        most = sum(self._length(record).epochs for record in whole)
        return sum(record.epochs for record in whole) / most if most else 1.0


class _Odds:
    """Probabilities that trials pass each rung, corrected by how many trials did pass."""

    def __init__(self, asha: AshaConfig | None, share: float) -> None:
        self._asha, self._share = asha, share
        self._expected: dict[int, float] = defaultdict(lambda: PRIOR_VERDICTS / 2)
        self._passed: dict[int, float] = defaultdict(lambda: PRIOR_VERDICTS / 2)

    def epochs_left(self, record: TrialRecord, most: int, reached: dict[int, float], *, is_judged: bool) -> Work:
        """Return the remaining work of a trial in epochs; must be called for its predecessors first.

        Args:
            most: maximum number of epochs that the trial trains.
            reached: number of predecessors at each rung, including expected ones; the trial is added to it.
            is_judged: False if the trial waits for the verdict at its rung.
        """
        probability, left, at = 1.0, 0.0, record.epochs
        for rung in rungs(self._asha, most):
            assert self._asha is not None
            chance = pass_probability(reached[rung], self._asha.reduction_factor)
            if rung <= record.epochs:
                reached[rung] += 1
                if rung < record.epochs or (is_judged and not record.finished) or record.status == "completed":
                    self._expected[rung] += chance
                    self._passed[rung] += 1
                elif record.status == "stopped_early":
                    self._expected[rung] += chance
                else:
                    probability *= self._corrected(chance, rung)
                continue
            if record.finished:
                break
            left += probability * (rung - at)
            at = rung
            reached[rung] += probability
            probability *= self._corrected(chance, rung)
        end = max(float(at), self._share * most)
        return Work(left + probability * (end - at), end - record.epochs, probability)

    def _corrected(self, chance: float, rung: int) -> float:
        return min(1.0, chance * self._passed[rung] / self._expected[rung])
