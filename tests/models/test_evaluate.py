"""Tests that an evaluation streams any source, agrees with a sweep on the same rows, and is the same on a cluster."""

import io
import json
import re
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from model_files import example_model_file, raw_rows, sweep
from rich.console import Console
from sender_thread import SenderThread

from msae_sweep.cli import main
from msae_sweep.data.prepare.split import is_validation
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.models import evaluate
from msae_sweep.models.evaluate import data_config_for, local_sums, make_plan
from msae_sweep.models.evaluation_figure import evaluation_figure
from msae_sweep.models.find import FoundModel
from msae_sweep.sae import evaluation as of_model
from msae_sweep.sae import model_file

CPU = torch.device("cpu")
N_ROWS = 1000


@pytest.fixture
def found() -> FoundModel:
    return FoundModel(example_model_file(), 5, "m.pt")


@pytest.fixture
def x(found) -> np.ndarray:
    return raw_rows(found.file, N_ROWS)


def npy(folder: Path, x: np.ndarray) -> Path:
    (folder / "block5").mkdir(parents=True)
    np.save(folder / "block5" / "chunk_0000.npy", x[:300])
    np.save(folder / "block5" / "chunk_0001.npy", x[300:])
    return folder


def hdf5(folder: Path, x: np.ndarray) -> Path:
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file["block5"] = x
    return folder / "a.h5"


def parquet(folder: Path, x: np.ndarray) -> Path:
    folder.mkdir()
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"block5": column}), folder / "a.parquet")
    return folder / "a.parquet"


def report(found, data, block=None, side="all", overrides=(), parts=None, **options):
    planned = make_plan(found, data_config_for("", str(data), overrides), block, side)
    return evaluate.evaluate(found, planned, parts or partial(local_sums, device=CPU), **options)


def expected(found: FoundModel, x: np.ndarray, max_k: int | None = None) -> of_model.Evaluation:
    z = (x.astype(np.float64) - found.file.mean) / found.file.std
    return of_model.evaluate(found.file.model, [torch.from_numpy(z).float()], max_k=max_k)


def same(a: of_model.Evaluation, b: of_model.Evaluation) -> None:
    torch.testing.assert_close(a.r2, b.r2, rtol=1e-5, atol=1e-5)
    assert (a.n_rows, a.dead_ratio, a.levels, a.l0) == (b.n_rows, b.dead_ratio, b.levels, b.l0)
    assert torch.equal(a.level_firing, b.level_firing)


@pytest.mark.parametrize("write", [npy, hdf5, parquet])
@pytest.mark.parametrize("range_bytes", [evaluate.RANGE_BYTES, 8 * 12 * 70])
def test_every_kind_of_data_gives_what_the_rows_in_memory_give(tmp_path, found, x, write, range_bytes, monkeypatch):
    monkeypatch.setattr(evaluate, "RANGE_BYTES", range_bytes)
    data = write(tmp_path / "data", x)
    seen = []
    same(report(found, data, on_progress=lambda *p: seen.append(p)).evaluation, expected(found, x))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) >= N_ROWS * 8 * 12 // range_bytes


def test_over_ray_it_is_the_same(tmp_path, ray_session, found, x, monkeypatch):
    from msae_sweep.sweep.ray_evaluation import sums_on_cluster

    monkeypatch.setattr(evaluate, "RANGE_BYTES", 8 * 12 * 70)
    data = npy(tmp_path / "data", x)
    there = report(found, data, parts=sums_on_cluster, max_k=20)
    here = report(found, data, max_k=20)
    same(there.evaluation, here.evaluation)
    assert there.pca_r2 == pytest.approx(here.pca_r2, abs=1e-9)
    assert there.evaluation.r2 == report(found, data, parts=sums_on_cluster, max_k=20).evaluation.r2


def test_what_a_task_refuses_over_ray_is_raised_as_here(tmp_path, ray_session, found, x):
    from msae_sweep.sweep.ray_evaluation import sums_on_cluster

    x[310:312, 3] = np.inf
    data = npy(tmp_path / "data", x)
    messages = []
    for parts in (None, sums_on_cluster):
        with pytest.raises(DataError) as caught:
            report(found, data, parts=parts)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert re.search(r"chunk_0001.npy rows 10-11: NaN or Inf.*--set data.drop_nonfinite=true", messages[0])
    for parts in (None, sums_on_cluster):
        dropped = report(found, data, parts=parts, overrides=["data.drop_nonfinite=true"])
        assert (dropped.n_dropped, dropped.evaluation.n_rows) == (2, N_ROWS - 2)


def test_sides_are_those_of_a_sweeps_split(tmp_path, found, x):
    games = np.arange(N_ROWS) // 10
    data = npy(tmp_path / "data", x)
    by_row = is_validation(np.arange(N_ROWS), 3, 0.2)
    split = ["data.seed=3", "data.val_split=0.2"]
    same(report(found, data, side="validation", overrides=split).evaluation, expected(found, x[by_row]))
    same(report(found, data, side="training", overrides=split).evaluation, expected(found, x[~by_row]))
    np.save(data / "game_id.npy", games)
    by_game = is_validation(games, 3, 0.2)
    assert by_game.any()
    same(report(found, data, side="validation", overrides=split).evaluation, expected(found, x[by_game]))


SPACE = """
name: small
data: {path: planted, blocks: [5], planted: {rows: 3000, input_dim: 16, dictionary_size: 32, active: 3}}
training: {k_levels: [2, 4, 8], expansion_factor: 4, batch_size: 64, epochs: 2, aux_k: 8, precision: fp32}
search: {trials_per_block: 1}
resources: {max_concurrent: 1}
asha: null
"""


def test_of_a_sweeps_model_it_says_what_the_sweep_said(tmp_path, ray_session, monkeypatch, capsys):
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("msae_sweep.sweep.run._write_report", lambda folder, console: None)
    monkeypatch.setattr("msae_sweep.track.tracker.SenderProcess", SenderThread)
    assert not command_line(monkeypatch, "run", "space.yaml", "--storage", "sweeps")
    summary = json.loads((tmp_path / "sweeps/small/summary.json").read_text())
    said = summary["blocks"]["block5"]["trials"][0]["metrics"]
    assert not command_line(monkeypatch, "eval", "sweeps/small", "--out", "e.json", "--figure", "figures/e.svg")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["data"]["rows"] == "validation"
    for k in (2, 4, 8):
        assert found["r2_by_level"][str(k)] == pytest.approx(said[f"r2_k{k}"], abs=1e-5)
        assert found["l0_by_level"][str(k)] == pytest.approx(said[f"l0_k{k}"], abs=1e-9)
    # The sweep's principal components were fitted to its training rows, those of `eval` to the validation rows.
    for k in (2, 4, 8):
        assert 0 < summary["blocks"]["block5"]["pca_r2"][f"k{k}"] < found["pca_r2"][k - 1]
    assert (tmp_path / "figures/e.svg").read_text().count("<svg") == 1
    # The champion in MLflow is the same model.
    command = ["eval", "champion:planted:5", "--data", "planted", "--rows", "validation", "--against", "sweeps/small"]
    planted = ["rows=3000", "input_dim=16", "dictionary_size=32", "active=3"]
    sets = [word for setting in planted for word in ("--set", f"data.planted.{setting}")]
    assert not command_line(monkeypatch, *command, *sets, "--out", "c.json")
    champion = json.loads((tmp_path / "c.json").read_text())
    assert champion["r2"] == found["r2"]
    assert all(
        value == pytest.approx(1, abs=1e-5) for value in champion["stability"][0]["matched_cosine_by_level"].values()
    )


def test_json_holds_everything_and_no_nan(tmp_path, found, x):
    x[:] = x[0]
    raw = json.dumps(report(found, npy(tmp_path / "data", x), max_k=4).to_json(), allow_nan=False)
    assert json.loads(raw)["r2"] == json.loads(raw)["pca_r2"] == [None] * 4
    varied = report(found, npy(tmp_path / "varied", raw_rows(found.file, N_ROWS)), against=[found]).to_json()
    assert set(varied) == {
        "model", "data", "r2", "l0", "r2_by_level", "l0_by_level", "dead_ratio", "decoder_coherence", "stability",
        "firing_frequency_by_level", "pca_r2",
    }  # fmt: skip
    assert (len(varied["r2"]), len(varied["firing_frequency_by_level"]["8"])) == (8, 48)
    assert sum(varied["firing_frequency_by_level"]["4"]) == pytest.approx(varied["l0"][3])
    assert varied["data"]["n_rows"] == N_ROWS


def test_components_are_those_of_the_evaluated_rows_and_bound_every_k_dimensional_model(
    tmp_path, found, x, monkeypatch
):
    x = np.cumsum(x, axis=1)  # channels that vary together
    data = npy(tmp_path / "data", x)
    z = (x.astype("f8") - found.file.mean) / found.file.std
    shares = np.linalg.eigvalsh(np.cov(z.T))[::-1].cumsum()
    monkeypatch.setattr(evaluate, "RANGE_BYTES", 8 * 12 * 70)
    shown = report(found, data, max_k=20)
    assert shown.pca_r2 == pytest.approx(shares / shares[-1], abs=1e-5)
    assert len(shown.pca_r2) == 12, "k ends at the width of the rows"
    console = Console(width=200, file=io.StringIO())
    console.print(evaluate.render(shown))
    line = f"fitted to these rows themselves: 1 {shown.pca_r2[0]:.3f} · 2 {shown.pca_r2[1]:.3f} · 4"
    assert line in console.file.getvalue()
    evaluation_figure(shown.evaluation, tmp_path / "e.svg", "a model", shown.pca_r2)
    assert "k principal components of these rows" in (tmp_path / "e.svg").read_text()
    monkeypatch.setattr(evaluate, "MOST_CHANNELS_OF_PCA", 11)
    assert report(found, data, max_k=20).pca_r2 == []


def test_dictionaries_are_matched_in_one_space_though_statistics_differ(tmp_path, found, x):
    """Directions that are equal in raw units match fully, although the other model was standardised differently."""
    file = example_model_file()
    other_std = file.std * np.linspace(0.5, 4, 12, dtype=np.float32)
    file.model.W_dec.data *= torch.from_numpy(file.std / other_std)
    file.model.normalize_decoder_()
    other = FoundModel(file._replace(std=other_std), 5, "other.pt")
    stability = report(found, npy(tmp_path / "data", x), against=[other]).stability
    assert stability["other.pt"] == pytest.approx([1.0] * 3, abs=1e-5)


def test_the_title_breaks_between_words_and_dead_latents_say_of_which_rows(tmp_path, x):
    where = "sweeps/a-sweep-with-a-name/models/msae_block20.pt"
    shown = report(FoundModel(example_model_file(), 5, where), npy(tmp_path / "data", x))
    console = Console(width=60, file=io.StringIO())
    console.print(evaluate.render(shown))
    lines = console.file.getvalue().splitlines()
    assert [line.strip() for line in lines[:2]] == [f"{where} on 1,000", "rows"]
    text = " ".join(console.file.getvalue().split())
    assert (
        "fired for none of these rows at k = 8; a sweep counts those that fired for no row of a whole training epoch"
        in text
    )


def test_the_table_shows_levels_curve_and_dictionary(tmp_path, found, x):
    seed_1 = FoundModel(example_model_file(1), 5, "seed1.pt")
    shown = report(found, npy(tmp_path / "data", x), against=[seed_1])
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(evaluate.render(shown))
    text = console.export_text()
    assert "m.pt on 1,000 rows" in text
    for k in (2, 4, 8):
        row = rf"│ *{k} │ *{shown.evaluation.r2[k - 1]:.4f} │ *{shown.evaluation.l0[k - 1]:.1f} │"
        assert re.search(row, text)
    for says in ("R²(k): 1 ", "dead latents: ", "decoder coherence |cosine|: largest", "matched cosine 1: seed1.pt"):
        assert says in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_figure_is_drawn_with_and_without_dead_latents(tmp_path, found, x, suffix):
    whole = report(found, npy(tmp_path / "data", x)).evaluation
    half = whole._replace(firing=torch.where(torch.arange(48) < 24, 0, whole.firing))
    none = whole._replace(firing=torch.zeros_like(whole.firing), r2=[float("nan")] * 8)
    for i, drawn in enumerate((whole, half, none, whole._replace(n_rows=1, firing=torch.ones_like(whole.firing)))):
        path = tmp_path / "deeper" / f"{i}{suffix}"
        evaluation_figure(drawn, path, "a model")
        assert path.stat().st_size > 1000


def command_line(monkeypatch, *arguments: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["msae-sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


WRONG = {
    "no data": (["m.pt"], "--data: missing; give activations, because m.pt is not a sweep folder"),
    "no such data": (["m.pt", "--data", "nowhere"], "nowhere does not exist"),
    "no such model": (["none.pt", "--data", "data"], "none.pt: no such model file"),
    "no such block": (["m.pt", "--data", "data", "--block", "7"], "no block 7 in data; found 5, 20"),
    "a block to say": (["m.pt", "--data", "data"], "--block: data has blocks 5, 20; choose one"),
    "a sweep's missing block": (["sweep", "--data", "data", "--block", "7"], "no model of block 7; found 5, 20"),
    "another width": (["wide.pt", "--data", "data", "--block", "5"], "wide.pt takes rows of width 14"),
    "against another width": (
        ["m.pt", "--data", "data", "--block", "5", "--against", "wide.pt"],
        "wide.pt: input_dim 14 must be ",
    ),
    "max_k above hidden_dim": (["m.pt", "--data", "data", "--block", "5", "--max-k", "49"], "49 exceeds hidden_dim 48"),
    "no such device": (["m.pt", "--data", "data", "--block", "5", "--device", "tpu"], "--device: tpu is not available"),
    "a device of a cluster": (
        ["m.pt", "--data", "data", "--block", "5", "--device", "cpu", "--cluster"],
        "--device: cpu applies to this machine only",
    ),
    "a figure of no format": (["m.pt", "--data", "data", "--figure", "f.bmp"], "f.bmp must end in .png, .svg, .pdf"),
    "a key of a sweep": (["m.pt", "--data", "data", "--set", "training.epochs=3"], "only data.… can be set here"),
    "no MLflow": (["champion:5", "--data", "data"], "no such MLflow database"),
    "a folder as out": (["m.pt", "--data", "data", "--block", "5", "--out", "data"], "--out: data is a folder"),
    "a folder as figure": (["m.pt", "--data", "data", "--figure", "folder.png"], "--figure: folder.png is a folder"),
    "a file as out": (["m.pt", "--data", "data", "--block", "5", "--out", "m.pt/x.json"], "cannot be written"),
    "games without game_id": (
        ["m.pt", "--data", "data", "--block", "5", "--set", "data.split_by=game_id"],
        "has no game_id; add one or write row",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, found, x, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    npy(tmp_path / "data", x)
    (tmp_path / "data" / "block20").mkdir()
    np.save(tmp_path / "data" / "block20" / "chunk_0000.npy", x)
    model_file.save(found.file, tmp_path / "m.pt")
    model_file.save(example_model_file(input_dim=14), tmp_path / "wide.pt")
    sweep(tmp_path / "sweep")
    (tmp_path / "folder.png").mkdir()
    if case.endswith((" as out", " as figure")):
        monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("rows were read before"))
    arguments, says = WRONG[case]
    assert command_line(monkeypatch, "eval", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1, error


def test_the_only_block_needs_no_name_and_a_model_may_be_tried_on_another(tmp_path, found, x):
    data = npy(tmp_path / "data", x)
    assert report(found._replace(block=None), data).plan.info.block == 5
    assert report(found._replace(block=20), data, block=5).plan.info.block == 5


def test_no_rows_on_a_side_are_an_error(tmp_path, found, x):
    data = npy(tmp_path / "data", x)
    np.save(data / "game_id.npy", np.zeros(N_ROWS, dtype=int))
    empty = "training" if is_validation(np.zeros(1, dtype=int), 0, 0.1)[0] else "validation"
    with pytest.raises(DataError, match=f"no {empty} rows to evaluate on"):
        report(found, data, side=empty)


def test_a_sweeps_own_data_is_what_it_was_about(tmp_path):
    folder = sweep(tmp_path / "sweep")
    (folder / "sweep.yaml").write_text("name: s\ndata: {path: /data, seed: 4, val_split: 0.3}\n")
    data = data_config_for(str(folder), None, ["data.val_split=0.5"])
    assert (data.path, data.seed, data.val_split) == ("/data", 4, 0.5)
    with pytest.raises(ConfigError, match="only data"):
        data_config_for(str(folder), None, ["name=x"])
