"""Tests that a trial's record can be written and read back, with keys that another version of the package added."""

import json

import pytest

from msae_sweep.sweep_folder.trial_record import TrialRecord

RECORD = TrialRecord("block5-003", 5, 3, {"learning_rate": 1e-3}, 7, points=[{"epoch": 1, "objective": 0.5}])


def test_a_record_is_read_back_equal():
    assert TrialRecord.from_json(RECORD.to_json()) == RECORD
    assert "unknown" not in json.loads(RECORD.to_json())


def test_keys_that_another_version_wrote_are_kept():
    text = json.dumps({**json.loads(RECORD.to_json()), "selection": "batch_topk", "unknown": 1})
    again = TrialRecord.from_json(text)
    assert again.points == RECORD.points
    assert json.loads(again.to_json()) == json.loads(text)


@pytest.mark.parametrize("text", ["[]", "1", "{}", '{"trial_id": "a"}'])
def test_what_is_no_record_is_refused(text):
    with pytest.raises((ValueError, TypeError)):
        TrialRecord.from_json(text)
