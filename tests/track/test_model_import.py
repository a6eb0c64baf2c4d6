"""Tests that an imported model is in MLflow like a trial's: comparable, loadable, and a version beside the champion."""

import json
import sys

import mlflow
import numpy as np
import pytest
import torch
from small_sweep import CONFIG_YAML, EXPERIMENT, SWEEP_ID, Store, send, write_model

import msae_sweep as ms
from msae_sweep.cli import main
from msae_sweep.errors import TrackingError
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.model_file import ModelFile
from msae_sweep.track.connection import connect
from msae_sweep.track.model_import import ModelImport, register_import

METRICS = {"r2_k2": 0.3, "r2_k4": 0.4, "r2_mean": 0.35, "objective": 0.35, "dead_ratio": 0.1}


@pytest.fixture
def what(tmp_path) -> ModelImport:
    file = write_model(tmp_path / "notebook" / "msae_block5.pt", seed=9)
    return ModelImport(file, 5, "import-msae_block5", METRICS, {"imported_from": "/x/msae_block5.pt"})


def test_it_becomes_a_version_beside_the_champion_and_is_the_same_model(uri, tmp_path, what):
    send(tmp_path / "sweep", uri)
    imported = register_import(what, tracking_uri=uri, experiment=EXPERIMENT)
    assert (imported.model, imported.version) == ("msae-block5", "2")
    client = connect(uri)
    assert client.get_model_version_by_alias("msae-block5", "champion").version in (1, "1")
    version = client.get_model_version("msae-block5", "2")
    assert version.tags["imported_from"] == "/x/msae_block5.pt"
    assert version.tags["r2_k4"] == "0.4"
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    expected = what.file.standardised()(x).detach()
    torch.testing.assert_close(ms.load("models:/msae-block5/2", tracking_uri=uri).reconstruct(x), expected)
    mlflow.set_tracking_uri(uri)
    try:
        torch.testing.assert_close(mlflow.pytorch.load_model("models:/msae-block5/2")(x), expected)
    finally:
        mlflow.set_tracking_uri(None)


def test_its_run_has_a_trials_params_and_metrics(uri, tmp_path, what):
    imported = register_import(what, tracking_uri=uri, experiment=EXPERIMENT)
    run = connect(uri).get_run(imported.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "block": "5",
        "input_dim": "8",
        "hidden_dim": "24",
        "k_levels": "[2, 4]",
        "weighting": "uniform",
        "expansion_factor": "3",
    }
    assert run.data.metrics == METRICS | {f"best_{key}": value for key, value in METRICS.items()}
    assert run.data.tags["status"] == "completed"


def test_repeating_it_adds_nothing_and_another_model_adds_a_version(uri, tmp_path, what):
    first = register_import(what, tracking_uri=uri, experiment=EXPERIMENT)
    assert register_import(what, tracking_uri=uri, experiment=EXPERIMENT) == first
    client = connect(uri)
    assert len(client.get_metric_history(first.run_id, "r2_k2")) == 1
    other = what._replace(file=write_model(tmp_path / "b.pt", seed=10))
    second = register_import(other, tracking_uri=uri, experiment=EXPERIMENT)
    assert (second.version, second.run_id == first.run_id) == ("2", False)
    assert len(client.search_model_versions("name = 'msae-block5'")) == 2


def test_the_alias_moves_only_where_it_is_asked_for(uri, what):
    register_import(what, tracking_uri=uri, experiment=EXPERIMENT)
    client = connect(uri)
    assert not client.get_registered_model("msae-block5").aliases
    register_import(what, tracking_uri=uri, experiment=EXPERIMENT, champion=True)
    assert client.get_model_version_by_alias("msae-block5", "champion").version in (1, "1")


def test_it_is_nested_in_the_sweep_that_it_is_compared_with_and_does_not_count_as_one_of_its_trials(
    uri, tmp_path, what
):
    send(tmp_path / "sweep", uri)
    sweep_run = Store(uri).sweep.info.run_id
    imported = register_import(what, tracking_uri=uri, experiment=EXPERIMENT, sweep_id=SWEEP_ID)
    assert connect(uri).get_run(imported.run_id).data.tags["mlflow.parentRunId"] == sweep_run
    # When the sweep is sent again later, the imported run must not be taken for a duplicate of the sweep's own run.
    send(tmp_path / "again", uri)
    assert connect(uri).get_run(imported.run_id).info.lifecycle_stage == "active"
    with pytest.raises(TrackingError, match="has no run of that sweep"):
        register_import(what, tracking_uri=uri, experiment=EXPERIMENT, sweep_id="unknown")


def test_a_silent_server_is_one_line(what):
    with pytest.raises(TrackingError, match="the model was not registered: no answer") as caught:
        register_import(what, tracking_uri="http://u:secret@127.0.0.1:9", experiment=EXPERIMENT)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_it_goes_through_a_server(server, what):
    imported = register_import(what, tracking_uri=server.uri, experiment="elsewhere")
    sae = ms.load(f"models:/msae-block5/{imported.version}", tracking_uri=server.uri)
    assert torch.equal(sae.W_dec, what.file.model.W_dec)


def command_line(monkeypatch, *arguments: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["msae-sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Model file of the notebook, in a working folder with activations, where no tracking URI is set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file = write_model(tmp_path / "msae_block5.pt", seed=9)
    (tmp_path / "activations" / "block5").mkdir(parents=True)
    rows = np.random.default_rng(0).normal(size=(400, 8)) * file.std + file.mean
    np.save(tmp_path / "activations" / "block5" / "chunk_0000.npy", rows.astype("f4"))
    return file


def test_the_command_measures_and_registers(uri, tmp_path, notebook, monkeypatch, capsys):
    command = ["import", "msae_block5.pt", "--data", "activations", "--tracking-uri", uri]
    assert not command_line(monkeypatch, *command)
    out = capsys.readouterr().out
    assert "registered: models:/msae-block5/1" in out
    client = connect(uri)
    version = client.get_model_version("msae-block5", "1")
    r2 = ms.load("msae_block5.pt").evaluate(np.load("activations/block5/chunk_0000.npy")).r2
    measured = client.get_run(version.run_id).data.metrics
    assert measured["r2_k4"] == measured["best_r2_k4"] == pytest.approx(r2[3], abs=1e-5)
    assert version.tags["measured_on"] == f"400 all rows of {tmp_path}/activations/block5"


def test_another_name_keeps_it_apart_from_the_sweeps_models(uri, notebook, monkeypatch, capsys):
    command = ["import", "msae_block5.pt", "--data", "activations", "--tracking-uri", uri, "--model-name"]
    assert not command_line(monkeypatch, *command, "notebook")
    assert "registered: models:/notebook-block5/1" in capsys.readouterr().out
    assert command_line(monkeypatch, *command, "a/b") == 2
    assert "tracking.model_name" in capsys.readouterr().err


def test_beside_a_sweep_it_is_measured_on_the_sweeps_validation_rows(uri, tmp_path, notebook, monkeypatch):
    folder = tmp_path / "sweep"
    send(folder, uri)
    data = f"data: {{path: {tmp_path}/activations, val_split: 0.25}}\n"
    (folder / "sweep.yaml").write_text(f"{CONFIG_YAML}{data}tracking: {{uri: '{uri}', experiment: {EXPERIMENT}}}\n")
    (folder / "identity.json").write_text(json.dumps({"sweep_id": SWEEP_ID}))
    assert not command_line(monkeypatch, "import", "msae_block5.pt", "--sweep", folder, "--champion")
    client = connect(uri)
    version = client.get_model_version_by_alias("msae-block5", "champion")
    run = client.get_run(version.run_id)
    assert run.data.tags["mlflow.parentRunId"] == Store(uri).sweep.info.run_id
    assert " validation rows of " in run.data.tags["measured_on"]


WRONG = {
    "no such file": (["none.pt", "--data", "activations"], "none.pt: no such model file"),
    "a folder": (["activations", "--data", "activations"], "activations: is a folder; give a model file"),
    "no block": (["model.pt", "--data", "activations"], "--block: the name of model.pt contains no block number"),
    "no data": (["msae_block5.pt"], "--data: missing; give activations, or give --sweep"),
    "no sweep": (["msae_block5.pt", "--sweep", "activations"], "activations: no sweep.yaml there"),
    "a missing block": (["model.pt", "--block", "7", "--data", "activations"], "no block 7 in activations; found 5"),
    "another width": (["wide.pt", "--block", "5", "--data", "activations"], "wide.pt takes rows of width 9"),
    "a file store": (["msae_block5.pt", "--data", "activations", "--tracking-uri", "mlruns"], "write sqlite:///"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_exit_code_2_and_no_store(tmp_path, notebook, monkeypatch, capsys, case):
    model_file.save(notebook, "model.pt")
    model_file.save(ModelFile(MSAE(9, 12, [2]), np.zeros(9), np.ones(9), {}), "wide.pt")
    arguments, says = WRONG[case]
    assert command_line(monkeypatch, "import", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1, error
    assert not (tmp_path / "mlflow.db").exists()
