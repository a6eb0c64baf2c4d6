"""Kernels of the backward pass, latent by latent: lists of active rows, and gradients of decoder rows and pre_acts.

The kernels iterate over latents instead of rows. So the gradient of a decoder row is a sum in registers that needs no
atomics, and it has the same bits on every run, because a latent's rows are visited in ascending order. A latent that is
active in many rows is cut into parts of `PART` entries, so that it does not delay the step; the kernels that read the
parts add them up in order.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from msae_sweep.sae.kernels.launch import launch
from msae_sweep.sae.kernels.packing import (
    DEQUANTIZE_OFFSET,
    QuadWords,
    code_value,
    dequantize_with_offset,
    high_half,
    low_half,
    split_codes,
)
from msae_sweep.sae.kernels.topk import _bit_number, _count_bits


class Entries(NamedTuple):
    """Active (row, latent) pairs, grouped by latent and in row order within a latent; filled anew every step."""

    packed: Int[Tensor, " entries"]
    """int64: the value's float32 bits in the high half and row · levels + level in the low half. The latter is the row
    of G that the entry's latent sees."""
    start: Int[Tensor, " hidden_dim"]
    """Offset of each latent's entries. Offsets vary between runs (atomic counter); the entries do not."""
    counts: Int[Tensor, " hidden_dim"]
    more_parts: Int[Tensor, " hidden_dim"]
    """Offset in `parts` of each latent's second and further parts."""
    parts: Int[Tensor, " parts"]
    """Latent of each second or further part."""
    part_numbers: Int[Tensor, " parts"]
    """Number of each of `parts` within its latent, from 1."""
    cursors: Int[Tensor, " 2"]
    """Number of entries and number of further parts allocated so far; zero before a step."""


class Gradients(NamedTuple):
    """Sums that the backward pass computes, one per part of a latent."""

    W_dec: Float[Tensor, "hidden_dim width"]
    """Gradient from part 0 of every latent; zero if the latent is not active."""
    W_dec_parts: Float[Tensor, "parts width"]
    pre_sum: Float[Tensor, " hidden_dim"]
    """Σ over the rows of part 0 of the gradient of a latent's pre_act."""
    pre_sum_parts: Float[Tensor, " parts"]


def build_entries(
    codes: Int[Tensor, "batch k_padded"],
    ranks: Int[Tensor, "hidden_dim batch"],
    holders: Int[Tensor, "hidden_dim batch_words"],
    level_of_rank: Int[Tensor, " k"],
    entries: Entries,
    samples_since_fired: Int[Tensor, " hidden_dim"],
    fired: Int[Tensor, " hidden_dim"],
    n_levels: int,
    part: int,
) -> None:
    """Fill `entries` from the output of `top_codes`, clear `holders`, and update `samples_since_fired` and `fired`."""
    hidden_dim, batch_words = holders.shape
    launch(
        _collect, (hidden_dim,),
        holders_ptr=holders, packed_ptr=entries.packed, start_ptr=entries.start, count_ptr=entries.counts,
        more_parts_ptr=entries.more_parts, parts_ptr=entries.parts, part_numbers_ptr=entries.part_numbers,
        cursors_ptr=entries.cursors, samples_since_fired_ptr=samples_since_fired, fired_ptr=fired, batch=len(codes),
        batch_words=batch_words,
        WORDS=triton.next_power_of_2(batch_words), PART=part,
        num_warps=max(1, min(8, triton.next_power_of_2(batch_words) // 64)),
    )  # fmt: skip
    launch(
        _describe, (triton.cdiv(len(entries.packed), 1024),),
        codes_ptr=codes, ranks_ptr=ranks, level_of_rank_ptr=level_of_rank, packed_ptr=entries.packed,
        cursors_ptr=entries.cursors, ranks_stride=ranks.shape[1], n_levels=n_levels,
        K_PADDED=codes.shape[1], BLOCK=1024, num_warps=4,
    )  # fmt: skip


def backward(
    G: QuadWords,
    W_dec: Int[Tensor, "hidden_dim half"],
    entries: Entries,
    gradients: Gradients,
    grad_pre: BFloat16[Tensor, "hidden_dim batch_stride"],
    part: int,
) -> None:
    """Write the decoder's gradient Σ v G, and scatter the pre_acts' gradient G · w into the zeroed `grad_pre`."""
    hidden_dim, half = W_dec.shape
    wide = G.words.numel() >= 2**31
    warps = max(1, min(16, half // 128))
    chunks = min(2, half // 8)
    # Each lane reads four words of one row at a time.
    rows = max(1, 32 * warps * 4 * chunks * 2 // half)
    launch(
        _backward, (hidden_dim + len(entries.parts),),
        packed_ptr=entries.packed, start_ptr=entries.start, count_ptr=entries.counts, parts_ptr=entries.parts,
        part_numbers_ptr=entries.part_numbers, cursors_ptr=entries.cursors, grad_W_dec_ptr=gradients.W_dec,
        grad_W_dec_parts_ptr=gradients.W_dec_parts, pre_sum_ptr=gradients.pre_sum,
        pre_sum_parts_ptr=gradients.pre_sum_parts, G_ptr=G.words, G_scales_ptr=G.scales, W_dec_ptr=W_dec,
        grad_pre_ptr=grad_pre, grad_pre_stride=grad_pre.shape[1], hidden_dim=hidden_dim,
        CHUNK=half // 2 // chunks, N_CHUNKS=chunks, ROWS=rows, TILES=2, N_LEVELS=G.words.shape[1], PART=part, WIDE=wide,
        NATIVE=W_dec.is_cuda, num_warps=warps, maxnreg=128,
    )  # fmt: skip


def part_size(batch: int, k: int, hidden_dim: int) -> int:
    """Return the number of entries in a part, about a latent's average, so that most latents have one or two parts."""
    return max(64, min(1024, triton.next_power_of_2(batch * k // hidden_dim)))


def n_parts(batch: int, k: int, part: int) -> int:
    """Return an upper bound on the number of second and further parts, for any data."""
    return batch * k // part


def entries_reference(codes: Int[Tensor, "batch k_padded"], hidden_dim: int) -> list[list[tuple[int, int, float]]]:
    """Return (row, rank, value) of every latent's entries in row order, in plain Python."""
    values, latents = split_codes(codes.cpu())
    found: list[list[tuple[int, int, float]]] = [[] for _ in range(hidden_dim)]
    for row in range(len(codes)):
        for rank, (value, latent) in enumerate(zip(values[row].tolist(), latents[row].tolist(), strict=True)):
            if value > 0:
                found[latent].append((row, rank, value))
    return found


@triton.jit
def _collect(
    holders_ptr,
    packed_ptr,
    start_ptr,
    count_ptr,
    more_parts_ptr,
    parts_ptr,
    part_numbers_ptr,
    cursors_ptr,
    samples_since_fired_ptr,
    fired_ptr,
    batch,
    batch_words,
    WORDS: tl.constexpr,
    PART: tl.constexpr,
):
    """Write a latent's active rows in order, as (latent, row) pairs that `_describe` turns into entries."""
    latent = tl.program_id(0)
    far = latent.to(tl.int64)
    word = tl.arange(0, WORDS)
    mask = tl.load(holders_ptr + far * batch_words + word, mask=word < batch_words, other=0)
    since = tl.load(samples_since_fired_ptr + latent)
    n_bits = _count_bits(mask)
    total = tl.sum(n_bits)
    tl.store(count_ptr + latent, total)
    tl.store(samples_since_fired_ptr + latent, tl.where(total > 0, 0, since + batch))
    if total > 0:
        tl.store(holders_ptr + far * batch_words + word, tl.zeros((WORDS,), tl.int32), mask=word < batch_words)
        tl.store(fired_ptr + latent, 1)
        first = tl.atomic_add(cursors_ptr, total, sem="relaxed")
        tl.store(start_ptr + latent, first)
        place = first + tl.cumsum(n_bits, 0) - n_bits
        for _ in range(tl.max(n_bits)):
            single = mask & -mask
            row = word * 32 + _bit_number(single)
            tl.store(packed_ptr + place, (far << 32) | row.to(tl.int64), mask=mask != 0)
            place += 1
            mask ^= single
        n_more = (total - 1) // PART
        if n_more > 0:
            first_more = tl.atomic_add(cursors_ptr + 1, n_more, sem="relaxed")
            tl.store(more_parts_ptr + latent, first_more)
            for i in range(n_more):
                tl.store(parts_ptr + first_more + i, latent)
                tl.store(part_numbers_ptr + first_more + i, i + 1)


@triton.jit
def _describe(
    codes_ptr, ranks_ptr, level_of_rank_ptr, packed_ptr, cursors_ptr, ranks_stride, n_levels, K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace (latent, row) pairs by entries; programs get equal numbers of pairs, however often each latent fires."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < tl.load(cursors_ptr)
    pair = tl.load(packed_ptr + entry, mask=inside, other=0)
    row = pair & 0xFFFFFFFF
    rank = tl.load(ranks_ptr + (pair >> 32) * ranks_stride + row, mask=inside, other=0).to(tl.int32)
    code = tl.load(codes_ptr + row * K_PADDED + rank, mask=inside, other=0)
    level = tl.load(level_of_rank_ptr + rank, mask=inside, other=0)
    bits = code_value(code).to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(packed_ptr + entry, (bits << 32) | (row * n_levels + level), mask=inside)


@triton.jit
def _backward(
    packed_ptr,
    start_ptr,
    count_ptr,
    parts_ptr,
    part_numbers_ptr,
    cursors_ptr,
    grad_W_dec_ptr,
    grad_W_dec_parts_ptr,
    pre_sum_ptr,
    pre_sum_parts_ptr,
    G_ptr,
    G_scales_ptr,
    W_dec_ptr,
    grad_pre_ptr,
    grad_pre_stride,
    hidden_dim,
    CHUNK: tl.constexpr,
    N_CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    N_LEVELS: tl.constexpr,
    PART: tl.constexpr,
    WIDE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Process one part of a latent's entries, ROWS · TILES at a time, while the gradients of the next are prefetched.

    A row is cut into chunks of a few lanes each, so that a warp holds several rows side by side. Sums over a row's
    elements then cross few lanes, and sums over rows cross none until the end.
    """
    QUARTER: tl.constexpr = CHUNK * N_CHUNKS
    HALF: tl.constexpr = 2 * QUARTER
    item = tl.program_id(0)
    j = tl.arange(0, CHUNK)
    lane = tl.arange(0, ROWS)
    is_first = item < hidden_dim
    more = item - hidden_dim
    live = is_first | (more < tl.load(cursors_ptr + 1))
    latent = tl.where(is_first, item, tl.load(parts_ptr + more, mask=live & (item >= hidden_dim), other=0))
    number = tl.load(part_numbers_ptr + more, mask=live & (item >= hidden_dim), other=0)
    if live:
        first = tl.load(start_ptr + latent)
        begin = first + number * PART
        end = tl.minimum(first + tl.load(count_ptr + latent), begin + PART)
        entries = _load_entries(packed_ptr, begin, end, lane, TILES)
        words, scales = _gather(
            G_ptr=G_ptr, G_scales_ptr=G_scales_ptr, entries=entries, j=j, CHUNK=CHUNK, N_CHUNKS=N_CHUNKS, TILES=TILES,
            WIDE=WIDE,
        )  # fmt: skip
        nexts = _load_entries(packed_ptr, begin + TILES * ROWS, end, lane, TILES)
        w = ()
        w_sum = tl.zeros((1, CHUNK), tl.float32)
        sums = ()
        for c in tl.static_range(N_CHUNKS):
            even = tl.load(W_dec_ptr + latent * HALF + 2 * (c * CHUNK + j))[None, :]
            odd = tl.load(W_dec_ptr + latent * HALF + 2 * (c * CHUNK + j) + 1)[None, :]
            w = w + (low_half(even), low_half(odd), high_half(even), high_half(odd))  # type: ignore[assignment]  # noqa: RUF005
            w_sum += (low_half(even) + low_half(odd)) + (high_half(even) + high_half(odd))
            zeros = tl.zeros((ROWS, CHUNK), tl.float32)
            sums = sums + (zeros, zeros, zeros, zeros)  # type: ignore[assignment]  # noqa: RUF005
        above = DEQUANTIZE_OFFSET * tl.sum(w_sum)
        pre_sums = tl.zeros((ROWS,), tl.float32)
        value_sums = tl.zeros((ROWS,), tl.float32)
        grad_row = grad_pre_ptr + latent.to(tl.int64) * grad_pre_stride
        for i in range(begin, end, ROWS * TILES):
            next_words, next_scales = _gather(
                G_ptr=G_ptr, G_scales_ptr=G_scales_ptr, entries=nexts, j=j, CHUNK=CHUNK, N_CHUNKS=N_CHUNKS, TILES=TILES,
                WIDE=WIDE,
            )  # fmt: skip
            after = _load_entries(packed_ptr, i + 2 * TILES * ROWS, end, lane, TILES)
            for u in tl.static_range(TILES):
                value = (entries[u] >> 32).to(tl.int32).to(tl.float32, bitcast=True) * scales[u]
                value_sums = tl.fma(value, tl.full((ROWS,), DEQUANTIZE_OFFSET, tl.float32), value_sums)
                products = tl.zeros((ROWS, CHUNK), tl.float32)
                more_sums = ()
                for c in tl.static_range(N_CHUNKS):
                    for byte in tl.static_range(4):
                        g = dequantize_with_offset(words[u * N_CHUNKS + c], byte, NATIVE)
                        products += g * w[4 * c + byte]
                        more_sums = more_sums + (tl.fma(value[:, None] + tl.zeros_like(g), g, sums[4 * c + byte]),)  # type: ignore[assignment]  # noqa: RUF005
                sums = more_sums
                grad = (tl.sum(products, 1) - above) * scales[u]
                inside = i + u * ROWS + lane < end
                tl.store(grad_row + entries[u].to(tl.int32) // N_LEVELS, grad.to(tl.bfloat16), mask=inside)
                pre_sums += tl.where(inside, grad, 0.0)
            entries = nexts
            words = next_words
            scales = next_scales
            nexts = after
        if is_first:
            target = grad_W_dec_ptr + latent.to(tl.int64) * (2 * HALF)
            tl.store(pre_sum_ptr + latent, tl.sum(pre_sums))
        else:
            target = grad_W_dec_parts_ptr + more.to(tl.int64) * (2 * HALF)
            tl.store(pre_sum_parts_ptr + more, tl.sum(pre_sums))
        for c in tl.static_range(N_CHUNKS):
            for byte in tl.static_range(4):
                place = byte // 2 * HALF + 2 * (c * CHUNK + j) + byte % 2
                tl.store(target + place, tl.sum(sums[4 * c + byte] - value_sums[:, None], 0))


@triton.jit
def _load_entries(packed_ptr, first, end, lane, TILES: tl.constexpr):
    """Load TILES entries per lane, and zeros past `end`: entries of row 0 with value 0, which add nothing."""
    entries = ()
    for u in tl.static_range(TILES):
        place = first + u * lane.shape[0] + lane
        entries = entries + (tl.load(packed_ptr + place, mask=place < end, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return entries


@triton.jit
def _gather(
    G_ptr, G_scales_ptr, entries, j, CHUNK: tl.constexpr, N_CHUNKS: tl.constexpr, TILES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    words = ()
    scales = ()
    for u in tl.static_range(TILES):
        place = entries[u].to(tl.int32)
        scales = scales + (tl.load(G_scales_ptr + place),)  # type: ignore[assignment]  # noqa: RUF005
        if WIDE:
            place = place.to(tl.int64)
        row = G_ptr + place[:, None] * (CHUNK * N_CHUNKS) + j[None, :]
        for c in tl.static_range(N_CHUNKS):
            words = words + (tl.load(row + c * CHUNK),)  # type: ignore[assignment]  # noqa: RUF005
    return words, scales
