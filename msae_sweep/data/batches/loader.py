"""Batches from shards: all rows in one tensor on the device if they fit, otherwise a shuffled stream of windows."""

import functools
import os
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msae_sweep.data.batches.stream import WINDOW_BYTES, ShardFetcher, StreamedBatches
from msae_sweep.data.batches.windows import Window, WindowBatches, order_key, permutation

__all__ = [
    "BatchesAndReason",
    "ResidentBatches",
    "ShardFetcher",
    "StreamedBatches",
    "Window",
    "WindowBatches",
    "default_budget_bytes",
    "machine_bytes",
    "make_batches",
]


class BatchesAndReason(NamedTuple):
    """Batches, and the reason why they are resident or streamed."""

    batches: WindowBatches
    reason: str


def make_batches(
    shards: Sequence[ShardFetcher],
    n_rows: int,
    input_dim: int,
    batch_size: int,
    device: torch.device,
    budget_bytes: int,
) -> BatchesAndReason:
    """Return resident batches if the rows take at most `budget_bytes` of the device, streamed batches otherwise."""
    need = 4 * n_rows * input_dim
    sizes = f"{need / 2**20:,.0f} MiB of rows, {budget_bytes / 2**20:,.0f} MiB allowed on {device}"
    if need <= budget_bytes:
        return BatchesAndReason(
            ResidentBatches.load(shards, n_rows, input_dim, batch_size, device), f"resident: {sizes}"
        )
    # The device holds two windows; the rest of the budget is for drawing orders and for the batches gathered.
    window_bytes = min(WINDOW_BYTES, budget_bytes // 4)
    streamed = StreamedBatches(shards, n_rows, input_dim, batch_size, device, window_bytes)
    return BatchesAndReason(streamed, f"streamed: {sizes}")


def default_budget_bytes(device: torch.device, share: float = 1.0) -> int:
    """Return the bytes that data may take: half of a GPU's free (or the machine's total) memory, times `share`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.5 * share)
    return int(machine_bytes() * 0.5 * share)


class _Drawn(NamedTuple):
    """Order of an epoch's rows, drawn before it is requested."""

    of: tuple[int, int]
    """Epoch and seed of the order."""
    order: Tensor
    done: torch.cuda.Event | None
    """Event to wait for before the order is read; None without CUDA, where the order is drawn at once."""


class ResidentBatches(WindowBatches):
    """Batches of rows that all lie in one tensor on the device."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        self.x, self.n_rows, self.batch_size = x, len(x), batch_size
        self._drawn: _Drawn | None = None

    @classmethod
    def load(
        cls, shards: Sequence[ShardFetcher], n_rows: int, input_dim: int, batch_size: int, device: torch.device
    ) -> "ResidentBatches":
        """Copy the shards into one tensor, one after another, so that only one of them is held in addition.

        On the CPU, a single shard is not copied; its memory is shared with every other process on the node.
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
        """Return the same rows, not copied, in batches of another size."""
        return ResidentBatches(self.x, batch_size)

    def windows(self, epoch: int, seed: int) -> Generator[Window, None, None]:
        """Yield one window with all rows in a new order, so the rows left over differ from epoch to epoch."""
        whole = self.n_rows - self.n_rows % self.batch_size
        if not whole:
            return
        if self._drawn is None or self._drawn.of != (epoch, seed):
            self.prefetch_order(epoch, seed)
        assert self._drawn is not None
        drawn, self._drawn = self._drawn, None
        if drawn.done is not None:
            stream = torch.cuda.current_stream(self.x.device)
            stream.wait_event(drawn.done)
            # The order's memory belongs to the stream that drew it, and must not be reused before the current stream is
            # done with it.
            drawn.order.record_stream(stream)
        yield Window(self.x, drawn.order[:whole])

    def prefetch_order(self, epoch: int, seed: int) -> None:
        """Draw the order of an epoch's rows; on CUDA, on a stream of its own beside the current stream's work."""
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
        """Yield the tensor itself, as a single piece."""
        yield self.x


@functools.cache
def _drawing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that orders are drawn on, the same one for all trials of a process.

    Memory that torch once allocated for a stream stays reserved for that stream, so a stream per trial would waste it.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def machine_bytes() -> int:
    """Return the bytes of the machine's memory, or the container's limit if that is lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2 here, or the file contains "max" (no limit)
        return machine


def _tensor(array: np.ndarray) -> Tensor:
    """Return a tensor that shares an array's memory.

    Arrays from the object store are read-only, and nothing here writes to them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
