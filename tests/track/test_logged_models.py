"""Tests that a logged model is the trial's model: in a fresh process, for any number of rows, and in the registry."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_sweep import SWEEP_ID, Store, best, params, send, start, tell_end, tell_start, tell_trial, write_model

from msae_sweep.sae import model_file

FRESH_PROCESS = """
import sys, warnings
import numpy as np, torch, mlflow
uri, rows, *models = sys.argv[1:]
mlflow.set_tracking_uri(uri)
x = np.load(rows)
for i, model in enumerate(models):
    np.save(f"{rows}.torch{i}.npy", mlflow.pytorch.load_model(model)(torch.from_numpy(x)).detach().numpy())
    # As on a machine with a GPU: the exported graph has to be asked for on the CPU, where it is.
    torch.cuda.is_available = lambda: True
    np.save(f"{rows}.pyfunc{i}.npy", mlflow.pyfunc.load_model(model).predict(x))
    torch.cuda.is_available = lambda: False
assert not any(name.startswith("msae_sweep") for name in sys.modules), "the model needs our package"
"""


def load_in_fresh_process(uri, x, folder, *models):
    rows = folder / "x.npy"
    np.save(rows, x)
    command = [sys.executable, "-c", FRESH_PROCESS, uri, str(rows), *models]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    kinds = [f"{kind}{i}" for i in range(len(models)) for kind in ("torch", "pyfunc")]
    return {kind: np.load(f"{rows}.{kind}.npy") for kind in kinds}


def test_in_a_fresh_process_it_gives_what_our_own_file_gives(uri, tmp_path):
    """The model is loaded by run, by model id and by the registry's alias, without msae_sweep and without pickle."""
    send(tmp_path / "sweep", uri)
    store = Store(uri)
    file = model_file.load(tmp_path / "sweep" / "trials" / "block5-000" / "model.pt")
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    expected = file.standardised()(torch.from_numpy(x)).detach().numpy()
    names = [f"runs:/{store.trial('block5-000').info.run_id}/model", "models:/msae-block5@champion"]
    names.append(f"models:/{store.models('block5-000')[0].model_id}")
    for output in load_in_fresh_process(uri, x, tmp_path, *names).values():
        np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 1000])
def test_it_takes_any_number_of_rows(tmp_path, n_rows):
    import mlflow.pytorch

    from msae_sweep.track.logged_models import save_model

    file = write_model(tmp_path / "model.pt")
    save_model(file, tmp_path / "logged")
    x = torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlflow.pytorch.load_model(str(tmp_path / "logged"))(x), file.standardised()(x))


def test_models_of_one_shape_share_an_export_and_keep_their_own_tensors(tmp_path):
    import mlflow.pytorch
    from mlflow.models import Model

    from msae_sweep.track import logged_models

    logged_models._kept_export.cache_clear()
    first, second = (write_model(tmp_path / f"{seed}.pt", seed=seed) for seed in (0, 1))
    for file, name in ((first, "a"), (second, "b")):
        logged_models.save_model(file, tmp_path / name, model_id=f"m-{name}", run_id=name)
    assert logged_models._kept_export.cache_info()[:2] == (1, 1), "the second one found the first one's export"
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    for file, name in ((first, "a"), (second, "b")):
        torch.testing.assert_close(mlflow.pytorch.load_model(str(tmp_path / name))(x), file.standardised()(x))
        assert Model.load(str(tmp_path / name)).model_id == f"m-{name}"
    assert not torch.equal(first.standardised()(x), second.standardised()(x))


def test_a_model_too_large_to_be_kept_is_exported_by_itself(tmp_path, monkeypatch):
    import mlflow.pytorch

    from msae_sweep.track import logged_models

    logged_models._kept_export.cache_clear()
    monkeypatch.setattr(logged_models, "MOST_BYTES_KEPT", 0)
    file = write_model(tmp_path / "model.pt")
    logged_models.save_model(file, tmp_path / "logged")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlflow.pytorch.load_model(str(tmp_path / "logged"))(x), file.standardised()(x))
    assert not logged_models._kept_export.cache_info().currsize


def test_requirements_are_written_without_a_look_at_all_that_is_installed(tmp_path, monkeypatch):
    import mlflow.utils.environment

    from msae_sweep.track import logged_models

    def check(requirements):
        pytest.fail("it was looked at")

    logged_models._kept_export.cache_clear()
    monkeypatch.setattr(mlflow.utils.environment, "warn_dependency_requirement_mismatches", check)
    logged_models.save_model(write_model(tmp_path / "model.pt"), tmp_path / "logged")
    assert mlflow.utils.environment.warn_dependency_requirement_mismatches is check
    required = (tmp_path / "logged" / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == ["mlflow", "torch", "numpy"]
    assert required[1] == f"torch=={torch.__version__.partition('+')[0]}"


def test_getting_ready_exports_a_model_once_and_says_nothing_of_a_failure(monkeypatch):
    from msae_sweep.track import logged_models

    exported = []

    def export(file, path):
        exported.append(path)
        raise RuntimeError("torch cannot do it here")

    logged_models.export_ahead.cache_clear()
    logged_models._kept_export.cache_clear()
    monkeypatch.setattr(logged_models, "_export", export)
    for _ in range(2):
        logged_models.export_ahead()
    assert len(exported) == 1
    logged_models.export_ahead.cache_clear()


@pytest.mark.parametrize("damage", ["no description of the tensors", "a part of another size"])
def test_a_graph_whose_archive_is_not_as_expected_is_exported_by_torch_for_every_model(damage, tmp_path, monkeypatch):
    import mlflow.pytorch

    from msae_sweep.track import logged_models

    logged_models._kept_export.cache_clear()
    export, exported = logged_models._export, []

    def changed(file, path):
        export(file, path)
        exported.append(path)
        if path.parent.name.startswith("msae-export-"):
            (graph,) = path.glob(logged_models.GRAPH)
            with zipfile.ZipFile(graph) as old:
                parts = {part: old.read(part) for part in old.infolist()}
            with zipfile.ZipFile(graph, "w") as new:
                for part, content in parts.items():
                    if damage.startswith("no") and part.filename.endswith("model_weights_config.json"):
                        continue
                    longer = damage.startswith("a part") and part.filename.endswith("weight_0")
                    new.writestr(part, content + b"more" if longer else content)

    monkeypatch.setattr(logged_models, "_export", changed)
    file = write_model(tmp_path / "model.pt")
    logged_models.save_model(file, tmp_path / "logged")
    assert exported[1:] == [tmp_path / "logged"]
    logged_models._kept_export.cache_clear()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlflow.pytorch.load_model(str(tmp_path / "logged"))(x), file.standardised()(x))


def test_the_attached_notebook_file_is_the_trials(uri, tmp_path):
    send(tmp_path / "sweep", uri)
    store = Store(uri)
    run_id = store.trial("block5-000").info.run_id
    attached = store.client.download_artifacts(run_id, "msae_block5.pt", str(tmp_path))
    assert Path(attached).read_bytes() == (tmp_path / "sweep/trials/block5-000/model.pt").read_bytes()


def test_a_model_shows_the_metrics_of_its_epoch_and_the_trials_params(uri, tmp_path):
    send(tmp_path / "sweep", uri)
    (model,) = Store(uri).models("block5-000")
    metrics = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    assert metrics["objective"] == (best("block5-000")["objective"], 5)
    assert metrics["r2_k4"] == (best("block5-000")["r2_k4"], 5)
    assert model.params == {key: str(value) for key, value in params(5).items()}


def test_a_sending_that_broke_off_in_the_middle_of_a_model_goes_on_with_it(uri, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    folder = tmp_path / "sweep"
    upload, failures = MlflowClient.log_model_artifacts, [ConnectionError("gone"), ConnectionError("gone")]

    def fails_twice(self, *arguments):
        upload(self, *arguments)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fails_twice)
    tracker = start(folder, uri)
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-001")
    assert tracker.close(timeout_seconds=60).pending == 0
    assert not failures
    (model,) = Store(uri).models("block5-001")
    assert str(model.status) == "READY"


def test_the_champion_is_a_version_of_its_trials_model_with_scores_as_tags(uri, tmp_path):
    send(tmp_path / "sweep", uri)
    store = Store(uri)
    version = store.client.get_model_version_by_alias("msae-block5", "champion")
    assert version.run_id == store.trial("block5-000").info.run_id
    assert version.tags["msae_sweep.sweep_id"] == SWEEP_ID
    assert version.tags["r2_k4"] == "0.51"
    assert store.sweep.data.tags["champion.block5"] == "block5-000"


def test_the_alias_goes_to_the_sweep_that_ended_last_and_older_versions_stay(uri, tmp_path):
    send(tmp_path / "a", uri)
    tracker = start(tmp_path / "b", uri, sweep_id="later")
    tell_start(tracker)
    tell_trial(tracker, tmp_path / "b", "block5-000")
    tell_end(tracker, tmp_path / "b")
    tracker.close(timeout_seconds=60)
    client = Store(uri).client
    assert client.get_model_version_by_alias("msae-block5", "champion").tags["msae_sweep.sweep_id"] == "later"
    assert len(client.search_model_versions("name = 'msae-block5'")) == 2


def test_nothing_is_registered_where_the_file_says_so(uri, tmp_path):
    folder = tmp_path / "sweep"
    tracker = start(folder, uri, register_models=False)
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-000")
    tell_end(tracker, folder)
    assert tracker.close(timeout_seconds=60).refused == 0
    assert not Store(uri).client.search_registered_models()


def test_a_sweep_with_a_name_of_its_own_leaves_the_other_champions_alone(uri, tmp_path):
    send(tmp_path / "real", uri)
    folder = tmp_path / "toy"
    tracker = start(folder, uri, sweep_id="toy", model_name="toy")
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-000")
    tell_end(tracker, folder)
    tracker.close(timeout_seconds=60)
    client = Store(uri).client
    assert client.get_model_version_by_alias("msae-block5", "champion").tags["msae_sweep.sweep_id"] == SWEEP_ID
    assert client.get_model_version_by_alias("toy-block5", "champion").tags["msae_sweep.sweep_id"] == "toy"
