import pytest
import torch

from msae_sweep.sae import loss
from msae_sweep.sae.kernels import Reconstruction
from msae_sweep.sae.metrics import SplitMetrics, objective, total_sum_of_squares
from msae_sweep.sae.model import MSAE

CPU = torch.device("cpu")


def reconstruction(x_hats: torch.Tensor, values: torch.Tensor | None = None) -> Reconstruction:
    values = torch.ones(x_hats.shape[1], 4) if values is None else values
    return Reconstruction(x_hats, values, torch.zeros_like(values, dtype=torch.int64))


def split(x, x_hats, k_levels=(2, 4), batches=1, values=None):
    cut = torch.arange(len(x)).tensor_split(batches)
    total = total_sum_of_squares(x[rows] for rows in cut)
    metrics = SplitMetrics(k_levels, x.shape[1], hidden_dim=8, total_sum_of_squares=total, device=CPU)
    for rows in cut:
        metrics.update(x[rows], reconstruction(x_hats[:, rows], None if values is None else values[rows]))
    return metrics


def test_level_weights_sum_to_one_and_reverse_favours_small_k():
    assert loss.level_weights(4, "uniform").tolist() == [0.25] * 4
    torch.testing.assert_close(loss.level_weights(4, "reverse"), torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert loss.level_weights(1, "reverse").tolist() == [1.0]


def test_the_loss_is_the_weighted_sum_of_the_levels_mean_squared_errors():
    torch.manual_seed(0)
    x, x_hats, weights = torch.randn(5, 3), torch.randn(2, 5, 3), torch.tensor([0.7, 0.3])
    expected = 0.7 * ((x_hats[0] - x) ** 2).mean() + 0.3 * ((x_hats[1] - x) ** 2).mean()
    torch.testing.assert_close(loss.reconstruction_loss(x, x_hats, weights), expected)


def aux_of(model: MSAE, x: torch.Tensor, dead: torch.Tensor, aux_k: int) -> torch.Tensor:
    x_hat = model.reconstruct(x).x_hats[-1]
    return loss.aux_loss(x, x_hat, dead, model.W_enc, model.W_dec, model.pre_bias, aux_k)


def test_the_aux_gradient_reaches_encoder_and_decoder_of_dead_latents_and_of_no_other():
    torch.manual_seed(0)
    model, x = MSAE(8, 32, [4]), torch.randn(64, 8)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[20:] = True
    aux_of(model, x, dead, aux_k=6).backward()
    for gradient in (model.W_enc.grad, model.W_dec.grad):
        assert gradient[20:].any(dim=1).all()
        assert not gradient[:20].any()


def test_the_aux_loss_equals_its_definition_with_a_mask_of_minus_infinity():
    torch.manual_seed(0)
    model, x = MSAE(8, 32, [4]), torch.randn(64, 8)
    dead = torch.rand(32) < 0.5
    residual = (x - model(x)).detach()
    pre_acts = ((x - model.pre_bias) @ model.W_enc.T).masked_fill(~dead, -torch.inf)
    values, indices = pre_acts.topk(6, dim=1)
    codes = torch.zeros(64, 32).scatter(1, indices, torch.relu(values))
    expected = (codes @ model.W_dec - residual).square().sum() / residual.square().sum()
    torch.testing.assert_close(aux_of(model, x, dead, aux_k=6), expected)


def test_the_aux_loss_is_zero_without_dead_latents_and_takes_all_where_few_are_dead():
    torch.manual_seed(0)
    model, x = MSAE(8, 32, [4]), torch.randn(64, 8)
    none, few = torch.zeros(32, dtype=torch.bool), torch.arange(32) < 3
    assert aux_of(model, x, none, aux_k=6) == 0
    torch.testing.assert_close(aux_of(model, x, few, aux_k=6), aux_of(model, x, few, aux_k=3))


def test_r2_is_zero_for_the_mean_predictor_and_one_for_a_perfect_one():
    torch.manual_seed(0)
    x = torch.randn(100, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + 7
    metrics = split(x, torch.stack([x.mean(dim=0).expand_as(x), x])).compute()
    assert metrics["r2_k2"] == pytest.approx(0, abs=1e-6)
    assert metrics["r2_k4"] == 1
    assert metrics["r2_mean"] == pytest.approx(0.5, abs=1e-6)


def test_splitting_batches_differently_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(101, 5) + torch.arange(101).unsqueeze(1) / 50  # the drift makes batch means differ
    x_hats = x + torch.randn(2, 101, 5)
    whole = split(x, x_hats).compute()
    for batches in (2, 7, 101):
        assert split(x, x_hats, batches=batches).compute() == pytest.approx(whole, abs=1e-9)


def test_adding_a_constant_to_x_and_x_hat_changes_nothing():
    torch.manual_seed(0)
    x = torch.randn(100, 5, dtype=torch.float64)
    x_hats = x + torch.randn(2, 100, 5, dtype=torch.float64)
    assert split(x + 1e4, x_hats + 1e4).compute() == pytest.approx(split(x, x_hats).compute(), abs=1e-9)


def test_an_average_of_batch_ratios_would_be_caught():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50, 5), torch.randn(50, 5) * 10])
    x_hats = (x + torch.randn(100, 5)).expand(2, -1, -1)
    halves = [split(x[rows], x_hats[:, rows]).compute()["r2_k2"] for rows in (slice(0, 50), slice(50, 100))]
    assert abs(sum(halves) / 2 - split(x, x_hats).compute()["r2_k2"]) > 0.1


def test_l0_counts_positive_values_among_the_largest_k():
    values = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    x = torch.randn(2, 5)
    metrics = split(x, x.expand(2, -1, -1), values=values).compute()
    assert (metrics["l0_k2"], metrics["l0_k4"]) == (1.5, 2.0)


def test_the_objective_falls_only_by_the_dead_share_above_thirty_percent():
    assert objective(0.9, 0.30) == 0.9
    assert objective(0.9, 0.0) == 0.9
    assert objective(0.99, 0.70) == pytest.approx(0.59)
