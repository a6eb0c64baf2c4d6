"""Tests of `msae-sweep ui`: it shows the right page of the right server, and the server ends with it.

`test_ui_in_browser.py` tests it in a browser.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from urllib.parse import parse_qs, urlparse

import psutil
import pytest
from small_sweep import EPOCHS, EXPERIMENT, STATUSES, SWEEP_ID, Store, send, tracking

from msae_sweep.config import TrackingConfig
from msae_sweep.errors import ConfigError, TrackingError
from msae_sweep.track import mlflow_ui


def state_behind(path: str, store: Store) -> dict:
    """Return the state that the page reads from the experiment's tag, which the address names."""
    fragment = urlparse(path).fragment
    assert fragment.startswith(f"/experiments/{store.experiment.experiment_id}/runs?")
    query = parse_qs(fragment.partition("?")[2])
    assert query["compareRunsMode"] == ["CHART"]
    return json.loads(store.experiment.tags[f"mlflow.sharedViewState.{query['viewStateShareKey'][0]}"])


def test_the_comparison_shows_the_trials_of_this_sweep_on_keys_that_they_have(uri, tmp_path):
    send(tmp_path / "sweep", uri)
    path = mlflow_ui.comparison_path(tmp_path / "sweep", tracking(uri))
    store = Store(uri)
    state = state_behind(path, store)
    shown = store.client.search_runs([store.experiment.experiment_id], state["searchFilter"])
    assert {run.data.tags["msae_sweep.trial_id"] for run in shown} == set(STATUSES)
    (chart,) = state["compareRunCharts"]
    assert chart["selectedParams"] == ["block", "learning_rate", "expansion_factor", "weighting"]
    assert chart["selectedMetrics"] == ["dead_ratio", "r2_k4"]
    for run in shown:
        assert set(chart["selectedParams"]) <= set(run.data.params)
        if run.data.metrics:
            assert set(chart["selectedMetrics"]) <= set(run.data.metrics)
            assert state["orderByKey"].split("`")[1] in run.data.metrics or run.data.tags["status"] == "failed"
    # A second call returns the same page and adds no tag.
    assert mlflow_ui.comparison_path(tmp_path / "sweep", tracking(uri)) == path


def test_a_trial_far_below_the_rest_is_left_out_by_a_filter_that_can_be_deleted(uri, tmp_path):
    send(tmp_path / "sweep", uri)
    store = Store(uri)
    parent = store.sweep.info.run_id
    for trial_id, r2 in [(f"block5-{i:03d}", 0.7 + 0.02 * i) for i in range(10, 15)] + [("block5-015", -9.0)]:
        tags = {"mlflow.parentRunId": parent, "msae_sweep.trial_id": trial_id, "msae_sweep.sweep_id": SWEEP_ID}
        run = store.client.create_run(store.experiment.experiment_id, run_name=trial_id, tags=tags)
        store.client.log_metric(run.info.run_id, "r2_k4", r2)
        store.client.log_metric(run.info.run_id, "dead_ratio", 0.1)
    state = state_behind(mlflow_ui.comparison_path(tmp_path / "sweep", tracking(uri)), Store(uri))
    assert state["searchFilter"].startswith(f"tags.`mlflow.parentRunId` = '{parent}' and metrics.`r2_k4` > ")
    shown = store.client.search_runs([store.experiment.experiment_id], state["searchFilter"])
    named = {run.data.tags["msae_sweep.trial_id"] for run in shown}
    assert named == {*EPOCHS, *(f"block5-{i:03d}" for i in range(10, 15))} - {"block20-001"}  # it has no epoch
    assert "far below the rest" in state["compareRunSections"][0]["name"]


def test_with_a_tracking_server_only_its_address_is_shown(server, tmp_path):
    send(tmp_path / "sweep", server.uri)
    said: list[str] = []
    mlflow_ui.serve(tmp_path / "sweep", tracking(server.uri), say=said.append)
    (url,) = said
    assert url.startswith(f"{server.uri}/#/experiments/")
    assert state_behind(url, Store(server.uri))


def test_no_user_or_password_is_shown(monkeypatch):
    said: list[str] = []
    secret = TrackingConfig(uri="http://me:secret@127.0.0.1:9/")
    mlflow_ui.serve(None, secret, say=said.append)
    assert said == ["http://127.0.0.1:9/"]


@pytest.mark.parametrize("end", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_on_a_store_a_server_of_our_own_answers_on_loopback_until_it_is_ended(uri, tmp_path, end):
    send(tmp_path / "sweep", uri)
    command = f"""
from pathlib import Path
from msae_sweep.config import TrackingConfig
from msae_sweep.track import mlflow_ui
tracking = TrackingConfig(uri={uri!r}, experiment={EXPERIMENT!r})
mlflow_ui.serve(Path({str(tmp_path / "sweep")!r}), tracking)
"""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = urlparse(process.stdout.readline().strip())
        assert url.hostname == "127.0.0.1"
        assert state_behind(url.geturl(), Store(uri))
        with urllib.request.urlopen(f"http://{url.netloc}/", timeout=30) as page:
            assert b"<html" in page.read()
        # The password that a store's address may hold must be on no command line.
        servers = psutil.Process(process.pid).children(recursive=True)
        assert servers
        assert not any(uri in part for server in servers for part in server.cmdline())
    finally:
        process.send_signal(end)
        assert process.wait(30) == 0
    with pytest.raises(OSError, match="refused"), socket.create_connection((url.hostname, url.port), timeout=5):
        pass


def test_a_sweep_that_the_store_does_not_have_is_said_with_what_to_do(uri, tmp_path):
    with pytest.raises(TrackingError, match=r"has no trials of this sweep in experiment study; .* track-sync"):
        mlflow_ui.comparison_path(tmp_path / "sweep", tracking(uri))


def test_a_server_that_is_down_is_one_line(tmp_path):
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
        mlflow_ui.comparison_path(tmp_path / "sweep", tracking("http://127.0.0.1:9"))


def test_an_address_that_is_not_here_and_a_port_that_is_taken_are_said(uri):
    with pytest.raises(ConfigError, match=r"--host: 192\.0\.2\.1 is not an address"):
        mlflow_ui.serve(None, tracking(uri), host="192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises((TrackingError, ConfigError), match="port"):
        mlflow_ui.serve(None, tracking(uri), port=taken.getsockname()[1])
