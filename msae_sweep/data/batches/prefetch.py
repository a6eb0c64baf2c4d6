"""Prefetch of windows: threads gather rows from shards into pinned memory, and a CUDA stream copies them to the device.

The threads touch host memory only. The consumer makes every CUDA call, when it requests a window. A CUDA graph may
therefore be captured while the threads work, and no thread needs to know the current device. The calls only queue work,
so the consumer runs ahead of the GPU: while the GPU uses a window, the next one is being copied and those after it are
being gathered.
"""

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from msae_sweep.data.batches.windows import Window, permutation

HOST_WINDOWS = 3
"""Number of windows on the host: one is copied to the device, one is filled, and one evens out their speeds."""

DEVICE_WINDOWS = 2
"""Number of windows on a GPU: one is used while the other is copied."""


class Segment(NamedTuple):
    """Rows to gather from a list of shards."""

    arrays: list[Float32[np.ndarray, "_ input_dim"]]
    """Rows of each shard."""
    starts: Int64[np.ndarray, " shards_and_one"]
    """Offset of each array in the concatenation of all arrays, followed by the total number of rows."""
    rows: Int64[np.ndarray, " n"]
    """Row numbers in the concatenation of all arrays, ascending."""


class WindowPlan(NamedTuple):
    """Plan of the contents of one window."""

    segments: list[Segment]
    n_rows: int
    n_ordered: int
    """Length of the window's `order`."""
    key: int
    """Key of the permutation that `order` is cut from; the permutation also depends on `first`."""
    first: int


def n_gather_threads(device: torch.device) -> int:
    """Return the number of threads that gather rows.

    For a GPU, this is the number of cores minus one for the consumer, at most 8, however few threads torch may use: a
    step of 0.2 ms at 4096 × 256 consumes 20 GB/s, one core gathers 4 to 6 GB/s, and a trial on a GPU leaves its cores
    idle. The total work does not depend on the number of threads, and the threads sleep when the host's windows are
    full. Elsewhere it is 1, because a step takes a hundred times as long as gathering its batch, and torch's threads
    need the cores.
    """
    if device.type != "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))


class _Slot(NamedTuple):
    """Memory on a GPU for one window."""

    rows: Tensor
    order: Tensor
    used: torch.cuda.Event
    """Event recorded on the consumer's stream after the last use; the next copy into this memory waits for it."""


class WindowBuffers:
    """Reusable memory for windows of at most `n_rows` rows, allocated once because pinning takes longer than filling.

    The host holds 3 windows, pinned if they are for a GPU, in which case torch rounds each up to a power of two. A GPU
    holds 2 windows, and 16 bytes per window row for their orders. On a CPU, a window is used in the memory that it was
    gathered into.
    """

    def __init__(self, n_rows: int, input_dim: int, device: torch.device) -> None:
        self.n_rows, self.device = n_rows, device
        on_gpu = device.type == "cuda"
        self.host = [torch.empty(n_rows, input_dim, pin_memory=on_gpu) for _ in range(HOST_WINDOWS)]
        self.stream: torch.cuda.Stream | None = None
        self.slots: list[_Slot] = []
        if on_gpu:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.slots = [self._slot(input_dim, self.stream) for _ in range(DEVICE_WINDOWS)]

    def _slot(self, input_dim: int, stream: torch.cuda.Stream) -> _Slot:
        rows = torch.empty(self.n_rows, input_dim, device=self.device)
        order = torch.empty(self.n_rows, dtype=torch.int64, device=self.device)
        # Without this, torch could reuse the memory of a freed tensor before the copy into it is done.
        for tensor in (rows, order):
            tensor.record_stream(stream)
        used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # This memory may come from a freed tensor that work queued on the current stream still reads.
        used.record(torch.cuda.current_stream(self.device))
        return _Slot(rows, order, used)


class _Arrived(NamedTuple):
    """Window whose copy to the device is queued; on a CPU, a window that has been gathered."""

    window: Window
    host: Tensor
    """Host memory that the window was gathered into."""
    slot: _Slot | None
    copied: torch.cuda.Event | None


_Filled = tuple[WindowPlan, Tensor, list[Future[None]]]


class WindowPrefetcher:
    """Prefetcher of a plan's windows, in order; its threads run ahead by as many windows as the host's buffers hold.

    Only one thread may request windows. An exception in a thread is raised when the window that it concerns is
    requested. A prefetcher that is dropped without being closed also leaves nothing behind.
    """

    def __init__(self, plan: Generator[WindowPlan, None, None], buffers: WindowBuffers, n_threads: int) -> None:
        self.buffers = buffers
        self._plan, self._n_threads = plan, n_threads
        self._planner = ThreadPoolExecutor(1, "window-planner")
        self._copiers = ThreadPoolExecutor(n_threads, "window-copier")
        self._filled: deque[Future[_Filled | None]] = deque()
        self._held: _Arrived | None = None
        self._ahead: _Arrived | None = None
        self._n_arrived = 0
        for host in buffers.host:
            self._refill(host)

    def next(self) -> Window | None:
        """Return the next window, ready for work on the current stream, or None after the last window.

        The window returned before is released.
        """
        self.release()
        arrived, self._ahead = self._ahead or self._arrive(), None
        # If the following window has been gathered, its copy is queued now: it then runs while the consumer waits for
        # its own work.
        if self._is_filled():
            self._ahead = self._arrive()
        if arrived is None:
            return None
        if arrived.copied is not None:
            torch.cuda.current_stream(self.buffers.device).wait_event(arrived.copied)
        self._held = arrived
        return arrived.window

    def release(self) -> None:
        """Take back the window that was returned last; all work on it must be queued on the current stream."""
        if self._held is not None:
            arrived, self._held = self._held, None
            self._take_back(arrived)
            self._refill(arrived.host)

    def close(self) -> None:
        """Stop the threads and wait for them; after that, another prefetcher may use the buffers."""
        self._planner.shutdown(cancel_futures=True)
        self._copiers.shutdown(cancel_futures=True)
        self._plan.close()
        for arrived in (self._held, self._ahead):
            if arrived is not None:
                self._take_back(arrived)
        self._held = self._ahead = None
        self._filled.clear()

    def _take_back(self, arrived: _Arrived) -> None:
        """Make the next copy into the window's slot wait for the work on it; wait until its host memory is copied."""
        if arrived.slot is not None and arrived.copied is not None:
            arrived.slot.used.record(torch.cuda.current_stream(self.buffers.device))
            arrived.copied.synchronize()

    def _refill(self, host: Tensor) -> None:
        self._filled.append(self._planner.submit(self._fill, host))

    def _fill(self, host: Tensor) -> _Filled | None:
        """Start to gather the plan's next window into `host`; runs on the planner's thread."""
        contents = next(self._plan, None)
        if contents is None:
            return None
        out, n = host.numpy(), self._n_threads
        return contents, host, [self._copiers.submit(_gather, contents.segments, out, i, n) for i in range(n)]

    def _is_filled(self) -> bool:
        """Return whether `_arrive` would neither wait nor raise."""
        if not self._filled or not self._filled[0].done() or self._filled[0].exception():
            return False
        filled = self._filled[0].result()
        return filled is None or all(copy.done() and not copy.exception() for copy in filled[2])

    def _arrive(self) -> _Arrived | None:
        """Wait until the next window is gathered, and queue its copy to the device."""
        filled = self._filled.popleft().result() if self._filled else None
        if filled is None:
            return None
        contents, host, copies = filled
        for copy in copies:
            copy.result()
        rows, device = host[: contents.n_rows], self.buffers.device
        if self.buffers.stream is None:
            return _Arrived(Window(rows.to(device), _order(contents, device)), host, None, None)
        slot = self.buffers.slots[self._n_arrived % DEVICE_WINDOWS]
        self._n_arrived += 1
        # A wait for a blocking event sleeps, which leaves the core to the threads.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.buffers.stream):
            self.buffers.stream.wait_event(slot.used)
            window = Window(slot.rows[: contents.n_rows], slot.order[: contents.n_ordered])
            window.rows.copy_(rows, non_blocking=True)
            window.order.copy_(_order(contents, device))
            copied.record(self.buffers.stream)
        return _Arrived(window, host, slot, copied)


def _order(contents: WindowPlan, device: torch.device) -> Tensor:
    if not contents.n_ordered:
        return torch.empty(0, dtype=torch.int64, device=device)
    return permutation(contents.n_rows, contents.key, device, contents.first)[: contents.n_ordered]


def _gather(segments: list[Segment], out: Float32[np.ndarray, "_ input_dim"], share: int, n_shares: int) -> None:
    """Copy one share of a window's rows into `out`; numpy releases the GIL while it copies."""
    at = 0
    for arrays, starts, rows in segments:
        low, high = (len(rows) * i // n_shares for i in (share, share + 1))
        cuts = np.searchsorted(rows[low:high], starts) + low
        for array, start, a, b in zip(arrays, starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if a < b:
                # With any other mode, numpy writes to a copy of `out` first.
                array.take(rows[a:b] - start, axis=0, out=out[at + a : at + b], mode="clip")
        at += len(rows)
