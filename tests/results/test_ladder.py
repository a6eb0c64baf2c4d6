"""Early stopping seen afterwards: the same bars and verdicts as while the sweep ran."""

import pytest

from msae_sweep.config import AshaConfig
from msae_sweep.results.ladder import climb, rungs
from msae_sweep.results.record import TrialRecord

ASHA = AshaConfig(grace_epochs=1, reduction_factor=2)


def trial(index: int, *objectives: float, reason: str = "epochs") -> TrialRecord:
    status = "stopped_early" if reason.startswith("asha") else "completed"
    points = [{"epoch": i, "objective": o} for i, o in enumerate(objectives, 1)]
    return TrialRecord(f"t{index}", 5, index, {}, 0, status, reason, points, seconds=3.0 * len(points))


def test_rungs_lie_below_the_last_epoch():
    assert rungs(AshaConfig(grace_epochs=3, reduction_factor=3), 30) == [3, 9, 27]
    assert rungs(AshaConfig(grace_epochs=3, reduction_factor=3), 27) == [3, 9]
    assert rungs(None, 30) == []


def test_a_stop_names_its_bar_and_what_was_missing():
    trials = [trial(0, 0.5, 0.6, 0.7), trial(1, 0.7, 0.8, 0.9), trial(2, 0.55, reason="asha at epoch 1")]
    (stop,) = climb(trials, ASHA, dict.fromkeys(("t0", "t1", "t2"), 3)).stops
    assert (stop.trial_id, stop.rung, stop.objective) == ("t2", 1, 0.55)
    assert stop.bar == pytest.approx(0.6)  # the median of 0.5 and 0.7
    assert stop.missing == pytest.approx(0.05)


def test_only_predecessors_set_the_bar_in_whatever_order_they_are_given():
    trials = [trial(2, 0.9, 0.9, 0.9), trial(1, 0.4, reason="asha at epoch 1"), trial(0, 0.5, 0.6, 0.7)]
    (stop,) = climb(trials, ASHA, dict.fromkeys(("t0", "t1", "t2"), 3)).stops
    assert stop.bar == 0.5


def test_what_was_saved_is_counted_at_each_trials_own_pace():
    trials = [trial(0, 0.5, 0.6, 0.7), trial(1, 0.4, reason="asha at epoch 1")]
    ladder = climb(trials, ASHA, {"t0": 3, "t1": 3})
    assert (ladder.rungs, ladder.epochs_saved, ladder.epochs_trained) == ([1, 2], 2, 4)
    assert ladder.seconds_saved == 6.0


def test_a_trial_that_patience_ended_is_not_counted_as_stopped():
    trials = [trial(0, 0.5, 0.6, 0.7), trial(1, 0.4, reason="patience")]
    assert climb(trials, ASHA, {"t0": 3, "t1": 3}).stops == []
