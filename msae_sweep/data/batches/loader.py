"""Shards to batches: one tensor on the device where it fits, else a shuffled stream of windows."""

import functools
import os
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msae_sweep.data.batches.stream import WINDOW_BYTES, Shard, StreamedBatches
from msae_sweep.data.batches.windows import Window, WindowBatches, order_key, permutation

__all__ = [
    "Loaded",
    "ResidentBatches",
    "Shard",
    "StreamedBatches",
    "Window",
    "WindowBatches",
    "default_budget",
    "machine_bytes",
    "make_batches",
]


class Loaded(NamedTuple):
    """Batches, and why they are kept as they are."""

    batches: WindowBatches
    reason: str


def make_batches(
    shards: Sequence[Shard], n_rows: int, input_dim: int, batch_size: int, device: torch.device, budget_bytes: int
) -> Loaded:
    """Resident batches where the rows take at most `budget_bytes` of the device, streamed ones otherwise."""
    need = 4 * n_rows * input_dim
    sizes = f"{need / 2**20:,.0f} MiB of rows, {budget_bytes / 2**20:,.0f} MiB allowed on {device}"
    if need <= budget_bytes:
        return Loaded(ResidentBatches.load(shards, n_rows, input_dim, batch_size, device), f"resident: {sizes}")
    # On the device lie two windows; the rest is for drawing an order and for the batches gathered from them.
    window_bytes = min(WINDOW_BYTES, budget_bytes // 4)
    streamed = StreamedBatches(shards, n_rows, input_dim, batch_size, device, window_bytes)
    return Loaded(streamed, f"streamed: {sizes}")


def default_budget(device: torch.device, share: float = 1.0) -> int:
    """Bytes that data may take: half of the device's free memory (on a CPU, of the machine's), times `share`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.5 * share)
    return int(machine_bytes() * 0.5 * share)


class _Drawn(NamedTuple):
    """An epoch's order, drawn before it is asked for."""

    of: tuple[int, int]
    """Epoch and seed."""
    order: Tensor
    done: torch.cuda.Event | None
    """Before which the order must not be read; None on a CPU, where it was drawn at once."""


class ResidentBatches(WindowBatches):
    """All rows in one tensor on the device."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        self.x, self.n_rows, self.batch_size = x, len(x), batch_size
        self._drawn: _Drawn | None = None

    @classmethod
    def load(
        cls, shards: Sequence[Shard], n_rows: int, input_dim: int, batch_size: int, device: torch.device
    ) -> "ResidentBatches":
        """Copy the shards into place one after another, so that only one of them is held besides.

        On the CPU a single shard is used where it lies, shared with every other process on the node.
        """
        if len(shards) == 1 and device.type == "cpu":
            return cls(_tensor(shards[0]()), batch_size)
        x = torch.empty(n_rows, input_dim, device=device)
        start = 0
        for fetch in shards:
            shard = _tensor(fetch())
            x[start : start + len(shard)] = shard
            start += len(shard)
        assert start == n_rows, f"{start} rows in the shards, {n_rows} expected"
        return cls(x, batch_size)

    def with_batch_size(self, batch_size: int) -> "ResidentBatches":
        """The same rows, not copied, in batches of another size."""
        return ResidentBatches(self.x, batch_size)

    def windows(self, epoch: int, seed: int) -> Generator[Window, None, None]:
        """One window, all rows in a fresh order, so the rows left over differ from epoch to epoch."""
        whole = self.n_rows - self.n_rows % self.batch_size
        if not whole:
            return
        if self._drawn is None or self._drawn.of != (epoch, seed):
            self.expect(epoch, seed)
        assert self._drawn is not None
        drawn, self._drawn = self._drawn, None
        if drawn.done is not None:
            stream = torch.cuda.current_stream(self.x.device)
            stream.wait_event(drawn.done)
            # Its memory belongs to the stream that drew it, and must not be used again before this one is done.
            drawn.order.record_stream(stream)
        yield Window(self.x, drawn.order[:whole])

    def expect(self, epoch: int, seed: int) -> None:
        """Draw the order; on CUDA beside what is queued on the current stream."""
        key, device = order_key(seed, epoch), self.x.device
        if device.type != "cuda":
            self._drawn = _Drawn((epoch, seed), permutation(self.n_rows, key, device), None)
            return
        with torch.cuda.stream(_drawing_stream(device)):
            order = permutation(self.n_rows, key, device)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._drawn = _Drawn((epoch, seed), order, done)

    def pieces(self) -> Generator[Tensor, None, None]:
        """The tensor itself."""
        yield self.x


@functools.cache
def _drawing_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all trials of a process: the memory that a stream once took stays its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def machine_bytes() -> int:
    """Memory of the machine, or of the container where that has a limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2 here, or the word "max"
        return machine


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor over an array's memory; object-store arrays are read-only, and nothing here writes to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
