"""Kernels at the two ends of a captured graph: gathering a step's rows, and summing errors and counts of validation.

A graph always reads the same addresses, but the rows of each trial have a different address. So the graph finds them
through `window`, int64 [3] on the device: the address of the rows, the address of their order (0: storage order), and
the number of rows. The number of the batch comes from a counter that the graph itself advances.
"""

import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from msae_sweep.sae.kernels.launch import launch
from msae_sweep.sae.kernels.packing import code_latent


def fetch_rows(
    window: Int[Tensor, " 3"],
    counter: Int[Tensor, " 1"],
    pre_bias: Float[Tensor, " width"],
    centred: BFloat16[Tensor, "batch width"],
    start: Float[Tensor, "batch width"],
    cursors: Int[Tensor, " 2"],
    batch: int,
    input_dim: int,
) -> None:
    """Gather batch number `counter` of the window into `centred` = x − pre_bias and `start` = pre_bias − x.

    The kernel also resets `cursors`. Rows beyond the window's end repeat its last row. Columns from `input_dim` on keep
    their values.
    """
    width = start.shape[1]
    rows = max(1, 2048 // width)
    launch(
        _fetch_rows, (triton.cdiv(batch, rows),),
        window_ptr=window, counter_ptr=counter, pre_bias_ptr=pre_bias, centred_ptr=centred, start_ptr=start,
        cursors_ptr=cursors, batch=batch, input_dim=input_dim,
        WIDTH=width, ROWS=rows, num_warps=4,
    )  # fmt: skip


def add_errors(
    window: Int[Tensor, " 3"],
    counter: Int[Tensor, " 1"],
    errors: Float[Tensor, "batch levels"],
    active: Int[Tensor, "batch levels"],
    error_sums: Float[Tensor, " levels"],
    active_sums: Int[Tensor, " levels"],
) -> None:
    """Add a batch's errors (in float64) and counts to the sums, and advance `counter`.

    Rows beyond the window's end are left out.
    """
    batch, n_levels = errors.shape
    launch(
        _add_errors, (1,),
        window_ptr=window, counter_ptr=counter, errors_ptr=errors, active_ptr=active, error_sums_ptr=error_sums,
        active_sums_ptr=active_sums, batch=batch,
        N_LEVELS=n_levels, LEVELS=triton.next_power_of_2(n_levels), ROWS=256, num_warps=8,
    )  # fmt: skip


def count_active(
    window: Int[Tensor, " 3"],
    counter: Int[Tensor, " 1"],
    codes: Int[Tensor, "batch k_padded"],
    counts: Int[Tensor, " hidden_dim"],
) -> None:
    """Add to `counts` in how many rows of batch number `counter` each latent is active (has a code).

    Rows beyond the window's end are left out. Integers are added, so the order of the atomic additions changes nothing.
    """
    batch, k_padded = codes.shape
    rows = max(1, 1024 // k_padded)
    launch(
        _count_active, (triton.cdiv(batch, rows),),
        window_ptr=window, counter_ptr=counter, codes_ptr=codes, counts_ptr=counts, batch=batch,
        K_PADDED=k_padded, ROWS=rows, num_warps=4,
    )  # fmt: skip


@triton.jit
def _count_active(window_ptr, counter_ptr, codes_ptr, counts_ptr, batch, K_PADDED: tl.constexpr, ROWS: tl.constexpr):
    n_rows = tl.load(window_ptr + 2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < batch) & (tl.load(counter_ptr).to(tl.int64) * batch + row < n_rows)
    place = row.to(tl.int64)[:, None] * K_PADDED + tl.arange(0, K_PADDED)[None, :]
    code = tl.load(codes_ptr + place, mask=inside[:, None], other=0)
    tl.atomic_add(counts_ptr + code_latent(code), 1, mask=code != 0)


@triton.jit
def _fetch_rows(
    window_ptr,
    counter_ptr,
    pre_bias_ptr,
    centred_ptr,
    start_ptr,
    cursors_ptr,
    batch,
    input_dim,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.load(window_ptr).to(tl.pointer_type(tl.float32))
    order = tl.load(window_ptr + 1)
    n_rows = tl.load(window_ptr + 2)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    number = tl.minimum(tl.load(counter_ptr).to(tl.int64) * batch + place, n_rows - 1)
    if order != 0:
        number = tl.load(order.to(tl.pointer_type(tl.int64)) + number, mask=place < batch, other=0)
    inside = (place < batch)[:, None] & (j < input_dim)[None, :]
    x = tl.load(rows + number[:, None] * input_dim + j[None, :], mask=inside, other=0.0)
    bias = tl.load(pre_bias_ptr + j)[None, :]
    target = place.to(tl.int64)[:, None] * WIDTH + j[None, :]
    tl.store(centred_ptr + target, (x - bias).to(tl.bfloat16), mask=inside)
    tl.store(start_ptr + target, bias - x, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(cursors_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int32))


@triton.jit
def _add_errors(
    window_ptr,
    counter_ptr,
    errors_ptr,
    active_ptr,
    error_sums_ptr,
    active_sums_ptr,
    batch,
    N_LEVELS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    level = tl.arange(0, LEVELS)
    n_rows = tl.load(window_ptr + 2)
    step = tl.load(counter_ptr)
    error_sum = tl.zeros((ROWS, LEVELS), tl.float64)
    active_sum = tl.zeros((ROWS, LEVELS), tl.int64)
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = ((row < batch) & (step.to(tl.int64) * batch + row < n_rows))[:, None] & (level < N_LEVELS)[None, :]
        place = row[:, None] * N_LEVELS + level[None, :]
        error_sum += tl.load(errors_ptr + place, mask=inside, other=0.0).to(tl.float64)
        active_sum += tl.load(active_ptr + place, mask=inside, other=0).to(tl.int64)
    known = level < N_LEVELS
    tl.store(error_sums_ptr + level, tl.load(error_sums_ptr + level, mask=known) + tl.sum(error_sum, 0), mask=known)
    tl.store(active_sums_ptr + level, tl.load(active_sums_ptr + level, mask=known) + tl.sum(active_sum, 0), mask=known)
    tl.store(counter_ptr, step + 1)
