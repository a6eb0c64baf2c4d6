"""Packing of the fused step's numbers into 32-bit words, and unpacking.

A *code* is one active latent of one row: 15 bits of a positive bfloat16 value (its sign is 0) above 17 bits of the
latent's number, so hidden_dim may be up to 131,072. As unsigned numbers, the codes of a row sort by value.

A *pair word* holds two bfloat16 numbers of a row of width 2 · half: element j in the low half of the word and element
j + half in the high half. A lane that reads 16 bytes therefore gets eight numbers, and the two halves are unpacked by a
shift and a mask.

A *quad word* holds four numbers of a row in eight bits each, biased by 128, with one scale per row: elements 2j,
2j + 1, half + 2j and half + 2j + 1. The gradients of the reconstructions are stored like this because the backward pass
is limited by reading them. A row of 256 is off by 0.7%, where bfloat16 is off by 0.2%; a sum over a latent's rows
averages this out. 0 stays 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra.cuda import libdevice


class QuadWords(NamedTuple):
    """Rows as quad words, with the rows' scales."""

    words: Int[Tensor, "batch levels quarter"]
    scales: Float[Tensor, "batch levels"]


LATENT_BITS = 17
MAX_HIDDEN_DIM = 1 << LATENT_BITS

QUANTIZATION_STEP = 2.0**-15
"""Value of the lowest bit of a quad word's byte, before multiplication by the row's scale."""

FULL_SCALE = tl.constexpr(1 / (127 * QUANTIZATION_STEP))
DEQUANTIZE_OFFSET = tl.constexpr(1 + 128 * QUANTIZATION_STEP)


@triton.jit
def code_value(code):
    """Return the value of a code as float32."""
    return ((code >> 1) & 0x7FFF0000).to(tl.float32, bitcast=True)


@triton.jit
def code_latent(code):
    """Return the latent's number in a code."""
    return code & 0x1FFFF


@triton.jit
def low_half(word):
    """Return the elements j < half of pair words, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_half(word):
    """Return the elements j + half of pair words, as float32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pack(low, high):
    """Return the pair words of two float32 halves, rounded to the nearest bfloat16."""
    bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def quantize(low, high, HALF: tl.constexpr):
    """Return the quad words [HALF / 2] of a row's two halves, and the scale that `dequantize` needs."""
    # Compared as integers, whose maximum over a warp is one instruction; positive floats sort by their bits.
    bits = tl.maximum(tl.abs(low), tl.abs(high)).to(tl.int32, bitcast=True)
    largest = tl.max(bits).to(tl.float32, bitcast=True)
    root = tl.rsqrt(tl.maximum(largest, 1e-30))
    inverse = 127.0 * root * root
    low_even, low_odd = tl.split(tl.reshape(_biased(low * inverse), (HALF // 2, 2)))
    high_even, high_odd = tl.split(tl.reshape(_biased(high * inverse), (HALF // 2, 2)))
    # The bits above the low byte are the same in every number, so their sum can be removed by one constant.
    return low_even + (low_odd << 8) + (high_even << 16) + (high_odd << 24) + 0x74C00000, largest * FULL_SCALE


@triton.jit
def _biased(x):
    """Return 0x4B400080 plus the integer nearest to x: the bits of a float32 whose lowest bit has the value 1."""
    return (x + 12583040.0).to(tl.int32, bitcast=True)


@triton.jit
def dequantize_with_offset(word, BYTE: tl.constexpr, NATIVE: tl.constexpr):
    """Return byte BYTE of quad words as RAISED_BY plus a number that is to be multiplied by the row's scale.

    The byte is put into the mantissa of 1.0, which is a single instruction (NATIVE) on a GPU. Code that sums products
    with such numbers subtracts RAISED_BY times the sum of the other factors once at the end, instead of subtracting
    RAISED_BY from every number.
    """
    if NATIVE:
        bits = libdevice.byte_perm(word, 0x3F800000, 0x7604 + 16 * BYTE)
    else:
        bits = (((word >> (8 * BYTE)) & 0xFF) << 8) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dequantize(word, BYTE: tl.constexpr):
    """Return byte BYTE of quad words as a number that is to be multiplied by the row's scale."""
    return dequantize_with_offset(word, BYTE, False) - DEQUANTIZE_OFFSET


def quantize_reference(x: Float[Tensor, "rows width"]) -> tuple[Int[Tensor, "rows quarter"], Float[Tensor, " rows"]]:
    """Return the quad words and scales of float32 rows, in plain PyTorch."""
    largest = x.abs().amax(dim=1)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    biased = (x * inverse[:, None]).round().int() + 128
    low, high = biased.view(len(x), 2, -1, 2).unbind(1)
    words = low[..., 0] | (low[..., 1] << 8) | (high[..., 0] << 16) | (high[..., 1] << 24)
    return words, largest / (127 * QUANTIZATION_STEP)


def dequantize_reference(
    words: Int[Tensor, "rows quarter"], scales: Float[Tensor, " rows"]
) -> Float[Tensor, "rows width"]:
    """Return the float32 rows of quad words, in plain PyTorch."""
    parts = [((words >> (8 * i)) & 0xFF) - 128 for i in range(4)]
    low, high = torch.stack(parts[:2], dim=2), torch.stack(parts[2:], dim=2)
    return torch.cat([low.flatten(1), high.flatten(1)], dim=1) * QUANTIZATION_STEP * scales[:, None]


def pack_reference(x: Float[Tensor, "rows width"]) -> Int[Tensor, "rows half"]:
    """Return the pair words of float32 rows, in plain PyTorch."""
    half = x.shape[1] // 2
    bits = x.bfloat16().view(torch.int16).int()
    return (bits[:, :half] & 0xFFFF) | (bits[:, half:] << 16)


def unpack_reference(words: Int[Tensor, "rows half"]) -> Float[Tensor, "rows width"]:
    """Return the float32 rows of pair words, in plain PyTorch."""
    return torch.cat([(words << 16).view(torch.float32), (words & -65536).view(torch.float32)], dim=1)


def split_codes(codes: Int[Tensor, "rows k"]) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Return the values and latents of codes, in plain PyTorch."""
    return ((codes >> 1) & 0x7FFF0000).view(torch.float32), codes & 0x1FFFF
