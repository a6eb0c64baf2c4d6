"""Kernel that selects and sorts the k largest positive pre_acts of every row, and marks each latent's active rows.

Among equal values the lowest latent comes first. A full selection would read a row many times. Here each row is read
twice: the k-th largest of the maxima of at least 2k disjoint groups is a lower bound of the k-th largest element, so
only about 1.15 k elements pass it, and only these are sorted. If ties or clustered values let too many elements pass,
an exact bisection over (value, latent) limits their number.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Int
from torch import Tensor

from msae_sweep.sae.kernels.launch import launch


def top_codes(
    pre_acts: BFloat16[Tensor, "rows hidden_dim"],
    codes: Int[Tensor, "batch k_padded"],
    ranks: Int[Tensor, "hidden_dim batch"],
    holders: Int[Tensor, "hidden_dim batch_words"],
    scratch: Int[Tensor, "batch candidates"],
    k: int,
    *,
    collect: bool = True,
) -> None:
    """Write the `k` largest positive entries of each row of `pre_acts` as sorted codes, and 0 where a row has fewer.

    For each entry (row b, latent n, rank r), also set bit b of `holders[n]` and write `ranks[n, b]` = r. `holders` must
    be zero before the call. Other elements of `ranks` keep their values. Without `collect` neither is changed.
    """
    batch, k_padded = codes.shape
    hidden_dim = pre_acts.shape[1]
    n_words = hidden_dim // 2
    group_words = min(triton.next_power_of_2(2 * k), triton.next_power_of_2(n_words))
    launch(
        _top_codes, (batch,),
        pre_words_ptr=pre_acts.view(torch.int32), pre_halves_ptr=pre_acts.view(torch.int16), scratch_ptr=scratch,
        codes_ptr=codes, ranks_ptr=ranks, holders_ptr=holders, ranks_stride=ranks.shape[1],
        holders_stride=holders.shape[1], collect=int(collect),
        HIDDEN_DIM=hidden_dim, K=k, K_PADDED=k_padded, CANDIDATES=scratch.shape[1], GROUP_WORDS=group_words,
        N_PASSES=triton.cdiv(n_words, group_words), COLUMNS=triton.next_power_of_2(hidden_dim // 32),
        num_warps=min(16, max(1, triton.next_power_of_2(hidden_dim) // 8192)),
    )  # fmt: skip


def top_codes_reference(pre_acts: BFloat16[Tensor, "rows hidden_dim"], k: int) -> Int[Tensor, "rows k"]:
    """Return the codes that `top_codes` writes, in plain PyTorch."""
    values, latents = torch.relu(pre_acts.float()).sort(dim=1, descending=True, stable=True)
    values, latents = values[:, :k], latents[:, :k].int()
    return torch.where(values > 0, (values.view(torch.int32) << 1) | latents, 0)


def n_candidates(k: int) -> int:
    """Return the width of the scratch row that `top_codes` needs."""
    return 2 * padded_k(k)


def padded_k(k: int) -> int:
    """Return the width of a row of codes, a power of two because sorting networks need one."""
    return max(16, triton.next_power_of_2(k))


@triton.jit
def _key(value_bits, latent):
    """Return a key whose order as a *signed* number is (value, lowest latent); the least int32 if there is no value."""
    key = ((value_bits << 17) | (0x1FFFF - latent)) ^ -2147483648
    return tl.where(value_bits > 0, key, -2147483648)


@triton.jit
def _count_bits(mask):
    x = mask - ((mask >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _bit_number(single):
    """Return the number of the only bit that is set, read off the exponent of its float32; 0 if no bit is set."""
    exponent = (single.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.maximum(exponent - 127, 0)


@triton.jit(do_not_specialize=["collect"])
def _top_codes(
    pre_words_ptr,
    pre_halves_ptr,
    scratch_ptr,
    codes_ptr,
    ranks_ptr,
    holders_ptr,
    ranks_stride,
    holders_stride,
    collect,
    HIDDEN_DIM: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    N_PASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    N_WORDS: tl.constexpr = HIDDEN_DIM // 2
    base = pre_words_ptr + row.to(tl.int64) * N_WORDS
    lane = tl.arange(0, GROUP_WORDS)

    # A word compares by its high half; shifted left, it compares by its low half. Negative values lose against 0.
    high = tl.zeros((GROUP_WORDS,), tl.int32)
    low = tl.zeros((GROUP_WORDS,), tl.int32)
    EVEN: tl.constexpr = N_PASSES * GROUP_WORDS == N_WORDS
    if EVEN and N_PASSES <= 32:
        for i in tl.static_range(N_PASSES):
            word = tl.load(base + i * GROUP_WORDS + lane)
            high = tl.maximum(high, word)
            low = tl.maximum(low, word << 16)
    else:
        for i in range(N_PASSES):
            word = tl.load(base + i * GROUP_WORDS + lane, mask=i * GROUP_WORDS + lane < N_WORDS, other=0)
            high = tl.maximum(high, word)
            low = tl.maximum(low, word << 16)
    high = high >> 16
    low = low >> 16
    bound = 0
    for i in tl.static_range(15):
        higher = bound | (1 << (14 - i))
        n_above = tl.sum((high >= higher).to(tl.int32) + (low >= higher).to(tl.int32))
        bound = tl.where(n_above >= K, higher, bound)
    threshold = tl.maximum(bound, 1) << 16

    # A column has 32 elements, one bit each: word s · N_COLUMNS + column gives bits s (low half) and 16 + s (high).
    N_COLUMNS: tl.constexpr = HIDDEN_DIM // 32
    column = tl.arange(0, COLUMNS)
    mask = tl.zeros((COLUMNS,), tl.int32)
    inside = column < N_COLUMNS
    for s in tl.static_range(16):
        if COLUMNS == N_COLUMNS:
            word = tl.load(base + s * N_COLUMNS + column)
        else:
            word = tl.load(base + s * N_COLUMNS + column, mask=inside, other=0)
        mask |= ((word << 16) >= threshold).to(tl.int32) << s
        mask |= (word >= threshold).to(tl.int32) << (16 + s)
    n_bits = _count_bits(mask)
    total = tl.sum(n_bits)
    if total > CANDIDATES:
        # This is rare. Find the largest key that at least K elements reach, bit by bit. `least` is the key's distance
        # from the least int32, in 64 bits.
        one = tl.full((), 1, tl.int64)
        least = tl.full((), 0, tl.int64)
        for step in range(33):
            trial = tl.where(step < 32, least | (one << ((31 - step) & 31)), least)
            reached = trial - 2147483648
            mask = tl.zeros((COLUMNS,), tl.int32)
            for w in range(16):
                word = tl.load(base + w * N_COLUMNS + column, mask=inside, other=0)
                latent = 2 * (w * N_COLUMNS + column)
                # Negative halves are replaced by 0, because their bits would read as a large number.
                low_key = _key(tl.maximum((word << 16) >> 16, 0), latent)
                high_key = _key(tl.maximum(word >> 16, 0), latent + 1)
                mask |= (inside & (low_key >= reached)).to(tl.int32) << w
                mask |= (inside & (high_key >= reached)).to(tl.int32) << (16 + w)
            least = tl.where(tl.sum(_count_bits(mask)) >= K, trial, least)
        # The last pass computed the mask of `least` itself.
        n_bits = _count_bits(mask)
        total = tl.minimum(tl.sum(n_bits), CANDIDATES)

    place = tl.cumsum(n_bits, 0) - n_bits
    row_scratch = scratch_ptr + row.to(tl.int64) * CANDIDATES
    for _ in range(tl.max(n_bits)):
        single = mask & -mask
        bit = _bit_number(single)
        latent = 2 * ((bit & 15) * N_COLUMNS + column) + (bit >> 4)
        tl.store(row_scratch + place, latent, mask=mask != 0)
        place += 1
        mask ^= single
    tl.debug_barrier()

    slot = tl.arange(0, CANDIDATES)
    latent = tl.load(row_scratch + slot, mask=slot < total, other=0)
    value = tl.load(pre_halves_ptr + row.to(tl.int64) * HIDDEN_DIM + latent, mask=slot < total, other=0).to(tl.int32)
    best = tl.topk(_key(value, latent), K_PADDED) ^ -2147483648
    rank = tl.arange(0, K_PADDED)
    value = tl.where(rank < K, (best >> 17) & 0x7FFF, 0)
    latent = tl.where(value > 0, 0x1FFFF - (best & 0x1FFFF), 0)
    tl.store(codes_ptr + row.to(tl.int64) * K_PADDED + rank, (value << 17) | latent)
    if collect > 0:
        far = latent.to(tl.int64)
        tl.store(ranks_ptr + far * ranks_stride + row, rank.to(ranks_ptr.dtype.element_ty), mask=value > 0)
        bit = (rank * 0 + 1) << (row & 31)
        tl.atomic_or(holders_ptr + far * holders_stride + (row >> 5), bit, mask=value > 0, sem="relaxed")
