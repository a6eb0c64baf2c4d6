"""Interface of training batches: windows of rows on the device, in an order that is the same on every device."""

import contextlib
from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float32, Int64
from torch import Tensor


class Window(NamedTuple):
    """Rows that are on the device at the same time, and the order in which batches are gathered from them."""

    rows: Float32[Tensor, "n input_dim"]
    """Contiguous rows, on the device."""
    order: Int64[Tensor, " m"]
    """Row numbers, on the device.

    m > 0 is a multiple of batch_size; each batch_size consecutive numbers are a batch.
    """


class WindowBatches(Protocol):
    """Rows of one split on a device: the interface that `sae.train.fit` needs, shared by resident and streamed batches.

    A window, a piece and a batch of `ordered` are valid until the next one is requested. Then their memory may be
    reused; on CUDA it is reused only after the work that is queued on the current stream at that moment is done. A
    batch of `epoch` belongs to the caller. Closing an iterator before its end, or dropping it, releases what it holds.
    """

    n_rows: int
    batch_size: int

    def windows(self, epoch: int, seed: int) -> Generator[Window, None, None]:
        """Yield the rows of one epoch, shuffled, in full batches only; they depend on `epoch` and `seed` alone."""

    def prefetch_order(self, epoch: int, seed: int) -> None:
        """Draw ahead what `windows(epoch, seed)` will need, if the implementation can do so."""

    def pieces(self) -> Generator[Tensor, None, None]:
        """Yield every row once, in order, in contiguous pieces as large as the device holds at once.

        The number of rows of every piece but the last is a multiple of batch_size.
        """

    def with_batch_size(self, batch_size: int) -> "WindowBatches":
        """Return the same rows, not copied, in batches of another size."""

    def epoch(self, epoch: int, seed: int) -> Iterator[Tensor]:
        """Yield the full batches [batch_size, input_dim] of the windows, in the order of the windows."""
        # The inner generator is closed explicitly, here and below, because not every Python closes it as soon as the
        # outer one is closed.
        with contextlib.closing(self.windows(epoch, seed)) as windows:
            for rows, order in windows:
                for numbers in torch.split(order, self.batch_size):
                    yield rows[numbers]

    def ordered(self) -> Iterator[Tensor]:
        """Yield every row once, in order, in batches; the last batch may be smaller."""
        with contextlib.closing(self.pieces()) as pieces:
            for piece in pieces:
                yield from torch.split(piece, self.batch_size)


def order_key(*numbers: int) -> int:
    """Return an int64 key for several integers, such as a seed and an epoch, each taken mod 2^64."""
    key = torch.zeros((), dtype=torch.int64)
    for number in numbers:
        key = _splitmix64(key ^ _signed(number % 2**64))
    return int(key)


def permutation(n: int, key: int, device: torch.device, first: int = 0) -> Int64[Tensor, " n"]:
    """Return the numbers 0 … n − 1 in an order that depends on `key` and `first` alone, drawn on the device.

    Number i is sorted by 63 bits of splitmix64(key ^ (first + i)). This is integer arithmetic and a stable sort, so the
    order is the same on every device, whereas `torch.randperm` uses a different generator on each kind of device.
    Measured for n = 450,000 on two cores: 10 ms (hash 2.7 ms, sort 7.0 ms) against 3.6 ms for `torch.randperm`, which
    is a thousandth of an epoch on that machine.
    """
    if device.type == "mps":  # 64-bit integers are not reliable on MPS
        return permutation(n, key, torch.device("cpu"), first).to(device)
    hashed = _splitmix64(torch.arange(first, first + n, device=device) ^ key)
    return torch.argsort(hashed & (2**63 - 1), stable=True)


def _splitmix64(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Apply the bijection of `prepare.split._splitmix64` to int64, which wraps around on overflow as uint64 does."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Shift right and fill with zeros from the left; the shift of int64 itself fills with copies of the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
