"""Kernels of pre_bias's gradient: one sum over rows and levels after decoding, one over latents before encoding.

The first one also fetches the learning rate of the step from the schedule.
"""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msae_sweep.sae.kernels.adam import DeviceHyperparameters
from msae_sweep.sae.kernels.latent_gradients import Entries, Gradients
from msae_sweep.sae.kernels.launch import launch
from msae_sweep.sae.kernels.packing import QuadWords, dequantize

N_DECODING_SUMS = 64
"""Number of programs that each sum a share of the rows."""

N_ENCODING_SUMS = 128
"""Number of programs that each sum a share of the latents."""

N_SUMS = N_DECODING_SUMS + N_ENCODING_SUMS


def sum_decoding_gradient(G: QuadWords, sums: Float[Tensor, "shares width"], hyper: DeviceHyperparameters) -> None:
    """Write pre_bias's gradient from its addition after decoding at every level: Σ_b G_0[b], in N_DECODING_SUMS shares.

    The kernel also copies this step's row of the schedule, with the learning rate, to `hyper.current`, where the
    kernels of `adam.py` read it, and advances the counters, which nothing reads any more in this step.
    """
    batch, n_levels, quarter = G.words.shape
    launch(
        _sum_decoding_gradient, (N_DECODING_SUMS,),
        G_ptr=G.words, G_scales_ptr=G.scales, sums_ptr=sums, schedule_ptr=hyper.schedule, counters_ptr=hyper.counters,
        current_ptr=hyper.current, batch=batch, n_levels=n_levels,
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
        W_enc_ptr=W_enc, count_ptr=entries.counts, more_parts_ptr=entries.more_parts, pre_sum_ptr=gradients.pre_sum,
        pre_sum_parts_ptr=gradients.pre_sum_parts, sums_ptr=sums[N_DECODING_SUMS:], hidden_dim=hidden_dim,
        HALF=half, ROWS=max(1, min(32, 4096 // half)), PART=part, SHARES=N_ENCODING_SUMS, num_warps=8,
    )  # fmt: skip


@triton.jit
def _sum_decoding_gradient(
    G_ptr,
    G_scales_ptr,
    sums_ptr,
    schedule_ptr,
    counters_ptr,
    current_ptr,
    batch,
    n_levels,
    QUARTER: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        in_window = tl.load(counters_ptr)
        in_schedule = tl.load(counters_ptr + 1)
        tl.store(current_ptr, tl.load(schedule_ptr + 2 * in_schedule))
        tl.store(current_ptr + 1, tl.load(schedule_ptr + 2 * in_schedule + 1))
        tl.store(current_ptr + 2, 1.0)
        tl.store(counters_ptr, in_window + 1)
        tl.store(counters_ptr + 1, in_schedule + 1)
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
        scale = tl.load(G_scales_ptr + place, mask=row < batch, other=0.0)[:, None]
        inside = (row < batch)[:, None] & (quarter >= 0)[None, :]
        word = tl.load(G_ptr + place[:, None] * QUARTER + quarter[None, :], mask=inside, other=0)
        sum0 += scale * dequantize(word, 0)
        sum1 += scale * dequantize(word, 1)
        sum2 += scale * dequantize(word, 2)
        sum3 += scale * dequantize(word, 3)
    target = sums_ptr + program * (2 * HALF)
    tl.store(target + 2 * quarter, tl.sum(sum0, 0))
    tl.store(target + 2 * quarter + 1, tl.sum(sum1, 0))
    tl.store(target + HALF + 2 * quarter, tl.sum(sum2, 0))
    tl.store(target + HALF + 2 * quarter + 1, tl.sum(sum3, 0))


@triton.jit
def _sum_encoding_gradient(
    W_enc_ptr,
    count_ptr,
    more_parts_ptr,
    pre_sum_ptr,
    pre_sum_parts_ptr,
    sums_ptr,
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
        W_low = tl.load(W_enc_ptr + place, mask=both, other=0.0)
        W_high = tl.load(W_enc_ptr + place + HALF, mask=both, other=0.0)
        total = tl.load(pre_sum_ptr + latent, mask=inside, other=0.0)
        n_more = tl.maximum(tl.load(count_ptr + latent, mask=inside, other=0) - 1, 0) // PART
        first_more = tl.load(more_parts_ptr + latent, mask=inside, other=0)
        number = tl.arange(0, 16)[None, :]
        for i in range(0, tl.max(n_more), 16):
            more = tl.load(
                pre_sum_parts_ptr + first_more[:, None] + i + number, mask=i + number < n_more[:, None], other=0.0
            )
            total += tl.sum(more, 1)
        low -= total[:, None] * W_low
        high -= total[:, None] * W_high
    tl.store(sums_ptr + program * (2 * HALF) + j, tl.sum(low, 0))
    tl.store(sums_ptr + program * (2 * HALF) + HALF + j, tl.sum(high, 0))
