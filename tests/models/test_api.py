"""Tests that a model loads from wherever it is stored, and works on raw activations of any kind and shape."""

import numpy as np
import pytest
import torch
from model_files import example_model_file, raw_rows, sweep

import msae_sweep as ms
from msae_sweep.errors import MsaeSweepError
from msae_sweep.sae import model_file


@pytest.fixture
def sae(tmp_path) -> ms.SAE:
    model_file.save(example_model_file(), tmp_path / "msae_block7.pt")
    return ms.load(tmp_path / "msae_block7.pt")


def test_every_place_of_a_sweeps_model_gives_the_same_model(tmp_path, monkeypatch):
    folder = sweep(tmp_path / "sweeps" / "small")
    monkeypatch.chdir(tmp_path)
    x, expected = raw_rows(example_model_file(5)), example_model_file(5).standardised()
    places = ["sweeps/small", folder / "models", "sweeps/small/models/msae_block5.pt"]
    for place in [*places, "sweeps/small/models/msae_block5.safetensors"]:
        sae = ms.load(place, block=5)
        assert sae.block == 5
        np.testing.assert_array_equal(sae.reconstruct(x), expected(torch.from_numpy(x)).detach().numpy())


def test_a_trials_model_knows_its_block(tmp_path):
    (tmp_path / "trials" / "block5-003").mkdir(parents=True)
    path = tmp_path / "trials" / "block5-003" / "model.pt"
    model_file.save(example_model_file(), path)
    assert ms.load(path).block == 5


def test_the_only_model_of_a_folder_needs_no_block(tmp_path):
    assert ms.load(sweep(tmp_path, blocks=(20,))).block == 20


WRONG = {
    "no such file": (lambda f: f / "nowhere.pt", {}, "nowhere.pt: no such model file"),
    "a folder without models": (lambda f: f / "empty", {}, "empty: contains no models; give a sweep that has ended"),
    "a block too few": (lambda f: f / "sweep", {}, "has models of blocks 5, 20; choose one"),
    "a missing block": (lambda f: f / "sweep", {"block": 7}, "no model of block 7; found 5, 20"),
    "another block": (
        lambda f: f / "sweep/models/msae_block5.pt",
        {"block": 7},
        "is a model of block 5, not of block 7",
    ),
    "something else": (lambda f: f / "text.pt", {}, "text.pt: not a model file that can be read safely"),
    "safetensors without json": (lambda f: f / "alone.safetensors", {}, "not a safetensors model with its .json"),
    "no number": (lambda f: "champion:best", {}, "must be champion:BLOCK"),
    "another name": (
        lambda f: "champion:quickstart:5",
        {"tracking_uri": "http://127.0.0.1:9"},
        "models:/quickstart-block5@champion: cannot be loaded",
    ),
    "no MLflow": (lambda f: "models:/msae-block5@champion", {}, "mlflow.db: no such MLflow database"),
    "no server": (
        lambda f: "champion:5",
        {"tracking_uri": "http://127.0.0.1:9"},
        "models:/msae-block5@champion: cannot be loaded from http://127.0.0.1:9: no answer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_model_is_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    model_file.save_safetensors(example_model_file(), tmp_path / "alone.safetensors")
    (tmp_path / "alone.json").unlink()
    sweep(tmp_path / "sweep")
    what, options, says = WRONG[case]
    with pytest.raises(MsaeSweepError) as caught:
        ms.load(what(tmp_path), **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mlflow.db").exists()


def test_decode_of_encode_is_reconstruct_at_every_k(sae):
    x = raw_rows(sae.file)
    for k in (1, 2, 3, 8, 48, None):
        codes = sae.encode(x, k)
        assert codes.shape == (200, 48)
        assert ((codes > 0).sum(axis=1) <= (k or 8)).all()
        np.testing.assert_array_equal(sae.decode(codes), sae.reconstruct(x, k))


def test_it_works_in_raw_units_by_the_formula(sae):
    x, file = raw_rows(sae.file).astype(np.float64), sae.file
    W_enc, W_dec, pre_bias = (getattr(sae, name).double().numpy() for name in ("W_enc", "W_dec", "pre_bias"))
    pre_acts = np.maximum(((x - file.mean) / file.std - pre_bias) @ W_enc.T, 0)
    kth = np.sort(pre_acts, axis=1)[:, -4][:, None]
    z = np.where(pre_acts >= kth, pre_acts, 0)
    np.testing.assert_allclose(sae.encode(x, k=4), z, atol=1e-5)
    np.testing.assert_allclose(sae.reconstruct(x, k=4), (z @ W_dec + pre_bias) * file.std + file.mean, atol=1e-4)


def test_what_comes_out_is_of_the_kind_and_shape_that_went_in(sae):
    x = raw_rows(sae.file)
    whole = sae.encode(x)
    for dtype in (np.float16, np.float32, np.float64):
        assert sae.encode(x.astype(dtype)).dtype == np.float32
    np.testing.assert_array_equal(sae.encode(x.reshape(10, 20, 12)).reshape(200, 48), whole)
    assert sae.encode(x[0]).shape == (48,)
    assert sae.reconstruct(x[:0]).shape == (0, 12)
    tensor = torch.from_numpy(x).requires_grad_()
    assert torch.equal(sae.encode(tensor), torch.from_numpy(whole))
    assert not sae.encode(tensor).requires_grad
    readonly = x.copy()
    readonly.flags.writeable = False  # memory-mapped files are read-only like this
    np.testing.assert_array_equal(sae.encode(readonly), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_weights_follow_a_tensor_to_its_device(sae):
    x = torch.from_numpy(raw_rows(sae.file))
    there = sae.encode(x.cuda())
    assert there.device.type == sae.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), sae.encode(x))


def test_reconstruct_in_chunks_changes_nothing(sae, monkeypatch):
    from msae_sweep.models import api

    x = raw_rows(sae.file)
    whole = sae.reconstruct(x)
    monkeypatch.setattr(api, "CHUNK_ELEMENTS", 48 * 7)
    # A product of 7 rows may be summed in another order than one of 200, as MKL does on an AMD EPYC. Each value comes
    # from sums of 12 and of 8 terms, which are rounded to float32 relative to the largest value.
    rounding = (12 + 8) * np.finfo(np.float32).eps * np.abs(whole).max()
    np.testing.assert_allclose(sae.reconstruct(x), whole, rtol=0, atol=rounding)


def test_evaluate_takes_raw_rows(sae):
    x = raw_rows(sae.file)
    z = (x - sae.file.mean) / sae.file.std
    z_hat = (sae.reconstruct(x, k=4) - sae.file.mean) / sae.file.std
    r2 = 1 - ((z - z_hat) ** 2).sum() / ((z - z.mean(axis=0)) ** 2).sum()
    found = sae.evaluate(x)
    assert len(found.r2) == 8
    assert found.r2[3] == pytest.approx(r2, abs=1e-5)


def test_its_attributes_are_the_models(sae):
    assert (sae.input_dim, sae.hidden_dim, sae.k_levels, sae.weighting) == (12, 48, (2, 4, 8), "reverse")
    np.testing.assert_array_equal(sae.mean, sae.file.mean)
    np.testing.assert_array_equal(sae.std, sae.file.std)
    assert (sae.W_dec.shape, sae.W_enc.shape, sae.pre_bias.shape) == ((48, 12), (48, 12), (12,))
    assert sae.history["train_loss"] == [1.0, 0.5]
    assert "hidden_dim=48" in repr(sae)


@pytest.mark.parametrize("k", [0, 49])
def test_a_k_that_cannot_be_is_refused(sae, k):
    with pytest.raises(MsaeSweepError, match=f"k: {k} must be 1 to hidden_dim 48"):
        sae.encode(raw_rows(sae.file), k)


@pytest.mark.parametrize("shape", [(3, 11), (12, 3), ()])
def test_another_width_is_refused(sae, shape):
    with pytest.raises(MsaeSweepError, match="must end in 12"):
        sae.encode(np.zeros(shape))
    with pytest.raises(MsaeSweepError, match="must end in 48"):
        sae.decode(np.zeros(shape))


def test_a_channel_that_a_notebook_gave_std_0_standardises_to_0(tmp_path):
    file = example_model_file()
    file.std[3] = 0
    model_file.save(file, tmp_path / "m.pt")
    sae = ms.load(tmp_path / "m.pt")
    assert sae.std[3] == 1
    assert np.isfinite(sae.reconstruct(raw_rows(file))).all()
    model_file.save_safetensors(file, tmp_path / "m.safetensors")
    assert ms.load(tmp_path / "m.safetensors").std[3] == 1


@pytest.mark.parametrize("mean", [np.zeros(5, "f4"), np.full(12, np.nan, "f4")])
def test_statistics_that_do_not_fit_are_refused(tmp_path, mean):
    model_file.save(example_model_file()._replace(mean=mean), tmp_path / "m.pt")
    with pytest.raises(MsaeSweepError, match="must be 12 finite numbers"):
        ms.load(tmp_path / "m.pt")


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        ms.encode  # noqa: B018
