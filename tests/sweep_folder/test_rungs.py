"""Tests that early stopping has the same cutoffs and verdicts when a sweep is summarised as while it ran."""

import pytest

from msae_sweep.config import AshaConfig
from msae_sweep.sweep_folder.rungs import cutoff, objectives_at_rungs, rungs, summarise_stops
from msae_sweep.sweep_folder.trial_record import TrialRecord

ASHA = AshaConfig(grace_epochs=1, reduction_factor=2)


def trial(index: int, *objectives: float, reason: str = "epochs") -> TrialRecord:
    status = "stopped_early" if reason.startswith("asha") else "completed"
    points = [{"epoch": i, "objective": o} for i, o in enumerate(objectives, 1)]
    return TrialRecord(f"t{index}", 5, index, {}, 0, status, reason, points, seconds=3.0 * len(points))


def test_rungs_lie_below_the_last_epoch():
    assert rungs(AshaConfig(grace_epochs=3, reduction_factor=3), 30) == [3, 9, 27]
    assert rungs(AshaConfig(grace_epochs=3, reduction_factor=3), 27) == [3, 9]
    assert rungs(None, 30) == []


def test_a_stop_names_its_cutoff_and_the_shortfall():
    trials = [trial(0, 0.5, 0.6, 0.7), trial(1, 0.7, 0.8, 0.9), trial(2, 0.55, reason="asha at epoch 1")]
    (stop,) = summarise_stops(trials, ASHA, dict.fromkeys(("t0", "t1", "t2"), 3)).stops
    assert (stop.trial_id, stop.rung, stop.objective) == ("t2", 1, 0.55)
    assert stop.cutoff == pytest.approx(0.6)  # the median of 0.5 and 0.7
    assert stop.shortfall == pytest.approx(0.05)


def test_only_predecessors_set_the_cutoff_in_whatever_order_they_are_given():
    trials = [trial(2, 0.9, 0.9, 0.9), trial(1, 0.4, reason="asha at epoch 1"), trial(0, 0.5, 0.6, 0.7)]
    (stop,) = summarise_stops(trials, ASHA, dict.fromkeys(("t0", "t1", "t2"), 3)).stops
    assert stop.cutoff == 0.5


def test_what_was_saved_is_counted_at_each_trials_own_pace():
    trials = [trial(0, 0.5, 0.6, 0.7), trial(1, 0.4, reason="asha at epoch 1")]
    ladder = summarise_stops(trials, ASHA, {"t0": 3, "t1": 3})
    assert (ladder.rungs, ladder.epochs_saved, ladder.epochs_trained) == ([1, 2], 2, 4)
    assert ladder.seconds_saved == 6.0


def test_a_trial_that_patience_ended_is_not_counted_as_stopped():
    trials = [trial(0, 0.5, 0.6, 0.7), trial(1, 0.4, reason="patience")]
    assert summarise_stops(trials, ASHA, {"t0": 3, "t1": 3}).stops == []


def test_an_epoch_that_is_no_rung_of_a_shorter_trial_sets_no_cutoff():
    # t0 trains at most 2 epochs, so epoch 2 is its end and no rung; t1 and t2 are judged there.
    trials = [trial(0, 0.1, 0.9), trial(1, 0.2, 0.5, 0.6), trial(2, 0.3, 0.4, reason="asha at epoch 2")]
    ladder = summarise_stops(trials, ASHA, {"t0": 2, "t1": 3, "t2": 3})
    assert [(stop.trial_id, stop.rung, stop.cutoff) for stop in ladder.stops] == [("t2", 2, 0.5)]


def test_only_rungs_of_a_trials_own_length_count():
    assert objectives_at_rungs(trial(0, 0.1, 0.9), ASHA, epochs=2) == {1: 0.1}
    assert objectives_at_rungs(trial(0, 0.1, 0.9), ASHA, epochs=3) == {1: 0.1, 2: 0.9}
    assert objectives_at_rungs(trial(0, 0.1, 0.9), None, epochs=3) == {}


def test_without_a_predecessor_at_the_rung_there_is_no_cutoff():
    assert cutoff([], 1, 3) is None
    assert cutoff([{1: 0.5}], 3, 3) is None
    assert cutoff([{1: 0.5}, {1: 0.7}], 1, 2) == pytest.approx(0.6)
