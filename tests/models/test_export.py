"""Tests that each format holds what its tool reads, and that the written files compute what the model does.

The other tools' arithmetic is repeated here in a few lines; `check_exports.py` runs the packages themselves.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import example_model_file, raw_rows, sweep
from safetensors.numpy import load_file

from msae_sweep.cli import main
from msae_sweep.errors import ConfigError
from msae_sweep.models.export import LOADERS, export, fold
from msae_sweep.models.find import FoundModel
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.model_file import ModelFile


def found(file: ModelFile | None = None) -> FoundModel:
    return FoundModel(file or example_model_file(), 5, "somewhere")


def top_k_relu(pre_acts: np.ndarray, k: int) -> np.ndarray:
    values, indices = torch.from_numpy(pre_acts).relu().topk(k, dim=-1)
    return torch.zeros(pre_acts.shape).scatter(-1, indices, values).numpy()


def as_saelens_does(folder: Path, a: np.ndarray) -> np.ndarray:
    config = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    sae_in = a - weights["b_dec"] * config["apply_b_dec_to_input"]
    codes = top_k_relu(sae_in @ weights["W_enc"] + weights["b_enc"], config["k"])
    return codes @ weights["W_dec"] + weights["b_dec"]


def as_sparsify_does(folder: Path, a: np.ndarray) -> np.ndarray:
    config = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae.safetensors")
    pre_acts = (a - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"]
    return top_k_relu(pre_acts, config["k"]) @ weights["W_dec"] + weights["b_dec"]


AS_THEY_DO = {"saelens": as_saelens_does, "sparsify": as_sparsify_does}


@pytest.mark.parametrize("format", AS_THEY_DO)
@pytest.mark.parametrize("k", [None, 1, 5])
def test_what_another_tool_computes_is_the_models_raw_reconstruction(tmp_path, format, k):
    file = example_model_file()
    a = raw_rows(file)
    folder = export(found(file), format, tmp_path / "out", k)
    expected = file.standardised()
    codes = expected.encode(torch.from_numpy(a), k or 8)
    np.testing.assert_allclose(
        AS_THEY_DO[format](folder, a), expected.decode(codes).detach(), rtol=1e-4, atol=1e-4 * file.std.max()
    )


def test_codes_stay_the_same_numbers():
    """A constant channel, means far from 0 and scales that differ 25-fold do not affect the code."""
    file = example_model_file()
    a = raw_rows(file).astype(np.float64)
    W_enc, _, b_dec = (array.astype(np.float64) for array in fold(file))
    expected = ((a - file.mean) / file.std - file.model.pre_bias.detach().numpy()) @ file.model.W_enc.detach().numpy().T
    np.testing.assert_allclose((a - b_dec) @ W_enc.T, expected, atol=1e-4)


@pytest.mark.parametrize("format", AS_THEY_DO)
def test_real_activations_come_out_the_same(tmp_path, real_data, format):
    """The model has the notebook's size. Rows are left out if only rounding separates latents 128 and 129."""
    a = np.load(real_data / "block20" / "chunk_0000.npy")[:512].astype(np.float32)
    stats = np.load(real_data / "block20" / "normalization_stats.npz")
    std = np.where(stats["std"] == 0, 1, stats["std"]).astype(np.float32)
    torch.manual_seed(0)
    file = ModelFile(MSAE(256, 4096, [16, 128]), stats["mean"].astype(np.float32), std, {})
    pre_acts = ((torch.from_numpy(a) - torch.from_numpy(file.mean)) / torch.from_numpy(std)) @ file.model.W_enc.T
    ranked = pre_acts.topk(129).values
    sure = (ranked[:, 127] - ranked[:, 128] > 1e-4).numpy()
    assert sure.mean() > 0.9
    expected = file.standardised()(torch.from_numpy(a)).detach().numpy()
    other = AS_THEY_DO[format](export(found(file), format, tmp_path / "out"), a)
    error = np.abs(other - expected)[sure] / np.abs(expected).max(axis=0)
    assert error.max() < 1e-4


def test_saelens_files_have_the_keys_shapes_and_settings_of_its_topk(tmp_path):
    folder = export(found(), "saelens", tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    weights = load_file(folder / "sae_weights.safetensors")
    shapes = {"W_enc": (12, 48), "b_enc": (48,), "W_dec": (48, 12), "b_dec": (12,)}
    assert {name: array.shape for name, array in weights.items()} == shapes
    assert {array.dtype for array in weights.values()} == {np.dtype("f4")}
    config = json.loads((folder / "cfg.json").read_text())
    assert config["metadata"].pop("exported_by").startswith("msae_sweep ")
    assert config == {
        "architecture": "topk",
        "d_in": 12,
        "d_sae": 48,
        "k": 8,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.0.0", "block": 5, "k_levels": [2, 4, 8], "weighting": "reverse"},
    }


def test_sparsify_files_have_the_keys_shapes_and_settings_of_its_sparse_coder(tmp_path):
    folder = export(found(), "sparsify", tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae.safetensors"}
    weights = load_file(folder / "sae.safetensors")
    shapes = {"encoder.weight": (48, 12), "encoder.bias": (48,), "W_dec": (48, 12), "b_dec": (12,)}
    assert {name: array.shape for name, array in weights.items()} == shapes
    config = json.loads((folder / "cfg.json").read_text())
    assert config == {
        "activation": "topk",
        "d_in": 12,
        "num_latents": 48,
        "expansion_factor": 4,
        "k": 8,
        "normalize_decoder": False,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }


@pytest.mark.parametrize(("format", "suffix"), [("notebook", ".pt"), ("safetensors", ".safetensors")])
def test_our_own_formats_keep_everything(tmp_path, format, suffix):
    file = example_model_file()
    written = [export(found(file), format, tmp_path / f"m{suffix}"), export(found(file), format, tmp_path)]
    assert written == [tmp_path / f"m{suffix}", tmp_path / f"msae_block5{suffix}"]
    for path in written:
        loaded = (model_file.load if format == "notebook" else model_file.load_safetensors)(path)
        a = torch.from_numpy(raw_rows(file))
        assert torch.equal(loaded.standardised()(a), file.standardised()(a))
        assert (loaded.model.config, loaded.history) == (file.model.config, file.history)


NOTEBOOK = """
import sys, numpy as np, torch
rows, out, advice = sys.argv[1:]
*allow, read = advice.split("; ")
exec("; ".join(allow))
saved = eval(read)
w, k = saved["model_state_dict"], saved["config"]["k_levels"][-1]
mean, std = (torch.from_numpy(saved["normalization"][name]) for name in ("mean", "std"))
a = torch.from_numpy(np.load(rows))
pre = torch.relu(((a - mean) / std - w["b_pre"]) @ w["W_enc"].T)
values, indices = pre.topk(k)
z = torch.zeros_like(pre).scatter(1, indices, values)
np.save(out, ((z @ w["W_dec"].T + w["b_pre"]) * std + mean).numpy())
assert not any(name.startswith("msae_sweep") for name in sys.modules)
"""


def test_the_advice_that_export_prints_reads_the_notebooks_format_without_this_package(tmp_path):
    file = example_model_file()
    path, rows = export(found(file), "notebook", tmp_path / "m.pt"), raw_rows(file)
    np.save(tmp_path / "rows.npy", rows)
    advice = LOADERS["notebook"].format(path=path).split("without this package, ")[1]
    assert "weights_only=True" in advice
    command = [sys.executable, "-c", NOTEBOOK, str(tmp_path / "rows.npy"), str(tmp_path / "out.npy"), advice]
    subprocess.run(command, check=True)
    expected = file.standardised()(torch.from_numpy(rows)).detach()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-5, atol=1e-5)


WRONG = {
    "unknown format": ("onnx", "out", None, "--format: onnx must be one of notebook, safetensors, saelens, sparsify"),
    "k of a format with all": ("notebook", "m.pt", 4, "--k: notebook keeps every k"),
    "k above hidden_dim": ("saelens", "out", 49, "--k: 49 must be 1 to hidden_dim 48"),
    "another suffix": ("safetensors", "m.pt", None, "must end in .safetensors, or be a folder that exists"),
    "something there": ("sparsify", "there", None, "there exists; give another path"),
    "below a file": ("sparsify", "file/out", None, "cannot be written"),
    "in a folder without files": ("notebook", "/proc/m.pt", None, "--out: /proc cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, case):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    format, out, k, says = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        export(found(), format, tmp_path / out, k)
    assert says in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


def command_line(monkeypatch, *arguments: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["msae-sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


def test_the_command_writes_it_and_says_how_it_is_read(tmp_path, monkeypatch, capsys):
    folder, out = sweep(tmp_path / "sweep"), tmp_path / "out"
    command = ["export", folder, "--block", 20, "--format", "saelens", "--out", out, "--k", 4]
    assert not command_line(monkeypatch, *command)
    assert capsys.readouterr().out == f'{out}: sae_lens.SAE.load_from_disk("{out}")\n'
    assert json.loads((out / "cfg.json").read_text())["k"] == 4


@pytest.mark.parametrize(
    ("what", "says"),
    [("nowhere", "nowhere: no such model file"), ("champion:5", "no such MLflow database"), ("sweep", "choose one")],
)
def test_no_such_model_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, what, says):
    sweep(tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert command_line(monkeypatch, "export", what, "--format", "sparsify", "--out", "out") == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["safetensors", "saelens", "sparsify"])
def test_others_may_read_what_is_written(tmp_path, format):
    """Other users can read the files like any new file, although safetensors' own writer makes private files."""
    (tmp_path / "any").touch()
    export(found(), format, tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors").rglob("*.*") if format != "safetensors" else [tmp_path / "m.safetensors"]:
        assert path.stat().st_mode == (tmp_path / "any").stat().st_mode
