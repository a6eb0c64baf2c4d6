"""Tests of every kernel of the fused step against its plain reference, on a GPU or in Triton's interpreter."""

import importlib
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, and without it the fused step is not taken")

from msae_sweep.sae.kernels import (
    adam,
    aux_loss,
    bias_gradient,
    decode,
    fused_step,
    gather,
    latent_gradients,
    launch,
    packing,
    topk,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16_TOLERANCE = 6e-3
"""Limit of ‖got − expected‖ / ‖expected‖. bfloat16 keeps 8 bits, so rounding is off by at most 2^-9 = 2e-3; the
interpreter truncates instead, which is off by 4e-3."""
INT8_TOLERANCE = 2e-2
"""Limit for numbers in eight bits. The largest number of a row, about 4 times the average one, sets the scale, so they
are off by largest / 440 on average."""


def difference(got: Tensor, expected: Tensor) -> float:
    """Return ‖got − expected‖ / ‖expected‖, or NaN if anything is NaN."""
    got, expected = got.double().cpu(), expected.double().cpu()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def random_codes(batch: int, hidden: int, k: int, seed: int = 0) -> Tensor:
    """Return codes of random pre_acts. About half of a row's latents are positive, and one row has none."""
    pre_acts = randn(batch, hidden, seed=seed).bfloat16()
    pre_acts[batch // 2] = -1
    codes = torch.zeros(batch, topk.padded_k(k), dtype=torch.int32, device=DEVICE)
    codes[:, :k] = topk.top_codes_reference(pre_acts, k)
    return codes


def run_top_codes(pre_acts: Tensor, k: int, collect: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    batch, hidden = pre_acts.shape
    codes = torch.full((batch, topk.padded_k(k)), -1, dtype=torch.int32, device=DEVICE)
    ranks = torch.full((hidden, batch), 255, dtype=torch.uint8, device=DEVICE)
    holders = torch.zeros(hidden, -(-batch // 32), dtype=torch.int32, device=DEVICE)
    scratch = torch.full((batch, topk.n_candidates(k)), -1, dtype=torch.int32, device=DEVICE)
    topk.top_codes(pre_acts, codes, ranks, holders, scratch, k, collect=collect)
    return codes, ranks, holders


PRE_ACTS = {
    "random": lambda x: x,
    "ties": lambda x: (2 * x).round() / 2,
    "constant": torch.ones_like,
    "all negative": lambda x: -x.abs() - 1,
    "few positive": lambda x: torch.where(x > 2, x, -x.abs()),
    "clustered": lambda x: x + 8 * (torch.arange(x.shape[1], device=x.device) % 64 < 4),
    "huge and tiny": lambda x: x * torch.where(torch.arange(x.shape[1], device=x.device) % 2 == 0, 1e30, 1e-30),
}


SLOW_TOP_CODES = {
    (64, 1, "constant"),
    (1024, 16, "constant"),
    (1024, 16, "clustered"),
    (320, 50, "constant"),
    (192, 7, "constant"),
}
"""Cases of the top-k that take ten seconds each in Triton's interpreter and are marked slow. The others are similar."""


@pytest.mark.parametrize(
    ("hidden", "k", "case"),
    [
        pytest.param(*shape, case, marks=[pytest.mark.slow] if (*shape, case) in SLOW_TOP_CODES else [])
        for shape in ((64, 1), (64, 64), (192, 7), (320, 50), (1024, 16))
        for case in PRE_ACTS
    ],
)
def test_top_codes_are_the_largest_in_order_with_the_lowest_latent_first(hidden, k, case):
    pre_acts = PRE_ACTS[case](randn(3, hidden, seed=k)).bfloat16().contiguous()
    codes, _, _ = run_top_codes(pre_acts, k)
    assert torch.equal(codes[:, :k], topk.top_codes_reference(pre_acts, k))
    assert not codes[:, k:].any()


def test_top_codes_keep_nan_so_that_a_diverged_trial_is_seen():
    pre_acts = randn(3, 64).bfloat16()
    pre_acts[1, 5] = float("nan")
    values, latents = packing.split_codes(run_top_codes(pre_acts, 4)[0])
    assert values[1, 0].isnan()
    assert latents[1, 0] == 5
    assert values[[0, 2]].isfinite().all()


def test_top_codes_say_who_holds_a_latent_and_at_which_rank():
    pre_acts = randn(40, 128).bfloat16()
    codes, ranks, holders = run_top_codes(pre_acts, 9)
    values, latents = packing.split_codes(codes)
    expected = torch.zeros(128, 40, dtype=torch.bool)
    for row in range(40):
        for rank in range(9):
            if values[row, rank] > 0:
                assert ranks[latents[row, rank], row] == rank
                expected[latents[row, rank], row] = True
    bits = (holders.cpu()[:, :, None] >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(1)[:, :40].bool(), expected)
    assert not run_top_codes(pre_acts, 9, collect=False)[2].any()


def test_codes_hold_the_largest_latent_and_any_positive_value():
    values = torch.tensor([1e-38, 0.5, 1.0, 3e38, float("inf")]).bfloat16()
    codes = (values.view(torch.int16).int() << 17) | (packing.MAX_HIDDEN_DIM - 1)
    got, latents = packing.split_codes(codes)
    assert torch.equal(got, values.float())
    assert (latents == packing.MAX_HIDDEN_DIM - 1).all()


def collected(
    codes: Tensor, hidden: int, levels: tuple[int, ...], part: int
) -> tuple[latent_gradients.Entries, Tensor, Tensor]:
    """Return the entries of codes, `holders` as the kernels leave it, and samples_since_fired, which was 5 before."""
    batch = len(codes)
    values, latents = packing.split_codes(codes)
    ranks = torch.full((hidden, batch), 200, dtype=torch.uint8, device=DEVICE)
    bits = torch.zeros(hidden, 32 * -(-batch // 32), dtype=torch.int64)
    for row in range(batch):
        for rank in range(codes.shape[1]):
            if values[row, rank] > 0:
                ranks[latents[row, rank], row] = rank
                bits[latents[row, rank], row] = 1
    packed = (bits.view(hidden, -1, 32) << torch.arange(32)).sum(dim=2)
    holders = torch.where(packed >= 2**31, packed - 2**32, packed).int().to(DEVICE)

    def empty(n: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((n,), -77, dtype=dtype, device=DEVICE)

    n_parts = max(1, latent_gradients.n_parts(batch, levels[-1], part))
    entries = latent_gradients.Entries(
        empty(batch * levels[-1], torch.int64), empty(hidden), empty(hidden), empty(hidden), empty(n_parts),
        empty(n_parts), torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    since = torch.full((hidden,), 5, dtype=torch.int64, device=DEVICE)
    fired = torch.zeros(hidden, dtype=torch.int32, device=DEVICE)
    level_of_rank = torch.tensor([sum(r >= k for k in levels[:-1]) for r in range(levels[-1])], dtype=torch.int32)
    latent_gradients.build_entries(
        codes, ranks, holders, level_of_rank.to(DEVICE), entries, since, fired, len(levels), part
    )
    assert torch.equal(fired > 0, since == 0)
    return entries, holders, since


@pytest.mark.parametrize(("batch", "hidden", "levels", "part"), [(70, 64, (2, 5, 12), 4), (33, 128, (3,), 64)])
def test_entries_are_the_codes_by_latent_in_the_order_of_rows(batch, hidden, levels, part):
    codes = random_codes(batch, hidden, levels[-1])
    entries, holders, since = collected(codes, hidden, levels, part)
    further = {}
    for i in range(int(entries.cursors[1])):
        further[int(entries.parts[i]), int(entries.part_numbers[i])] = i
    for latent, expected in enumerate(latent_gradients.entries_reference(codes, hidden)):
        assert entries.counts[latent] == len(expected)
        assert since[latent] == (0 if expected else 5 + batch)
        start = int(entries.start[latent])
        for place, (row, rank, value) in enumerate(expected):
            packed = int(entries.packed[start + place])
            level = sum(rank >= k for k in levels[:-1])
            assert packed & 0xFFFFFFFF == row * len(levels) + level
            assert torch.tensor(packed >> 32, dtype=torch.int32).view(torch.float32) == value
        for number in range(1, -(-len(expected) // part)):
            assert further.pop((latent, number)) == entries.more_parts[latent] + number - 1
    assert not further
    assert not holders.any()


def decode_case(batch: int, hidden: int, width: int, levels: tuple[int, ...], seed: int = 0):
    codes = random_codes(batch, hidden, levels[-1], seed)
    W_dec = torch.nn.functional.normalize(randn(hidden, width, seed=seed + 1), dim=1).bfloat16().float()
    start = randn(batch, width, seed=seed + 2)
    scales = torch.rand(len(levels), generator=torch.Generator().manual_seed(seed)).to(DEVICE) + 0.1
    errors = decode.level_errors_reference(start, codes, W_dec, levels)
    return codes, W_dec, start, scales, errors, decode.gradients_reference(errors, scales)


def nans(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(size, float("nan"), dtype=dtype, device=DEVICE)


LEVELS = [(1,), (2, 5, 12), (16, 32), (3, 20, 21)]


def poisoned_quads(batch: int, n_levels: int, width: int) -> packing.QuadWords:
    return packing.QuadWords(
        torch.full((batch, n_levels, width // 4), -1, dtype=torch.int32, device=DEVICE), nans(batch, n_levels)
    )


def quantized(x: Tensor) -> packing.QuadWords:
    quads, scales = packing.quantize_reference(x.flatten(0, 1))
    return packing.QuadWords(quads.view(*x.shape[:2], -1).contiguous(), scales.view(x.shape[:2]).contiguous())


def unquantized(G: packing.QuadWords) -> Tensor:
    return packing.dequantize_reference(G.words.flatten(0, 1), G.scales.flatten()).view(*G.scales.shape, -1)


def test_quad_words_keep_zeros_and_are_off_by_half_a_step_at_the_most():
    x = randn(9, 64, seed=2)
    x[0], x[1, ::2], x[2] = 0, 0, -x[2].abs()
    back = packing.dequantize_reference(*packing.quantize_reference(x))
    assert torch.equal(back == 0, x.abs() * 254 <= x.abs().amax(dim=1, keepdim=True))
    assert ((back - x).abs() <= x.abs().amax(dim=1, keepdim=True) * (1 + 1e-5) / 254).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_decoding_few_levels_gives_every_levels_gradient(levels):
    batch, hidden, width = 9, 64, 64
    codes, W_dec, start, scales, errors, G_expected = decode_case(batch, hidden, width, levels)
    G = poisoned_quads(batch, len(levels), width)
    row_loss, last_squared_error, grad_pre = nans(batch), nans(batch), nans(hidden, 16, dtype=torch.bfloat16)
    decode.decode_few(
        start, codes, packing.pack_reference(W_dec), scales, G, row_loss, last_squared_error, grad_pre, levels
    )
    assert difference(unquantized(G), G_expected.transpose(0, 1)) < INT8_TOLERANCE
    assert difference(row_loss, (scales[:, None] / 2 * errors.square().sum(dim=2)).sum(dim=0)) < 1e-5
    assert difference(last_squared_error, errors[-1].square().sum(dim=1)) < 1e-5
    assert not grad_pre.any()


@pytest.mark.parametrize("levels", [*LEVELS, tuple(range(1, 21))])
def test_decoding_many_levels_gives_the_same_by_walking_back(levels):
    batch, hidden, width, k = 9, 64, 64, levels[-1]
    codes, W_dec, start, scales, errors, G_expected = decode_case(batch, hidden, width, levels)
    rank_scales = torch.tensor(fused_step.rank_scales(scales.tolist(), levels), device=DEVICE)
    level_of_rank = torch.tensor([sum(r >= n for n in levels[:-1]) for r in range(k)], dtype=torch.int32, device=DEVICE)
    G = poisoned_quads(batch, len(levels), width)
    row_loss, last_squared_error = nans(batch), nans(batch)
    grad_pre = nans(hidden, 16, dtype=torch.bfloat16)
    packed = packing.pack_reference(W_dec)
    decode.decode_many(start, codes, packed, rank_scales, level_of_rank, G, row_loss, last_squared_error, grad_pre)
    assert difference(row_loss, (scales[:, None] / 2 * errors.square().sum(dim=2)).sum(dim=0)) < 1e-5
    assert difference(last_squared_error, errors[-1].square().sum(dim=1)) < 1e-5
    assert not grad_pre.any()
    assert difference(unquantized(G), G_expected.transpose(0, 1)) < INT8_TOLERANCE


def pre_gradient(codes: Tensor, W_dec: Tensor, G: Tensor, hidden: int, levels: tuple[int, ...]) -> Tensor:
    """Return the gradient [batch, hidden_dim] in the plain way: G · w wherever a latent is active."""
    values, latents = packing.split_codes(codes)
    expected = torch.zeros(len(codes), hidden, dtype=torch.float64, device=DEVICE)
    for rank in range(levels[-1]):
        level = sum(rank >= k for k in levels[:-1])
        active = values[:, rank] > 0
        dot = (G[level] * W_dec.double()[latents[:, rank].long()]).sum(dim=1)
        expected[torch.arange(len(codes), device=DEVICE)[active], latents[active, rank].long()] = dot[active]
    return expected


@pytest.mark.parametrize("levels", [(1,), (2, 5, 12), (3, 20, 21)])
def test_validation_errors_and_active_counts_are_those_of_every_level(levels):
    batch, hidden, width = 6, 64, 64
    codes, W_dec, start, _, errors, _ = decode_case(batch, hidden, width, levels, seed=3)
    got, active = nans(batch, len(levels)), torch.full((batch, len(levels)), -1, dtype=torch.int32, device=DEVICE)
    decode.decode_errors(start, codes, packing.pack_reference(W_dec), got, active, levels)
    assert difference(got, errors.square().sum(dim=2).T) < 1e-5
    holds = packing.split_codes(codes)[0] > 0
    assert torch.equal(active, torch.stack([holds[:, :k].sum(dim=1) for k in levels], dim=1).int())


@pytest.mark.parametrize(
    ("batch", "levels", "part"), [pytest.param(41, (2, 5, 12), 4, marks=pytest.mark.slow), (9, (3,), 64)]
)
def test_the_backward_pass_sums_each_latents_rows_part_by_part(batch, levels, part):
    hidden, width = 64, 64
    codes, W_dec, _, _, _, G = decode_case(batch, hidden, width, levels, seed=5)
    entries, _, _ = collected(codes, hidden, levels, part)
    packed_G = quantized(G.transpose(0, 1).float())
    rounded_G = unquantized(packed_G).transpose(0, 1).double()
    expected_pre = pre_gradient(codes, W_dec, rounded_G, hidden, levels)
    n_parts = len(entries.parts)
    gradients = latent_gradients.Gradients(nans(hidden, width), nans(n_parts, width), nans(hidden), nans(n_parts))
    grad_pre = torch.zeros(hidden, -(-batch // 8) * 8, dtype=torch.bfloat16, device=DEVICE)
    latent_gradients.backward(packed_G, packing.pack_reference(W_dec), entries, gradients, grad_pre, part)
    used = int(entries.cursors[1])
    W_grad, pre_sum = gradients.W_dec.double(), gradients.pre_sum.double()
    W_grad.index_add_(0, entries.parts[:used].long(), gradients.W_dec_parts[:used].double())
    pre_sum.index_add_(0, entries.parts[:used].long(), gradients.pre_sum_parts[:used].double())
    values, latents = packing.split_codes(codes)
    expected = torch.zeros(hidden, width, dtype=torch.float64, device=DEVICE)
    for rank in range(levels[-1]):
        level = sum(rank >= k for k in levels[:-1])
        expected.index_add_(0, latents[:, rank].long(), values[:, rank, None].double() * rounded_G[level])
    # The kernel sums 1 + 2⁻¹⁵ of each byte, which loses some bits. Rounding to eight bits costs fifty times as much.
    assert difference(W_grad, expected) < 1e-4
    assert difference(grad_pre[:, :batch], expected_pre.T) < BF16_TOLERANCE
    assert difference(pre_sum, expected_pre.sum(dim=0)) < BF16_TOLERANCE


def update_case(hidden: int, width: int, n_parts: int = 6):
    """Return the inputs and the expected gradients of one step. Latent 3 has three parts, and latent 7 has none."""
    part = 4
    moments = [
        adam.AdamParameter(
            randn(*size, seed=i), 0.1 * randn(*size, seed=i + 10), 0.01 * randn(*size, seed=i + 20).square()
        )
        for i, size in enumerate([(hidden, width), (hidden, width), (width,)])
    ]
    moments[1].value.copy_(torch.nn.functional.normalize(moments[1].value, dim=1))
    counts = torch.full((hidden,), 2, dtype=torch.int32, device=DEVICE)
    counts[3], counts[7] = 11, 0
    more_parts = torch.full((hidden,), -5, dtype=torch.int32, device=DEVICE)
    more_parts[3] = 1
    unused = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    entries = latent_gradients.Entries(unused, unused, counts, more_parts, unused, unused, unused)
    gradients = latent_gradients.Gradients(
        randn(hidden, width, seed=31), randn(n_parts, width, seed=32), randn(hidden, seed=33), randn(n_parts, seed=34)
    )
    totals = torch.tensor([1.0, 2.0], dtype=torch.float64, device=DEVICE)
    hyper = adam.DeviceHyperparameters(
        torch.tensor([[9.0, 9.0], [0.02, 0.3]], device=DEVICE), torch.tensor([0.9, 0.99, 1e-6, 0.5], device=DEVICE),
        torch.tensor([4, 1], dtype=torch.int32, device=DEVICE), torch.tensor([0.02, 0.3, 0.25], device=DEVICE), totals,
    )  # fmt: skip
    W_dec_gradient = gradients.W_dec.double()
    W_dec_gradient[3] += gradients.W_dec_parts[1:3].double().sum(dim=0)
    pre_sum = gradients.pre_sum.double()
    pre_sum[3] += gradients.pre_sum_parts[1:3].double().sum()
    return part, moments, entries, gradients, hyper, W_dec_gradient, pre_sum


def test_pre_biass_gradient_is_summed_and_the_counters_move_on():
    hidden, width, batch = 64, 64, 37
    part, (W_enc, _, _), entries, gradients, hyper, _, pre_sum = update_case(hidden, width)
    G = quantized(randn(batch * 3, width, seed=1).view(batch, 3, width))
    sums = nans(bias_gradient.N_SUMS, width)
    bias_gradient.sum_decoding_gradient(G, sums, hyper)
    bias_gradient.sum_encoding_gradient(W_enc.value, entries, gradients, sums, part)
    first = unquantized(G)[:, 0].double().sum(dim=0)
    assert difference(sums.sum(dim=0), first - pre_sum @ W_enc.value.double()) < 1e-5
    assert hyper.counters.tolist() == [5, 2]
    assert hyper.current.tolist() == pytest.approx([0.02, 0.3, 1.0])


@pytest.mark.parametrize("normalize", [True, False])
def test_adam_updates_everything_and_keeps_decoder_rows_at_unit_norm(normalize):
    hidden, width = 64, 64
    part, (W_enc, W_dec, pre_bias), entries, gradients, hyper, W_dec_gradient, _ = update_case(hidden, width)
    grad_W_enc, sums, row_loss = (
        randn(hidden, width, seed=40),
        randn(bias_gradient.N_SUMS, width, seed=41),
        randn(1500, seed=42),
    )
    aux_losses = randn(7, seed=43)
    if normalize:
        along = (W_dec_gradient * W_dec.value).sum(dim=1, keepdim=True)
        W_dec_gradient = W_dec_gradient - along * W_dec.value.double()
    # The schedule holds learning_rate / (1 − β₁^t) and sqrt(1 − β₂^t). With t = 1, these are 0.02 and 0.3.
    settings = {"lr": 0.02 * (1 - 0.9), "beta1": 0.9, "beta2": 1 - 0.3**2, "eps": 1e-6, "step": 1}
    hyper.constants[1] = 1 - 0.3**2
    expected = [
        adam.adam_reference(moments, 0.25 * gradient, **settings)
        for moments, gradient in (
            (W_enc, grad_W_enc), (W_dec, W_dec_gradient), (pre_bias, sums.double().sum(dim=0)),
        )
    ]  # fmt: skip
    if normalize:
        expected[1] = torch.nn.functional.normalize(expected[1], dim=1)
    encoder_copy = nans(hidden, width, dtype=torch.bfloat16)
    decoder_copy = torch.full((hidden, width // 2), -1, dtype=torch.int32, device=DEVICE)
    adam.update_weights(
        W_enc, W_dec, pre_bias, grad_W_enc, entries, gradients, sums, row_loss, aux_losses, hyper, encoder_copy,
        decoder_copy, part, normalize=normalize,
    )  # fmt: skip
    for moments, value in zip((W_enc, W_dec, pre_bias), expected, strict=True):
        assert difference(moments.value, value) < 1e-6
    assert difference(W_enc.mean, 0.9 * 0.1 * randn(hidden, width, seed=10) + 0.1 * 0.25 * grad_W_enc) < 1e-6
    assert difference(encoder_copy, W_enc.value) < BF16_TOLERANCE
    assert difference(packing.unpack_reference(decoder_copy), W_dec.value) < BF16_TOLERANCE
    assert hyper.totals.tolist() == pytest.approx([1 + row_loss.sum().item(), 2 + aux_losses.sum().item()], rel=1e-5)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_takes_the_norm_over_all_parameters(limit):
    hidden, width = 64, 64
    part, (_, W_dec, _), entries, gradients, hyper, W_dec_gradient, _ = update_case(hidden, width)
    hyper.constants[3] = limit
    grad_W_enc, sums, norms = randn(hidden, width, seed=40), randn(bias_gradient.N_SUMS, width, seed=41), nans(4)
    adam.clip_gradients(grad_W_enc, W_dec.value, entries, gradients, sums, norms, hyper, part, normalize=True)
    along = (W_dec_gradient * W_dec.value).sum(dim=1, keepdim=True)
    parts = (grad_W_enc, W_dec_gradient - along * W_dec.value.double(), sums.double().sum(dim=0))
    norm = sum(p.double().square().sum() for p in parts) ** 0.5
    assert hyper.current[2].item() == pytest.approx(min(1.0, limit / (norm.item() + 1e-6)), rel=1e-5)


def dead_case(batch: int, hidden: int, width: int, n_dead: int):
    since = torch.zeros(hidden, dtype=torch.int64, device=DEVICE)
    since[torch.randperm(hidden, generator=torch.Generator().manual_seed(1))[:n_dead]] = 100
    aux = aux_loss.AuxHyper(torch.tensor([100], device=DEVICE), torch.tensor([0.3], device=DEVICE))
    row_tiles = -(-batch // aux_loss.TILE)
    buffers = aux_loss.DeadLatents(
        torch.full((hidden,), -1, dtype=torch.int32, device=DEVICE),
        torch.full((1,), -1, dtype=torch.int32, device=DEVICE),
        nans(batch, hidden, dtype=torch.bfloat16),
        torch.full((batch, width // 2), -1, dtype=torch.int32, device=DEVICE),
        nans(row_tiles * (width // 2 // min(64, width // 2))),
        nans(row_tiles, hidden),
    )
    return since, aux, buffers


@pytest.mark.parametrize("n_dead", [0, 1, 40, 100])
@pytest.mark.parametrize("aux_k", [5, 64])
def test_the_dead_are_listed_and_each_row_uses_its_largest_aux_k(n_dead, aux_k):
    since, aux, buffers = dead_case(5, 128, 32, n_dead)
    since[120:] = 100  # beyond the first 120 latents there is only padding
    aux_loss.find_dead(since, aux, buffers, 120)
    expected = (since[:120] >= 100).nonzero().flatten()
    assert buffers.n_dead.item() == len(expected)
    assert torch.equal(buffers.latents[: len(expected)].long(), expected)
    pre_acts = (randn(5, 128) * 2).round().div(2).bfloat16()  # the rounding makes many ties
    aux_loss.select_codes(pre_acts, buffers, aux_k)
    if len(expected):
        acts = buffers.acts[:, : len(expected)].float()
        chosen = pre_acts[:, expected].float().clamp_min(0)
        values, places = chosen.sort(dim=1, descending=True, stable=True)
        wanted = torch.zeros_like(chosen).scatter(1, places[:, :aux_k], values[:, :aux_k])
        assert torch.equal(acts, wanted)
        assert not buffers.acts[:, len(expected) : -(-len(expected) // aux_loss.TILE) * aux_loss.TILE].any()


@pytest.mark.parametrize(("batch", "n_dead", "aux_k"), [(70, 50, 10), (20, 100, 512), (5, 0, 8)])
def test_the_auxiliary_loss_and_its_gradients_are_those_of_the_plain_one(batch, n_dead, aux_k):
    hidden, width = 128, 64
    since, aux, buffers = dead_case(batch, hidden, width, n_dead)
    aux_loss.find_dead(since, aux, buffers, hidden)
    W_enc, W_dec = (randn(hidden, width, seed=i).bfloat16().double() for i in (1, 2))
    bias, x, x_hat = randn(width, seed=3).double(), randn(batch, width, seed=4).double(), randn(batch, width, seed=5)
    centred = (x - bias).float().bfloat16().double()
    pre_acts = (centred @ W_enc.T).float().bfloat16()
    scales = torch.tensor([0.2, 0.4], device=DEVICE)
    error = x_hat.double() - x
    G = poisoned_quads(batch, 2, width)
    last = quantized((0.4 * error).float()[:, None])
    G.words[:, 1], G.scales[:, 1] = last.words[:, 0], last.scales[:, 0]
    before = randn(hidden, width, seed=6), randn(hidden, seed=7), randn(hidden, 72, seed=8).bfloat16()
    gradients = latent_gradients.Gradients(before[0].clone(), nans(1, width), before[1].clone(), nans(1))
    grad_pre = before[2].clone()
    aux_loss.select_codes(pre_acts, buffers, aux_k)
    packed = packing.pack_reference(W_dec.float())
    aux_loss.residual_gradient(G, scales, error.square().sum(dim=1).float(), packed, aux, buffers)
    aux_loss.add_gradients(packed, buffers, grad_pre, gradients)

    # The expected values come from autograd, from the rounded pre_acts on, so that both choose the same latents.
    is_dead = since >= 100
    leaf, decoder = pre_acts.double().requires_grad_(), W_dec.clone().requires_grad_()
    expected = aux_loss_from_pre_acts(leaf, -error, is_dead, decoder, aux_k)
    assert buffers.losses.sum().item() == pytest.approx(expected.item(), rel=5e-3, abs=1e-9)
    if n_dead:
        (0.3 * expected).backward()
        got = gradients.W_dec.double() - before[0]
        assert difference(got, decoder.grad) < 2 * BF16_TOLERANCE
        got = (grad_pre.float() - before[2].float())[:, :batch].T
        scale = before[2].float().abs().max() * 2**-8  # the previous content is rounded again with the sum
        assert (got.double() - leaf.grad).abs().max() < scale + 2 * BF16_TOLERANCE * leaf.grad.abs().max()
        assert difference(gradients.pre_sum - before[1], leaf.grad.sum(dim=0)) < 3 * BF16_TOLERANCE
    else:
        assert torch.equal(gradients.W_dec, before[0])
        assert torch.equal(grad_pre, before[2])


def aux_loss_from_pre_acts(pre_acts: Tensor, residual: Tensor, is_dead: Tensor, W_dec: Tensor, aux_k: int) -> Tensor:
    """Return `loss.aux_loss` for given pre_acts and a given residual."""
    latents = is_dead.nonzero().flatten()
    if not len(latents):
        return residual.new_zeros(())
    chosen = torch.relu(pre_acts[:, latents])
    values, places = chosen.sort(dim=1, descending=True, stable=True)
    codes = torch.zeros_like(chosen).scatter(1, places[:, :aux_k], values[:, :aux_k])
    return (codes @ W_dec[latents] - residual).square().sum() / residual.square().sum()


@pytest.mark.parametrize("with_order", [True, False])
def test_rows_are_fetched_in_order_and_the_last_one_fills_a_batch(with_order):
    n, batch, input_dim, width = 21, 8, 10, 32
    x, order = randn(n, input_dim), torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    window = torch.tensor([x.data_ptr(), order.data_ptr() if with_order else 0, n], device=DEVICE)
    bias = torch.zeros(width, device=DEVICE)
    bias[:input_dim] = randn(input_dim, seed=2)
    for step in range(3):
        counter = torch.tensor([step], dtype=torch.int32, device=DEVICE)
        centred, start = nans(batch, width, dtype=torch.bfloat16), nans(batch, width)
        cursors = torch.ones(2, dtype=torch.int32, device=DEVICE)
        gather.fetch_rows(window, counter, bias, centred, start, cursors, batch, input_dim)
        numbers = torch.arange(step * batch, (step + 1) * batch, device=DEVICE).clamp_max(n - 1)
        expected = (x[order] if with_order else x)[numbers] - bias[:input_dim]
        assert torch.equal(start[:, :input_dim], -expected)
        assert difference(centred[:, :input_dim], expected) < BF16_TOLERANCE
        assert start[:, input_dim:].isnan().all()  # padding is not written
        assert not cursors.any()


def test_rows_beyond_the_windows_end_do_not_count_in_validation():
    n, batch = 21, 8
    window = torch.tensor([0, 0, n], device=DEVICE)
    counter = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    sums = torch.ones(3, dtype=torch.float64, device=DEVICE)
    counts = torch.ones(3, dtype=torch.int64, device=DEVICE)
    expected_sums, expected_counts = sums.clone(), counts.clone()
    for step in (1, 2):
        errors = randn(batch, 3, seed=step)
        active = torch.randint(9, (batch, 3), dtype=torch.int32, device=DEVICE)
        inside = min(batch, n - step * batch)
        expected_sums += errors[:inside].double().sum(dim=0)
        expected_counts += active[:inside].sum(dim=0)
        gather.add_errors(window, counter, errors, active, sums, counts)
    torch.testing.assert_close(sums, expected_sums)
    assert torch.equal(counts, expected_counts)
    assert counter.item() == 3


@pytest.mark.parametrize("k", [1, 16, 50])
def test_validation_counts_each_latents_active_rows_up_to_the_windows_end(k):
    n, batch, hidden_dim = 21, 8, 64
    window = torch.tensor([0, 0, n], device=DEVICE)
    counts = torch.ones(hidden_dim, dtype=torch.int32, device=DEVICE)
    expected = counts.clone()
    for step in (0, 2):  # the last batch has five rows inside the window
        counter = torch.tensor([step], dtype=torch.int32, device=DEVICE)
        # Half of the entries are negative, so rows have fewer codes than k where k is 50.
        codes = topk.top_codes_reference(randn(batch, hidden_dim, seed=step).bfloat16(), k)
        padded = torch.zeros(batch, topk.padded_k(k), dtype=torch.int32, device=DEVICE)
        padded[:, :k] = codes
        values, latents = packing.split_codes(codes[: min(batch, n - step * batch)])
        expected += torch.bincount(latents[values > 0], minlength=hidden_dim).int()
        gather.count_active(window, counter, padded, counts)
    assert torch.equal(counts, expected)


def compile_three(monkeypatch) -> list[str]:
    """Compile three kernels in parallel, and return what was asked for, in its order."""
    cache = importlib.import_module("triton.runtime.cache")
    asked: list[str] = []
    monkeypatch.setattr(cache, "triton_key", lambda: asked.append("hash"), raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with launch.compile_in_parallel(torch.device("cuda", 0)):
        for _ in range(3):
            kernel = Mock()
            kernel.warmup.side_effect = lambda *args, **options: (cache.triton_key(), asked.append("kernel"))
            launch.launch(kernel, (1,), value=1.0)
        assert asked == []
    return asked


def test_an_installed_triton_need_not_hash_itself(monkeypatch):
    asked = compile_three(monkeypatch)
    assert asked == ["kernel"] * 3
    importlib.import_module("triton.runtime.cache").triton_key()
    assert asked[-1] == "hash", "others find Triton as it was"


def test_a_triton_without_its_installers_digests_hashes_itself_before_the_threads_ask(monkeypatch):
    monkeypatch.setattr(launch, "_installed_triton", lambda: None)
    asked = compile_three(monkeypatch)
    assert asked[0] == "hash"
    assert asked.count("kernel") == 3


def test_what_tells_a_triton_from_another_are_the_digests_of_its_files(tmp_path, monkeypatch):
    package = tmp_path / "triton" / "__init__.py"
    monkeypatch.setattr(importlib.import_module("triton"), "__file__", str(package))
    assert launch._installed_triton() is None
    record = tmp_path / "triton-3.9.0.dist-info" / "RECORD"
    record.parent.mkdir()
    record.write_text("triton-3.9.0.dist-info/METADATA,sha256=a,1\n")  # an editable installation has such a RECORD
    assert launch._installed_triton() is None
    keys = []
    for digest in ("b", "c", "b"):
        record.write_text(f"triton/_C/libtriton.so,sha256={digest},1\n")
        keys.append(launch._installed_triton())
    assert keys[0] == keys[2] != keys[1]
