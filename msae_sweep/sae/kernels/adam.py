"""Kernels of Adam and the work around it: sums of gradient parts, projection, unit norm, bfloat16 copies, pre_bias."""

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from msae_sweep.sae.kernels.latent_gradients import Entries, Gradients
from msae_sweep.sae.kernels.launch import launch
from msae_sweep.sae.kernels.packing import QuadWords, dequantize, pack

N_DECODING_SUMS = 64
"""Number of programs that each sum a share of the rows for pre_bias's gradient."""

N_ENCODING_SUMS = 128
"""Number of programs that each sum a share of the latents for pre_bias's gradient."""

N_SUMS = N_DECODING_SUMS + N_ENCODING_SUMS


class AdamParameter(NamedTuple):
    """Parameter with Adam's two moments: float32 tensors of one shape, updated in place."""

    value: Tensor
    mean: Tensor
    square: Tensor


class DeviceHyperparameters(NamedTuple):
    """Values that differ between trials or steps, on the device so that one captured graph can be used for all."""

    schedule: Float[Tensor, "steps 2"]
    """Row per step: learning_rate / (1 − β₁^t), and sqrt(1 − β₂^t)."""
    betas: Float[Tensor, " 4"]
    """β₁, β₂, eps, and the largest gradient norm (infinite where gradients are not clipped)."""
    counters: Int[Tensor, " 2"]
    """Number of steps done in this window, and number done since the schedule was last set."""
    now: Float[Tensor, " 3"]
    """Current step's row of `schedule`, and the factor that clips its gradient."""
    totals: Float[Tensor, " 2"]
    """Sums over the epoch of the reconstruction loss and of the auxiliary loss, float64."""


def sum_decoding_gradient(G: QuadWords, sums: Float[Tensor, "shares width"], hyper: DeviceHyperparameters) -> None:
    """Write pre_bias's gradient from its addition after decoding at every level: Σ_b G_0[b], in N_DECODING_SUMS shares.

    The kernel also copies this step's row of the schedule to `hyper.now` and advances the counters, which nothing reads
    any more in this step.
    """
    batch, n_levels, quarter = G.words.shape
    launch(
        _sum_decoding_gradient, (N_DECODING_SUMS,),
        *G, sums, hyper.schedule, hyper.counters, hyper.now, batch, n_levels,
        QUARTER=quarter, ROWS=max(1, min(16, 1024 // quarter)), num_warps=4,
    )  # fmt: skip


def sum_encoding_gradient(
    W_enc: Float[Tensor, "hidden_dim width"],
    entries: Entries,
    gradients: Gradients,
    sums: Float[Tensor, "shares width"],
    part: int,
) -> None:
    """Write pre_bias's gradient from its subtraction before encoding: −Σ_n (Σ_b grad_pre[b, n]) W_enc[n], in shares.

    The shares follow those of `sum_decoding_gradient` in `sums`. The matrix product that runs concurrently fills the
    multiprocessors that it uses, and waits for them, so the work here is cut finely enough to end soon.
    """
    hidden_dim, width = W_enc.shape
    half = width // 2
    launch(
        _sum_encoding_gradient, (N_ENCODING_SUMS,),
        W_enc, entries.counts, entries.more_parts, gradients.pre_sum, gradients.pre_sum_parts,
        sums[N_DECODING_SUMS:], hidden_dim,
        HALF=half, ROWS=max(1, min(32, 4096 // half)), PART=part, SHARES=N_ENCODING_SUMS, num_warps=8,
    )  # fmt: skip


def clip_gradients(
    grad_W_enc: Float[Tensor, "hidden_dim width"],
    W_dec: Float[Tensor, "hidden_dim width"],
    entries: Entries,
    gradients: Gradients,
    sums: Float[Tensor, "shares width"],
    norms: Float[Tensor, " pieces"],
    hyper: DeviceHyperparameters,
    part: int,
    *,
    normalize: bool,
) -> None:
    """Write to `hyper.now` the factor that reduces the gradient norm over all parameters to the largest allowed one.

    With `normalize`, the decoder's gradient enters the norm without its component along the rows, which is projected
    out.
    """
    hidden_dim, width = W_dec.shape
    launch(
        _gradient_norms, (len(norms),),
        grad_W_enc, W_dec, entries.counts, entries.more_parts, gradients.W_dec, gradients.W_dec_parts, norms,
        HALF=width // 2, ROWS=hidden_dim // len(norms), PART=part, NORMALIZE=normalize, num_warps=4,
    )  # fmt: skip
    launch(
        _clip_factor, (1,),
        norms, len(norms), sums, len(sums), width, hyper.betas, hyper.now,
        SHARES=triton.next_power_of_2(len(sums)), COLUMNS=32, num_warps=8,
    )  # fmt: skip


def update_weights(
    W_enc: AdamParameter,
    W_dec: AdamParameter,
    pre_bias: AdamParameter,
    grad_W_enc: Float[Tensor, "hidden_dim width"],
    entries: Entries,
    gradients: Gradients,
    sums: Float[Tensor, "shares width"],
    row_loss: Float[Tensor, " batch"],
    aux_losses: Float[Tensor, " pieces"] | None,
    hyper: DeviceHyperparameters,
    encoder_copy: BFloat16[Tensor, "hidden_dim width"],
    decoder_copy: Int[Tensor, "hidden_dim half"],
    part: int,
    *,
    normalize: bool,
) -> None:
    """Update all parameters by Adam in one launch, write their bfloat16 copies, and add up the losses.

    With `normalize`, the decoder's gradient is projected before the update and its rows are normalised afterwards.
    """
    hidden_dim, width = W_dec.value.shape
    rows = rows_per_program(hidden_dim, width)
    launch(
        _update_weights, (1 + 2 * hidden_dim // rows,),
        *W_enc, *W_dec, *pre_bias, grad_W_enc, entries.counts, entries.more_parts, gradients.W_dec,
        gradients.W_dec_parts, sums, row_loss, row_loss if aux_losses is None else aux_losses,
        len(row_loss), 0 if aux_losses is None else len(aux_losses),
        hyper.betas, hyper.now, hyper.totals, encoder_copy, decoder_copy, hidden_dim,
        HALF=width // 2, ROWS=rows, PART=part, NORMALIZE=normalize, SHARES=len(sums), num_warps=8,
    )  # fmt: skip


def rows_per_program(hidden_dim: int, width: int) -> int:
    """Return the number of rows with about 1024 elements: a power of two up to 16, which divides padded hidden_dim."""
    return max(1, min(16, 1024 // width))


def adam_reference(
    moments: AdamParameter, gradient: Tensor, *, lr: float, beta1: float, beta2: float, eps: float, step: int
) -> Tensor:
    """Return the parameter after one step of Adam, in plain PyTorch and float64; `step` counts from 1."""
    g = gradient.double()
    mean = beta1 * moments.mean.double() + (1 - beta1) * g
    square = beta2 * moments.square.double() + (1 - beta2) * g * g
    denominator = (square / (1 - beta2**step)).sqrt() + eps
    return moments.value.double() - lr / (1 - beta1**step) * mean / denominator


@triton.jit
def _sum_decoding_gradient(
    G,
    G_scales,
    sums,
    schedule,
    counters,
    now,
    batch,
    n_levels,
    QUARTER: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        in_window = tl.load(counters)
        in_epoch = tl.load(counters + 1)
        tl.store(now, tl.load(schedule + 2 * in_epoch))
        tl.store(now + 1, tl.load(schedule + 2 * in_epoch + 1))
        tl.store(now + 2, 1.0)
        tl.store(counters, in_window + 1)
        tl.store(counters + 1, in_epoch + 1)
    HALF: tl.constexpr = 2 * QUARTER
    quarter = tl.arange(0, QUARTER)
    sum0 = tl.zeros((ROWS, QUARTER), tl.float32)
    sum1 = tl.zeros((ROWS, QUARTER), tl.float32)
    sum2 = tl.zeros((ROWS, QUARTER), tl.float32)
    sum3 = tl.zeros((ROWS, QUARTER), tl.float32)
    for first in range(program * ROWS, batch, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        place = row.to(tl.int64) * n_levels
        # Rows beyond the batch get the scale 0, so they add nothing.
        scale = tl.load(G_scales + place, mask=row < batch, other=0.0)[:, None]
        inside = (row < batch)[:, None] & (quarter >= 0)[None, :]
        word = tl.load(G + place[:, None] * QUARTER + quarter[None, :], mask=inside, other=0)
        sum0 += scale * dequantize(word, 0)
        sum1 += scale * dequantize(word, 1)
        sum2 += scale * dequantize(word, 2)
        sum3 += scale * dequantize(word, 3)
    target = sums + program * (2 * HALF)
    tl.store(target + 2 * quarter, tl.sum(sum0, 0))
    tl.store(target + 2 * quarter + 1, tl.sum(sum1, 0))
    tl.store(target + HALF + 2 * quarter, tl.sum(sum2, 0))
    tl.store(target + HALF + 2 * quarter + 1, tl.sum(sum3, 0))


@triton.jit
def _sum_encoding_gradient(
    W_enc,
    count,
    more_parts,
    pre_sum,
    pre_sum_parts,
    sums,
    hidden_dim,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    SHARES: tl.constexpr,
):
    program = tl.program_id(0)
    j = tl.arange(0, HALF)
    low = tl.zeros((ROWS, HALF), tl.float32)
    high = tl.zeros((ROWS, HALF), tl.float32)
    for first in range(program * ROWS, hidden_dim, SHARES * ROWS):
        latent = first + tl.arange(0, ROWS)
        inside = latent < hidden_dim
        place = latent.to(tl.int64)[:, None] * (2 * HALF) + j[None, :]
        both = inside[:, None] & (j >= 0)[None, :]
        # These loads depend on no other load, so they are issued first.
        W_low = tl.load(W_enc + place, mask=both, other=0.0)
        W_high = tl.load(W_enc + place + HALF, mask=both, other=0.0)
        total = tl.load(pre_sum + latent, mask=inside, other=0.0)
        n_more = tl.maximum(tl.load(count + latent, mask=inside, other=0) - 1, 0) // PART
        first_more = tl.load(more_parts + latent, mask=inside, other=0)
        number = tl.arange(0, 16)[None, :]
        for i in range(0, tl.max(n_more), 16):
            more = tl.load(
                pre_sum_parts + first_more[:, None] + i + number, mask=i + number < n_more[:, None], other=0.0
            )
            total += tl.sum(more, 1)
        low -= total[:, None] * W_low
        high -= total[:, None] * W_high
    tl.store(sums + program * (2 * HALF) + j, tl.sum(low, 0))
    tl.store(sums + program * (2 * HALF) + HALF + j, tl.sum(high, 0))


@triton.jit
def _clip_factor(norms, n_norms, sums, n_sums, width, betas, now, SHARES: tl.constexpr, COLUMNS: tl.constexpr):
    lane = tl.arange(0, 1024)
    share = tl.arange(0, SHARES)
    squares = tl.zeros((1024,), tl.float32)
    for first in range(0, n_norms, 1024):
        squares += tl.load(norms + first + lane, mask=first + lane < n_norms, other=0.0)
    total = tl.sum(squares)
    for first in range(0, width, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        inside = (share < n_sums)[:, None] & (j < width)[None, :]
        g = tl.sum(tl.load(sums + share[:, None] * width + j[None, :], mask=inside, other=0.0), 0)
        total += tl.sum(g * g)
    tl.store(now + 2, tl.minimum(1.0, tl.load(betas + 3) / (tl.sqrt(total) + 1e-6)))


@triton.jit
def _decoder_gradient(
    latent, place, W_low, W_high, count, more_parts, grad, grad_parts, HALF: tl.constexpr, PART: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of decoder rows, parts summed in order; NORMALIZE removes the component along the row."""
    j = tl.arange(0, HALF)
    low = tl.load(grad + place)
    high = tl.load(grad + place + HALF)
    n_more = tl.maximum(tl.load(count + latent) - 1, 0) // PART
    first_more = tl.load(more_parts + latent)
    for i in range(0, tl.max(n_more), 4):
        # Parts are loaded four at a time, so that a latent with many parts waits for memory less often.
        for u in tl.static_range(4):
            part_place = (first_more + i + u).to(tl.int64)[:, None] * (2 * HALF) + j[None, :]
            inside = (i + u < n_more)[:, None] & (j >= 0)[None, :]
            low += tl.load(grad_parts + part_place, mask=inside, other=0.0)
            high += tl.load(grad_parts + part_place + HALF, mask=inside, other=0.0)
    if NORMALIZE:
        along = tl.sum(low * W_low + high * W_high, 1)[:, None]
        low -= along * W_low
        high -= along * W_high
    return low, high


@triton.jit
def _gradient_norms(
    grad_W_enc,
    W_dec,
    count,
    more_parts,
    grad_W_dec,
    grad_W_dec_parts,
    norms,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    latent = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = latent.to(tl.int64)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    low, high = _decoder_gradient(
        latent, place, tl.load(W_dec + place), tl.load(W_dec + place + HALF), count, more_parts, grad_W_dec,
        grad_W_dec_parts, HALF, PART, NORMALIZE,
    )  # fmt: skip
    e_low = tl.load(grad_W_enc + place)
    e_high = tl.load(grad_W_enc + place + HALF)
    tl.store(norms + tl.program_id(0), tl.sum(low * low + high * high + e_low * e_low + e_high * e_high))


@triton.jit
def _adam(place, value, mean, square, g, betas, now):
    beta1 = tl.load(betas)
    beta2 = tl.load(betas + 1)
    g *= tl.load(now + 2)
    m = beta1 * tl.load(mean + place) + (1 - beta1) * g
    v = beta2 * tl.load(square + place) + (1 - beta2) * g * g
    tl.store(mean + place, m)
    tl.store(square + place, v)
    return value - tl.load(now) * m / (tl.sqrt(v) / tl.load(now + 1) + tl.load(betas + 2))


@triton.jit
def _add_up(values, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        total += tl.load(values + first + lane, mask=first + lane < n, other=0.0)
    return tl.sum(total).to(tl.float64)


@triton.jit
def _update_bias(
    pre_bias, mean, square, sums, row_loss, aux_losses, batch, n_aux, betas, now, totals, HALF: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = min(32, max(1, 4096 // HALF))
    j = tl.arange(0, HALF)
    place = tl.arange(0, ROWS)[:, None] * (2 * HALF) + j[None, :]
    low = tl.zeros((ROWS, HALF), tl.float32)
    high = tl.zeros((ROWS, HALF), tl.float32)
    for first in tl.static_range(0, SHARES, ROWS):
        low += tl.load(sums + first * (2 * HALF) + place)
        high += tl.load(sums + first * (2 * HALF) + HALF + place)
    low = tl.sum(low, 0)
    high = tl.sum(high, 0)
    tl.store(pre_bias + j, _adam(j, tl.load(pre_bias + j), mean, square, low, betas, now))
    j += HALF
    tl.store(pre_bias + j, _adam(j, tl.load(pre_bias + j), mean, square, high, betas, now))
    tl.store(totals, tl.load(totals) + _add_up(row_loss, batch, 1024))
    tl.store(totals + 1, tl.load(totals + 1) + _add_up(aux_losses, n_aux, 1024))


@triton.jit
def _update_weights(
    W_enc,
    W_enc_mean,
    W_enc_square,
    W_dec,
    W_dec_mean,
    W_dec_square,
    pre_bias,
    pre_bias_mean,
    pre_bias_square,
    grad_W_enc,
    count,
    more_parts,
    grad_W_dec,
    grad_W_dec_parts,
    sums,
    row_loss,
    aux_losses,
    batch,
    n_aux,
    betas,
    now,
    totals,
    encoder_copy,
    decoder_copy,
    hidden_dim,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SHARES: tl.constexpr,
):
    j = tl.arange(0, HALF)
    n_programs = hidden_dim // ROWS
    # The program for pre_bias and the epoch's losses takes longest, so it is the first one.
    program = tl.program_id(0) - 1
    latent = (program % n_programs) * ROWS + tl.arange(0, ROWS)
    place = latent.to(tl.int64)[:, None] * (2 * HALF) + j[None, :]
    if program < 0:
        _update_bias(
            pre_bias, pre_bias_mean, pre_bias_square, sums, row_loss, aux_losses, batch, n_aux, betas, now, totals,
            HALF, SHARES,
        )  # fmt: skip
    elif program < n_programs:
        low = tl.load(W_dec + place)
        high = tl.load(W_dec + place + HALF)
        g_low, g_high = _decoder_gradient(
            latent, place, low, high, count, more_parts, grad_W_dec, grad_W_dec_parts, HALF, PART, NORMALIZE
        )
        low = _adam(place, low, W_dec_mean, W_dec_square, g_low, betas, now)
        high = _adam(place + HALF, high, W_dec_mean, W_dec_square, g_high, betas, now)
        if NORMALIZE:
            # The clamp is the least normal float32: a row of zeros stays zero, as in MSAE.normalize_decoder_.
            norm = tl.sqrt(tl.sum(low * low + high * high, 1))[:, None]
            scale = 1.0 / tl.maximum(norm, 1.1754943508222875e-38)
            low *= scale
            high *= scale
        tl.store(W_dec + place, low)
        tl.store(W_dec + place + HALF, high)
        tl.store(decoder_copy + latent.to(tl.int64)[:, None] * HALF + j[None, :], pack(low, high))
    else:
        low = _adam(place, tl.load(W_enc + place), W_enc_mean, W_enc_square, tl.load(grad_W_enc + place), betas, now)
        tl.store(W_enc + place, low)
        tl.store(encoder_copy + place, low.to(tl.bfloat16))
        place += HALF
        high = _adam(place, tl.load(W_enc + place), W_enc_mean, W_enc_square, tl.load(grad_W_enc + place), betas, now)
        tl.store(W_enc + place, high)
        tl.store(encoder_copy + place, high.to(tl.bfloat16))
