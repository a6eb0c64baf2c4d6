"""Tests of a cluster's tracking server: `mlflow server` on PostgreSQL, with artifacts in an S3 store."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servers import S3, Mlflow, Postgres, in_environment, wait_for
from small_sweep import CONFIG_YAML, INPUT_DIM, Store, assert_whole, manifest, params, send, start, write_model

from msae_sweep.paths import StoragePath
from msae_sweep.sae import model_file

pytestmark = pytest.mark.slow
if reason := Postgres.why_not() or S3.why_not():
    pytest.skip(reason, allow_module_level=True)

EPOCHS = 30


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with Postgres() as database:
        yield database


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with S3(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture(scope="module")
def server(database: Postgres, store: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    folder = tmp_path_factory.mktemp("mlflow")
    keys = {**store.environment(), "MLFLOW_S3_ENDPOINT_URL": store.endpoint}
    with Mlflow(folder, database.uri, artifacts=f"{store.bucket}/mlflow", environment=keys, workers=2) as server:
        yield server


def test_artifacts_reach_the_store_through_the_server_alone(server, store, tmp_path, monkeypatch):
    import mlflow.pytorch

    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
    report = send(tmp_path / "sweep", server.uri)
    assert (report.pending, report.refused) == (0, 0)
    assert_whole(Store(server.uri))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    x = torch.randn(3, INPUT_DIM, generator=torch.Generator().manual_seed(1))
    ours = model_file.load(tmp_path / "sweep/trials/block5-000/model.pt").standardised()
    torch.testing.assert_close(mlflow.pytorch.load_model("models:/msae-block5@champion")(x), ours(x))
    with in_environment(store.environment()):
        objects = {file: file.read() for file in (StoragePath(store.bucket) / "mlflow").files(recursive=True)}
    assert {"sweep.yaml", "summary.json", "msae_block5.pt"} <= {file.name for file in objects}
    assert not [file for file, content in objects.items() if store.secret.encode() in content]


def tell_at_once(folder: Path, uri: str, sweep_id: str, n_trials: int, disturb=lambda epoch, tracker: None):
    """Report trials that run side by side, one epoch of all of them at a time, and return the sender's report."""
    tracker = start(folder, uri, sweep_id=sweep_id)
    tracker.sweep_started(name=sweep_id, params={}, tags={}, config_yaml=CONFIG_YAML, datasets={5: manifest(5)})
    names = [f"block5-{i:03d}" for i in range(n_trials)]
    for name in names:
        tracker.trial_started(trial_id=name, block=5, params=params(5))
    for epoch in range(1, EPOCHS + 1):
        disturb(epoch, tracker)
        for i, name in enumerate(names):
            point = {"epoch": epoch, "time_ms": 1_700_000_000_000 + epoch, "objective": i + epoch / EPOCHS}
            tracker.metrics(trial_id=name, points=[point | {f"r2_k{k}": 0.1 for k in (16, 32, 64, 128)}])
    for i, name in enumerate(names):
        model = folder / "trials" / name / "model.pt"
        write_model(model, seed=i)
        best = {"epoch": EPOCHS, "objective": i + 1.0}
        tracker.trial_ended(trial_id=name, status="completed", reason="epochs", best=best, model_file=model)
    tracker.sweep_ended(status="completed", artifacts=[], champions={}, metrics={})
    return tracker.close(timeout_seconds=240)


def assert_all_there_once(uri: str, sweep_id: str, n_trials: int) -> None:
    store = Store(uri, sweep_id)
    assert len(store.runs) == 1 + n_trials
    assert store.sweep.info.status == "FINISHED"
    for i in range(n_trials):
        name = f"block5-{i:03d}"
        run = store.trial(name)
        history = store.client.get_metric_history(run.info.run_id, "objective")
        assert [(m.step, m.value) for m in history] == [(e, i + e / EPOCHS) for e in range(1, EPOCHS + 1)]
        assert run.data.tags["status"] == "completed"
        assert [str(model.status) for model in store.models(name)] == ["READY"]


def test_sixteen_trials_at_once_are_all_there_once(server, tmp_path):
    report = tell_at_once(tmp_path / "sweep", server.uri, "sixteen", 16)
    assert (report.pending, report.refused) == (0, 0), report
    assert_all_there_once(server.uri, "sixteen", 16)


def test_a_database_that_is_killed_and_comes_back_misses_nothing_and_doubles_nothing(server, database, tmp_path):
    def disturb(epoch, tracker):
        if epoch == EPOCHS // 3:
            wait_for(lambda: tracker.status.sent > 4, 60, "something is sent")
            database.kill()
        if epoch == EPOCHS // 2:
            wait_for(lambda: tracker.status.last_error, 60, "the sender notices")
            database.start()

    report = tell_at_once(tmp_path / "sweep", server.uri, "database-killed", 4, disturb)
    assert (report.pending, report.refused) == (0, 0), report
    assert_all_there_once(server.uri, "database-killed", 4)
