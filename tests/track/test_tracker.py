"""Tests that everything a sweep reports to its tracker is in MLflow (SQLite), completely and exactly once."""

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
from small_sweep import (
    CONFIG_YAML,
    STATUSES,
    Store,
    assert_whole,
    best,
    manifest,
    params,
    point,
    send,
    start,
    tell,
    tell_end,
    tell_start,
    tell_trial,
    tracking,
)

from msae_sweep.errors import ConfigError, SweepError
from msae_sweep.track import journal, logged_models, sender
from msae_sweep.track.tracker import Tracker, sync


@pytest.fixture(scope="module")
def sent(empty_database, tmp_path_factory):
    """Tracking store of a sweep that was reported and sent in one go."""
    folder = tmp_path_factory.mktemp("sent")
    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    report = send(folder / "sweep", uri)
    assert (report.pending, report.refused, report.reason) == (0, 0, "")
    return Store(uri)


def test_every_trial_is_one_nested_run_with_every_epoch_once(sent):
    assert_whole(sent)
    assert sent.sweep.info.run_name == "small"


@pytest.mark.parametrize("trial_id", STATUSES)
def test_status_and_reason_of_each_trial(sent, trial_id):
    run = sent.trial(trial_id)
    ended_well = STATUSES[trial_id] in ("completed", "stopped_early")
    assert run.info.status == ("FINISHED" if ended_well else "FAILED")
    assert run.data.tags["reason"] == f"because {STATUSES[trial_id]}"


def test_a_trial_has_all_its_params_defaults_too(sent):
    logged = sent.trial("block5-001").data.params
    assert logged == {key: str(value) for key, value in params(5).items()}
    assert logged["k_levels"] == "[16, 32, 64, 128]"


def test_the_series_is_left_as_it_was_and_the_best_epoch_stands_beside_it(sent):
    metrics = sent.trial("block5-000").data.metrics
    assert metrics["objective"] == pytest.approx(0.05)  # this is the last epoch's objective
    assert metrics["best_objective"] == pytest.approx(0.5)
    assert metrics["best_epoch"] == 5
    assert "best_learning_rate" not in metrics
    assert "time_ms" not in metrics


def test_the_sweeps_run_says_where_it_came_from(sent):
    data = sent.sweep.data
    assert data.params["training.epochs"] == "6"
    assert data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert data.tags["config_digest"] == "123456789abc"
    assert {"torch", "mlflow"} <= data.tags.keys()
    assert data.metrics["block5/r2_k4"] == 0.51
    assert sent.trial("block5-000").data.tags["mlflow.source.git.commit"] == "c0ffee"


def test_artifacts_of_sweep_and_trial(sent, tmp_path):
    assert sent.artifacts(sent.sweep) == {"sweep.yaml", "summary.json", "figures"}
    assert sent.artifacts(sent.sweep, "figures") == {"figures/training.png"}
    assert sent.artifacts(sent.trial("block5-000")) == {"history.json", "msae_block5.pt"}
    path = sent.client.download_artifacts(sent.sweep.info.run_id, "sweep.yaml", str(tmp_path))
    assert Path(path).read_text() == CONFIG_YAML


def test_the_data_manifest_is_the_dataset_of_the_sweep_and_of_each_trial(sent):
    datasets = [given.dataset for given in sent.sweep.inputs.dataset_inputs]
    assert {d.name: d.digest for d in datasets} == {"block5": manifest(5)["key"], "block20": manifest(20)["key"]}
    (dataset,) = [given.dataset for given in sent.trial("block20-000").inputs.dataset_inputs]
    assert dataset.name == "block20"
    assert json.loads(dataset.profile)["num_rows"] == 1000
    assert json.loads(dataset.source) == {"uri": "/data/block20"}


def test_artifacts_lie_beside_the_database(sent):
    assert sent.experiment.artifact_location.endswith("/mlartifacts")


def test_sending_again_changes_nothing(uri, tmp_path):
    """The cursor is lost, too, so that every event is sent a second time."""
    send(tmp_path / "sweep", uri)
    (tmp_path / "sweep" / "journal" / "cursor.json").unlink()
    report = sync(tmp_path / "sweep", uri, tracking(uri))
    assert (report.pending, report.refused) == (0, 0)
    store = Store(uri)
    assert_whole(store)
    assert len(store.client.search_model_versions("name = 'msae-block5'")) == 1
    assert len(store.client.get_metric_history(store.trial("block5-000").info.run_id, "best_objective")) == 1
    assert len(store.trial("block5-000").inputs.dataset_inputs) == 1


def test_a_resumed_sweep_goes_on_in_the_same_runs_and_repeats_no_epoch(uri, tmp_path):
    folder = tmp_path / "sweep"
    first = start(folder, uri)
    tell_start(first)
    tell_trial(first, folder, "block5-001")
    first.trial_started(trial_id="block5-000", block=5, params=params(5))
    first.metrics(trial_id="block5-000", points=[point("block5-000", epoch) for epoch in (1, 2, 3)])
    assert first.close(timeout_seconds=60).pending == 0
    before = Store(uri)
    assert before.trial("block5-000").info.status == before.sweep.info.status == "RUNNING"

    second = start(folder, uri)
    tell_start(second)
    # The trial is back at its checkpoint after epoch 1, so epochs 2 and 3 are reported again, at another time.
    tell_trial(second, folder, "block5-000", first_epoch=2, clock_ms=60_000)
    tell_trial(second, folder, "block20-000")
    tell_trial(second, folder, "block20-001")
    tell_end(second, folder)
    assert second.close(timeout_seconds=60).pending == 0
    after = Store(uri)
    assert_whole(after)
    assert after.sweep.info.run_id == before.sweep.info.run_id
    assert after.trial("block5-000").info.run_id == before.trial("block5-000").info.run_id


def test_a_failed_trial_that_is_tried_again_keeps_its_run(uri, tmp_path):
    folder = tmp_path / "sweep"
    tracker = start(folder, uri)
    tell_start(tracker)
    tracker.trial_started(trial_id="block5-001", block=5, params=params(5))
    tracker.metrics(trial_id="block5-001", points=[point("block5-001", 1)])
    tracker.trial_ended(trial_id="block5-001", status="failed", reason="lost", best={}, model_file=None)
    tell_trial(tracker, folder, "block5-001", clock_ms=1000)
    assert tracker.close(timeout_seconds=60).refused == 0
    store = Store(uri)
    assert store.epochs("block5-001") == [1, 2, 3]
    assert store.trial("block5-001").info.status == "FINISHED"
    assert store.trial("block5-001").data.tags["status"] == "stopped_early"


def test_settings_changed_on_resume_become_a_tag_and_the_params_stay(uri, tmp_path):
    for workers in (1, 2):
        tracker = start(tmp_path / "sweep", uri)
        tell_start(tracker, **{"resources.cpu": workers})
        assert tracker.close(timeout_seconds=60).refused == 0
    data = Store(uri).sweep.data
    assert data.params["resources.cpu"] == "1"
    assert json.loads(data.tags["changed_on_resume"]) == {"resources.cpu": "2"}


def test_long_values_are_cut_without_a_word_of_mlflows_and_do_not_count_as_changed(uri, tmp_path):
    class Heard(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said: list[str] = []
    mlflows, handler = logging.getLogger("mlflow"), Heard()
    mlflows.addHandler(handler)
    try:
        for _ in range(2):
            tracker = start(tmp_path / "sweep", uri)
            tell_start(tracker, **{"space.aux_k": "x" * 7000})
            assert tracker.close(timeout_seconds=60).refused == 0
    finally:
        mlflows.removeHandler(handler)
    data = Store(uri).sweep.data
    assert data.params["space.aux_k"] == "x" * 6000
    assert "changed_on_resume" not in data.tags
    assert not [line for line in said if "truncated" in line]


def test_an_interrupted_sweep_is_killed_until_it_is_resumed(uri, tmp_path):
    tracker = start(tmp_path / "sweep", uri)
    tell_start(tracker)
    tracker.sweep_ended(status="interrupted", artifacts=[], champions={}, metrics={})
    tracker.close(timeout_seconds=60)
    assert Store(uri).sweep.info.status == "KILLED"
    tracker = start(tmp_path / "sweep", uri)
    tell_start(tracker)
    tracker.close(timeout_seconds=60)
    assert Store(uri).sweep.info.status == "RUNNING"


def test_numbers_that_are_none_are_not_logged(uri, tmp_path):
    tracker = start(tmp_path / "sweep", uri)
    tell_start(tracker)
    tracker.trial_started(trial_id="block5-000", block=5, params=params(5))
    odd = {"r2_k4": float("nan"), "val_loss": float("inf"), "note": "text", "nothing": None}
    tracker.metrics(trial_id="block5-000", points=[point("block5-000", 1) | odd])
    assert tracker.close(timeout_seconds=60).refused == 0
    metrics = Store(uri).trial("block5-000").data.metrics
    assert metrics["objective"] == pytest.approx(0.1)
    assert not metrics.keys() & odd.keys()


def test_what_mlflow_refuses_is_written_down_and_hides_nothing_else(uri, tmp_path, caplog):
    folder = tmp_path / "sweep"
    tracker = start(folder, uri)
    tell_start(tracker, **{"bad?key": 1})
    tracker.trial_started(trial_id="block5-000", block=5, params=params(5))
    tracker.metrics(trial_id="block5-000", points=[point("block5-000", 1) | {"bad?metric": 1.0}])
    tracker.metrics(trial_id="nobody", points=[{"epoch": 1, "time_ms": 1, "objective": 0.0}])
    tracker.metrics(trial_id="block5-000", points=[point("block5-000", 2)])
    lost = folder / "trials" / "block5-000" / "model.pt"
    tracker.trial_ended(
        trial_id="block5-000", status="completed", reason="epochs", best=best("block5-000"), model_file=lost
    )
    with caplog.at_level(logging.WARNING):
        report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 4)
    assert "refused.jsonl" in str(report)
    lines = [json.loads(line) for line in (folder / "journal" / "refused.jsonl").read_text().splitlines()]
    assert [(line["event"], line["part"]) for line in lines] == [
        ("sweep_started", "params bad?key"),
        ("metrics", "all"),
        ("metrics", "metrics bad?metric"),
        ("trial_ended", "model"),
    ]
    assert "no such model file" in lines[-1]["reason"]
    store = Store(uri)
    assert store.sweep.data.params["training.epochs"] == "6"
    assert store.epochs("block5-000") == [1, 2]
    assert store.trial("block5-000").data.tags["status"] == "completed"


def test_a_replaced_database_gets_the_whole_sweep(uri, tmp_path, empty_database):
    folder = tmp_path / "sweep"
    send(folder, uri)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    assert sync(folder, uri, tracking(uri)).pending == 0
    assert_whole(Store(uri))


def test_another_store_gets_the_whole_sweep_and_the_first_keeps_it(uri, tmp_path, empty_database):
    folder = tmp_path / "sweep"
    send(folder, uri)
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert sync(folder, other, tracking(other)).pending == 0
    assert_whole(Store(other))
    assert sync(folder, uri, tracking(uri)).pending == 0
    assert_whole(Store(uri))


def test_a_sweep_folder_that_was_moved_can_still_be_sent(uri, tmp_path, empty_database):
    send(tmp_path / "sweep", uri)
    shutil.move(tmp_path / "sweep", tmp_path / "archive")
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"
    report = sync(tmp_path / "archive", other, tracking(other))
    assert (report.pending, report.refused) == (0, 0)
    assert_whole(Store(other))


def test_twins_of_a_run_are_deleted_and_the_filled_one_stays(uri, tmp_path):
    """If the server creates a run after the sender has given up the request, a second, empty run is left."""
    folder = tmp_path / "sweep"
    tracker = start(folder, uri)
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-000")
    tracker.close(timeout_seconds=60)
    store = Store(uri)
    for run in (store.sweep, store.trial("block5-000")):
        tags = {key: value for key, value in run.data.tags.items() if key.startswith("msae_sweep.")}
        store.client.create_run(store.experiment.experiment_id, tags=tags)
    tracker = start(folder, uri)
    for trial_id in ("block5-001", "block20-000", "block20-001"):
        tell_trial(tracker, folder, trial_id)
    tell_end(tracker, folder)
    tracker.close(timeout_seconds=60)
    assert_whole(Store(uri))


def test_two_sweeps_share_an_experiment_without_touching_each_other(uri, tmp_path):
    send(tmp_path / "a", uri)
    tracker = start(tmp_path / "b", uri, sweep_id="other")
    tell(tracker, tmp_path / "b")
    tracker.close(timeout_seconds=60)
    assert_whole(Store(uri))
    assert_whole(Store(uri, "other"))


def test_a_running_sweep_cannot_be_started_again(uri, tmp_path):
    tracker = start(tmp_path / "sweep", uri)
    tell_start(tracker)
    with pytest.raises(SweepError, match="run by another process"):
        start(tmp_path / "sweep", uri)
    tracker.close(timeout_seconds=60)


def test_a_sync_beside_a_sender_leaves_the_work_to_it(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "LAST_TRIES", 1)
    tracker = start(tmp_path / "sweep", "http://127.0.0.1:9")
    tell_start(tracker)
    tracker.close(timeout_seconds=60)
    with journal.lock(tmp_path / "sweep"):
        report = sync(tmp_path / "sweep", uri, tracking(uri))
    assert report.pending == 1
    assert "is sending this sweep" in report.reason


def test_nothing_is_given_up_for_what_fails_while_python_shuts_down(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "LAST_TRIES", 1)
    monkeypatch.setattr(sender, "_is_exiting", lambda: True)
    tracker = start(tmp_path / "sweep", uri)
    tell_start(tracker, **{"bad?key": 1})
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (1, 0)


def test_a_folder_as_tracking_uri_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="file store"):
        Tracker.start(tmp_path, tracking("./mlruns"), sweep_id="s")
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_told_nothing_has_nothing_to_sync(tmp_path):
    assert sync(tmp_path, f"sqlite:///{tmp_path}/mlflow.db").pending == 0


def test_progress_is_told_step_by_step(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "LAST_TRIES", 1)
    folder = tmp_path / "sweep"
    tracker = start(folder, "http://127.0.0.1:9")
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-001")
    assert tracker.close(timeout_seconds=60).pending == 6
    seen = []
    sync(folder, uri, tracking(uri), on_progress=seen.append)
    assert [status.pending for status in seen] == sorted((status.pending for status in seen), reverse=True)
    assert seen[-1].pending == 0


def test_epochs_of_all_trials_come_in_any_order(uri, tmp_path):
    """Reports of concurrent trials are interleaved in the journal, and are sent together by trial."""
    tracker = start(tmp_path / "sweep", uri)
    tell_start(tracker)
    trials = ("block5-000", "block5-001")
    for trial_id in trials:
        tracker.trial_started(trial_id=trial_id, block=5, params=params(5))
    for epoch in (1, 2, 3):
        for trial_id in trials:
            tracker.metrics(trial_id=trial_id, points=[point(trial_id, epoch)])
    tracker.close(timeout_seconds=60)
    assert [Store(uri).epochs(trial_id) for trial_id in trials] == [[1, 2, 3]] * 2


def test_a_sender_that_has_nothing_to_send_makes_itself_ready_for_models(uri, tmp_path, monkeypatch):
    ready = threading.Event()
    monkeypatch.setattr(logged_models, "export_ahead", ready.set)
    tracker = start(tmp_path / "sweep", uri)
    assert ready.wait(30)
    tell(tracker, tmp_path / "sweep")
    assert tracker.close(timeout_seconds=60).pending == 0


def test_a_sync_to_which_nothing_is_to_come_does_not(uri, tmp_path, monkeypatch):
    send(tmp_path / "sweep", uri)
    monkeypatch.setattr(logged_models, "export_ahead", lambda: pytest.fail("it took 3 s for that"))
    assert sync(tmp_path / "sweep", uri, tracking(uri)).reason == ""
