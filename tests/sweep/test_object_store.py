"""Tests that a sweep with activations and folder in an object store has the same result as on a disk, killed or not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_sweep import database

from msae_sweep.errors import DataError, SweepError
from msae_sweep.paths import StoragePath
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sweep_folder import driver_lock
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.store_sync import StoreSync, fetch
from msae_sweep.track import journal

SPACE = """
name: small
data: {path: DATA}
space:
  learning_rate: {loguniform: [1e-3, 3e-2]}
  weighting: {choice: [uniform, reverse]}
training: {k_levels: [2, 4, 8], batch_size: 128, epochs: 12, aux_k: 8, expansion_factor: 4,
           early_stopping_patience: null}
search: {trials_per_block: 4, seed: 0}
asha: {grace_epochs: 1, reduction_factor: 2}
resources: {checkpoint_seconds: 0.5}
"""


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "activations"
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((32, 16))
    for block in (5, 20):
        (folder / f"block{block}").mkdir(parents=True)
        for chunk in range(3):
            codes = rng.random((1500, 32)) * (rng.random((1500, 32)) < 0.1)
            x = codes @ directions + 0.02 * rng.standard_normal((1500, 16))
            np.save(folder / f"block{block}" / f"chunk_{chunk}.npy", x.astype(np.float32))
    return folder


def launch(folder: Path, command: str, *arguments: str) -> subprocess.Popen:
    with open(folder / "out", "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "msae_sweep", command, *arguments,
             "--tracking-uri", database(folder)],
            cwd=folder, stdout=out, stderr=out, start_new_session=True,
            # Start a separate Ray instead of using the test session's.
            env={**os.environ, "RAY_ADDRESS": "local"},
        )  # fmt: skip


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary without the values that depend on the clock or on locations."""
    stripped = json.loads(json.dumps(summary))
    stripped.pop("seconds")
    for block in stripped["blocks"].values():
        block["data"].pop("key")
        block["data"].pop("source")
        for trial in block["trials"]:
            trial.pop("seconds")
            trial["metrics"].pop("samples_per_second", None)
    return stripped


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what MLflow has of every trial: its status, all metrics of every epoch, and whether its model is there."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    found = {}
    for run in client.search_runs([experiment.experiment_id], max_results=100):
        if "mlflow.parentRunId" not in run.data.tags:
            continue
        history = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
            if name != "samples_per_second" and not name.endswith("samples_per_second")
        }
        assert run.info.run_name not in found, "a trial has two runs"
        found[run.info.run_name] = {
            "status": run.data.tags["status"],
            "metrics": {name: sorted(values) for name, values in history.items()},
            "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        }
    return found


@pytest.fixture(scope="module")
def on_disk(activations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    (folder / "space.yaml").write_text(SPACE.replace("DATA", str(activations)))
    process = launch(folder, "run", "space.yaml", "--storage", str(folder / "sweeps"))
    assert process.wait(timeout=240) == 0, (folder / "out").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def uploaded(object_store, activations) -> str:
    there = StoragePath(object_store.bucket) / "data"
    for file in StoragePath(activations).files(recursive=True):
        (there / file.relative_to(StoragePath(activations)).as_posix()).write(file.read())
    return there.uri


@pytest.mark.slow
def test_a_sweep_in_a_store_killed_and_resumed_elsewhere_ends_as_the_undisturbed_one_on_a_disk(
    object_store, uploaded, on_disk, tmp_path
):
    (tmp_path / "space.yaml").write_text(SPACE.replace("DATA", uploaded))
    sweep = StoragePath(object_store.bucket) / "killed" / "small"
    process = launch(tmp_path, "run", "space.yaml", "--storage", f"{object_store.bucket}/killed")

    def ended() -> set[str]:
        records = [file for file in sweep.files(recursive=True) if file.name == "trial.json"]
        return {file.parent.name for file in records if b'"status": "completed"' in file.read()}

    until = time.monotonic() + 200
    while not ended():
        assert process.poll() is None, (tmp_path / "out").read_text()[-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(ended()) < 8

    resumed = launch(tmp_path, "resume", str(sweep))
    assert resumed.wait(timeout=240) == 0, (tmp_path / "out").read_text()[-3000:]
    summary = json.loads((sweep / "summary.json").read())
    assert results(summary) == results(json.loads((on_disk / "sweeps/small/summary.json").read_text()))
    assert runs(tmp_path) == runs(on_disk)

    left = {file.relative_to(sweep).as_posix(): file.read() for file in sweep.files(recursive=True)}
    for name in ("sweep.yaml", "results/reconstruction.json", "figures/msae_training.png", "models/msae_block5.pt"):
        assert name in left
    assert not any(name.endswith("state.pt") for name in left)

    # Neither the key nor the secret may be in anything that the sweep wrote or printed.
    said = (tmp_path / "out").read_bytes() + b"".join(left.values())
    said += b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    for secret in object_store.secrets:
        assert secret.encode() not in said
    assert re.search(rb"results: s3://bucket/killed/small", said)


def test_what_a_store_has_is_the_sweep_as_it_stood_at_some_moment(object_store, tmp_path):
    """Journal lines are in the store before the record that follows from them, in pieces that make up the whole."""
    shared = StoragePath(object_store.bucket) / "moments" / "sweep"
    folder = SweepFolder(tmp_path / "copy", shared)
    folder.create()
    with folder.lock_and_sync():
        written = journal.Journal(folder.path)
        for i in range(30):
            written.append("metrics", trial_id="t", points=[i])
            folder.write_text(folder.path / "trials" / f"t{i % 3}" / "trial.json", json.dumps({"upto": i}))
            if i % 7 == 0:
                folder.flush()
                assert folder.n_sendable(written.seq) == i + 1
                copy = tmp_path / f"copy{i}"
                copy.mkdir()
                fetch(shared, copy)
                assert [entry.event["points"] for entry in journal.read(copy)] == [[n] for n in range(i + 1)]
                assert json.loads((copy / "trials" / f"t{i % 3}" / "trial.json").read_text()) == {"upto": i}
        written.close()
    again = SweepFolder.at(shared.uri)
    assert journal.Journal(again.path).seq == 30


def test_a_driver_sees_what_the_one_before_it_wrote_after_it_looked(object_store, tmp_path):
    shared = StoragePath(object_store.bucket) / "successor" / "sweep"
    late = SweepFolder.at(shared.uri)
    first = SweepFolder(tmp_path, shared)
    with first.lock_and_sync():
        first.write_text(tmp_path / "sweep.yaml", "name: sweep")
    assert not late.exists()
    with late.lock_and_sync():
        assert late.exists()


def test_a_file_that_is_removed_goes_from_the_store_too(object_store, tmp_path):
    shared = StoragePath(object_store.bucket) / "removed" / "sweep"
    folder = SweepFolder(tmp_path, shared)
    with folder.lock_and_sync():
        folder.write_text(tmp_path / "trials/a/state.pt", "x")
        folder.flush()
        assert (shared / "trials/a/state.pt").is_file()
        folder.remove(tmp_path / "trials/a/state.pt")
    assert not (shared / "trials/a/state.pt").exists()


def test_a_store_that_fails_for_a_while_loses_nothing_and_one_that_stays_away_ends_the_sweep(
    object_store, tmp_path, monkeypatch
):
    shared = StoragePath(object_store.bucket) / "failing" / "sweep"
    real, failing = StoragePath.write, [True]

    def write(place: StoragePath, content: bytes) -> None:
        if failing[0]:
            raise OSError(f"{place}: the store is away")
        real(place, content)

    monkeypatch.setattr(StoragePath, "write", write)
    monkeypatch.setattr("msae_sweep.sweep_folder.store_sync.time.sleep", lambda seconds: failing.__setitem__(0, False))
    (tmp_path / "file").write_text("kept")
    mirror = StoreSync(tmp_path, shared)
    mirror.changed(tmp_path / "file")
    mirror.flush()
    assert (shared / "file").read() == b"kept"

    failing[0] = True
    monkeypatch.setattr("msae_sweep.sweep_folder.store_sync.PATIENCE_SECONDS", -1.0)
    mirror.changed(tmp_path / "file")
    with pytest.raises(Exception, match="the store is away; files not yet uploaded are lost; resume when"):
        mirror.flush()
    mirror.close()


def test_a_sweep_in_a_store_has_one_driver_and_a_dead_one_is_told_from_a_living(object_store, tmp_path, monkeypatch):
    place = StoragePath(object_store.bucket) / "leased" / "sweep" / "journal" / "driver.json"
    monkeypatch.setattr(driver_lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(driver_lock, "STALE_SECONDS", 1.0)
    elsewhere = f"process {os.getpid()} on another-machine"
    with driver_lock.hold_lock(place):
        wait_for(place.exists)
        first = place.read()
        wait_for(lambda: place.read() != first)
        monkeypatch.setattr(driver_lock, "_is_dead_here", lambda driver: False)
        with (
            pytest.raises(SweepError, match=r"sweep: this sweep is being run by process \d+"),
            driver_lock.hold_lock(place),
        ):
            pass
    assert not place.exists()
    # The driver was killed on another machine: its file remains and does not change.
    place.write(json.dumps({"driver": elsewhere, "beat": "1"}).encode())
    started = time.monotonic()
    with driver_lock.hold_lock(place):
        assert time.monotonic() - started >= 1.0
        wait_for(lambda: elsewhere.encode() not in place.read())
    monkeypatch.undo()
    # The driver was killed on this machine, which is known at once.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    place.write(json.dumps({"driver": f"process {gone.pid} on {socket.gethostname()}", "beat": "1"}).encode())
    started = time.monotonic()
    with driver_lock.hold_lock(place):
        assert time.monotonic() - started < driver_lock.STALE_SECONDS / 2


def wait_for(condition) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_model_is_found_in_a_store_as_on_a_disk(object_store, tmp_path):
    from msae_sweep.models.find import find

    sae = MSAE(4, 8, [1, 2])
    file = model_file.ModelFile(sae, np.zeros(4, np.float32), np.ones(4, np.float32), {})
    model_file.save(file, tmp_path / "msae_block5.pt")
    model_file.save_safetensors(file, tmp_path / "msae_block5.safetensors")
    sweep = StoragePath(object_store.bucket) / "models of a sweep"
    for path in tmp_path.iterdir():
        (sweep / "models" / path.name).write(path.read_bytes())
    for what in (sweep, sweep / "models", sweep / "models/msae_block5.pt", sweep / "models/msae_block5.safetensors"):
        found = find(what.uri)
        assert found.block == 5
        assert found.where.startswith("s3://bucket/models of a sweep/models/msae_block5.")
        assert torch.equal(found.file.model.W_dec, sae.W_dec)
    with pytest.raises(DataError, match=r"s3://bucket/none: no such model file"):
        find("s3://bucket/none")
