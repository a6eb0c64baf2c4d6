"""Tests that a model comes out of MLflow unchanged by each of its names, and that the README's Python runs."""

import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from small_sweep import Store, send

import msae_sweep as ms
from msae_sweep.errors import TrackingError
from msae_sweep.sae import model_file
from msae_sweep.track.logged_models import fetch

README = Path(__file__).parents[2] / "README.md"


def test_every_uri_gives_the_trials_model(uri, tmp_path):
    send(tmp_path / "sweep", uri)
    store = Store(uri)
    run_id = store.trial("block5-000").info.run_id
    expected = model_file.load(tmp_path / "sweep" / "trials" / "block5-000" / "model.pt")
    names = [f"runs:/{run_id}", f"runs:/{run_id}/model", f"models:/{store.models('block5-000')[0].model_id}"]
    for name in [*names, "models:/msae-block5@champion", "models:/msae-block5/1"]:
        file, block, found_run = fetch(name, uri)
        assert (block, found_run) == (5, run_id)
        assert file.history == expected.history
        assert file.model.config == expected.model.config
        np.testing.assert_array_equal(file.mean, expected.mean)
        for key, tensor in expected.model.state_dict().items():
            assert torch.equal(file.model.state_dict()[key], tensor)
    assert ms.load("champion:5", tracking_uri=uri).block == 5


def test_from_a_server_too(server, tmp_path):
    send(tmp_path / "sweep", server.uri)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype("f4")
    expected = ms.load(tmp_path / "sweep" / "trials" / "block5-000" / "model.pt").reconstruct(x)
    sae = ms.load("models:/msae-block5@champion", tracking_uri=server.uri)
    np.testing.assert_array_equal(sae.reconstruct(x), expected)


def test_what_mlflow_has_not_is_one_line(uri, tmp_path):
    send(tmp_path / "sweep", uri)
    sweep_run = Store(uri).sweep.info.run_id
    wrong = {
        "models:/msae-block99@champion": "not found",
        "models:/msae-block5@nobody": "nobody not found",
        "models:/msae-block5/99": "not found",
        "models:/m-0123": "not found",
        "runs:/0123": "not found",
        f"runs:/{sweep_run}": "has no msae_block….pt; give the run of a finished trial",
        "models:/msae-block5": "must be models:/NAME@ALIAS",
    }
    for name, says in wrong.items():
        with pytest.raises(TrackingError) as caught:
            fetch(name, uri)
        assert says in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("code from a registered model ran",))


def test_a_run_whose_file_would_run_code_is_refused(uri, tmp_path, capsys):
    send(tmp_path / "sweep", uri)
    store = Store(uri)
    torch.save({"model_state_dict": Evil()}, tmp_path / "msae_block5.pt")
    store.client.log_artifact(store.trial("block5-000").info.run_id, str(tmp_path / "msae_block5.pt"))
    with pytest.raises(ms.errors.DataError, match="safely"):
        fetch("models:/msae-block5@champion", uri)
    assert "ran" not in capsys.readouterr().out


def test_the_readmes_python_runs(uri, tmp_path, monkeypatch):
    """Each block of Python in the README runs with files and a registry under the names that it uses."""
    send(tmp_path / "sent", uri)
    client = Store(uri).client
    client.create_registered_model("msae-block4")
    version = client.get_model_version_by_alias("msae-block5", "champion")
    client.create_model_version("msae-block4", version.source, version.run_id, model_id=version.model_id)
    client.set_registered_model_alias("msae-block4", "champion", "1")
    (tmp_path / "sweeps/leela-zero/models").mkdir(parents=True)
    model = (tmp_path / "sent/trials/block5-000/model.pt").read_bytes()
    (tmp_path / "sweeps/leela-zero/models/msae_block4.pt").write_bytes(model)
    (tmp_path / "activations/block4").mkdir(parents=True)
    rows = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float16)
    np.save(tmp_path / "activations/block4/chunk_0000.npy", rows)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    try:
        for block in blocks:
            # The small model has 24 latents, whereas the README's has 4096.
            exec(block.replace("k=32", "k=3").replace("k=16", "k=2"), names)
    finally:
        mlflow.set_tracking_uri(None)
    assert isinstance(names["sae"], ms.SAE)
    assert len(names["r2"]) == 4
