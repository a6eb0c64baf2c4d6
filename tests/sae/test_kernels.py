import pytest
import torch
from torch import Tensor

from msae_sweep.sae.kernels import reference, sparse_cpu, top_k_cpu

# Each row is batch, input_dim, hidden_dim, k_levels. There are cases with one row, with one latent per row, with all
# latents, and with sizes that are no power of two.
SHAPES = [
    (33, 7, 40, [1, 3, 20, 40]),
    (1, 5, 6, [2]),
    (64, 16, 100, [4, 8]),
    (17, 3, 9, [1]),
    (5, 1, 3, [3]),
]
# The CPU kernel takes these shapes in groups of latents, in slabs of levels, or both.
GROUPED_SHAPES = [
    (21, 6, 96, [1, 3]),
    (9, 5, 1000, [2, 7, 30]),
    (6, 4, 256, list(range(1, 129))),
    (3, 4, 40, list(range(1, 41))),
]


def parameters(input_dim: int, hidden_dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    shapes = [(hidden_dim, input_dim), (hidden_dim, input_dim), (input_dim,)]
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def gradients(reconstruct, x, tensors, k_levels, weights):
    result = reconstruct(x, *tensors, k_levels)
    return result, torch.autograd.grad((result.x_hats * weights).sum(), tensors)


def naive(x, W_enc, W_dec, pre_bias, k_levels):
    """Reconstruct x in the notebook's way, with a separate top-k and a dense decode for every level."""
    x_hats = []
    for k in k_levels:
        pre_acts = torch.relu((x - pre_bias) @ W_enc.T)
        values, indices = pre_acts.topk(k, dim=1)
        x_hats.append(torch.zeros_like(pre_acts).scatter(1, indices, values) @ W_dec + pre_bias)
    return reference.Reconstruction(torch.stack(x_hats), values, indices)


@pytest.mark.parametrize(("batch", "input_dim", "hidden_dim", "k_levels"), SHAPES)
def test_the_reference_passes_gradcheck(batch, input_dim, hidden_dim, k_levels):
    torch.manual_seed(0)
    x = torch.randn(min(batch, 5), input_dim, dtype=torch.float64, requires_grad=True)
    tensors = parameters(input_dim, hidden_dim)
    assert torch.autograd.gradcheck(lambda *args: reference.reconstruct(*args, k_levels).x_hats, (x, *tensors))


@pytest.mark.parametrize(("batch", "input_dim", "hidden_dim", "k_levels"), SHAPES)
def test_running_sums_over_groups_equal_a_top_k_for_every_level(batch, input_dim, hidden_dim, k_levels):
    torch.manual_seed(1)
    x, tensors = torch.randn(batch, input_dim, dtype=torch.float64), parameters(input_dim, hidden_dim)
    weights = torch.randn(len(k_levels), batch, input_dim, dtype=torch.float64)
    expected, expected_gradients = gradients(naive, x, tensors, k_levels, weights)
    result, result_gradients = gradients(reference.reconstruct, x, tensors, k_levels, weights)
    torch.testing.assert_close(result.x_hats, expected.x_hats)
    torch.testing.assert_close(result_gradients, expected_gradients)


@pytest.mark.parametrize(("batch", "input_dim", "hidden_dim", "k_levels"), [*SHAPES, *GROUPED_SHAPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sparse_kernel_equals_the_reference_with_every_gradient(batch, input_dim, hidden_dim, k_levels, dtype):
    torch.manual_seed(2)
    x, tensors = torch.randn(batch, input_dim, dtype=dtype), parameters(input_dim, hidden_dim, dtype)
    weights = torch.randn(len(k_levels), batch, input_dim, dtype=dtype)
    expected, expected_gradients = gradients(reference.reconstruct, x, tensors, k_levels, weights)
    result, result_gradients = gradients(sparse_cpu.reconstruct, x, tensors, k_levels, weights)
    # In float32, sums of up to batch · k products are taken in another order.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(result.x_hats, expected.x_hats, **tolerance)
    torch.testing.assert_close(result.values, expected.values, **tolerance)
    torch.testing.assert_close(result_gradients, expected_gradients, **tolerance)


@pytest.mark.parametrize("case", ["zero rows", "all pre_acts negative", "ties"])
def test_the_sparse_kernel_equals_the_reference_where_latents_are_silent_or_tied(case):
    torch.manual_seed(3)
    x = torch.randn(12, 6, dtype=torch.float64)
    W_enc, W_dec, pre_bias = parameters(6, 20)
    if case == "zero rows":
        x[:6] = pre_bias.detach()
    elif case == "all pre_acts negative":
        W_enc.data = -(x.T @ torch.rand(12, 20, dtype=torch.float64)).T.sign() * 10
        x = x.abs()
        W_enc.data = -W_enc.data.abs()
        pre_bias.data.zero_()
    else:
        # Tied latents have equal decoder rows, so the reconstruction is the same, whichever of them is taken.
        W_enc.data = W_enc.data[:1].expand(20, 6).clone()
        W_dec.data = W_dec.data[:1].expand(20, 6).clone()
    weights = torch.randn(2, 12, 6, dtype=torch.float64)
    tensors = (W_enc, W_dec, pre_bias)
    expected, expected_gradients = gradients(reference.reconstruct, x, tensors, [4, 8], weights)
    result, result_gradients = gradients(sparse_cpu.reconstruct, x, tensors, [4, 8], weights)
    torch.testing.assert_close(result.x_hats, expected.x_hats)
    torch.testing.assert_close(result_gradients[2], expected_gradients[2])
    assert all(gradient.isfinite().all() for gradient in result_gradients)
    if case != "ties":  # any of the tied latents may get the gradient
        torch.testing.assert_close(result_gradients, expected_gradients)


def test_the_sparse_kernel_gives_the_same_bits_on_every_run():
    torch.manual_seed(4)
    for hidden_dim, k_levels in ((256, [8, 16]), (512, list(range(1, 33)))):
        x, tensors = torch.randn(500, 32), parameters(32, hidden_dim, torch.float32)
        weights = torch.randn(len(k_levels), 500, 32)
        runs = [gradients(sparse_cpu.reconstruct, x, tensors, k_levels, weights)[1] for _ in range(3)]
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("where", ["x", "W_enc", "W_dec", "pre_bias"])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sparse_kernel_hides_no_nan(where, nan, dtype):
    torch.manual_seed(5)
    x, tensors = torch.randn(12, 6, dtype=dtype), parameters(6, 64, dtype)
    named = dict(zip(("x", "W_enc", "W_dec", "pre_bias"), (x, *tensors), strict=True))
    # A single number of the decoder may meet no active latent, so a whole column is set there.
    named[where].data[(slice(None), 1) if where == "W_dec" else (0,)] = nan
    weights = torch.ones(2, 12, 6, dtype=dtype)
    expected, _ = gradients(reference.reconstruct, x, tensors, [2, 4], weights)
    result, result_gradients = gradients(sparse_cpu.reconstruct, x, tensors, [2, 4], weights)
    assert result.x_hats.isnan().any()
    assert (result.x_hats.isnan() | ~expected.x_hats.isnan()).all(), "NaN in the reference, a number here"
    assert any(gradient.isnan().any() for gradient in result_gradients)


def test_what_a_sparse_product_overwrites_does_not_matter():
    torch.manual_seed(6)
    dense = torch.randn(30, 9)
    codes = torch.randn(50, 30) * (torch.rand(50, 30) < 0.03)  # some rows are empty
    out = torch.full((50, 9), float("nan"))
    sparse_cpu._product_(out, codes.to_sparse_csr(), dense, beta=0)
    torch.testing.assert_close(out, codes @ dense)
    sparse_cpu._product_(out, codes.to_sparse_csr(), dense, beta=1)
    torch.testing.assert_close(out, 2 * (codes @ dense))


@pytest.mark.parametrize(("hidden_dim", "k"), [(1, 1), (7, 3), (64, 64), (64, 4), (96, 2), (1000, 1), (4096, 128)])
@pytest.mark.parametrize("case", ["distinct", "ties", "negative", "zero", "infinite", "NaN", "-NaN"])
def test_the_top_k_equals_torchs(hidden_dim, k, case):
    torch.manual_seed(7)
    pre_acts = torch.randn(19, hidden_dim)
    if case == "ties":
        pre_acts = pre_acts.round()
    elif case == "negative":
        pre_acts = -pre_acts.abs()
    elif case == "zero":
        pre_acts[::2] = -0.0
    elif case != "distinct":
        pre_acts[pre_acts > 1] = {"infinite": float("inf"), "NaN": float("nan"), "-NaN": -float("nan")}[case]
    values, indices = top_k_cpu.top_k(pre_acts.clone(), k)
    torch.testing.assert_close(values, torch.relu(pre_acts).topk(k, dim=1).values, rtol=0, atol=0, equal_nan=True)
    found = torch.relu(pre_acts).gather(1, indices)
    torch.testing.assert_close(values, found, rtol=0, atol=0, equal_nan=True)
    assert all(len(row.unique()) == k for row in indices), "no latent twice"


@pytest.mark.parametrize("rows", [1, 4, 10, 100])
def test_encoding_in_chunks_of_rows_changes_nothing(rows, monkeypatch):
    torch.manual_seed(8)
    centred, W_enc = torch.randn(10, 5).round(), torch.randn(64, 5).round()  # with whole numbers, sums are exact
    monkeypatch.setattr(top_k_cpu, "CHUNK_SIZE", rows * 64)
    values, indices = top_k_cpu.encode(centred, W_enc, 4)
    expected_values, expected_indices = top_k_cpu.top_k(centred @ W_enc.T, 4)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


def test_no_rows_reconstruct_to_no_rows():
    assert sparse_cpu.reconstruct(torch.empty(0, 3), *parameters(3, 8, torch.float32), [1, 2]).x_hats.shape == (2, 0, 3)
