"""Runs a whole sweep: checks, data, trials, tracking, and a folder from which it can be resumed and reported."""

import contextlib
import json
import logging
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ray
from rich.console import Console

import msae_sweep
from msae_sweep import signals
from msae_sweep.config import SweepConfig
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.data.sources.catalog import check_blocks
from msae_sweep.data.sources.extraction_manifest import numbering_note
from msae_sweep.errors import SweepError
from msae_sweep.format_version import SWEEP_FOLDER
from msae_sweep.report import pca_baseline
from msae_sweep.report.tables import best_table, criteria_table, further_criteria_table
from msae_sweep.report.training_figure import import_ahead, training_figure
from msae_sweep.sweep import final_files, ray_cluster
from msae_sweep.sweep.figure_workers import draw_in_workers, run_in_workers
from msae_sweep.sweep.memory import check_devices, check_memory_and_disk
from msae_sweep.sweep.preparation import Interrupted, Preparation, enough_free_cores
from msae_sweep.sweep.resources import check_device, gpus_per_trial
from msae_sweep.sweep.resume import check_same_data, check_same_settings, flatten, last_start, read_json_or_empty
from msae_sweep.sweep.tuning import Tuning
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.track.journal import Journal
from msae_sweep.track.tracker import SyncReport, Tracker
from msae_sweep.track.uri import redact, resolve_uri

FLUSH_SECONDS, FLUSH_SECONDS_A_TRIAL = 600.0, 2.0
"""Maximum seconds that a sweep waits at its end to send pending events to MLflow: a fixed part and a part per trial.

A server that is down is given up within seconds. Sending a trial takes 0.2 s to SQLite, and 1.0 s if server, database
and object store share two cores with the sweep. Events that remain then can be sent by `msae-sweep track-sync`.
"""


class SweepResult(NamedTuple):
    """Result of a sweep."""

    folder: SweepFolder
    summary: dict[str, Any]
    tracking: SyncReport
    interrupted: bool
    """True if trials are left that a resumed sweep would run."""
    report: str | None
    """Path of the report's page; None if no trial has ended or the report could not be written."""


def run(config: SweepConfig, *, resume: bool = False, command: str = "", console: Console | None = None) -> SweepResult:
    """Run a sweep from its beginning, or continue one that exists (`resume`).

    Ctrl-C and SIGTERM end the sweep in order; running trials keep their last saved state. A second signal ends it at
    once.

    Raises:
        MsaeSweepError: the user can fix the cause; most such errors are found before the sweep exists.
        KeyboardInterrupt: the sweep was interrupted before trials ran, or a second time; its notes say what to do next.
    """
    console = console or Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with signals.sigterm_as_ctrl_c():
        config, folder, infos = check_before_ray(config, resume=resume, say=say)
        try:
            return _connected(config, folder, infos, resume, command, console)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"continue with: msae-sweep resume {folder}"
                if folder.exists()
                else "the sweep has not started; prepared data is kept; run the same command to continue"
            )
            raise


def _connected(
    config: SweepConfig, folder: SweepFolder, infos: list[BlockInfo], resume: bool, command: str, console: Console
) -> SweepResult:
    """Connect to Ray, lock the sweep against other drivers, and run it."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if not ray.is_initialized():
        say(f"{config.name}: {len(infos)} x {config.n_trials_per_block()} trials; connecting to Ray")
    ray_cluster.connect(say)
    gpus = gpus_per_trial(config, say)
    check_devices(config, infos, gpus)
    is_resumed = resume and folder.exists()
    folder.create()
    with folder.lock_and_sync(), folder.storage_errors(), contextlib.closing(Journal(folder.path)) as written:
        # Checked again: another driver may have started the sweep before this one took the lock.
        _check_start(folder, config, resume=is_resumed)
        identity = _identity(folder, config, command, gpus)
        # Connecting to MLflow takes seconds, which pass while the data is prepared.
        tracker = Tracker.start(
            folder.path, config.tracking, sweep_id=identity["sweep_id"], shared=folder, written=written
        )
        try:
            return _drive(
                config=config,
                folder=folder,
                identity=identity,
                tracker=tracker,
                infos=infos,
                gpus=gpus,
                console=console,
            )
        except BaseException:
            # The journal is complete up to here: a resumed sweep continues it, and `track-sync` can send it.
            tracker.close(timeout_seconds=0)
            raise


def _check_start(folder: SweepFolder, config: SweepConfig, *, resume: bool) -> None:
    """Check that a resumed sweep has its old settings, or that a new sweep's name is free.

    Raises:
        ConfigError: a setting has changed.
        SweepError: a sweep of this name exists.
    """
    if resume:
        check_same_settings(folder, config)
    elif folder.exists():
        raise SweepError(
            f"name: sweep {config.name} exists in {config.storage}; continue it with --resume, or give another --name"
        )


def check_before_ray(
    config: SweepConfig, *, resume: bool, say: Callable[[str], None] = lambda line: None
) -> tuple[SweepConfig, SweepFolder, list[BlockInfo]]:
    """Check everything that can be checked before Ray starts; return the resolved configuration, folder and blocks.

    Args:
        say: takes a line for the user before something that takes time.

    Raises:
        MsaeSweepError: a check failed; the user can fix the cause.
    """
    config = _with_whole_paths(config)
    folder = SweepFolder.locate(config.storage, config.name)
    _check_start(folder, config, resume=resume and folder.exists())
    check_device(config)
    # Headers give row counts and widths, so that most mistakes in the data are found before Ray starts.
    infos = check_blocks(config.data, batch_size=max(int(b) for b in config.corners("batch_size")))
    for info in infos:
        config.check_width(info.input_dim, info.block)
    if note := numbering_note(config.data.path):
        say(f"note: {note}")
    if resume and folder.exists():
        check_same_data(folder, config, infos, say)
    check_memory_and_disk(config, infos)
    return config, folder, infos


def _drive(
    config: SweepConfig,
    folder: SweepFolder,
    identity: dict[str, Any],
    tracker: Tracker,
    infos: list[BlockInfo],
    gpus: float,
    console: Console,
) -> SweepResult:
    """Run the sweep in a folder to which no other driver writes: prepare data, run trials, write results and report."""
    if not folder.exists():
        folder.clear_trials()
    preparation = Preparation(config, infos, lambda line: console.print(line, highlight=False))

    def begin() -> None:
        manifests = {block: p.manifest for block, p in preparation.wait().items()}
        # Once these files are written, the sweep exists and can be resumed.
        origins = {block: p.origin for block, p in preparation.wait().items()}
        folder.write_text(folder.path / "origins.json", json.dumps(origins, indent=1))
        folder.write_text(folder.path / "data.json", json.dumps(manifests, indent=1))
        folder.write_text(folder.config_file, redact(config.to_yaml()))
        tracker.sweep_started(
            name=config.name,
            params=flatten(config.model_dump(mode="json")),
            tags={
                key: str(value)
                for key, value in identity.items()
                if value and key not in ("format", "sweep_id", "runs")
            },
            config_yaml=config.to_yaml(),
            datasets=manifests,
        )

    try:
        if enough_free_cores(config, gpus):
            threading.Thread(target=_import_ahead, args=(preparation,), name="imports", daemon=True).start()
        else:
            preparation.wait()
        started = time.monotonic()
        tuning = Tuning(
            config=config,
            folder=folder,
            preparation=preparation,
            gpus=gpus,
            console=console,
            tracker=tracker,
            sweep_id=identity["sweep_id"],
        )
        records = tuning.run(begin)
        prepared = preparation.wait()
    except BaseException as error:
        if not folder.exists():
            folder.clear_trials()
        if isinstance(error, Interrupted):
            raise KeyboardInterrupt from error
        raise
    finally:
        preparation.close()
    interrupted = not tuning.is_whole
    if any(record.status == "failed" for record in records):
        ray_cluster.keep_session()
    seconds = time.monotonic() - started
    manifests = {block: p.manifest for block, p in prepared.items()}
    # A sweep that was told to end may be killed soon, so the report measures them instead.
    most = 0 if interrupted else pca_baseline.MOST_PRODUCTS_AT_ONCE
    baselines = pca_baseline.pca_baselines(folder, config.storage, manifests, most_products=most, run=run_in_workers)
    summary, histories = final_files.write(config, folder, records, manifests, baselines.by_block, seconds=seconds)
    # The tables are printed before the report, which takes seconds, and a slow MLflow, which takes minutes.
    console.print(best_table(summary))
    if any(block["best"] for block in summary["blocks"].values()):
        console.print(criteria_table(summary), further_criteria_table(summary))
    figure = run_in_workers([partial(training_figure, histories)] if histories else [])
    identity["runs"][-1]["seconds"] = round(seconds, 1)
    folder.write_text(folder.path / "identity.json", json.dumps(identity, indent=1))
    # This event comes before the figures, so that events are sent to MLflow while they are drawn.
    tracker.sweep_ended(
        status="interrupted" if interrupted else "completed",
        artifacts=[folder.path / name for name in final_files.ARTIFACTS if (folder.path / name).exists()],
        champions={} if interrupted else final_files.champions(summary),
        metrics=final_files.block_metrics(summary) | {"wall_seconds": seconds},
    )
    report = _write_report(folder, console) if any(record.finished for record in records) else None
    drawn = [final_files.write_figure(folder, png) for png in figure()] + (
        [folder.path / final_files.REPORT] if report is not None else []
    )
    if drawn:
        tracker.artifacts(drawn)
    if (pending := tracker.status.pending) > 1:
        console.print(f"sending the last {pending} events to MLflow", highlight=False)
    folder.flush()
    patience = FLUSH_SECONDS + FLUSH_SECONDS_A_TRIAL * len(records)
    tracking = tracker.close(timeout_seconds=patience, say=lambda line: console.print(line, highlight=False))
    return SweepResult(folder, summary, tracking, interrupted, report)


def _with_whole_paths(config: SweepConfig) -> SweepConfig:
    """Return the configuration with absolute paths and tracking URI, so that any working folder can resume the sweep.

    Raises:
        ConfigError: MLflow cannot use the tracking URI.
    """
    data, storage = config.data, config.storage
    if data.path != "planted" and "://" not in data.path:
        data = data.model_copy(update={"path": str(Path(data.path).expanduser().absolute())})
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    tracking = config.tracking.model_copy(update={"uri": resolve_uri(config.tracking.uri)})
    return config.model_copy(update={"data": data, "storage": storage, "tracking": tracking})


def _import_ahead(preparation: Preparation) -> None:
    """Import what figures need once the data is ready; until then, this process prepares data and starts workers."""
    with contextlib.suppress(Exception):  # the main thread raises such errors itself
        preparation.wait()
        import_ahead()


def _write_report(folder: SweepFolder, console: Console) -> str | None:
    """Write the report and return the path of its page.

    If that fails, the error is printed and None is returned, so that the sweep itself is not affected.
    """
    console.print("writing the report", highlight=False)
    try:
        from msae_sweep import report

        return report.write_at_the_end(folder, draw_in_workers).page
    except Exception as error:
        logging.getLogger(__name__).debug("the report failed", exc_info=True)
        console.print(
            f"no report was written: {type(error).__name__}: {str(error)[:200]}; try msae-sweep report {folder}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return None


def _identity(folder: SweepFolder, config: SweepConfig, command: str, gpus: float) -> dict[str, Any]:
    """Write `identity.json` and return its content: the sweep's id, which is made once, and the origin of each run."""
    # With a new id, MLflow would get every run twice.
    identity = read_json_or_empty(folder, "identity.json") or {
        "sweep_id": (last_start(folder) or {}).get("sweep_id") or uuid.uuid4().hex
    }
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = {"command": redact(command), "started": started, "host": platform.node()}
    if accelerators := sorted(
        k.partition(":")[2] for k in ray.cluster_resources() if k.startswith("accelerator_type:")
    ):
        run["accelerators"] = ", ".join(accelerators)
    identity |= {
        "format": SWEEP_FOLDER,
        "runs": [*identity.get("runs", []), run],
        "gpus_per_trial": gpus,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "mlflow")},
        "command": redact(command),
        "config_digest": config.digest(),
        "git_commit": _git_commit(),
        "msae_sweep": msae_sweep.__version__,
        "ray": ray.__version__,
    }
    folder.write_text(folder.path / "identity.json", json.dumps(identity, indent=1))
    return identity


def _git_commit() -> str | None:
    """Return the commit of the working folder; None if it is not a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
