import collections
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from notebook_module import NotebooksModule

from msae_sweep.errors import DataError
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE, geometric_median
from msae_sweep.sae.model_file import ModelFile


def random_file(seed: int = 0) -> ModelFile:
    torch.manual_seed(seed)
    model = MSAE(8, 24, [2, 4, 8], "reverse")
    model.pre_bias.data = torch.randn(8)
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=8).astype("f4"), rng.uniform(0.5, 2, 8).astype("f4")
    return ModelFile(model, mean, std, {"train_loss": [1.0, 0.5], "val_r2": {"r2_k2": [0.1, 0.2]}})


def test_the_notebooks_shape_has_2_097_408_parameters():
    assert sum(p.numel() for p in MSAE(256, 4096, [16, 32, 64, 128]).parameters()) == 2_097_408


def test_decoder_rows_start_at_unit_norm_and_the_encoder_equals_them():
    model = MSAE(16, 64, [4])
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(model.W_enc, model.W_dec)
    assert not model.pre_bias.any()


def test_each_level_equals_a_plain_topk_model_cut_from_the_same_weights():
    torch.manual_seed(0)
    model, x = MSAE(16, 64, [4, 8, 16]), torch.randn(50, 16)
    x_hats = model.reconstruct(x).x_hats
    for level, k in enumerate(model.k_levels):
        plain = MSAE(16, 64, [k])
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(x_hats[level], plain(x))
        torch.testing.assert_close(x_hats[level], model(x, k))


def test_a_code_has_at_most_k_latents_and_contains_the_smaller_codes():
    torch.manual_seed(0)
    model, x = MSAE(16, 64, [4, 8]), torch.randn(50, 16)
    small, large = model.encode(x, 4), model.encode(x, 8)
    assert ((large > 0).sum(dim=1) <= 8).all()
    assert torch.equal(large[small > 0], small[small > 0])


@pytest.mark.parametrize("k_levels", [[], [4, 2], [2, 2], [0, 4], [4, 65]])
def test_levels_must_ascend_within_the_dictionary(k_levels):
    with pytest.raises(ValueError, match="k_levels"):
        MSAE(16, 64, k_levels)


def test_given_parameters_are_the_models_own_and_nothing_is_drawn():
    drawn = MSAE(8, 24, [2])
    before = torch.get_rng_state()
    same = MSAE(**drawn.config, parameters=drawn.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert same.W_enc.data_ptr() == drawn.W_enc.data_ptr()
    assert [name for name, _ in same.named_parameters()] == [name for name, _ in drawn.named_parameters()]
    assert all(parameter.requires_grad for parameter in same.parameters())
    for wrong in (
        {},
        drawn.state_dict() | {"b_enc": torch.zeros(24)},
        drawn.state_dict() | {"W_dec": torch.zeros(8, 24)},
    ):
        with pytest.raises(ValueError, match=r"parameters: .* must be"):
            MSAE(8, 24, [2], parameters=wrong)


def test_projection_makes_the_gradient_orthogonal_to_its_decoder_row():
    torch.manual_seed(0)
    model = MSAE(16, 64, [4])
    model.W_dec.grad = torch.randn(64, 16)
    model.project_decoder_gradient_()
    torch.testing.assert_close((model.W_dec.grad * model.W_dec).sum(dim=1), torch.zeros(64), atol=1e-6, rtol=0)


def test_the_geometric_median_resists_an_outlier_that_moves_the_mean():
    torch.manual_seed(0)
    x = torch.randn(101, 4)
    x[0] = 1e6
    assert x.mean(dim=0).norm() > 1e3
    assert geometric_median(x).norm() < 1


@pytest.mark.parametrize("form", ["notebook", "safetensors"])
def test_a_saved_model_loads_to_identical_outputs(tmp_path, form):
    file, raw = random_file(), torch.randn(20, 8)
    path = tmp_path / ("msae_block5.pt" if form == "notebook" else "msae_block5.safetensors")
    save, load = {
        "notebook": (model_file.save, model_file.load),
        "safetensors": (model_file.save_safetensors, model_file.load_safetensors),
    }[form]
    save(file, path)
    loaded = load(path)
    assert torch.equal(loaded.standardised()(raw), file.standardised()(raw))
    assert loaded.model.config == file.model.config
    assert loaded.history == file.history


def test_the_model_file_has_the_notebooks_keys(tmp_path):
    model_file.save(random_file(), tmp_path / "m.pt")
    # The notebook's own code does the same. The file is ours, so unpickling it is safe.
    raw = torch.load(tmp_path / "m.pt", weights_only=False)
    assert set(raw) == {"model_state_dict", "config", "normalization", "history"}
    assert raw["config"] == {"input_dim": 8, "hidden_dim": 24, "k_levels": [2, 4, 8], "weighting": "reverse"}
    assert {key: (type(v), v.dtype) for key, v in raw["normalization"].items()} == {
        "mean": (np.ndarray, np.dtype("f4")),
        "std": (np.ndarray, np.dtype("f4")),
    }


@pytest.mark.parametrize("hidden_dim", [24, 8], ids=["wide", "square"])
def test_the_model_file_loads_strictly_into_the_notebooks_module_and_reconstructs_alike(tmp_path, hidden_dim):
    torch.manual_seed(1)
    model = MSAE(8, hidden_dim, [2, 4, 8], "uniform")
    model.W_enc.data += 0.1 * torch.randn(hidden_dim, 8)
    model.pre_bias.data = torch.randn(8)
    counts = np.arange(hidden_dim, dtype=np.float32)
    file = random_file()._replace(model=model, activation_counts=counts, total_samples=1000)
    model_file.save(file, tmp_path / "m.pt")
    raw = torch.load(tmp_path / "m.pt", weights_only=False)
    theirs = NotebooksModule(**raw["config"])
    theirs.load_state_dict(raw["model_state_dict"], strict=True)
    assert list(raw["model_state_dict"]) == ["b_pre", "W_enc", "W_dec", "activation_counts", "total_samples"]
    assert {tensor.dtype for tensor in raw["model_state_dict"].values()} == {torch.float32}
    assert theirs.activation_counts.tolist() == counts.tolist()
    assert theirs.total_samples.item() == 1000
    x = torch.randn(50, 8)
    for k in range(1, hidden_dim + 1):
        torch.testing.assert_close(theirs.reconstruct(x, k), model(x, k))
    again = model_file.load(tmp_path / "m.pt")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.model.state_dict().items())


def test_a_file_of_an_earlier_version_gives_the_same_model_without_counts(tmp_path):
    file = random_file()
    saved = foreign()
    saved["model_state_dict"] = dict(file.model.state_dict())
    torch.save(saved, tmp_path / "m.pt")
    loaded = model_file.load(tmp_path / "m.pt")
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in file.model.state_dict().items())
    assert (loaded.activation_counts, loaded.total_samples) == (None, 0)


@pytest.mark.parametrize("form", ["notebook", "safetensors"])
def test_counts_are_kept_and_no_counts_stay_none(tmp_path, form):
    path = tmp_path / ("m.pt" if form == "notebook" else "m.safetensors")
    save = model_file.save if form == "notebook" else model_file.save_safetensors
    load = model_file.load if form == "notebook" else model_file.load_safetensors
    save(random_file()._replace(activation_counts=np.full(24, 3, np.float32), total_samples=7), path)
    assert load(path).activation_counts.tolist() == [3.0] * 24
    assert load(path).total_samples == 7
    save(random_file(), path)
    assert (load(path).activation_counts, load(path).total_samples) == (None, 0)


def foreign(**changed: torch.Tensor) -> dict:
    """Return the same model as a class with torch Linears would save it, with NumPy's numbers in its history."""
    file = random_file()
    weights = file.model.state_dict()
    tensors = {
        "pre_bias": weights["pre_bias"],
        "encoder.weight": weights["W_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        "steps_since_fired": torch.ones(24),
    }
    history = collections.defaultdict(list)
    history["train_loss"] = [np.float64(1.0), np.float32(0.5)]
    history["val_r2"] = {"r2_k2": [np.float64(0.1), 0.2]}
    return {
        "model_state_dict": tensors | changed,
        "config": file.model.config,
        "normalization": {"mean": file.mean[None], "std": file.std.astype("f8")},
        "history": history,
    }


def test_a_notebooks_own_names_and_orientations_are_understood(tmp_path):
    raw = torch.randn(20, 8)
    expected = random_file()
    for rename in (lambda n: n, lambda n: f"_orig_mod.{n}", lambda n: n.replace("oder.weight", "")):
        saved = foreign()
        saved["model_state_dict"] = {rename(name): tensor for name, tensor in saved["model_state_dict"].items()}
        torch.save(saved, tmp_path / "m.pt")
        loaded = model_file.load(tmp_path / "m.pt")
        torch.testing.assert_close(loaded.standardised()(raw), expected.standardised()(raw))
        model_file.save_safetensors(loaded, tmp_path / "m.safetensors")  # this needs a history of plain numbers
        assert loaded.history == {"train_loss": [1.0, 0.5], "val_r2": {"r2_k2": [0.1, 0.2]}}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"encoder.bias": torch.ones(24)}, "encoder.bias is a bias on latents"),
        ({"decoder.bias": torch.ones(8)}, "cannot identify encoder, decoder and pre_bias among"),
        ({"encoder.weight": torch.ones(24, 9)}, "cannot identify encoder, decoder and pre_bias among"),
        ({"other": torch.ones(24, 8)}, "cannot identify encoder, decoder and pre_bias among"),
    ],
)
def test_tensors_that_could_mean_two_things_are_refused(tmp_path, changed, says):
    torch.save(foreign(**changed), tmp_path / "m.pt")
    with pytest.raises(DataError, match=says):
        model_file.load(tmp_path / "m.pt")


def test_a_latent_bias_of_zeros_is_no_bias(tmp_path):
    torch.save(foreign(b_enc=torch.zeros(24)), tmp_path / "m.pt")
    assert model_file.load(tmp_path / "m.pt").model.hidden_dim == 24


class Evil:
    def __reduce__(self):
        return (print, ("code from a model file ran",))


def test_threads_read_model_files_side_by_side(tmp_path):
    model_file.save(random_file(), tmp_path / "model.pt")
    with ThreadPoolExecutor(4) as threads:
        files = list(threads.map(model_file.load, [tmp_path / "model.pt"] * 200))
    assert all(torch.equal(file.model.W_dec, files[0].model.W_dec) for file in files)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model_state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"safely: it contains .*print"):
        model_file.load(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out


def test_a_file_of_something_else_is_refused_in_one_line(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.pt", "text.pt", "missing.pt"):
        with pytest.raises(DataError) as caught:
            model_file.load(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
        assert "weights_only" not in str(caught.value)  # torch's message advises to switch the safety off


def test_a_checkpoint_without_normalization_is_named_for_what_it_is(tmp_path):
    saved = foreign()
    del saved["normalization"]
    torch.save(saved, tmp_path / "msae_best.pt")
    with pytest.raises(
        DataError, match=r"msae_best\.pt: has no normalization, like the notebook's msae_best\.pt; give"
    ):
        model_file.load(tmp_path / "msae_best.pt")


def test_the_standardised_model_works_in_raw_units():
    file, raw = random_file(), torch.randn(20, 8)
    mean, std = torch.from_numpy(file.mean), torch.from_numpy(file.std)
    torch.testing.assert_close(file.standardised()(raw), file.model((raw - mean) / std) * std + mean)
