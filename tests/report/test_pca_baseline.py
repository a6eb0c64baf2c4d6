"""Tests that a report compares MSAEs with as many principal components, measured once on the prepared rows."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_sweeps import INPUT_DIM, N_TRAIN, N_VAL, add_rows_and_models, make, settings

from msae_sweep import report
from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.data.principal_components import Scatter, components_r2
from msae_sweep.paths import StoragePath
from msae_sweep.report import pca_baseline
from msae_sweep.report.figures import Line, r2_by_k
from msae_sweep.report.pca_baseline import CACHE, pca_baselines
from msae_sweep.report.sweep_data import Curve, read
from msae_sweep.report.training_figure import training_figure
from msae_sweep.sweep_folder.folder import SweepFolder


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    sweep = make(tmp_path / "sweeps" / "made-up", settings(4), lambda p, e: 0.5, blocks=(5, 20))
    add_rows_and_models(sweep)
    return sweep


def measured(sweep: SweepFolder, **options):
    view = read(sweep.path)
    return pca_baselines(view.folder, view.config.storage, view.manifests, **options)


def prepared_rows(sweep: SweepFolder, block: int) -> tuple[np.ndarray, np.ndarray]:
    shards = ShardFolder(StoragePath(sweep.storage) / "prepared" / f"block{block}-key{block}")
    parts = [(shards.shard(i), n) for i, n, _ in read(sweep.path).manifests[block]["shards"]]
    return np.concatenate([x[:n] for x, n in parts]), np.concatenate([x[n:] for x, n in parts])


def test_components_are_fitted_to_training_rows_and_measured_on_validation_rows(sweep):
    found = measured(sweep)
    assert not found.missing
    for block, r2 in found.by_block.items():
        train, val = prepared_rows(sweep, block)
        assert (len(train), len(val)) == (N_TRAIN, N_VAL)
        assert r2 == pytest.approx(components_r2(Scatter.of(train), Scatter.of(val)), abs=1e-6)
        assert len(r2) == INPUT_DIM


@pytest.mark.parametrize("most", [31, 60, 199])
def test_the_rows_that_are_fitted_are_spread_over_all_training_rows(sweep, monkeypatch, most):
    monkeypatch.setattr(pca_baseline, "MOST_ROWS_FITTED", most)
    taken = []
    of = Scatter.of
    monkeypatch.setattr(Scatter, "of", lambda x: taken.append(x) or of(x))
    info = read(sweep.path).manifests[5] | {"shards": [[0, 3, 1], [1, 1, 1], [2, 0, 1], [3, N_TRAIN - 4, N_VAL - 3]]}
    train, val = prepared_rows(sweep, 5)
    shards = ShardFolder(StoragePath(sweep.storage) / "prepared" / "block5-key5")
    starts = np.cumsum([0, *(n for _, n, _ in info["shards"])]), np.cumsum([0, *(n for *_, n in info["shards"])])
    for i, n_train, n_val in info["shards"]:
        a, b = starts[0][i], starts[1][i]
        shards.save_shard(i, np.concatenate([train[a : a + n_train], val[b : b + n_val]]))
    shards.save_manifest(info)
    found = pca_baselines(sweep, "nowhere", {5: info})
    step = -(-N_TRAIN // most)
    fitted = np.concatenate([x for x in taken if x[0].mean() > 2])  # training rows have mean 5
    np.testing.assert_array_equal(fitted, train[::step])
    assert sum(len(x) for x in taken) == len(fitted) + N_VAL
    assert sweep.read_json(CACHE)["5"]["n_fitted"] == len(fitted) <= most
    assert found.by_block[5] == pytest.approx(components_r2(of(fitted), of(val)), abs=1e-6)


def test_wide_rows_are_fitted_to_fewer_but_never_to_too_few_for_their_channels():
    def fitted(dim: int) -> int:
        return pca_baseline._rows_fitted({"input_dim": dim, "n_train": 10**7})

    assert fitted(256) == 100_000
    assert 10 * 768 < fitted(768) < 100_000
    assert fitted(4096) == 40_960


def test_what_was_measured_is_kept_and_outlives_the_rows(sweep):
    before = measured(sweep)
    shutil.rmtree(Path(sweep.storage) / "prepared")
    assert measured(sweep) == before


def test_a_kept_measurement_of_other_data_or_a_damaged_file_is_not_taken(sweep):
    before = measured(sweep)
    kept = sweep.read_json(CACHE)
    kept["5"] |= {"data": "another", "r2": [0.0] * INPUT_DIM}
    for content in (json.dumps(kept), "{"):
        (sweep.path / CACHE).write_text(content)
        assert measured(sweep) == before


def test_blocks_beyond_the_limit_are_left_out_until_a_report_measures_them(sweep):
    of_one = (N_TRAIN + N_VAL) * INPUT_DIM**2
    found = measured(sweep, most_products=of_one)
    assert list(found.by_block) == [5]
    assert "left out to end the sweep sooner" in found.missing[20]
    assert list(measured(sweep).by_block) == [5, 20]


def test_rows_that_are_too_wide_gone_or_unreadable_are_reported_and_no_error(sweep, monkeypatch):
    monkeypatch.setattr(pca_baseline, "MOST_CHANNELS", INPUT_DIM - 1)
    assert "more than 15 channels" in measured(sweep).missing[5]
    monkeypatch.undo()
    shard = Path(sweep.storage) / "prepared" / "block5-key5" / "shard-00000.npy"
    shard.write_bytes(b"x" * shard.stat().st_size)
    assert "cannot be read" in measured(sweep).missing[5]
    shard.unlink()
    assert "no longer in" in measured(sweep).missing[5]


def test_a_report_draws_tabulates_and_explains_the_components(sweep):
    r2 = measured(sweep).by_block[5]
    written = report.write([sweep.path])
    assert written.notes == []
    folder = Path(written.where)
    page, twin = (folder / "report.html").read_text(encoding="utf-8"), (folder / "report.md").read_text("utf-8")
    cells = [f"{r2[k - 1]:.4f}" for k in (2, 4, 8)]
    row = '<tr class="soft"><td class="left">k principal components</td><td>–</td>'
    assert row + "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert f"| k principal components | – | {' | '.join(cells)} |" in twin
    for name in ("r2_by_k_block5", "weighting_block5"):
        assert "k principal components" in (folder / "figures" / f"{name}.svg").read_text()
    assert f"2 principal components explain {r2[1]:.1%}, and 8 explain {r2[7]:.1%}" in twin
    # Every row of the table has as many cells as its head.
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        widths = {len(re.findall("<t[dh][ >]", line)) for line in re.findall(r"<tr.*?</tr>", table)}
        assert len(widths) == 1


def test_a_report_of_a_sweep_whose_rows_are_gone_has_no_components_and_says_why(sweep):
    shutil.rmtree(Path(sweep.storage) / "prepared")
    written = report.write([sweep.path])
    assert len(written.notes) == 2
    assert "trained levels only, without principal components; the prepared rows" in written.notes[0]
    page = (Path(written.where) / "report.html").read_text(encoding="utf-8")
    assert '<td class="left">k principal components' not in page
    assert "k principal components" not in (Path(written.where) / "figures" / "r2_by_k_block5.svg").read_text()


def test_the_notebooks_figure_has_a_dotted_line_of_components_beside_each_blocks_r2(monkeypatch):
    history = {"train_loss": [1.0], "val_loss": [1.0], "dead_ratio": [0.0], "best_epoch": 1}
    history["val_r2"] = {"r2_k2": [0.5], "r2_k4": [0.7]}
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[3]))
    training_figure({"block5": {**history, "pca_r2": {"k2": 0.3, "k4": 0.4, "k8": 0.6}}, "block20": history})
    lines = {line.get_label(): line for line in drawn[0].get_lines()}
    assert list(lines) == ["block5", "block5, k principal components", "block20"]
    components = lines["block5, k principal components"]
    assert (list(components.get_xdata()), list(components.get_ydata())) == ([2, 4], [0.3, 0.4])
    assert (components.get_color(), components.get_linestyle()) == (lines["block5"].get_color(), ":")


def test_a_sweep_of_an_earlier_version_whose_summary_has_neither_components_nor_further_criteria_is_reported(tmp_path):
    old = Path(__file__).parents[1] / "sweep_folder" / "format_1"
    folder = Path(shutil.copytree(old / "sweep", tmp_path / "old"))
    shutil.copy(old / "summary.json", folder / "summary.json")
    block = json.loads((folder / "summary.json").read_text())["blocks"]["block5"]
    assert not {"pca_r2", "further_criteria"} & block.keys()
    written = report.write([folder])
    assert any("without principal components" in note for note in written.notes)
    twin = (Path(written.where) / "report.md").read_text(encoding="utf-8")
    assert "Further criteria of the original series:" in twin


def test_a_figure_ends_at_the_channels_where_k_goes_beyond_them():
    line = Line("a", Curve((8, 32), [0.5, 0.9], False), (8, 32))
    drawn = r2_by_k(5, [line], {}, None, [i / 16 for i in range(1, 17)])
    assert "; 8 principal components explain 50.0%; going" in drawn.reading
    assert "principal" not in r2_by_k(5, [line], {}, None, [0.5] * 4).reading
