"""Estimates of how much longer a sweep takes, and how many rows a second it trains.

The work that is left is counted in expected epochs: early stopping ends most trials at their first rungs. Without
knowledge of scores, the i-th of several trials passes a rung with the probability that it ranks above the cutoff of its
predecessors there; the more pass or fail than that, the more the estimate follows them. Work is divided by the speed
at which all trials together have trained since the first of them began, so starting Ray, workers and data counts for
nothing, and trials that run side by side count as such.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from msae_sweep.config import AshaConfig, SweepConfig
from msae_sweep.sweep_folder.rungs import objectives_at_rungs, rungs
from msae_sweep.sweep_folder.trial_record import TrialRecord

PRIOR_VERDICTS = 6.0
"""Verdicts at a rung that count as much as what is expected of early stopping without knowing any; chosen by hand."""
PRIOR_SECONDS, PRIOR_BUSY = 20.0, 0.85
"""The speed begins as that of the trials that run, each training rows for this share of the time, as if it had been
measured for so many seconds; chosen by hand."""
WINDOW_SECONDS = 60.0
"""Rows a second are those of so long ago until now."""


class Length(NamedTuple):
    """Facts on a trial that the estimate needs besides its record."""

    group: str
    """Trials that early stopping compares have one group."""
    epochs: int
    """Epochs that it trains at the most."""
    shape: Any
    """Trials of one shape take equally long for an epoch."""


class Work(NamedTuple):
    """Work that is left of one trial, in epochs or in seconds."""

    expected: float
    most: float
    """If it passes every rung."""
    probability: float
    """Probability that the trial passes every rung."""

    def times(self, factor: float) -> "Work":
        """In another unit."""
        return Work(self.expected * factor, self.most * factor, self.probability)


def _tail(work: Sequence[Work], n_at_once: float) -> float:
    """Seconds at the end in which not every worker has a trial, as one of the last trials trains to its end.

    With k workers a list of jobs takes at most its work / k + (1 − 1/k) × its longest job (Graham 1966); half
    of the latter is expected.
    """
    last = work[-max(1, round(n_at_once)) :]
    none = math.prod(1 - one.probability for one in last)
    return 0.5 * (1 - 1 / n_at_once) * (1 - none) * max((one.most for one in last), default=0.0)


def pass_probability(n_before: float, reduction_factor: int) -> float:
    """Probability that a trial passes a rung at which `n_before` predecessors were judged, if any order is as likely.

    The cutoff is the quantile 1 − 1/f of n values, at place h = (n − 1)(1 − 1/f) from below, and a further value is as
    likely to fall between any two of them: (n − h) / (n + 1). It falls from 1 for the first trial towards 1/f.
    """
    if n_before < 1:
        return 1 - n_before / 2  # n = 1 gives 1/2
    return (1 + (n_before - 1) / reduction_factor) / (n_before + 1)


class TimeLeft:
    """Learns from the epochs that trials report; all methods belong to one thread or under one lock."""

    def __init__(self, config: SweepConfig, n_trials: int, clock: Callable[[], float]) -> None:
        """`n_trials`: of the whole sweep; those without a record are still to be proposed."""
        self._config, self._n_trials, self._clock = config, n_trials, clock
        self._lengths: dict[str, Length] = {}
        self._seen: dict[str, int] = {}
        self._cost: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """By shape, epochs and the seconds that training them took."""
        self._started: float | None = None
        self._heard = 0.0
        self._worked = 0.0
        """Seconds of training since the start, of all trials together."""
        self._rows: deque[tuple[float, float]] = deque()

    def take(self, records: Iterable[TrialRecord]) -> None:
        """Know records of an earlier run: their epochs tell how long one takes, and do not count into the speed."""
        for record in records:
            self._learn(record)
        self._started, self._worked = None, 0.0
        self._rows.clear()

    def hear(self, record: TrialRecord) -> None:
        """Count the epochs of a record that are new."""
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
        """Training rows a second of all trials together; None before it can be told."""
        if len(self._rows) < 2 or self._rows[-1][0] <= self._rows[0][0]:
            return None
        return sum(rows for _, rows in list(self._rows)[1:]) / (self._rows[-1][0] - self._rows[0][0])

    def seconds(self, records: Sequence[TrialRecord]) -> float | None:
        """Seconds that the rest of the sweep is expected to take; None before the first epoch of this run."""
        if self._started is None or self._heard <= self._started:
            return None
        work = self._work_left(records)
        # Few reports tell little of the speed, while it is known how many trials train side by side.
        n_training = sum(record.status == "running" and not self.is_waiting(record, records) for record in records)
        expected = max(1, n_training) * PRIOR_BUSY
        speed = (self._worked + PRIOR_SECONDS * expected) / (self._heard - self._started + PRIOR_SECONDS)
        whole = sum(one.expected for one in work) / speed
        left = max(whole + _tail(work, max(1.0, speed)), max((one.expected for one in work), default=0.0))
        return max(0.0, left - (self._clock() - self._heard))

    def is_waiting(self, record: TrialRecord, records: Iterable[TrialRecord]) -> bool:
        """Whether a trial stands at a rung and cannot be judged, as a predecessor has not come there."""
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
        """Epochs that a trial trains at the most."""
        return self._length(record).epochs

    def _learn(self, record: TrialRecord) -> tuple[float, float]:
        """Seconds and rows of a record's epochs that were not known."""
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
        """Seconds of one epoch: of trials of that shape, else of all."""
        known = self._cost.get(shape)
        epochs, seconds = known if known else map(sum, zip(*self._cost.values(), strict=True))
        return seconds / epochs

    def _work_left(self, records: Sequence[TrialRecord]) -> list[Work]:
        """Work of every trial that has not ended, in the order of their numbers."""
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
        """Share of their epochs that trials train which are not stopped: patience ends some sooner."""
        whole = [record for record in records if record.status == "completed"]
        most = sum(self._length(record).epochs for record in whole)
        return sum(record.epochs for record in whole) / most if most else 1.0


class _Odds:
    """How likely trials are to pass each rung, corrected by how many did."""

    def __init__(self, asha: AshaConfig | None, share: float) -> None:
        self._asha, self._share = asha, share
        self._expected: dict[int, float] = defaultdict(lambda: PRIOR_VERDICTS / 2)
        self._passed: dict[int, float] = defaultdict(lambda: PRIOR_VERDICTS / 2)

    def epochs_left(self, record: TrialRecord, most: int, reached: dict[int, float], *, is_judged: bool) -> Work:
        """Expected epochs of a trial that are still to come; its predecessors have been asked before.

        Args:
            reached: predecessors at each rung, expected ones included; the trial is added.
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
