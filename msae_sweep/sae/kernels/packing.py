"""How the fused step packs numbers into 32-bit words, and reads them back.

A *code* is one active latent of one row: 15 bits of a positive bfloat16 value (its sign is 0) over 17 bits of the
latent's number, so hidden_dim may be up to 131,072. As unsigned numbers, codes of a row sort by value.

A *pair word* holds two bfloat16 numbers of a row of width 2 · half: element j below element j + half. So a warp that
reads 16 bytes a lane gets eight numbers, and both halves are unpacked by a shift and a mask.

A *quad word* holds four numbers of a row in eight bits each, biased by 128, over one scale a row: elements 2j, 2j + 1,
and those two plus half. The gradients of the reconstructions are kept so, as the backward pass waits for reading them:
a row of 256 is off by 0.7% where bfloat16 is by 0.2%, which a sum over a latent's rows evens out. 0 stays 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra.cuda import libdevice


class Quads(NamedTuple):
    """Rows as quad words with their scales."""

    words: Int[Tensor, "batch levels quarter"]
    scales: Float[Tensor, "batch levels"]


LATENT_BITS = 17
MAX_HIDDEN_DIM = 1 << LATENT_BITS

UNIT = 2.0**-15
"""What the lowest bit of a quad word's byte stands for before the row's scale."""

FULL_SCALE = tl.constexpr(1 / (127 * UNIT))
RAISED_BY = tl.constexpr(1 + 128 * UNIT)


@triton.jit
def code_value(code):
    """The value of a code as float32."""
    return ((code >> 1) & 0x7FFF0000).to(tl.float32, bitcast=True)


@triton.jit
def code_latent(code):
    """The latent of a code."""
    return code & 0x1FFFF


@triton.jit
def low_half(word):
    """Elements below `half` of pair words, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word):
    """Elements from `half` on of pair words, as float32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pack(low, high):
    """Pair words of two float32 halves, rounded to nearest bfloat16."""
    bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def quantize(low, high, HALF: tl.constexpr):
    """Quad words [HALF / 2] of a row's two halves, and the scale that `dequantize` needs."""
    # As whole numbers, whose maximum over a warp is one instruction; positive floats sort by their bits.
    bits = tl.maximum(tl.abs(low), tl.abs(high)).to(tl.int32, bitcast=True)
    largest = tl.max(bits).to(tl.float32, bitcast=True)
    root = tl.rsqrt(tl.maximum(largest, 1e-30))
    inverse = 127.0 * root * root
    low_even, low_odd = tl.split(tl.reshape(_biased(low * inverse), (HALF // 2, 2)))
    high_even, high_odd = tl.split(tl.reshape(_biased(high * inverse), (HALF // 2, 2)))
    # The bits above the low byte are the same in every number, so that their sum can be taken away at once.
    return low_even + (low_odd << 8) + (high_even << 16) + (high_odd << 24) + 0x74C00000, largest * FULL_SCALE


@triton.jit
def _biased(x):
    """0x4B400080 plus the nearest whole number: the bits of a float whose last bit stands for 1."""
    return (x + 12583040.0).to(tl.int32, bitcast=True)


@triton.jit
def raised(word, BYTE: tl.constexpr, NATIVE: tl.constexpr):
    """Byte BYTE of quad words as RAISED_BY plus a number that is to be multiplied by the row's scale.

    The byte is put into the bits of 1, which is a single instruction (NATIVE) on a GPU. Whoever sums up products with
    such numbers takes RAISED_BY times the other factors' sum away at the end, instead of RAISED_BY from every number.
    """
    if NATIVE:
        bits = libdevice.byte_perm(word, 0x3F800000, 0x7604 + 16 * BYTE)
    else:
        bits = (((word >> (8 * BYTE)) & 0xFF) << 8) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dequantize(word, BYTE: tl.constexpr):
    """Byte BYTE of quad words as a number that is to be multiplied by the row's scale."""
    return raised(word, BYTE, False) - RAISED_BY


def quantize_reference(x: Float[Tensor, "rows width"]) -> tuple[Int[Tensor, "rows quarter"], Float[Tensor, " rows"]]:
    """Quad words and scales of float32 rows, the plain way."""
    largest = x.abs().amax(dim=1)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    biased = (x * inverse[:, None]).round().int() + 128
    low, high = biased.view(len(x), 2, -1, 2).unbind(1)
    words = low[..., 0] | (low[..., 1] << 8) | (high[..., 0] << 16) | (high[..., 1] << 24)
    return words, largest / (127 * UNIT)


def dequantize_reference(
    words: Int[Tensor, "rows quarter"], scales: Float[Tensor, " rows"]
) -> Float[Tensor, "rows width"]:
    """Float32 rows of quad words, the plain way."""
    parts = [((words >> (8 * i)) & 0xFF) - 128 for i in range(4)]
    low, high = torch.stack(parts[:2], dim=2), torch.stack(parts[2:], dim=2)
    return torch.cat([low.flatten(1), high.flatten(1)], dim=1) * UNIT * scales[:, None]


def pack_reference(x: Float[Tensor, "rows width"]) -> Int[Tensor, "rows half"]:
    """Pair words of float32 rows, the plain way."""
    half = x.shape[1] // 2
    bits = x.bfloat16().view(torch.int16).int()
    return (bits[:, :half] & 0xFFFF) | (bits[:, half:] << 16)


def unpack_reference(words: Int[Tensor, "rows half"]) -> Float[Tensor, "rows width"]:
    """Float32 rows of pair words, the plain way."""
    return torch.cat([(words << 16).view(torch.float32), (words & -65536).view(torch.float32)], dim=1)


def split_codes(codes: Int[Tensor, "rows k"]) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Values and latents of codes, the plain way."""
    return ((codes >> 1) & 0x7FFF0000).view(torch.float32), codes & 0x1FFFF
