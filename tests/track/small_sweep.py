"""A small sweep that is reported to a tracker, and what a tracking store then holds of it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sender_thread import SenderThread

from msae_sweep.config import TrackingConfig, TrainingConfig
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.model_file import ModelFile
from msae_sweep.track.connection import connect
from msae_sweep.track.tracker import SyncReport, Tracker

EXPERIMENT = "study"
SWEEP_ID = "0123abcd"
INPUT_DIM = 8
CONFIG_YAML = "name: small\n"
STATUSES = {
    "block5-000": "completed",
    "block5-001": "stopped_early",
    "block20-000": "diverged",
    "block20-001": "failed",
}
EPOCHS = {"block5-000": 6, "block5-001": 3, "block20-000": 2, "block20-001": 0}
BEST_EPOCH = {"block5-000": 5, "block5-001": 3, "block20-000": 1}


def tracking(uri: str, **settings: Any) -> TrackingConfig:
    return TrackingConfig(uri=uri, experiment=EXPERIMENT, **settings)


def start(folder: Path, uri: str, *, sweep_id: str = SWEEP_ID, sending: Any = SenderThread, **settings: Any) -> Tracker:
    folder.mkdir(parents=True, exist_ok=True)
    # The sender runs in a thread, which tests can inspect, and which saves each of them the imports of another process.
    return Tracker.start(folder, tracking(uri, **settings), sweep_id=sweep_id, sending=sending)


def params(block: int) -> dict[str, Any]:
    return {"block": block, "input_dim": INPUT_DIM, "hidden_dim": 24, **TrainingConfig(seed=7).model_dump(mode="json")}


def manifest(block: int) -> dict[str, Any]:
    return {
        "key": f"{block:012x}",
        "block": block,
        "source": {"where": f"/data/block{block}", "rows": 1000, "dtype": "float16"},
        "input_dim": INPUT_DIM,
        "n_train": 900,
        "n_val": 100,
        "shards": {"train": [["train-00000.npy", 900]], "val": [["val-00000.npy", 100]]},
    }


def point(trial_id: str, epoch: int) -> dict[str, Any]:
    rise = 0.1 * epoch if epoch <= BEST_EPOCH[trial_id] else 0.05
    return {
        "epoch": epoch,
        "time_ms": 1_700_000_000_000 + epoch,
        "objective": rise,
        "r2_k4": rise + 0.01,
        "dead_ratio": 0.25,
        "learning_rate": 8e-4,
        "samples_seen": 900.0 * epoch,
    }


def best(trial_id: str) -> dict[str, Any]:
    if trial_id not in BEST_EPOCH:
        return {}
    return {key: value for key, value in point(trial_id, BEST_EPOCH[trial_id]).items() if key != "time_ms"}


def write_model(path: Path, seed: int = 0) -> ModelFile:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=INPUT_DIM).astype("f4"), rng.uniform(0.5, 2, INPUT_DIM).astype("f4")
    file = ModelFile(MSAE(INPUT_DIM, 24, [2, 4]), mean, std, {"train_loss": [1.0, 0.5]})
    path.parent.mkdir(parents=True, exist_ok=True)
    model_file.save(file, path)
    return file


def tell_start(tracker: Tracker, **changed: Any) -> None:
    tracker.sweep_started(
        name="small",
        params={"training.epochs": 6, "data.path": "/data", "space.learning_rate.kind": "loguniform"} | changed,
        tags={"git_commit": "c0ffee", "command": "msae-sweep run small.yaml", "config_digest": "123456789abc"},
        config_yaml=CONFIG_YAML,
        datasets={5: manifest(5), 20: manifest(20)},
    )


def block_of(trial_id: str) -> int:
    return int(trial_id.removeprefix("block").partition("-")[0])


def tell_trial(tracker: Tracker, folder: Path, trial_id: str, *, first_epoch: int = 1, clock_ms: int = 0) -> None:
    """Report a whole trial epoch by epoch. `clock_ms` shifts its times, as a resumed driver would."""
    tracker.trial_started(trial_id=trial_id, block=block_of(trial_id), params=params(block_of(trial_id)))
    for epoch in range(first_epoch, EPOCHS[trial_id] + 1):
        shifted = point(trial_id, epoch)
        tracker.metrics(trial_id=trial_id, points=[shifted | {"time_ms": shifted["time_ms"] + clock_ms}])
    status = STATUSES[trial_id]
    model = folder / "trials" / trial_id / "model.pt"
    if status in ("completed", "stopped_early"):
        write_model(model, seed=len(trial_id))
    tracker.trial_ended(
        trial_id=trial_id,
        status=status,
        reason=f"because {status}",
        best=best(trial_id),
        model_file=model if model.exists() else None,
    )


def tell_end(tracker: Tracker, folder: Path) -> None:
    for name in ("summary.json", "figures/training.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("content")
    tracker.sweep_ended(
        status="completed",
        artifacts=[folder / "summary.json", folder / "figures" / "training.png"],
        champions={5: "block5-000"},
        metrics={"block5/r2_k4": 0.51, "block5/objective": 0.5, "wall_seconds": 12.0},
    )


def tell(tracker: Tracker, folder: Path) -> None:
    """Report the whole sweep."""
    tell_start(tracker)
    for trial_id in STATUSES:
        tell_trial(tracker, folder, trial_id)
    tell_end(tracker, folder)


def send(folder: Path, uri: str) -> SyncReport:
    """Report the whole sweep, send it, and return the sender's report."""
    tracker = start(folder, uri)
    tell(tracker, folder)
    return tracker.close(timeout_seconds=60)


class Store:
    """Content of a tracking store for one sweep."""

    def __init__(self, uri: str, sweep_id: str = SWEEP_ID) -> None:
        self.client = connect(uri)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        self.runs = [
            run
            for run in (self.client.search_runs([experiment.experiment_id]) if experiment else [])
            if run.data.tags.get("msae_sweep.sweep_id") == sweep_id
        ]
        self.experiment = experiment

    @property
    def sweep(self) -> Any:
        (run,) = [run for run in self.runs if "msae_sweep.trial_id" not in run.data.tags]
        return run

    def trial(self, trial_id: str) -> Any:
        (run,) = [run for run in self.runs if run.data.tags.get("msae_sweep.trial_id") == trial_id]
        return run

    def epochs(self, trial_id: str, key: str = "objective") -> list[int]:
        history = self.client.get_metric_history(self.trial(trial_id).info.run_id, key)
        return sorted(metric.step for metric in history)

    def artifacts(self, run: Any, folder: str | None = None) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run.info.run_id, folder)}

    def models(self, trial_id: str) -> list[Any]:
        run_id = self.trial(trial_id).info.run_id
        return list(
            self.client.search_logged_models(
                [self.experiment.experiment_id], filter_string=f"source_run_id = '{run_id}'"
            )
        )


def assert_whole(store: Store) -> None:
    """Assert that every trial has one run under the sweep's, every epoch once, its status and at most one model."""
    assert len(store.runs) == 1 + len(STATUSES)
    for trial_id, status in STATUSES.items():
        run = store.trial(trial_id)
        assert run.data.tags["mlflow.parentRunId"] == store.sweep.info.run_id
        assert run.data.tags["status"] == status
        assert store.epochs(trial_id) == list(range(1, EPOCHS[trial_id] + 1))
        models = store.models(trial_id)
        assert [str(model.status) for model in models] == ["READY"] * (status in ("completed", "stopped_early"))
        assert [o.model_id for o in run.outputs.model_outputs] == [model.model_id for model in models]
    assert store.sweep.info.status == "FINISHED"
