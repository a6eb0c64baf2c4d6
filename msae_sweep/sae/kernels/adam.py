"""Kernels of Adam and the work around it: clipping, sums of gradient parts, projection, unit norm, bfloat16 copies."""

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from msae_sweep.sae.kernels.latent_gradients import Entries, Gradients
from msae_sweep.sae.kernels.launch import launch
from msae_sweep.sae.kernels.packing import pack


class AdamParameter(NamedTuple):
    """Parameter with Adam's two moments: float32 tensors of one shape, updated in place."""

    value: Tensor
    mean: Tensor
    square: Tensor


class DeviceHyperparameters(NamedTuple):
    """Values that differ between trials or steps, on the device so that one captured graph can be used for all."""

    schedule: Float[Tensor, "steps 2"]
    """Row per step: learning_rate / (1 − β₁^t), and sqrt(1 − β₂^t)."""
    constants: Float[Tensor, " 4"]
    """β₁, β₂, eps, and the largest gradient norm (infinite where gradients are not clipped)."""
    counters: Int[Tensor, " 2"]
    """Number of steps done in this window, and number done since the schedule was last set."""
    current: Float[Tensor, " 3"]
    """Current step's row of `schedule`, and the factor that clips its gradient."""
    totals: Float[Tensor, " 2"]
    """Sums over the epoch of the reconstruction loss and of the auxiliary loss, float64."""


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
    """Write to `hyper.current` the factor that reduces the norm of all gradients to the largest allowed one.

    With `normalize`, the decoder's gradient enters the norm without its component along the rows, which is projected
    out.
    """
    hidden_dim, width = W_dec.shape
    launch(
        _gradient_norms, (len(norms),),
        grad_W_enc_ptr=grad_W_enc, W_dec_ptr=W_dec, count_ptr=entries.counts, more_parts_ptr=entries.more_parts,
        grad_W_dec_ptr=gradients.W_dec, grad_W_dec_parts_ptr=gradients.W_dec_parts, norms_ptr=norms,
        HALF=width // 2, ROWS=hidden_dim // len(norms), PART=part, NORMALIZE=normalize, num_warps=4,
    )  # fmt: skip
    launch(
        _clip_factor, (1,),
        norms_ptr=norms, n_norms=len(norms), sums_ptr=sums, n_sums=len(sums), width=width,
        constants_ptr=hyper.constants, current_ptr=hyper.current,
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
        W_enc_ptr=W_enc.value, W_enc_mean_ptr=W_enc.mean, W_enc_square_ptr=W_enc.square, W_dec_ptr=W_dec.value,
        W_dec_mean_ptr=W_dec.mean, W_dec_square_ptr=W_dec.square, pre_bias_ptr=pre_bias.value,
        pre_bias_mean_ptr=pre_bias.mean, pre_bias_square_ptr=pre_bias.square, grad_W_enc_ptr=grad_W_enc,
        count_ptr=entries.counts, more_parts_ptr=entries.more_parts, grad_W_dec_ptr=gradients.W_dec,
        grad_W_dec_parts_ptr=gradients.W_dec_parts, sums_ptr=sums, row_loss_ptr=row_loss,
        aux_losses_ptr=row_loss if aux_losses is None else aux_losses, batch=len(row_loss),
        n_aux=0 if aux_losses is None else len(aux_losses), constants_ptr=hyper.constants, current_ptr=hyper.current,
        totals_ptr=hyper.totals, encoder_copy_ptr=encoder_copy, decoder_copy_ptr=decoder_copy, hidden_dim=hidden_dim,
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
def _clip_factor(
    norms_ptr, n_norms, sums_ptr, n_sums, width, constants_ptr, current_ptr, SHARES: tl.constexpr, COLUMNS: tl.constexpr
):
    lane = tl.arange(0, 1024)
    share = tl.arange(0, SHARES)
    squares = tl.zeros((1024,), tl.float32)
    for first in range(0, n_norms, 1024):
        squares += tl.load(norms_ptr + first + lane, mask=first + lane < n_norms, other=0.0)
    total = tl.sum(squares)
    for first in range(0, width, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        inside = (share < n_sums)[:, None] & (j < width)[None, :]
        g = tl.sum(tl.load(sums_ptr + share[:, None] * width + j[None, :], mask=inside, other=0.0), 0)
        total += tl.sum(g * g)
    tl.store(current_ptr + 2, tl.minimum(1.0, tl.load(constants_ptr + 3) / (tl.sqrt(total) + 1e-6)))


@triton.jit
def _decoder_gradient(
    latent, place, W_low, W_high, count_ptr, more_parts_ptr, grad_ptr, grad_parts_ptr, HALF: tl.constexpr,
    PART: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Return the gradient of decoder rows, parts summed in order; NORMALIZE removes the component along the row."""
    j = tl.arange(0, HALF)
    low = tl.load(grad_ptr + place)
    high = tl.load(grad_ptr + place + HALF)
    n_more = tl.maximum(tl.load(count_ptr + latent) - 1, 0) // PART
    first_more = tl.load(more_parts_ptr + latent)
    for i in range(0, tl.max(n_more), 4):
        # Parts are loaded four at a time, so that a latent with many parts waits for memory less often.
        for u in tl.static_range(4):
            part_place = (first_more + i + u).to(tl.int64)[:, None] * (2 * HALF) + j[None, :]
            inside = (i + u < n_more)[:, None] & (j >= 0)[None, :]
            low += tl.load(grad_parts_ptr + part_place, mask=inside, other=0.0)
            high += tl.load(grad_parts_ptr + part_place + HALF, mask=inside, other=0.0)
    if NORMALIZE:
        along = tl.sum(low * W_low + high * W_high, 1)[:, None]
        low -= along * W_low
        high -= along * W_high
    return low, high


@triton.jit
def _gradient_norms(
    grad_W_enc_ptr,
    W_dec_ptr,
    count_ptr,
    more_parts_ptr,
    grad_W_dec_ptr,
    grad_W_dec_parts_ptr,
    norms_ptr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    latent = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = latent.to(tl.int64)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    low, high = _decoder_gradient(
        latent=latent, place=place, count_ptr=count_ptr, more_parts_ptr=more_parts_ptr, grad_ptr=grad_W_dec_ptr,
        grad_parts_ptr=grad_W_dec_parts_ptr, W_low=tl.load(W_dec_ptr + place), W_high=tl.load(W_dec_ptr + place + HALF),
        HALF=HALF, PART=PART, NORMALIZE=NORMALIZE,
    )  # fmt: skip
    e_low = tl.load(grad_W_enc_ptr + place)
    e_high = tl.load(grad_W_enc_ptr + place + HALF)
    tl.store(norms_ptr + tl.program_id(0), tl.sum(low * low + high * high + e_low * e_low + e_high * e_high))


@triton.jit
def _adam(place, value, mean_ptr, square_ptr, g, constants_ptr, current_ptr):
    beta1 = tl.load(constants_ptr)
    beta2 = tl.load(constants_ptr + 1)
    g *= tl.load(current_ptr + 2)
    m = beta1 * tl.load(mean_ptr + place) + (1 - beta1) * g
    v = beta2 * tl.load(square_ptr + place) + (1 - beta2) * g * g
    tl.store(mean_ptr + place, m)
    tl.store(square_ptr + place, v)
    return value - tl.load(current_ptr) * m / (tl.sqrt(v) / tl.load(current_ptr + 1) + tl.load(constants_ptr + 2))


@triton.jit
def _add_up(values_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        total += tl.load(values_ptr + first + lane, mask=first + lane < n, other=0.0)
    return tl.sum(total).to(tl.float64)


@triton.jit
def _update_bias(
    pre_bias_ptr, mean_ptr, square_ptr, sums_ptr, row_loss_ptr, aux_losses_ptr, batch, n_aux, constants_ptr,
    current_ptr, totals_ptr, HALF: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = min(32, max(1, 4096 // HALF))
    j = tl.arange(0, HALF)
    place = tl.arange(0, ROWS)[:, None] * (2 * HALF) + j[None, :]
    low = tl.zeros((ROWS, HALF), tl.float32)
    high = tl.zeros((ROWS, HALF), tl.float32)
    for first in tl.static_range(0, SHARES, ROWS):
        low += tl.load(sums_ptr + first * (2 * HALF) + place)
        high += tl.load(sums_ptr + first * (2 * HALF) + HALF + place)
    low = tl.sum(low, 0)
    high = tl.sum(high, 0)
    updated = _adam(
        place=j, value=tl.load(pre_bias_ptr + j), mean_ptr=mean_ptr, square_ptr=square_ptr, g=low,
        constants_ptr=constants_ptr, current_ptr=current_ptr,
    )  # fmt: skip
    tl.store(pre_bias_ptr + j, updated)
    j += HALF
    updated = _adam(
        place=j, value=tl.load(pre_bias_ptr + j), mean_ptr=mean_ptr, square_ptr=square_ptr, g=high,
        constants_ptr=constants_ptr, current_ptr=current_ptr,
    )  # fmt: skip
    tl.store(pre_bias_ptr + j, updated)
    tl.store(totals_ptr, tl.load(totals_ptr) + _add_up(row_loss_ptr, batch, 1024))
    tl.store(totals_ptr + 1, tl.load(totals_ptr + 1) + _add_up(aux_losses_ptr, n_aux, 1024))


@triton.jit
def _update_weights(
    W_enc_ptr,
    W_enc_mean_ptr,
    W_enc_square_ptr,
    W_dec_ptr,
    W_dec_mean_ptr,
    W_dec_square_ptr,
    pre_bias_ptr,
    pre_bias_mean_ptr,
    pre_bias_square_ptr,
    grad_W_enc_ptr,
    count_ptr,
    more_parts_ptr,
    grad_W_dec_ptr,
    grad_W_dec_parts_ptr,
    sums_ptr,
    row_loss_ptr,
    aux_losses_ptr,
    batch,
    n_aux,
    constants_ptr,
    current_ptr,
    totals_ptr,
    encoder_copy_ptr,
    decoder_copy_ptr,
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
            pre_bias_ptr=pre_bias_ptr, mean_ptr=pre_bias_mean_ptr, square_ptr=pre_bias_square_ptr, sums_ptr=sums_ptr,
            row_loss_ptr=row_loss_ptr, aux_losses_ptr=aux_losses_ptr, batch=batch, n_aux=n_aux,
            constants_ptr=constants_ptr, current_ptr=current_ptr, totals_ptr=totals_ptr, HALF=HALF, SHARES=SHARES,
        )  # fmt: skip
    elif program < n_programs:
        low = tl.load(W_dec_ptr + place)
        high = tl.load(W_dec_ptr + place + HALF)
        g_low, g_high = _decoder_gradient(
            latent=latent, place=place, count_ptr=count_ptr, more_parts_ptr=more_parts_ptr, grad_ptr=grad_W_dec_ptr,
            grad_parts_ptr=grad_W_dec_parts_ptr, W_low=low, W_high=high, HALF=HALF, PART=PART, NORMALIZE=NORMALIZE,
        )  # fmt: skip
        low = _adam(
            place=place, value=low, mean_ptr=W_dec_mean_ptr, square_ptr=W_dec_square_ptr, g=g_low,
            constants_ptr=constants_ptr, current_ptr=current_ptr,
        )  # fmt: skip
        high = _adam(
            place=place + HALF, value=high, mean_ptr=W_dec_mean_ptr, square_ptr=W_dec_square_ptr, g=g_high,
            constants_ptr=constants_ptr, current_ptr=current_ptr,
        )  # fmt: skip
        if NORMALIZE:
            # The clamp is the least normal float32: a row of zeros stays zero, as in MSAE.normalize_decoder_.
            norm = tl.sqrt(tl.sum(low * low + high * high, 1))[:, None]
            scale = 1.0 / tl.maximum(norm, 1.1754943508222875e-38)
            low *= scale
            high *= scale
        tl.store(W_dec_ptr + place, low)
        tl.store(W_dec_ptr + place + HALF, high)
        tl.store(decoder_copy_ptr + latent.to(tl.int64)[:, None] * HALF + j[None, :], pack(low, high))
    else:
        low = _adam(
            place=place, value=tl.load(W_enc_ptr + place), mean_ptr=W_enc_mean_ptr, square_ptr=W_enc_square_ptr,
            g=tl.load(grad_W_enc_ptr + place), constants_ptr=constants_ptr, current_ptr=current_ptr,
        )  # fmt: skip
        tl.store(W_enc_ptr + place, low)
        tl.store(encoder_copy_ptr + place, low.to(tl.bfloat16))
        place += HALF
        high = _adam(
            place=place, value=tl.load(W_enc_ptr + place), mean_ptr=W_enc_mean_ptr, square_ptr=W_enc_square_ptr,
            g=tl.load(grad_W_enc_ptr + place), constants_ptr=constants_ptr, current_ptr=current_ptr,
        )  # fmt: skip
        tl.store(W_enc_ptr + place, high)
        tl.store(encoder_copy_ptr + place, high.to(tl.bfloat16))
