"""Kernels of the auxiliary loss on dead latents, without synchronisation: the host need not know how many are dead.

The dead latents reconstruct the residual e = x − x̂ of the largest level:  ê = TopK_aux_k(ReLU(pre_acts of the dead))
W_dec,  loss ‖ê − e‖² / ‖e‖².  Half of all pre_acts are positive, so a row uses a good share of the dead latents;
therefore the matrix products are dense, over the dead latents only. Every launch covers the worst case, and programs
beyond the number of dead latents end at once, so with no dead latent the kernels cost only their launches.

`add_gradients` runs after the main backward pass and adds to the gradients that it wrote for dead latents, because a
latent that counts as dead may fire in this very batch. Source of the loss: Gao et al. 2024 (arXiv 2406.04093), A.2; see
`sae.loss.aux_loss`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from msae_sweep.sae.kernels.latent_gradients import Gradients
from msae_sweep.sae.kernels.launch import launch
from msae_sweep.sae.kernels.packing import QuadWords, dequantize, high_half, low_half, pack

TILE = 64
"""Number of rows, and of latents, in a tile of the dense products; hidden_dim is padded to a multiple of it."""


class DeadLatents(NamedTuple):
    """Dead latents of a step, with their codes, their loss and its gradients."""

    latents: Int[Tensor, " hidden_dim"]
    """Numbers of the dead latents, ascending; only the first `n_dead` elements are valid."""
    n_dead: Int[Tensor, " 1"]
    acts: BFloat16[Tensor, "batch hidden_dim"]
    """Dense codes, column i for `latents[i]`; zero from column `n_dead` to the next multiple of TILE."""
    G: Int[Tensor, "batch half"]
    """Gradient of the auxiliary loss, times its coefficient, with respect to ê, as pair words."""
    losses: Float[Tensor, " pieces"]
    """Partial sums of the auxiliary loss, one per program of `residual_gradient`."""
    pre_sums: Float[Tensor, "row_tiles hidden_dim"]
    """Σ over a tile of rows of the gradient of a dead latent's pre_act, column i for `latents[i]`."""


class AuxHyper(NamedTuple):
    """Hyperparameters of the auxiliary loss, on the device because they differ between trials."""

    dead_after: Int[Tensor, " 1"]
    """Number of rows without firing after which a latent is dead, int64."""
    coefficient: Float[Tensor, " 1"]


def find_dead(
    samples_since_fired: Int[Tensor, " hidden_dim"], aux: AuxHyper, dead: DeadLatents, hidden_dim: int
) -> None:
    """Write the dead latents among the first `hidden_dim` ones, and their number, to `dead`."""
    launch(
        _find_dead, (1,),
        samples_since_fired_ptr=samples_since_fired, dead_after_ptr=aux.dead_after, latents_ptr=dead.latents,
        n_dead_ptr=dead.n_dead, hidden_dim=hidden_dim,
        BLOCK=4096, num_warps=8,
    )  # fmt: skip


def select_codes(pre_acts: BFloat16[Tensor, "rows hidden_dim"], dead: DeadLatents, aux_k: int) -> None:
    """Write the dead latents' codes: each row's `aux_k` largest positive pre_acts, lowest latent first on ties."""
    batch, hidden_dim = dead.acts.shape
    block = min(1024, triton.next_power_of_2(hidden_dim))
    launch(
        _select, (batch,),
        pre_acts_ptr=pre_acts.view(torch.int16), latents_ptr=dead.latents, n_dead_ptr=dead.n_dead,
        acts_ptr=dead.acts.view(torch.int16), aux_k=aux_k,
        HIDDEN_DIM=hidden_dim, BLOCK=block, num_warps=4,
    )  # fmt: skip


def residual_gradient(
    G: QuadWords,
    level_scales: Float[Tensor, " levels"],
    last_squared_error: Float[Tensor, " batch"],
    W_dec: Int[Tensor, "hidden_dim half"],
    aux: AuxHyper,
    dead: DeadLatents,
) -> None:
    """Reconstruct the residual from the dead latents; write the loss, and its gradient times the coefficient."""
    batch, n_levels, quarter = G.words.shape
    half = 2 * quarter
    columns = min(64, half)
    launch(
        _residual_gradient, (triton.cdiv(batch, TILE), half // columns),
        G_ptr=G.words, G_scales_ptr=G.scales, level_scales_ptr=level_scales, last_squared_error_ptr=last_squared_error,
        W_dec_ptr=W_dec, coefficient_ptr=aux.coefficient, latents_ptr=dead.latents, n_dead_ptr=dead.n_dead,
        acts_ptr=dead.acts, dead_G_ptr=dead.G, losses_ptr=dead.losses, batch=batch, n_levels=n_levels,
        acts_stride=dead.acts.shape[1],
        HALF=half, ROWS=TILE, COLUMNS=columns, DEPTH=64, PRODUCT=_product_type(W_dec.device), num_warps=4,
    )  # fmt: skip


def add_gradients(
    W_dec: Int[Tensor, "hidden_dim half"],
    dead: DeadLatents,
    grad_pre: BFloat16[Tensor, "hidden_dim batch_stride"],
    gradients: Gradients,
) -> None:
    """Add the auxiliary loss's gradients to those of the dead latents' pre_acts and decoder rows."""
    hidden_dim, half = W_dec.shape
    batch = len(dead.G)
    row_tiles = triton.cdiv(batch, TILE)
    columns = min(64, half)
    launch(
        _add_pre_gradients, (hidden_dim // TILE, row_tiles),
        W_dec_ptr=W_dec, latents_ptr=dead.latents, n_dead_ptr=dead.n_dead, acts_ptr=dead.acts, dead_G_ptr=dead.G,
        dead_pre_sums_ptr=dead.pre_sums, grad_pre_ptr=grad_pre, grad_pre_stride=grad_pre.shape[1], batch=batch,
        acts_stride=hidden_dim,
        HALF=half, ROWS=TILE, LATENTS=TILE, DEPTH=min(64, half), PRODUCT=_product_type(W_dec.device), num_warps=4,
    )  # fmt: skip
    launch(
        _add_decoder_gradients, (hidden_dim // 32, half // columns),
        latents_ptr=dead.latents, n_dead_ptr=dead.n_dead, acts_ptr=dead.acts, dead_G_ptr=dead.G,
        dead_pre_sums_ptr=dead.pre_sums, grad_W_dec_ptr=gradients.W_dec, pre_sum_ptr=gradients.pre_sum, batch=batch,
        acts_stride=hidden_dim, row_tiles=row_tiles,
        HALF=half, LATENTS=32, COLUMNS=columns, DEPTH=2 * TILE, PRODUCT=_product_type(W_dec.device), num_warps=4,
    )  # fmt: skip


def _product_type(device: torch.device) -> tl.dtype:
    """Return the operands' type in dense products: Triton's interpreter, used on CPUs, has no bfloat16 products."""
    return tl.bfloat16 if device.type == "cuda" else tl.float32


@triton.jit
def _find_dead(samples_since_fired_ptr, dead_after_ptr, latents_ptr, n_dead_ptr, hidden_dim, BLOCK: tl.constexpr):
    limit = tl.load(dead_after_ptr)
    found = 0
    for first in range(0, hidden_dim, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        since = tl.load(samples_since_fired_ptr + latent, mask=latent < hidden_dim, other=-1)
        is_dead = ((since >= limit) & (latent < hidden_dim)).to(tl.int32)
        tl.store(latents_ptr + found + tl.cumsum(is_dead, 0) - is_dead, latent, mask=is_dead > 0)
        found += tl.sum(is_dead)
    tl.store(n_dead_ptr, found)


@triton.jit
def _select(pre_acts_ptr, latents_ptr, n_dead_ptr, acts_ptr, aux_k, HIDDEN_DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(n_dead_ptr)
    if n > 0:
        pre_acts_ptr += row * HIDDEN_DIM
        acts_ptr += row * HIDDEN_DIM
        lane = tl.arange(0, BLOCK)
        positive = 0
        for first in range(0, n, BLOCK):
            place = first + lane
            latent = tl.load(latents_ptr + place, mask=place < n, other=0)
            bits = tl.maximum(tl.load(pre_acts_ptr + latent, mask=place < n, other=0), 0)
            # Also stored beyond the last dead latent, because the products read whole tiles.
            tl.store(acts_ptr + place, bits, mask=place < HIDDEN_DIM)
            positive += tl.sum((bits > 0).to(tl.int32))
        if positive > aux_k:
            tl.debug_barrier()
            # Find the aux_k-th largest value bit by bit; then keep all above it, and the first of those equal to it.
            bound = 0
            for i in range(15):
                higher = bound | (1 << (14 - i))
                reached = 0
                for first in range(0, n, BLOCK):
                    bits = tl.load(acts_ptr + first + lane, mask=first + lane < n, other=0).to(tl.int32)
                    reached += tl.sum((bits >= higher).to(tl.int32))
                bound = tl.where(reached >= aux_k, higher, bound)
            above = 0
            for first in range(0, n, BLOCK):
                bits = tl.load(acts_ptr + first + lane, mask=first + lane < n, other=0).to(tl.int32)
                above += tl.sum((bits > bound).to(tl.int32))
            ties_left = aux_k - above
            for first in range(0, n, BLOCK):
                place = first + lane
                bits = tl.load(acts_ptr + place, mask=place < n, other=0).to(tl.int32)
                is_tie = (bits == bound).to(tl.int32)
                keep = (bits > bound) | ((is_tie > 0) & (tl.cumsum(is_tie, 0) <= ties_left))
                tl.store(acts_ptr + place, tl.where(keep, bits, 0).to(tl.int16), mask=place < n)
                ties_left = tl.maximum(ties_left - tl.sum(is_tie), 0)


@triton.jit
def _residual_gradient(
    G_ptr,
    G_scales_ptr,
    level_scales_ptr,
    last_squared_error_ptr,
    W_dec_ptr,
    coefficient_ptr,
    latents_ptr,
    n_dead_ptr,
    acts_ptr,
    dead_G_ptr,
    losses_ptr,
    batch,
    n_levels,
    acts_stride,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    n = tl.load(n_dead_ptr)
    piece = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if n == 0:
        tl.store(losses_ptr + piece, 0.0)
    else:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        far = row.to(tl.int64)[:, None]
        inside = (row < batch)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        low = tl.zeros((ROWS, COLUMNS), tl.float32)
        high = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, n, DEPTH):
            place = first + depth
            code = tl.load(acts_ptr + far * acts_stride + place[None, :], mask=inside & (place < n)[None, :], other=0.0)
            latent = tl.load(latents_ptr + place, mask=place < n, other=0)
            word = tl.load(W_dec_ptr + latent[:, None] * HALF + column[None, :])
            low = tl.dot(code.to(PRODUCT), low_half(word).to(PRODUCT), low)
            high = tl.dot(code.to(PRODUCT), high_half(word).to(PRODUCT), high)
        # Every program sums ‖e‖² itself, in the same order.
        scale = 0.0
        lane = tl.arange(0, 1024)
        for first in range(0, batch, 1024):
            scale += tl.sum(tl.load(last_squared_error_ptr + first + lane, mask=first + lane < batch, other=0.0))
        inverse = tl.where(scale > 0, 1 / tl.maximum(scale, 1.1754943508222875e-38), 0.0)
        # G of the last level is c · (x̂ − x), so the residual is −G / c.
        to_residual = -1 / tl.load(level_scales_ptr + n_levels - 1)
        last = far * n_levels + n_levels - 1
        quarter = (tl.program_id(1) * COLUMNS // 2 + tl.arange(0, COLUMNS // 2))[None, :]
        quad = tl.load(G_ptr + last * (HALF // 2) + quarter, mask=inside, other=0)
        g_scale = tl.load(G_scales_ptr + last, mask=inside, other=0.0) * to_residual
        low -= g_scale * tl.reshape(tl.join(dequantize(quad, 0), dequantize(quad, 1)), (ROWS, COLUMNS))
        high -= g_scale * tl.reshape(tl.join(dequantize(quad, 2), dequantize(quad, 3)), (ROWS, COLUMNS))
        tl.store(losses_ptr + piece, tl.sum(tl.where(inside, low * low + high * high, 0.0)) * inverse)
        factor = 2 * tl.load(coefficient_ptr) * inverse
        tl.store(dead_G_ptr + far * HALF + column[None, :], pack(low * factor, high * factor), mask=inside)


@triton.jit
def _add_pre_gradients(
    W_dec_ptr,
    latents_ptr,
    n_dead_ptr,
    acts_ptr,
    dead_G_ptr,
    dead_pre_sums_ptr,
    grad_pre_ptr,
    grad_pre_stride,
    batch,
    acts_stride,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    n = tl.load(n_dead_ptr)
    place = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    if tl.program_id(0) * LATENTS < n:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        known = (place < n)[:, None]
        inside = (row < batch)[None, :]
        latent = tl.load(latents_ptr + place, mask=place < n, other=0)
        j = tl.arange(0, DEPTH)
        grad = tl.zeros((LATENTS, ROWS), tl.float32)
        for first in range(0, HALF, DEPTH):
            w = tl.load(W_dec_ptr + latent[:, None] * HALF + first + j[None, :])
            g = tl.load(dead_G_ptr + row.to(tl.int64)[None, :] * HALF + first + j[:, None], mask=inside, other=0)
            grad = tl.dot(low_half(w).to(PRODUCT), low_half(g).to(PRODUCT), grad)
            grad = tl.dot(high_half(w).to(PRODUCT), high_half(g).to(PRODUCT), grad)
        code = tl.load(
            acts_ptr + row.to(tl.int64)[None, :] * acts_stride + place[:, None], mask=known & inside, other=0.0
        )
        grad = tl.where(code > 0, grad, 0.0)
        target = grad_pre_ptr + latent.to(tl.int64)[:, None] * grad_pre_stride + row[None, :]
        before = tl.load(target, mask=known & inside, other=0.0).to(tl.float32)
        tl.store(target, (before + grad).to(tl.bfloat16), mask=known & inside)
        tl.store(dead_pre_sums_ptr + tl.program_id(1) * acts_stride + place, tl.sum(grad, 1), mask=place < n)


@triton.jit
def _add_decoder_gradients(
    latents_ptr,
    n_dead_ptr,
    acts_ptr,
    dead_G_ptr,
    dead_pre_sums_ptr,
    grad_W_dec_ptr,
    pre_sum_ptr,
    batch,
    acts_stride,
    row_tiles,
    HALF: tl.constexpr,
    LATENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    n = tl.load(n_dead_ptr)
    place = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    if tl.program_id(0) * LATENTS < n:
        known = place < n
        latent = tl.load(latents_ptr + place, mask=known, other=0)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        low = tl.zeros((LATENTS, COLUMNS), tl.float32)
        high = tl.zeros((LATENTS, COLUMNS), tl.float32)
        for first in range(0, batch, DEPTH):
            row = first + tl.arange(0, DEPTH)
            inside = row < batch
            far = row.to(tl.int64)
            code = tl.load(
                acts_ptr + far[None, :] * acts_stride + place[:, None], mask=inside[None, :] & known[:, None], other=0.0
            )
            g = tl.load(dead_G_ptr + far[:, None] * HALF + column[None, :], mask=inside[:, None], other=0)
            low = tl.dot(code.to(PRODUCT), low_half(g).to(PRODUCT), low)
            high = tl.dot(code.to(PRODUCT), high_half(g).to(PRODUCT), high)
        target = grad_W_dec_ptr + latent.to(tl.int64)[:, None] * (2 * HALF) + column[None, :]
        tl.store(target, tl.load(target, mask=known[:, None]) + low, mask=known[:, None])
        tl.store(target + HALF, tl.load(target + HALF, mask=known[:, None]) + high, mask=known[:, None])
        if tl.program_id(1) == 0:
            total = tl.load(pre_sum_ptr + latent, mask=known, other=0.0)
            for i in range(row_tiles):
                total += tl.load(dead_pre_sums_ptr + i * acts_stride + place, mask=known, other=0.0)
            tl.store(pre_sum_ptr + latent, total, mask=known)
