"""MLflow's pages for a sweep: a comparison of its trials, and a local server for a store that has no server.

The comparison is the experiment's page of charts, in the form in which its Share button would save it. A tag of the
experiment, `mlflow.sharedViewState.KEY`, holds filter, order and charts as JSON, and the page's address contains the
key: `#/experiments/ID/runs?compareRunsMode=CHART&viewStateShareKey=KEY`. MLflow documents neither the tag nor the
address. Both were read from the page's own code in MLflow 3.17.2, and are tested with a browser in
`tests/track/check_ui.py`. If the page does not know the key, it shows the experiment without the charts.
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
"""Longest time to wait for a server's first answer. It takes about 5 s on an idle machine, more for a new database."""
SPREAD, LEAST_TRIALS = 4.0, 4
"""Definition of a trial that is far below the rest: its distance below the median is more than SPREAD times the
distance of the best trial above the median. It is applied only to LEAST_TRIALS trials or more."""
PARAMS = ("block", "learning_rate", "expansion_factor", "weighting")
"""First axes of the comparison, from left to right. The dead ratio and R² at every k follow."""


def comparison_path(sweep_folder: Path | None, tracking: TrackingConfig, where: str = "SWEEP") -> str:
    """Return the URL path, below a server's address, of the page that compares the trials of a sweep.

    If `sweep_folder` is None, return the path of MLflow's start page.

    Args:
        where: the user's name for the sweep, for messages.

    Raises:
        TrackingError: MLflow does not answer, or has no trials of the sweep.
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
    """Return the page's state: the trials of one sweep, best first, in a chart of parallel coordinates.

    The axes of the chart are `PARAMS`, then `metrics`.

    Args:
        least: lower bounds by metric; only trials above them are shown. The page's search box shows this filter, and a
            user who wants to see the other trials can delete it there.
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
    """Show the comparison on the configured tracking server; if the store has none, start a server until Ctrl-C.

    Args:
        where: the user's name for the sweep, for messages.
        port: port of a server that is started here; 0 means any free port.

    Raises:
        ConfigError: the store does not have MLflow's own pages, or `host` or `port` cannot be used.
        TrackingError: MLflow has no trials of the sweep, or the server does not start.
    """
    uri = resolve_uri(tracking.uri)
    scheme = uri.partition(":")[0]
    if scheme.startswith("databricks"):
        raise ConfigError(f"tracking.uri: {redact(uri)} has pages of its own; open them in the workspace")
    path = comparison_path(sweep_folder, tracking, where)
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
                say("Press Ctrl-C to stop the server")
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
    """Return the dead ratio and R² at every k that all trials have, or mean R² if they have no k in common."""
    known = [set(run.data.metrics) for run in trials if run.data.metrics]
    common = set.intersection(*known) if known else set()
    levels = sorted((int(key[4:]), key) for key in common if key.startswith("r2_k"))
    # MLflow colours the lines by the last metric.
    return ["dead_ratio", *([key for _, key in levels] or ["r2_mean"])]


def _far_below(trials: Iterable[Any], keys: Sequence[str]) -> dict[str, float]:
    """Return, for each R² in which some trials are far below the rest, a bound between these trials and the others.

    The axes of MLflow's parallel coordinates span all values and cannot be limited. One trial with an R² of −9 would
    leave a twentieth of an axis for all others.
    """
    bounds = {}
    for key in keys:
        values = sorted(run.data.metrics[key] for run in trials if key in run.data.metrics)
        if not key.startswith("r2") or len(values) < LEAST_TRIALS:
            continue
        middle, top = values[len(values) // 2], values[-1]
        bound = middle - SPREAD * max(top - middle, 0.01)
        if values[0] < min(bound, 0.0):  # below 0, R² is worse than predicting the mean of all rows
            bounds[key] = min(bound, 0.0)
    return bounds


def _start(uri: str, host: str, port: int, log: IO[str]) -> subprocess.Popen[str]:
    """Start MLflow's server on a store. The URI may hold a password, so it is not passed on the command line."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    # Without job execution, which only MLflow's tracing of language models needs, it is two processes, not nine.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _wait(server: subprocess.Popen[str], address: str, log: IO[str]) -> None:
    """Wait until the server answers.

    Raises:
        TrackingError: the server ended, or takes too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        if server.poll() is not None:
            raise TrackingError(f"MLflow's server does not start: {_last_line(log)}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise TrackingError(f"MLflow's server does not answer at {address}: {_last_line(log)}") from None
            time.sleep(0.2)
        else:
            return


def _stop(server: subprocess.Popen[str]) -> None:
    """Stop the server and all processes that it started."""
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
    # Without a screen, webbrowser may open a browser that runs in the terminal.
    has_screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if open_browser and has_screen:
        webbrowser.open(url)


def _free_port(host: str, port: int) -> int:
    """Return `port`, or a port that is free now if `port` is 0.

    Raises:
        ConfigError: this machine does not have the address `host`, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port that another server has just stopped using may be used again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port: {port} is in use; give another, or leave it out to use a free port") from None
        raise ConfigError(f"--host: {host} is not an address of this machine: {error.strerror}") from None


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return redact(lines[-1])[:300] if lines else "it printed nothing"
