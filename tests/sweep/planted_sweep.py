"""A small sweep of planted data that runs in the tests' own process and Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from servers import empty_database

from msae_sweep.config import SweepConfig, parse

SPACE = """
name: small
data:
  path: planted
  blocks: [5, 20]
  planted: {rows: 3000, input_dim: 16, dictionary_size: 32, active: 3, noise: 0.02}
space:
  learning_rate: {loguniform: [1e-3, 3e-2]}
  expansion_factor: {choice: [2, 4]}
  weighting: {choice: [uniform, reverse]}
training: {k_levels: [2, 4, 8], batch_size: 128, epochs: 6, aux_k: 8}
search: {trials_per_block: 4, seed: 0}
asha: {grace_epochs: 1, reduction_factor: 2}
"""

ONE_WORKER = "resources.max_concurrent=1"


def database(folder: Path) -> str:
    """Return the tracking URI of a SQLite file in `folder`. An empty one is created unless it exists."""
    if not (folder / "mlflow.db").exists():
        shutil.copy(empty_database(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def config(folder: Path, *overrides: str) -> SweepConfig:
    return parse(SPACE, [f"storage={folder}/sweeps", f"tracking.uri={database(folder)}", *overrides])


def sweep(folder: Path, *overrides: str, resume: bool = False, drawn: bool = False) -> Any:
    """Run a small sweep. With `drawn`, for tests that look at its outputs, it does everything that a sweep does.

    Otherwise its report is not written, the notebook's figure is not drawn, which takes 8 s, and events are sent to
    MLflow by a thread instead of a process, whose imports would take 5 s of two cores. One trial runs at a time unless
    `overrides` say otherwise, because starting a second worker takes more seconds than all trials.
    """
    return run_quietly(config(folder, ONE_WORKER, *overrides), folder, resume=resume, drawn=drawn)


def run_quietly(config: SweepConfig, folder: Path, *, resume: bool = False, drawn: bool = False) -> Any:
    """Run a sweep of any configuration as `sweep` does. Its output is appended to `folder`/log."""
    from sender_thread import SenderThread

    from msae_sweep.sweep import run
    from msae_sweep.track import tracker

    with open(folder / "log", "a") as log, pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr(run, "_write_report", lambda folder, console: None)
            patch.setattr(run, "training_figure", lambda histories: b"")
            patch.setattr(tracker, "SenderProcess", SenderThread)
        return run.run(config, resume=resume, command="test", console=Console(file=log, width=200))


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without the values that depend on the clock."""
    stripped = json.loads(json.dumps(summary))
    stripped.pop("seconds")
    for block in stripped["blocks"].values():
        for trial in block["trials"]:
            trial.pop("seconds")
            trial["metrics"].pop("samples_per_second", None)
    return stripped
