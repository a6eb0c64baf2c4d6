import numpy as np
import pytest
from activation_files import write_npy

from msae_sweep.config import DataConfig, PlantedConfig
from msae_sweep.data.inspection import inspect, render
from msae_sweep.data.principal_components import Scatter, components_r2
from msae_sweep.data.sources.planted import PlantedSource, recovery, true_dictionary

CONFIG = PlantedConfig(rows=20_000, input_dim=32, dictionary_size=64, active=6)


def planted_rows(config=CONFIG, block=5):
    source = PlantedSource(config)
    return source.read(source.row_ranges(block, config.rows)[0])


def test_without_noise_the_rows_lie_on_the_dictionary():
    config = CONFIG.model_copy(update={"noise": 0.0, "dictionary_size": 8, "active": 2.0, "rows": 2000})
    x = planted_rows(config).x
    centred = x - np.linalg.lstsq(np.ones((len(x), 1)), x, rcond=None)[0]
    assert np.linalg.matrix_rank(centred, tol=1e-2) <= 8


def test_seeds_and_blocks_have_dictionaries_of_their_own():
    other_seed = CONFIG.model_copy(update={"seed": 1})
    assert not np.allclose(true_dictionary(CONFIG, 5), true_dictionary(CONFIG, 20))
    assert not np.allclose(true_dictionary(CONFIG, 5), true_dictionary(other_seed, 5))
    np.testing.assert_array_equal(true_dictionary(CONFIG, 5), true_dictionary(CONFIG, 5))


def test_rows_of_one_group_resemble_each_other():
    rows = planted_rows()
    x = (rows.x - rows.x.mean(axis=0)) / rows.x.std(axis=0)
    same, other = (x[:-10:10] * x[1:-9:10]).sum(axis=1).mean(), (x[:-10:10] * x[10::10]).sum(axis=1).mean()
    assert same > other + 1


def test_recovery_is_one_for_the_dictionary_itself_and_low_for_noise():
    dictionary, std = true_dictionary(CONFIG, 5), np.linspace(0.5, 3, 32)
    assert recovery(dictionary / std, std, dictionary) == pytest.approx(1)
    assert recovery(7 * dictionary[::-1] / std, std, dictionary) == pytest.approx(1)
    assert recovery(np.random.default_rng(0).normal(size=(64, 32)), std, dictionary) < 0.6


def test_any_seed_is_a_seed():
    other = CONFIG.model_copy(update={"seed": -1, "rows": 500})
    assert np.isfinite(planted_rows(other).x).all()


def test_inspect_counts_what_a_sweep_would_stumble_over(tmp_path, rows, games):
    rows[3, 1], rows[77, 0] = np.nan, np.inf
    (report,) = inspect(DataConfig(path=write_npy(tmp_path, rows, games)))
    good = np.delete(rows, [3, 77], axis=0).astype("f8")
    assert (report.n_nonfinite, report.n_constant, report.n_groups) == (2, 1, 50)
    assert report.mean_range == pytest.approx((good.mean(axis=0).min(), good.mean(axis=0).max()), rel=1e-6)
    assert report.std_range == pytest.approx((0, good.std(axis=0).max()), rel=1e-6)


def test_explained_variance_is_that_of_the_correlation_matrix(tmp_path):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 3)) @ rng.normal(size=(3, 40)) + 100).astype(np.float32)
    (report,) = inspect(DataConfig(path=write_npy(tmp_path, x)))
    assert report.explained[16] == pytest.approx(1, abs=1e-4)
    assert 128 not in report.explained


def test_what_inspect_shows_is_the_r2_of_components_that_are_fitted_to_the_rows_themselves(tmp_path):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3000, 40)) @ (rng.normal(size=(40, 40)) * 0.9 ** np.arange(40)) + 7).astype(np.float32)
    (report,) = inspect(DataConfig(path=write_npy(tmp_path, x)))
    rows = Scatter.of((x - x.mean(axis=0, dtype="f8")) / x.std(axis=0, dtype="f8"))
    r2 = components_r2(rows, rows)
    assert report.explained == {16: pytest.approx(r2[15]), 32: pytest.approx(r2[31])}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dtype", "scale"), [("f4", 2.0**127), ("f8", 2.0**664), ("f8", 2.0**1023), ("f8", 2.0**-664)])
def test_values_near_the_limits_of_their_type_are_measured_like_any_others(tmp_path, dtype, scale):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(600, 3)) @ rng.normal(size=(3, 20))).round(3)
    # The largest rows come last, so that the sums over earlier rows have to be scaled down.
    x = (x[np.argsort(np.abs(x).max(axis=1))] / (np.abs(x).max() / 1.5)).astype("f4").astype(dtype)
    (plain,) = inspect(DataConfig(path=write_npy(tmp_path / "plain", x, chunks=6)))
    (report,) = inspect(DataConfig(path=write_npy(tmp_path / "scaled", x * x.dtype.type(scale), chunks=6)))
    assert report.mean_range == tuple(scale * value for value in plain.mean_range)
    assert report.std_range == tuple(scale * value for value in plain.std_range)
    assert (report.explained, report.n_constant) == (plain.explained, 0)


def test_the_real_activations_have_the_spectrum_that_was_measured(real_data):
    expected = {5: (0.48, 0.77, 0.90), 20: (0.33, 0.64, 0.82), 35: (0.36, 0.64, 0.82)}
    for report in inspect(DataConfig(path=str(real_data))):
        found = [report.explained[n] for n in (16, 64, 128)]
        assert found == pytest.approx(expected[report.info.block], abs=0.015)


def test_inspect_renders_a_row_a_block(tmp_path, rows):
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(inspect(DataConfig(path=write_npy(tmp_path, rows)))))
    text = console.export_text()
    assert "500" in text
    assert "float32" in text
    assert "R² of k principal components" in text
    assert "fitted to these rows themselves" in text
