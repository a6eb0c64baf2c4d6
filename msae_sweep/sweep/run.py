"""A whole sweep: check, prepare, tune, track, and leave a folder that can be resumed and reported."""

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
from msae_sweep.errors import SweepError
from msae_sweep.report.tables import best_table, criteria_table
from msae_sweep.report.training_figure import import_ahead, training_figure
from msae_sweep.sweep import final_files, ray_cluster
from msae_sweep.sweep.figure_workers import beside, side_by_side
from msae_sweep.sweep.memory import check_devices, check_here
from msae_sweep.sweep.preparation import Interrupted, Preparation, leaves_cores
from msae_sweep.sweep.resources import check_device, gpus_per_trial
from msae_sweep.sweep.resume import check_same_data, check_same_question, flatten, last_start, undamaged
from msae_sweep.sweep.tuning import Tuning
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.track.journal import Journal
from msae_sweep.track.tracker import SyncReport, Tracker
from msae_sweep.track.uri import redact, resolve_uri

FLUSH_SECONDS, FLUSH_SECONDS_A_TRIAL = 600.0, 2.0
"""How long the end of a sweep waits while MLflow takes what is left; a server that is down is given up within seconds.
A trial takes 0.2 s to SQLite, and 1.0 s where server, database and object store share two cores with it. What is left
then is sent later by `msae-sweep track-sync`."""


class SweepResult(NamedTuple):
    """What a sweep came to."""

    folder: SweepFolder
    summary: dict[str, Any]
    tracking: SyncReport
    interrupted: bool
    """Whether trials are left that a resumed sweep would run."""
    report: str | None
    """Its page; None where it could not be written."""


def run(config: SweepConfig, *, resume: bool = False, command: str = "", console: Console | None = None) -> SweepResult:
    """Run a sweep from its beginning, or go on with one (`resume`) that exists.

    Ctrl-C and SIGTERM end it in order, trials that run with their last state; a second one ends it at once.

    Raises:
        MsaeSweepError: something that the user can mend, found before the sweep exists.
        KeyboardInterrupt: interrupted before trials ran, or a second time; its notes say what to do next.
    """
    console = console or Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with signals.sigterm_as_ctrl_c():
        config, folder, infos = checked(config, resume=resume, say=say)
        try:
            return _connected(config, folder, infos, resume, command, console)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"go on with: msae-sweep resume {folder}"
                if folder.exists()
                else "the sweep has not begun; what is prepared is kept, and the same command goes on"
            )
            raise


def _connected(
    config: SweepConfig, folder: SweepFolder, infos: list[BlockInfo], resume: bool, command: str, console: Console
) -> SweepResult:
    """Connect to Ray, and drive the sweep."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if not ray.is_initialized():
        say(f"{config.name}: {len(infos)} x {config.n_trials_per_block()} trials; connecting to Ray")
    ray_cluster.connect(say)
    gpus = gpus_per_trial(config, say)
    check_devices(config, infos, gpus)
    is_resumed = resume and folder.exists()
    folder.create()
    with folder.driven(), folder.storage_errors(), contextlib.closing(Journal(folder.path)) as written:
        # Again, now that no other driver can have begun it meanwhile.
        _check_start(folder, config, resume=is_resumed)
        identity = _identity(folder, config, command, gpus)
        # Connecting to MLflow takes seconds; the preparation gives it time.
        tracker = Tracker.start(
            folder.path, config.tracking, sweep_id=identity["sweep_id"], shared=folder, written=written
        )
        try:
            return _drive(config, folder, identity, tracker, infos, gpus, console)
        except BaseException:
            # What is in the journal is whole: a resumed sweep goes on from it, and `track-sync` can send it.
            tracker.close(timeout_seconds=0)
            raise


def _check_start(folder: SweepFolder, config: SweepConfig, *, resume: bool) -> None:
    """Whether the sweep may begin, or go on."""
    if resume:
        check_same_question(folder, config)
    elif folder.exists():
        raise SweepError(
            f"name: sweep {config.name} exists in {config.storage}; go on with --resume, or give another --name"
        )


def checked(
    config: SweepConfig, *, resume: bool, say: Callable[[str], None] = lambda line: None
) -> tuple[SweepConfig, SweepFolder, list[BlockInfo]]:
    """Everything that can be checked before Ray starts: the resolved configuration, its folder and the blocks.

    Args:
        say: takes a line for the user before something that takes time.

    Raises:
        MsaeSweepError: something that the user can mend.
    """
    config = _with_whole_paths(config)
    folder = SweepFolder.locate(config.storage, config.name)
    _check_start(folder, config, resume=resume and folder.exists())
    check_device(config)
    # Row counts and widths from headers: most mistakes in the data are found before Ray starts.
    infos = check_blocks(config.data, batch_size=max(int(b) for b in config.corners("batch_size")))
    for info in infos:
        config.check_width(info.input_dim, info.block)
    if resume and folder.exists():
        check_same_data(folder, config, infos, say)
    check_here(config, infos)
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
    """From a folder that no other driver writes to a finished comparison."""
    if not folder.exists():
        folder.clear_trials()
    preparation = Preparation(config, infos, lambda line: console.print(line, highlight=False))

    def begin() -> None:
        manifests = {block: p.manifest for block, p in preparation.wait().items()}
        # From here on the sweep exists, and can be resumed.
        origins = {block: p.origin for block, p in preparation.wait().items()}
        folder.write_text(folder.path / "origins.json", json.dumps(origins, indent=1))
        folder.write_text(folder.path / "data.json", json.dumps(manifests, indent=1))
        folder.write_text(folder.config_file, redact(config.to_yaml()))
        tracker.sweep_started(
            name=config.name,
            params=flatten(config.model_dump(mode="json")),
            tags={key: str(value) for key, value in identity.items() if value and key not in ("sweep_id", "runs")},
            config_yaml=config.to_yaml(),
            datasets=manifests,
        )

    try:
        if leaves_cores(config, gpus):
            threading.Thread(target=_import_ahead, args=(preparation,), name="imports", daemon=True).start()
        else:
            preparation.wait()
        started = time.monotonic()
        tuning = Tuning(config, folder, preparation, gpus, console, tracker, identity["sweep_id"])
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
    summary, histories = final_files.write(config, folder, records, manifests, seconds=seconds)
    # At once: the report takes seconds, and a slow MLflow minutes.
    console.print(best_table(summary))
    if any(block["best"] for block in summary["blocks"].values()):
        console.print(criteria_table(summary))
    figure = beside([partial(training_figure, histories)] if histories else [])
    identity["runs"][-1]["seconds"] = round(seconds, 1)
    folder.write_text(folder.path / "identity.json", json.dumps(identity, indent=1))
    # Told before anything is drawn, so that MLflow is brought up to date meanwhile.
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
    """Paths and tracking URI independent of the working folder, so that a sweep can be resumed from any other.

    Raises:
        ConfigError: a URI that MLflow cannot use.
    """
    data, storage = config.data, config.storage
    if data.path != "planted" and "://" not in data.path:
        data = data.model_copy(update={"path": str(Path(data.path).expanduser().absolute())})
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    tracking = config.tracking.model_copy(update={"uri": resolve_uri(config.tracking.uri)})
    return config.model_copy(update={"data": data, "storage": storage, "tracking": tracking})


def _import_ahead(preparation: Preparation) -> None:
    """Once the data is ready: before, this process is busy enough with that and with starting workers."""
    with contextlib.suppress(Exception):  # which the main thread hears of
        preparation.wait()
        import_ahead()


def _write_report(folder: SweepFolder, console: Console) -> str | None:
    """The report of what there is, its page; what goes wrong with it is said, and takes nothing from the sweep."""
    console.print("writing the report", highlight=False)
    try:
        from msae_sweep import report

        return report.write_at_the_end(folder, side_by_side).page
    except Exception as error:
        logging.getLogger(__name__).debug("the report failed", exc_info=True)
        console.print(
            f"no report: {type(error).__name__}: {str(error)[:200]}; try msae-sweep report {folder}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return None


def _identity(folder: SweepFolder, config: SweepConfig, command: str, gpus: float) -> dict[str, Any]:
    """The sweep's id, made once, and where each run of it came from."""
    # Under another id MLflow would get every run twice.
    identity = undamaged(folder, "identity.json") or {
        "sweep_id": (last_start(folder) or {}).get("sweep_id") or uuid.uuid4().hex
    }
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = {"command": redact(command), "started": started, "host": platform.node()}
    if accelerators := sorted(
        k.partition(":")[2] for k in ray.cluster_resources() if k.startswith("accelerator_type:")
    ):
        run["accelerators"] = ", ".join(accelerators)
    identity |= {
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
    """Commit of the working folder, where it is a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
