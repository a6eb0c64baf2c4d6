"""MLflow's own pages on a sweep: the comparison of its trials, and a server for a store that has none.

The comparison is the experiment's page of charts, as its Share button would save it: a tag of the experiment,
`mlflow.sharedViewState.KEY`, holds filter, order and charts as JSON, and the address names the key:
`#/experiments/ID/runs?compareRunsMode=CHART&viewStateShareKey=KEY`. Neither is documented; both were read off MLflow
3.17.2 (its page's own code) and are tested with a browser in `tests/track/check_ui.py`. A page that does not know the
key opens on the experiment without the charts.
"""

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from msae_sweep.config import TrackingConfig
from msae_sweep.errors import ConfigError, TrackingError
from msae_sweep.signals import sigterm_as_ctrl_c
from msae_sweep.track.connection import connect, one_line
from msae_sweep.track.cursor import Cursor
from msae_sweep.track.runs import SWEEP_TAG, TRIAL_TAG
from msae_sweep.track.uri import redact, resolve_uri

START_SECONDS = 120.0
"""How long a server may take until it answers; about 5 s on an idle machine, more where the database is new."""
SPREAD, LEAST_TRIALS = 4.0, 4
"""A trial is far below the rest where it is this many times as far below the median as the best is above it; asked only
of so many trials or more."""
PARAMS = ("block", "learning_rate", "expansion_factor", "weighting")
"""Axes of the comparison, left to right; the dead share and R² at every k follow."""


def comparison(sweep_folder: Path | None, tracking: TrackingConfig, where: str = "SWEEP") -> str:
    """Path of the page, below a server's address, that compares the trials of a sweep; of MLflow itself without one.

    Args:
        where: how the user names the sweep, for messages.

    Raises:
        TrackingError: MLflow does not answer, or has nothing of the sweep.
    """
    if sweep_folder is None:
        return "/"
    uri = resolve_uri(tracking.uri)
    try:
        client = connect(uri)
        experiment = client.get_experiment_by_name(tracking.experiment)
        sweep_id = Cursor.load(sweep_folder).sweep_id
        runs = _runs(client, experiment.experiment_id, sweep_id) if experiment and sweep_id else []
        parents = [run for run in runs if TRIAL_TAG not in run.data.tags]
        trials = [run for run in runs if TRIAL_TAG in run.data.tags]
        if not parents or not trials:
            raise TrackingError(
                f"{redact(uri)} has no trials of this sweep in experiment {tracking.experiment}; "
                f"send them with msae-sweep track-sync {where}"
            )
        keys = _metric_keys(trials)
        state = json.dumps(view_state(parents[0].info.run_id, keys, _far_below(trials, keys)), sort_keys=True)
        key = hashlib.sha256(state.encode()).hexdigest()[:16]
        client.set_experiment_tag(experiment.experiment_id, f"mlflow.sharedViewState.{key}", state)
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"{redact(uri)}: {one_line(error)}") from None
    query = urlencode({"compareRunsMode": "CHART", "viewStateShareKey": key})
    return f"/#/experiments/{quote(experiment.experiment_id)}/runs?{query}"


def view_state(parent_run_id: str, metrics: Sequence[str], least: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The page's state: the trials of one sweep, best first, with parallel coordinates from `PARAMS` to `metrics`.

    Args:
        least: metrics with the value above which trials are shown. The filter stands in the page's search box, where
            whoever wants to see the others deletes it.
    """
    section, title = "msae-sweep-trials", "Trials compared"
    if least:
        title += "; the filter leaves out those whose R² is far below the rest"
    base = {"metricSectionId": section, "deleted": False, "isGenerated": False}
    parallel = {
        **base,
        "type": "PARALLEL",
        "uuid": "msae-sweep-parallel",
        "selectedParams": list(PARAMS),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
    }
    return {
        "searchFilter": " and ".join(
            [
                f"tags.`mlflow.parentRunId` = '{parent_run_id}'",
                *(f"metrics.`{key}` > {value:.4f}" for key, value in (least or {}).items()),
            ]
        ),
        "orderByKey": "metrics.`best_objective`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [
            *(f"params.`{key}`" for key in PARAMS),
            *(f"metrics.`{key}`" for key in metrics),
            "attributes.`Models`",
        ],
        "compareRunCharts": [parallel],
        "compareRunSections": [
            {
                **{"uuid": section, "name": title, "display": True, "isReordered": True, "deleted": False},
                **{"columns": 1, "cardHeight": 460},
            }
        ],
        "isAccordionReordered": True,
    }


def serve(
    sweep_folder: Path | None,
    tracking: TrackingConfig,
    *,
    where: str = "SWEEP",
    host: str = "127.0.0.1",
    port: int = 0,
    open_browser: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Show the comparison: on the tracking server there is, else on one of our own until Ctrl-C.

    Args:
        where: how the user names the sweep, for messages.
        port: 0 takes a free one.

    Raises:
        ConfigError: a store that has no pages of MLflow's own.
        TrackingError: MLflow has nothing of the sweep, or the server does not start.
    """
    uri = resolve_uri(tracking.uri)
    scheme = uri.partition(":")[0]
    if scheme.startswith("databricks"):
        raise ConfigError(f"tracking.uri: {redact(uri)} has pages of its own; open them in the workspace")
    path = comparison(sweep_folder, tracking, where)
    if scheme in ("http", "https"):
        _show(f"{redact(uri).replace('***@', '').rstrip('/')}{path}", open_browser, say)
        return
    port = _free_port(host, port)
    with tempfile.TemporaryFile("w+") as log:
        server = _start(uri, host, port, log)
        try:
            with sigterm_as_ctrl_c():
                address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
                _wait(server, address, log)
                _show(f"{address}{path}", open_browser, say)
                say("Ctrl-C ends it")
                if server.wait() != 0:
                    raise TrackingError(f"MLflow's server ended: {_last_line(log)}")
        except KeyboardInterrupt:
            pass
        finally:
            _stop(server)


def _runs(client: Any, experiment_id: str, sweep_id: str) -> list[Any]:
    runs, token = [], None
    while True:
        page = client.search_runs([experiment_id], f"tags.`{SWEEP_TAG}` = '{sweep_id}'", page_token=token)
        runs += page
        if not (token := page.token):
            return runs


def _metric_keys(trials: Iterable[Any]) -> list[str]:
    """The dead share, and R² at every k that all trials have; mean R² where they have no k in common."""
    known = [set(run.data.metrics) for run in trials if run.data.metrics]
    common = set.intersection(*known) if known else set()
    levels = sorted((int(key[4:]), key) for key in common if key.startswith("r2_k"))
    # The lines take their colour from the last one.
    return ["dead_ratio", *([key for _, key in levels] or ["r2_mean"])]


def _far_below(trials: Iterable[Any], keys: Sequence[str]) -> dict[str, float]:
    """For each R² with trials far below the rest, a bound between these and the others.

    The axes of MLflow's parallel coordinates span all values and cannot be limited: one trial of R² −9 leaves a
    twentieth of an axis for all others.
    """
    bounds = {}
    for key in keys:
        values = sorted(run.data.metrics[key] for run in trials if key in run.data.metrics)
        if not key.startswith("r2") or len(values) < LEAST_TRIALS:
            continue
        middle, top = values[len(values) // 2], values[-1]
        bound = middle - SPREAD * max(top - middle, 0.01)
        if values[0] < min(bound, 0.0):  # below 0 it is worse than the mean of all rows
            bounds[key] = min(bound, 0.0)
    return bounds


def _start(uri: str, host: str, port: int, log: IO[str]) -> subprocess.Popen[str]:
    """MLflow's server on a store; its URI may hold a password, so it is not on the command line."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    # Without jobs (they serve MLflow's tracing of language models) it is two processes instead of nine.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _wait(server: subprocess.Popen[str], address: str, log: IO[str]) -> None:
    """Until it answers.

    Raises:
        TrackingError: it ended, or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        if server.poll() is not None:
            raise TrackingError(f"MLflow's server does not start: {_last_line(log)}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise TrackingError(f"MLflow's server gives no answer at {address}: {_last_line(log)}") from None
            time.sleep(0.2)
        else:
            return


def _stop(server: subprocess.Popen[str]) -> None:
    """End the server with all that it started."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(server.pid, number)
            server.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _show(url: str, open_browser: bool, say: Callable[[str], object]) -> None:
    say(url)
    # Elsewhere webbrowser may find one that runs in the terminal.
    has_screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if open_browser and has_screen:
        webbrowser.open(url)


def _free_port(host: str, port: int) -> int:
    """`port`, or one that is free now for 0.

    Raises:
        ConfigError: no such address on this machine, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port that a server has just left may be taken again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port: {port} is taken; give another, or none for a free one") from None
        raise ConfigError(f"--host: {host} is no address of this machine: {error.strerror}") from None


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return redact(lines[-1])[:300] if lines else "it said nothing"
