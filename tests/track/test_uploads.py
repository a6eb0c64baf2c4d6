"""Tests that models are uploaded beside the events that follow them, and that no event counts as sent before it is."""

import threading

import pytest
from small_sweep import Store, assert_whole, start, tell, tell_end, tell_start, tell_trial

from msae_sweep.track import logged_models, sender
from msae_sweep.track.cursor import Cursor
from msae_sweep.track.journal import Entry
from msae_sweep.track.uploads import Uploads


def entry(seq: int) -> Entry:
    return Entry(seq, {"event": "trial_ended", "trial_id": f"block5-{seq:03d}"}, 100 * seq)


class Held:
    """Upload that runs until the test lets it end."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.may_end.wait(30)


def seqs(entries) -> list[int]:
    return [entry.seq for entry in entries]


def test_no_event_is_done_before_one_whose_upload_is_under_way():
    uploads, first = Uploads(2), Held()
    uploads.add(entry(1), None)
    uploads.add(entry(2), first)
    uploads.add(entry(3), lambda: None)
    uploads.add(entry(4), None)
    assert first.begun.wait(30)
    assert seqs(uploads.done(2)) == [1]
    assert uploads.concern({"block5-002"})
    assert not uploads.concern({"block5-009"})
    first.may_end.set()
    assert seqs(uploads.done(0)) == [2, 3, 4]
    assert not uploads.concern({"block5-002"})


def test_no_more_are_under_way_than_at_once():
    uploads, held = Uploads(2), [Held() for _ in range(3)]
    for seq, upload in enumerate(held):
        uploads.add(entry(seq), upload)
    assert held[1].begun.wait(30)
    assert not held[2].begun.wait(0.2)
    threading.Timer(0.2, held[0].may_end.set).start()
    assert seqs(uploads.done(2)) == [0]
    assert held[2].begun.wait(30)
    for upload in held:
        upload.may_end.set()
    assert seqs(uploads.done(0)) == [1, 2]


def test_one_at_once_is_done_where_it_is_added():
    uploads, where = Uploads(1), []
    uploads.add(entry(1), lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]
    assert seqs(uploads.done(1)) == [1]


def test_what_an_upload_fails_of_is_raised_and_the_rest_is_dropped_when_it_has_ended():
    def fails() -> None:
        raise ConnectionError("no answer")

    uploads, held, ended = Uploads(2), Held(), []
    uploads.add(entry(1), fails)
    uploads.add(entry(2), lambda: (held(), ended.append(2)))
    uploads.add(entry(3), lambda: ended.append(3))
    assert held.begun.wait(30)
    with pytest.raises(ConnectionError):
        list(uploads.done(2))
    threading.Timer(0.2, held.may_end.set).start()
    uploads.drop()
    assert 2 in ended
    assert seqs(uploads.done(0)) == []


@pytest.fixture
def four_at_once(monkeypatch) -> None:
    """Allow four uploads at a time, as for a server, although the store is a SQLite file."""
    monkeypatch.setattr(sender, "Uploads", lambda at_once: Uploads(4))


def test_events_do_not_wait_for_a_model_and_the_cursor_does(four_at_once, uri, tmp_path, monkeypatch):
    held, log_model = Held(), logged_models.log_model

    def slow(client, run, file, metrics, step):
        if not held.begun.is_set():
            held()
        log_model(client, run, file, metrics, step)

    monkeypatch.setattr(logged_models, "log_model", slow)
    folder = tmp_path / "sweep"
    tracker = start(folder, uri)
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-000")
    tell_trial(tracker, folder, "block20-001")
    assert held.begun.wait(60)
    for _ in range(600):
        found = Store(uri).client.search_runs(["1"], "tags.`msae_sweep.trial_id` = 'block20-001'")
        if found and found[0].info.status == "FAILED":
            break
        threading.Event().wait(0.1)
    else:
        pytest.fail("the next trial waits for the model of the one before")
    told = tracker.status.pending + tracker.status.sent
    assert Cursor.load(folder).seq < told
    held.may_end.set()
    tell_trial(tracker, folder, "block5-001")
    tell_trial(tracker, folder, "block20-000")
    tell_end(tracker, folder)
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 0)
    assert_whole(Store(uri))


def test_a_model_that_fails_while_others_get_through_is_sent_again_and_nothing_is_doubled(
    four_at_once, uri, tmp_path, monkeypatch
):
    log_model, failures = logged_models.log_model, []
    others = threading.Event()

    def failing(client, run, file, metrics, step):
        if not failures:
            failures.append(run.run_id)
            assert others.wait(60)
            raise ConnectionError("no answer")
        log_model(client, run, file, metrics, step)
        others.set()

    monkeypatch.setattr(logged_models, "log_model", failing)
    tracker = start(tmp_path / "sweep", uri)
    tell(tracker, tmp_path / "sweep")
    report = tracker.close(timeout_seconds=120)
    assert (report.pending, report.refused) == (0, 0), report
    assert len(failures) == 1
    assert_whole(Store(uri))
