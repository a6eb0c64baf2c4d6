"""A small sweep of planted data, in the tests' own process and Ray."""

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
    """Tracking URI of a SQLite file in `folder`, empty unless it is there."""
    if not (folder / "mlflow.db").exists():
        shutil.copy(empty_database(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


def config(folder: Path, *overrides: str) -> SweepConfig:
    return parse(SPACE, [f"storage={folder}/sweeps", f"tracking.uri={database(folder)}", *overrides])


def sweep(folder: Path, *overrides: str, resume: bool = False, drawn: bool = False) -> Any:
    """Run one. Where a test looks at what it leaves (`drawn`) it does all that a sweep does.

    Elsewhere its report is not written and the notebook's figure not drawn, which takes 8 s, and MLflow is sent what
    happened by a thread instead of a process, which would import for 5 s of two cores. One trial runs at a time unless
    `overrides` say otherwise: a second worker costs more seconds to start than all trials take.
    """
    return run_quietly(config(folder, ONE_WORKER, *overrides), folder, resume=resume, drawn=drawn)


def run_quietly(config: SweepConfig, folder: Path, *, resume: bool = False, drawn: bool = False) -> Any:
    """Run a sweep as `sweep` describes, from any configuration; what it prints is appended to `folder`/log."""
    from msae_sweep.sweep import run
    from msae_sweep.track import tracker
    from msae_sweep.track.sender_process import SenderThread

    with open(folder / "log", "a") as log, pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr(run, "_write_report", lambda folder, console: None)
            patch.setattr(run, "training_figure", lambda histories: b"")
            patch.setattr(tracker, "SenderProcess", SenderThread)
        return run.run(config, resume=resume, command="test", console=Console(file=log, width=200))


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what clocks say."""
    stripped = json.loads(json.dumps(summary))
    stripped.pop("seconds")
    for block in stripped["blocks"].values():
        for trial in block["trials"]:
            trial.pop("seconds")
            trial["metrics"].pop("samples_per_second", None)
    return stripped
