"""Tests against a real MLflow server, over HTTP, with everything that can happen to a server or to a driver."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_sweep import (
    Store,
    assert_whole,
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

from msae_sweep.sae import model_file
from msae_sweep.track import sender as sender_module
from msae_sweep.track import tracker as tracker_module
from msae_sweep.track.tracker import sync

HERE = Path(__file__).parent


@pytest.fixture
def silent_uri():
    """URI of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept())

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def test_a_sweep_over_http_is_whole_and_its_model_loads(server, tmp_path, monkeypatch):
    import mlflow.pytorch

    report = send(tmp_path / "sweep", server.uri)
    assert (report.pending, report.refused) == (0, 0)
    store = Store(server.uri)
    assert_whole(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    ours = model_file.load(tmp_path / "sweep/trials/block5-000/model.pt").standardised()
    torch.testing.assert_close(mlflow.pytorch.load_model("models:/msae-block5@champion")(x), ours(x))


def test_a_server_that_goes_and_comes_back_misses_nothing_and_doubles_nothing(server, tmp_path):
    folder, sweep_id = tmp_path / "sweep", "comes-back"
    tracker = start(folder, server.uri, sweep_id=sweep_id)
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-000")
    wait_for(lambda: tracker.status.sent >= 4)
    server.kill()
    try:
        tell_trial(tracker, folder, "block5-001")
        wait_for(lambda: tracker.status.last_error)
        tell_trial(tracker, folder, "block20-000")
        assert tracker.status.pending
    finally:
        server.start()
    tell_trial(tracker, folder, "block20-001")
    tell_end(tracker, folder)
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 0)
    assert_whole(Store(server.uri, sweep_id))


def test_a_silent_server_stops_no_call_and_sync_sends_everything_later(silent_uri, uri, tmp_path):
    folder = tmp_path / "sweep"
    tracker = start(folder, silent_uri)
    tell(tracker, folder)  # this returns although the server answered nothing
    assert tracker.status.sent == 0
    report = tracker.close(timeout_seconds=0.1)
    assert report.pending == 21
    assert report.reason
    # A copy is sent, because the stuck sender holds the lock for as long as this process lives.
    shutil.copytree(folder, tmp_path / "later")
    assert sync(tmp_path / "later", uri, tracking(uri)).pending == 0
    assert_whole(Store(uri))


def test_the_end_of_a_sweep_says_that_it_waits_for_a_silent_server_and_gives_it_up(silent_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracker_module, "SAY_SECONDS", 0.1)
    monkeypatch.setattr(tracker_module, "SILENT_SECONDS", 1.5)
    tracker = start(tmp_path / "sweep", silent_uri.replace("//", "//me:secret@"))
    tell(tracker, tmp_path / "sweep")
    said: list[str] = []
    # Outside of tests, the sender's three last tries take longer than this, so its limit must not end the wait here.
    monkeypatch.setattr(sender_module, "LAST_TRIES", 1000)
    report = tracker.close(timeout_seconds=600, say=said.append)
    assert report.pending == 21
    assert "no answer from http://***@127.0.0.1" in report.reason
    assert said == [
        f"waiting for MLflow at {silent_uri.replace('//', '//***@')}: no answer yet; 21 events are safe in the sweep's "
        "journal and can be sent later"
    ]


def test_a_server_that_never_was_is_given_up_soon_and_said(tmp_path):
    tracker = start(tmp_path / "sweep", "http://me:secret@127.0.0.1:9")
    tell_start(tracker)
    report = tracker.close(timeout_seconds=60)
    assert report.pending == 1
    assert "127.0.0.1" in report.reason
    assert "secret" not in str(report)
    for file in (tmp_path / "sweep").rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()


DRIVER = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path[:0] = {here!r}
import mlflow, small_sweep
folder, uri, method, number, when = Path(sys.argv[1]), *sys.argv[2:]
told, calls, original = threading.Event(), [], getattr(mlflow.MlflowClient, method)

def fatal(*arguments, **named):
    told.wait()
    calls.append(method)
    is_fatal = len(calls) == int(number)
    if is_fatal and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **named)
    if is_fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(mlflow.MlflowClient, method, fatal)
tracker = small_sweep.start(folder, uri)
small_sweep.tell_start(tracker)
for trial_id in ("block5-000", "block5-001"):
    small_sweep.tell_trial(tracker, folder, trial_id)
tracker.trial_started(trial_id="block20-000", block=20, params=small_sweep.params(20))
tracker.metrics(trial_id="block20-000", points=[small_sweep.point("block20-000", 1)])
told.set()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("method", "number", "when"),
    [
        pytest.param("create_run", 1, "after", marks=pytest.mark.slow),
        pytest.param("log_batch", 4, "after", marks=pytest.mark.slow),
        pytest.param("create_logged_model", 1, "after", marks=pytest.mark.slow),
        ("finalize_logged_model", 2, "before"),
    ],
)
def test_a_driver_killed_in_the_middle_of_sending_is_synced_and_resumed(uri, tmp_path, method, number, when):
    folder = tmp_path / "sweep"
    command = [
        sys.executable,
        "-c",
        DRIVER.format(here=[str(HERE), str(HERE.parent)]),
        str(folder),
        uri,
        method,
        str(number),
        when,
    ]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    with open(folder / "journal" / "events.jsonl", "ab") as file:
        file.write(b'{"seq": 99, "event": "metr')  # the driver was killed in the middle of a line, too

    assert sync(folder, uri, tracking(uri)).pending == 0
    store = Store(uri)
    assert len(store.runs) == 4
    assert store.trial("block20-000").info.status == store.sweep.info.status == "RUNNING"
    assert store.epochs("block5-000") == [1, 2, 3, 4, 5, 6]

    tracker = start(folder, uri)
    tell_start(tracker)
    for trial_id in ("block20-000", "block20-001"):
        tell_trial(tracker, folder, trial_id, clock_ms=5000)
    tell_end(tracker, folder)
    assert tracker.close(timeout_seconds=60).pending == 0
    assert_whole(Store(uri))


def test_a_call_costs_little_while_the_sender_is_stuck(silent_uri, tmp_path):
    """A thousand calls return while one request of the sender has not. No time is measured."""
    tracker = start(tmp_path / "sweep", silent_uri)
    tell_start(tracker)
    tracker.trial_started(trial_id="block5-000", block=5, params=params(5))
    for _ in range(1000):
        tracker.metrics(trial_id="block5-000", points=[point("block5-000", 1)])
    assert tracker.status.pending == 1002
    tracker.close(timeout_seconds=0)
