"""Tests that R² of principal components follows from sums, whichever parts they are over."""

import numpy as np
import pytest

from msae_sweep.data.principal_components import Scatter, components_r2


def rows(n: int, seed: int, mean: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(12, 12)) * 0.7 ** np.arange(12)
    return (rng.normal(size=(n, 12)) @ mixing.T + mean).astype(np.float32)


def by_definition(fitted: np.ndarray, measured: np.ndarray, k: int) -> float:
    fitted, measured = fitted.astype("f8"), measured.astype("f8")
    mean = fitted.mean(axis=0)
    components = np.linalg.svd(fitted - mean, full_matrices=False)[2][:k]
    x_hat = mean + (measured - mean) @ components.T @ components
    return 1 - np.sum((measured - x_hat) ** 2) / np.sum((measured - measured.mean(axis=0)) ** 2)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_r2_is_that_of_reconstructions_from_the_fitted_rows_components(shift):
    """With `shift`, the measured rows have another mean, so few components reconstruct them worse than their mean."""
    fitted, measured = rows(500, 0, mean=100.0), rows(200, 1, mean=100.0 + shift)
    found = components_r2(Scatter.of(fitted), Scatter.of(measured))
    assert found == pytest.approx([by_definition(fitted, measured, k) for k in range(1, 13)], abs=1e-9)
    assert (found[0] < 0) == bool(shift)


def test_as_many_components_as_channels_reconstruct_every_row():
    assert components_r2(Scatter.of(rows(50, 0)), Scatter.of(rows(20, 1, 5.0)))[-1] == pytest.approx(1)


def test_components_of_the_measured_rows_themselves_are_never_worse():
    fitted, measured = Scatter.of(rows(100, 0)), Scatter.of(rows(300, 1))
    assert (components_r2(measured, measured) >= components_r2(fitted, measured) - 1e-12).all()


def test_parts_in_any_order_add_up_to_the_whole():
    x = rows(1000, 0, mean=1e4)
    whole, parts = Scatter.of(x), [Scatter.of(part) for part in (x[600:], x[:1], x[1:1], x[1:600])]
    merged = Scatter.empty(12)
    for part in parts:
        merged = merged.merge(part)
    assert merged.n == 1000
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.products, whole.products, rtol=1e-9, atol=1e-6)


def test_a_tile_is_no_boundary(monkeypatch):
    x = rows(1000, 0)
    whole = Scatter.of(x)
    monkeypatch.setattr("msae_sweep.data.principal_components.TILE_BYTES", 8 * 12 * 7)
    np.testing.assert_allclose(Scatter.of(x).products, whole.products, rtol=1e-9, atol=1e-9)


def test_rows_that_do_not_vary_have_no_r2():
    constant = Scatter.of(np.full((5, 3), 0.1, dtype=np.float32))
    assert not constant.products.any()
    assert np.isnan(components_r2(Scatter.of(rows(50, 0)[:, :3]), constant)).all()
    assert np.isnan(components_r2(constant, Scatter.empty(3))).all()
