"""Kernels that decode all levels of a row in one pass: errors and gradients for training, error sums for validation.

With e_l = x̂_l − x and the weights c_l = 2 α_l / (batch · input_dim), the loss is Σ_l c_l/2 · Σ e_l², and the gradient
that a latent of group l sees is G_l = Σ_{j≥l} c_j e_j, because it is part of every reconstruction from level l on.

`decode_few` keeps the error of every level in registers, which suits a handful of levels. `decode_many` decodes up to
the last level and then walks the ranks backwards: e before rank i is e after it minus v_i w_i. Its second gather of
decoder rows costs less than writing and reading the errors of up to 512 levels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from msae_sweep.sae.kernels.launch import launch
from msae_sweep.sae.kernels.packing import (
    QuadWords,
    code_latent,
    code_value,
    high_half,
    low_half,
    quantize,
    split_codes,
)

FEW_LEVELS = 8


def decode_few(
    start: Float[Tensor, "batch width"],
    codes: Int[Tensor, "batch k_padded"],
    W_dec: Int[Tensor, "hidden_dim half"],
    level_scales: Float[Tensor, " levels"],
    G: QuadWords,
    row_loss: Float[Tensor, " batch"],
    last_squared_error: Float[Tensor, " batch"],
    grad_pre: BFloat16[Tensor, "hidden_dim batch_stride"],
    k_levels: Sequence[int],
) -> None:
    """Write G_l of every row, the row's loss, and Σ e² at the last level; the launch also zeroes `grad_pre`.

    `start` is pre_bias − x, the error before any latent is added.
    """
    half = W_dec.shape[1]
    n_programs, share = _zeroing(grad_pre, len(codes))
    launch(
        _decode_few, (n_programs,),
        start_ptr=start, codes_ptr=codes, W_dec_ptr=W_dec, level_scales_ptr=level_scales, G_ptr=G.words,
        G_scales_ptr=G.scales, row_loss_ptr=row_loss, last_squared_error_ptr=last_squared_error,
        zero_words_ptr=grad_pre.view(torch.int32), n_zero_words=grad_pre.numel() // 2, share=share,
        HALF=half, K_PADDED=codes.shape[1], LEVELS=tuple(k_levels), UNROLL=16, num_warps=_warps(half),
    )  # fmt: skip


def decode_many(
    start: Float[Tensor, "batch width"],
    codes: Int[Tensor, "batch k_padded"],
    W_dec: Int[Tensor, "hidden_dim half"],
    rank_scales: Float[Tensor, " k"],
    level_of_rank: Int[Tensor, " k"],
    G: QuadWords,
    row_loss: Float[Tensor, " batch"],
    last_squared_error: Float[Tensor, " batch"],
    grad_pre: BFloat16[Tensor, "hidden_dim batch_stride"],
) -> None:
    """Write the same outputs as `decode_few`, for any number of levels.

    `rank_scales[i]` is c_l where i is the last rank of level l, and 0 elsewhere.
    """
    half = W_dec.shape[1]
    n_programs, share = _zeroing(grad_pre, len(codes))
    launch(
        _decode_many, (n_programs,),
        start_ptr=start, codes_ptr=codes, W_dec_ptr=W_dec, rank_scales_ptr=rank_scales, level_of_rank_ptr=level_of_rank,
        G_ptr=G.words, G_scales_ptr=G.scales, n_levels=G.words.shape[1], row_loss_ptr=row_loss,
        last_squared_error_ptr=last_squared_error, zero_words_ptr=grad_pre.view(torch.int32),
        n_zero_words=grad_pre.numel() // 2, share=share,
        HALF=half, K_PADDED=codes.shape[1], K=len(rank_scales), UNROLL=16, BACK=8, num_warps=_warps(half),
    )  # fmt: skip


def decode_errors(
    start: Float[Tensor, "batch width"],
    codes: Int[Tensor, "batch k_padded"],
    W_dec: Int[Tensor, "hidden_dim half"],
    errors: Float[Tensor, "batch levels"],
    active: Int[Tensor, "batch levels"],
    k_levels: Sequence[int],
) -> None:
    """Write Σ e² and the number of active latents of every row at every level, for validation."""
    half = W_dec.shape[1]
    launch(
        _decode_errors, (len(codes),),
        start_ptr=start, codes_ptr=codes, W_dec_ptr=W_dec, errors_ptr=errors, active_ptr=active,
        HALF=half, K_PADDED=codes.shape[1], LEVELS=tuple(k_levels), UNROLL=16, num_warps=_warps(half),
    )  # fmt: skip


def level_errors_reference(
    start: Float[Tensor, "batch width"],
    codes: Int[Tensor, "batch k_padded"],
    W_dec: Float[Tensor, "hidden_dim width"],
    k_levels: Sequence[int],
) -> Float[Tensor, "levels batch width"]:
    """Return e_l of every level, in plain PyTorch and float64."""
    values, latents = split_codes(codes)
    error = start.double()
    errors = []
    for low, high in zip((0, *k_levels), k_levels, strict=False):
        added = values[:, low:high, None].double() * W_dec.double()[latents[:, low:high].long()]
        error = error + added.sum(dim=1)
        errors.append(error)
    return torch.stack(errors)


def gradients_reference(
    errors: Float[Tensor, "levels batch width"], level_scales: Float[Tensor, " levels"]
) -> Float[Tensor, "levels batch width"]:
    """Return G_l = Σ_{j≥l} c_j e_j, in plain PyTorch and float64."""
    scaled = level_scales.double()[:, None, None] * errors
    return scaled.flip(0).cumsum(0).flip(0)


def _warps(half: int) -> int:
    """Return the number of warps per row: one up to a width of 256, so that no sum crosses warps.

    Wider rows get as many warps, up to 16, as keep the number of elements per lane constant.
    """
    return max(1, min(16, half // 128))


def _zeroing(grad_pre: Tensor, batch: int) -> tuple[int, int]:
    """Return the number of programs, and of words that each of them zeroes, rounded up to whole stores of 512."""
    share = triton.cdiv(triton.cdiv(grad_pre.numel() // 2, batch), 512) * 512
    return batch, share


@triton.jit
def _zero_share(words_ptr, n_words, share, row):
    first = row.to(tl.int64) * share
    lane = tl.arange(0, 512)
    if first + share <= n_words:
        for i in range(0, share, 512):
            tl.store(words_ptr + first + i + lane, tl.zeros((512,), tl.int32))
    else:
        for i in range(0, share, 512):
            tl.store(words_ptr + first + i + lane, tl.zeros((512,), tl.int32), mask=first + i + lane < n_words)


@triton.jit
def _add_one(row_codes_ptr, rank, W_dec_ptr, j, low, high, HALF: tl.constexpr):
    code = tl.load(row_codes_ptr + rank)
    word = tl.load(W_dec_ptr + code_latent(code) * HALF + j)
    value = code_value(code)
    return low + value * low_half(word), high + value * high_half(word)


@triton.jit
def _add_ranks(
    row_codes_ptr,
    W_dec_ptr,
    j,
    low,
    high,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    UNROLL: tl.constexpr,
    HALF: tl.constexpr,
):
    """Add the latents of ranks FIRST to END − 1, UNROLL at a time, so that many gathers are in flight."""
    WHOLE: tl.constexpr = FIRST + (END - FIRST) // UNROLL * UNROLL
    for i in range(FIRST, WHOLE, UNROLL):
        for u in tl.static_range(UNROLL):
            low, high = _add_one(
                row_codes_ptr=row_codes_ptr, rank=i + u, W_dec_ptr=W_dec_ptr, j=j, low=low, high=high, HALF=HALF,
            )  # fmt: skip
    for i in tl.static_range(WHOLE, END):
        low, high = _add_one(
            row_codes_ptr=row_codes_ptr, rank=i, W_dec_ptr=W_dec_ptr, j=j, low=low, high=high, HALF=HALF,
        )  # fmt: skip
    return low, high


@triton.jit
def _decode_few(
    start_ptr,
    codes_ptr,
    W_dec_ptr,
    level_scales_ptr,
    G_ptr,
    G_scales_ptr,
    row_loss_ptr,
    last_squared_error_ptr,
    zero_words_ptr,
    n_zero_words,
    share,
    HALF: tl.constexpr,
    K_PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0)
    j = tl.arange(0, HALF)
    quarter = tl.arange(0, HALF // 2)
    N_LEVELS: tl.constexpr = len(LEVELS)
    _zero_share(zero_words_ptr, n_zero_words, share, row)
    far = row.to(tl.int64)
    low = tl.load(start_ptr + far * (2 * HALF) + j)
    high = tl.load(start_ptr + far * (2 * HALF) + HALF + j)
    row_codes = codes_ptr + far * K_PADDED
    lows = ()
    highs = ()
    for level in tl.static_range(N_LEVELS):
        low, high = _add_ranks(
            row_codes_ptr=row_codes, W_dec_ptr=W_dec_ptr, j=j, low=low, high=high,
            FIRST=LEVELS[level - 1] if level > 0 else 0, END=LEVELS[level], UNROLL=UNROLL, HALF=HALF,
        )  # fmt: skip
        # Triton does not support starred expressions.
        lows = lows + (low,)  # type: ignore[assignment]  # noqa: RUF005
        highs = highs + (high,)  # type: ignore[assignment]  # noqa: RUF005
    squares = low * low + high * high
    tl.store(last_squared_error_ptr + row, tl.sum(squares))
    g_low = tl.zeros((HALF,), tl.float32)
    g_high = tl.zeros((HALF,), tl.float32)
    loss = tl.zeros((HALF,), tl.float32)
    for level in tl.static_range(N_LEVELS - 1, -1, -1):
        scale = tl.load(level_scales_ptr + level)
        g_low += scale * lows[level]
        g_high += scale * highs[level]
        loss += scale * (lows[level] * lows[level] + highs[level] * highs[level])
        quad, g_scale = quantize(g_low, g_high, HALF)
        tl.store(G_ptr + (far * N_LEVELS + level) * (HALF // 2) + quarter, quad)
        tl.store(G_scales_ptr + far * N_LEVELS + level, g_scale)
    tl.store(row_loss_ptr + row, tl.sum(loss) * 0.5)


@triton.jit
def _go_back(
    row_codes_ptr,
    W_dec_ptr,
    rank_scales_ptr,
    level_of_rank_ptr,
    G_ptr,
    G_scales_ptr,
    row_place,
    j,
    quarter,
    low,
    high,
    g_low,
    g_high,
    loss,
    end,
    COUNT: tl.constexpr,
    HALF: tl.constexpr,
):
    """Walk over the COUNT ranks before `end`, the last one first, and write G of each level whose last rank is reached.

    All loads come before the stores, because the compiler may not move a load across a store, and would wait for each
    load.
    """
    values = ()
    words = ()
    scales = ()
    levels = ()
    for u in tl.static_range(COUNT):
        rank = end - 1 - u
        code = tl.load(row_codes_ptr + rank)
        values = values + (code_value(code),)  # type: ignore[assignment]  # noqa: RUF005
        words = words + (tl.load(W_dec_ptr + code_latent(code) * HALF + j),)  # type: ignore[assignment]  # noqa: RUF005
        scales = scales + (tl.load(rank_scales_ptr + rank),)  # type: ignore[assignment]  # noqa: RUF005
        levels = levels + (tl.load(level_of_rank_ptr + rank),)  # type: ignore[assignment]  # noqa: RUF005
    for u in tl.static_range(COUNT):
        scale: tl.tensor = scales[u]
        loss += scale * (low * low + high * high)
        g_low += scale * low
        g_high += scale * high
        quad, g_scale = quantize(g_low, g_high, HALF)
        place = row_place + levels[u]
        tl.store(G_ptr + place * (HALF // 2) + quarter, quad, mask=tl.zeros_like(quad).to(tl.float32) + scale > 0)
        tl.store(G_scales_ptr + place, g_scale, mask=scale > 0)
        low -= values[u] * low_half(words[u])
        high -= values[u] * high_half(words[u])
    return low, high, g_low, g_high, loss


@triton.jit
def _decode_many(
    start_ptr,
    codes_ptr,
    W_dec_ptr,
    rank_scales_ptr,
    level_of_rank_ptr,
    G_ptr,
    G_scales_ptr,
    n_levels,
    row_loss_ptr,
    last_squared_error_ptr,
    zero_words_ptr,
    n_zero_words,
    share,
    HALF: tl.constexpr,
    K_PADDED: tl.constexpr,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    BACK: tl.constexpr,
):
    row = tl.program_id(0)
    j = tl.arange(0, HALF)
    _zero_share(zero_words_ptr, n_zero_words, share, row)
    far = row.to(tl.int64)
    low = tl.load(start_ptr + far * (2 * HALF) + j)
    high = tl.load(start_ptr + far * (2 * HALF) + HALF + j)
    row_codes = codes_ptr + far * K_PADDED
    low, high = _add_ranks(
        row_codes_ptr=row_codes, W_dec_ptr=W_dec_ptr, j=j, low=low, high=high, FIRST=0, END=K, UNROLL=UNROLL, HALF=HALF,
    )  # fmt: skip
    tl.store(last_squared_error_ptr + row, tl.sum(low * low + high * high))
    quarter = tl.arange(0, HALF // 2)
    loss = tl.zeros((HALF,), tl.float32)
    g_low = tl.zeros((HALF,), tl.float32)
    g_high = tl.zeros((HALF,), tl.float32)
    for i in range(K // BACK):
        low, high, g_low, g_high, loss = _go_back(
            row_codes_ptr=row_codes, W_dec_ptr=W_dec_ptr, rank_scales_ptr=rank_scales_ptr,
            level_of_rank_ptr=level_of_rank_ptr, G_ptr=G_ptr, G_scales_ptr=G_scales_ptr, row_place=far * n_levels, j=j,
            quarter=quarter, low=low, high=high, g_low=g_low, g_high=g_high, loss=loss, end=K - i * BACK, COUNT=BACK,
            HALF=HALF,
        )  # fmt: skip
    low, high, g_low, g_high, loss = _go_back(
        row_codes_ptr=row_codes, W_dec_ptr=W_dec_ptr, rank_scales_ptr=rank_scales_ptr,
        level_of_rank_ptr=level_of_rank_ptr, G_ptr=G_ptr, G_scales_ptr=G_scales_ptr, row_place=far * n_levels, j=j,
        quarter=quarter, low=low, high=high, g_low=g_low, g_high=g_high, loss=loss, end=K % BACK, COUNT=K % BACK,
        HALF=HALF,
    )  # fmt: skip
    tl.store(row_loss_ptr + row, tl.sum(loss) * 0.5)


@triton.jit
def _decode_errors(
    start_ptr,
    codes_ptr,
    W_dec_ptr,
    errors_ptr,
    active_ptr,
    HALF: tl.constexpr,
    K_PADDED: tl.constexpr,
    LEVELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0)
    j = tl.arange(0, HALF)
    rank = tl.arange(0, K_PADDED)
    N_LEVELS: tl.constexpr = len(LEVELS)
    far = row.to(tl.int64)
    low = tl.load(start_ptr + far * (2 * HALF) + j)
    high = tl.load(start_ptr + far * (2 * HALF) + HALF + j)
    row_codes = codes_ptr + far * K_PADDED
    holds = (code_value(tl.load(row_codes + rank)) > 0).to(tl.int32)
    for level in tl.static_range(N_LEVELS):
        low, high = _add_ranks(
            row_codes_ptr=row_codes, W_dec_ptr=W_dec_ptr, j=j, low=low, high=high,
            FIRST=LEVELS[level - 1] if level > 0 else 0, END=LEVELS[level], UNROLL=UNROLL, HALF=HALF,
        )  # fmt: skip
        tl.store(errors_ptr + far * N_LEVELS + level, tl.sum(low * low + high * high))
        tl.store(active_ptr + far * N_LEVELS + level, tl.sum(tl.where(rank < LEVELS[level], holds, 0)))
