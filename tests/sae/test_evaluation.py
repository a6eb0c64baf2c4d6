"""Tests that an evaluation equals the reference at every k, however the rows are split and wherever they are summed."""

import pickle
from itertools import pairwise

import pytest
import torch

from msae_sweep.sae.evaluation import (
    CHUNK_ELEMENTS,
    EvaluationSums,
    activation_counts,
    decoder_coherence,
    evaluate,
    level_stability,
    matched_cosine,
)
from msae_sweep.sae.kernels import reference
from msae_sweep.sae.metrics import SplitMetrics, total_sum_of_squares
from msae_sweep.sae.model import MSAE


def trained(seed: int = 0, hidden_dim: int = 48, k_levels=(2, 4, 8)) -> MSAE:
    """Return a model whose encoder, decoder and pre_bias differ, and in which some latents never fire."""
    torch.manual_seed(seed)
    model = MSAE(12, hidden_dim, k_levels)
    model.W_enc.data += 0.3 * torch.randn_like(model.W_enc)
    model.W_enc.data[:3] = 0
    model.pre_bias.data = torch.randn(12)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(500, 12, generator=torch.Generator().manual_seed(1)) * 2 + 5


@pytest.mark.parametrize("max_k", [1, 8, 20, 48])
def test_every_k_equals_the_reference_with_every_level(x, max_k):
    model = trained()
    every = range(1, max_k + 1)
    expected = SplitMetrics(every, 12, total_sum_of_squares([x]), torch.device("cpu"))
    whole = reference.reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, every)
    expected.update(x, whole)
    named = expected.compute()
    found = evaluate(model, [x], max_k=max_k)
    torch.testing.assert_close(found.r2, [named[f"r2_k{k}"] for k in every], rtol=1e-5, atol=1e-5)
    assert found.l0 == [named[f"l0_k{k}"] for k in every]
    fired = torch.zeros(500, 48).scatter(1, whole.indices, (whole.values > 0).float()).sum(dim=0)
    assert found.firing.tolist() == fired.tolist()
    assert found.dead_ratio == (fired == 0).double().mean().item() >= 3 / 48
    assert found.n_rows == 500


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("elements", [1000, 2**27])
def test_a_gpu_gives_what_the_cpu_gives(x, elements, monkeypatch):
    from msae_sweep.sae import evaluation

    monkeypatch.setitem(evaluation.CHUNK_ELEMENTS, "cuda", elements)
    model = trained()
    here, there = evaluate(model, [x], max_k=20), evaluate(model, [x], "cuda", max_k=20)
    assert model.W_enc.device.type == "cpu"
    torch.testing.assert_close(there.r2, here.r2, rtol=1e-5, atol=1e-5)
    assert torch.equal(there.level_firing, here.level_firing)
    assert decoder_coherence(model.W_dec.cuda()) == pytest.approx(decoder_coherence(model.W_dec), rel=1e-5)


def test_levels_of_firing_are_the_models_levels_up_to_max_k(x):
    model = trained()
    assert evaluate(model, [x]).levels == (2, 4, 8)
    assert evaluate(model, [x], max_k=4).levels == (2, 4)
    found = evaluate(model, [x], max_k=20)
    assert found.levels == (2, 4, 8, 20)
    for k, firing in zip(found.levels, found.level_firing, strict=True):
        assert torch.equal(firing, (model.encode(x, k) > 0).sum(dim=0))


@pytest.mark.parametrize("elements", [1, 100, 10**9])
def test_cutting_rows_and_adding_parts_changes_nothing_but_rounding(x, elements, monkeypatch):
    from msae_sweep.sae import evaluation

    model, whole = trained(), evaluate(trained(), [x])
    monkeypatch.setitem(evaluation.CHUNK_ELEMENTS, "cpu", elements)
    parts = []
    for rows in (x[:1], x[1:300], x[300:300], x[300:]):
        sums = EvaluationSums(model)
        for batch in rows.split(77):
            sums.update(model, batch)
        parts.append(pickle.loads(pickle.dumps(sums.cpu())))
    total = EvaluationSums(model)
    for part in parts:
        total.merge(part)
    found = total.compute()
    torch.testing.assert_close(found.r2, whole.r2, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.level_firing, whole.level_firing)
    assert (found.n_rows, found.l0, found.dead_ratio) == (whole.n_rows, whole.l0, whole.dead_ratio)


def test_a_mean_far_from_zero_costs_r2_no_digits():
    """The mean predictor has R² 0, even at a mean where Σx² − (Σx)²/n in float32 would have lost all digits."""
    x = (torch.randn(2000, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4).float()
    model = trained()
    model.W_enc.data.zero_()
    model.pre_bias.data = x.double().mean(dim=0).float()
    assert evaluate(model, x.split(100)).r2 == pytest.approx([0.0] * 8, abs=1e-4)


def test_r2_rises_where_nothing_but_true_directions_are_taken():
    model = trained()
    model.W_enc.data = model.W_dec.data.clone()
    model.pre_bias.data.zero_()
    code = torch.zeros(64, 48)
    code[torch.arange(64), torch.arange(64) % 48] = 3.0
    r2 = evaluate(model, [code @ model.W_dec.detach()]).r2
    assert r2[0] > 0.999
    model.W_dec.data *= 0.1  # each rank then takes off only a part
    assert all(a < b for a, b in pairwise(evaluate(model, [code @ model.W_enc.detach()], max_k=3).r2))


@pytest.mark.parametrize("max_k", [0, 49])
def test_max_k_must_lie_within_the_dictionary(x, max_k):
    with pytest.raises(ValueError, match=f"max_k: {max_k} must be 1 to hidden_dim 48"):
        evaluate(trained(), [x], max_k=max_k)


def test_rows_that_do_not_vary_have_no_r2_and_no_rows_leave_every_latent_dead():
    assert all(r2 != r2 for r2 in evaluate(trained(), [torch.ones(5, 12)]).r2)
    nothing = evaluate(trained(), [])
    assert (nothing.n_rows, nothing.dead_ratio, nothing.l0) == (0, 1.0, [0.0] * 8)


def test_activation_counts_are_the_firings_at_the_largest_level(x, monkeypatch):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1000)
    model = trained()
    counts = activation_counts(model, torch.split(x, 100))
    assert torch.equal(counts, evaluate(model, [x]).firing)
    assert 0 < counts.max() <= len(x)


def test_coherence_is_that_of_the_whole_matrix_of_cosines(monkeypatch):
    W_dec = trained().W_dec.detach() * 3
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0)
    found = decoder_coherence(W_dec)
    assert found.max == pytest.approx(cosines.max().item(), rel=1e-6)
    assert found.mean == pytest.approx(cosines.sum().item() / (48 * 47), rel=1e-6)
    assert found.mean_max == pytest.approx(cosines.amax(dim=1).mean().item(), rel=1e-6)


def test_coherence_of_orthogonal_rows_is_0_and_of_a_repeated_direction_1():
    assert decoder_coherence(torch.eye(5)) == (0, 0, 0)
    assert decoder_coherence(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).max == pytest.approx(1)
    assert decoder_coherence(torch.ones(1, 5)) == (0, 0, 0)


def test_a_large_dictionary_is_compared_in_chunks():
    W_dec = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))  # 5000² numbers make two chunks
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    cosines = unit @ unit.T
    assert decoder_coherence(W_dec).mean_max == pytest.approx(
        cosines.abs().fill_diagonal_(0).amax(dim=1).mean().item(), rel=1e-5
    )
    torch.testing.assert_close(matched_cosine(W_dec, W_dec[:4000]), (unit @ unit[:4000].T).amax(dim=1))


def test_the_same_dictionary_in_another_order_matches_fully_and_its_opposite_does_not():
    W_dec = trained().W_dec.detach()
    torch.testing.assert_close(matched_cosine(W_dec, W_dec[torch.randperm(48)] * 2), torch.ones(48))
    lonely = torch.eye(12)[:1]
    assert matched_cosine(lonely, -lonely).tolist() == [-1]


def test_stability_weighs_latents_by_how_often_they_fire_at_the_level():
    firing = torch.tensor([[4, 0, 0], [4, 4, 0], [0, 0, 0]])
    found = level_stability(firing, torch.tensor([1.0, 0.5, 0.1]))
    assert found[:2] == [1.0, 0.75]
    assert found[2] != found[2]


def test_a_model_is_stable_against_itself_and_less_so_against_another_seed(x):
    model = trained()
    found = evaluate(model, [x])
    itself, other = (
        level_stability(found.level_firing, matched_cosine(model.W_dec, against.W_dec))
        for against in (model, trained(seed=1))
    )
    assert itself == pytest.approx([1.0] * 3, abs=1e-6)
    assert all(0 < level < 0.95 for level in other)


def test_models_of_other_width_cannot_be_matched():
    with pytest.raises(ValueError, match="input_dim: 12 and 8"):
        matched_cosine(torch.ones(4, 12), torch.ones(4, 8))
