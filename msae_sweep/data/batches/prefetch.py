"""Shards to windows on the device: threads gather rows into pinned memory, a CUDA stream of its own moves them on.

Threads touch host memory only. Every CUDA call is made by the consumer when it asks for a window, so that a CUDA graph
may be captured meanwhile, and no thread needs to know the current device. The calls only queue work, so a consumer runs
ahead of the GPU: while the GPU uses a window, the next one is being copied and those after it are being gathered.
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
"""On the host: one that is copied to the device, one that is being filled, and one that evens out their speeds."""

DEVICE_WINDOWS = 2
"""On a GPU: one that is used, and one that is copied meanwhile."""


class Segment(NamedTuple):
    """Rows of some shards."""

    arrays: list[Float32[np.ndarray, "_ input_dim"]]
    starts: Int64[np.ndarray, " shards_and_one"]
    """Of each array in the shards laid end to end, and their total."""
    rows: Int64[np.ndarray, " n"]
    """Numbers of rows in the shards laid end to end, ascending."""


class WindowContents(NamedTuple):
    """What a window is to hold."""

    segments: list[Segment]
    n_rows: int
    n_ordered: int
    """Length of the window's `order`."""
    key: int
    """With `first`, of the permutation that `order` is cut from."""
    first: int


def copying_threads(device: torch.device) -> int:
    """Threads that gather rows.

    For a GPU as many as there are cores beside the consumer's, 8 at the most, however few threads torch has been given:
    a step of 0.2 ms at 4096 × 256 eats 20 GB/s, one core gathers 4 to 6, and a trial on a GPU leaves its cores idle.
    The work is the same however many share it; they sleep when the host's windows are full. Elsewhere a step takes a
    hundred times as long as gathering its batch, and torch's threads want the cores: one.
    """
    if device.type != "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))


class _Slot(NamedTuple):
    """A window's place on a GPU."""

    rows: Tensor
    order: Tensor
    used: torch.cuda.Event
    """Recorded on the consumer's stream; whoever writes here next waits for it."""


class WindowBuffers:
    """Memory that windows of at most `n_rows` pass through, made once because pinning takes longer than filling.

    On the host 3 windows (pinned for a GPU, where torch rounds each up to a power of two), on a GPU 2 of them and
    16 bytes a row. A CPU's windows are used where they were gathered.
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
        for tensor in (rows, order):  # freed, it is not given away before the copying into it is done
            tensor.record_stream(stream)
        used = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # What torch freed and gave out again may still be read by work that is queued here.
        used.record(torch.cuda.current_stream(self.device))
        return _Slot(rows, order, used)


class _Arrived(NamedTuple):
    """A window whose copying is queued."""

    window: Window
    host: Tensor
    """Where it was gathered."""
    slot: _Slot | None
    copied: torch.cuda.Event | None


_Filled = tuple[WindowContents, Tensor, list[Future[None]]]


class WindowPrefetcher:
    """The windows of a plan, one after another; the threads run ahead by as many as the host's buffers hold.

    Only one thread may ask for windows. An exception in a thread is raised where the window that it concerns is asked
    for. Dropped without being closed, it leaves nothing behind either.
    """

    def __init__(self, plan: Generator[WindowContents, None, None], buffers: WindowBuffers, n_threads: int) -> None:
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
        """The next window, ready for work on the current stream; None after the last. Takes the last one back."""
        self.release()
        arrived, self._ahead = self._ahead or self._arrive(), None
        # Queued now where it can be, so that a consumer who waits for its own work finds the next window copied.
        if self._is_filled():
            self._ahead = self._arrive()
        if arrived is None:
            return None
        if arrived.copied is not None:
            torch.cuda.current_stream(self.buffers.device).wait_event(arrived.copied)
        self._held = arrived
        return arrived.window

    def release(self) -> None:
        """Take back the window that was given last; all work on it is queued on the current stream."""
        if self._held is not None:
            arrived, self._held = self._held, None
            self._take_back(arrived)
            self._refill(arrived.host)

    def close(self) -> None:
        """Stop the threads and wait for them; the buffers may be used by another pipeline then."""
        self._planner.shutdown(cancel_futures=True)
        self._copiers.shutdown(cancel_futures=True)
        self._plan.close()
        for arrived in (self._held, self._ahead):
            if arrived is not None:
                self._take_back(arrived)
        self._held = self._ahead = None
        self._filled.clear()

    def _take_back(self, arrived: _Arrived) -> None:
        """Make its slot wait for the work on it, and wait until its host memory has been copied."""
        if arrived.slot is not None and arrived.copied is not None:
            arrived.slot.used.record(torch.cuda.current_stream(self.buffers.device))
            arrived.copied.synchronize()

    def _refill(self, host: Tensor) -> None:
        self._filled.append(self._planner.submit(self._fill, host))

    def _fill(self, host: Tensor) -> _Filled | None:
        """On the planner's thread: start gathering the plan's next window into `host`."""
        contents = next(self._plan, None)
        if contents is None:
            return None
        out, n = host.numpy(), self._n_threads
        return contents, host, [self._copiers.submit(_gather, contents.segments, out, i, n) for i in range(n)]

    def _is_filled(self) -> bool:
        """Whether `_arrive` would neither wait nor raise."""
        if not self._filled or not self._filled[0].done() or self._filled[0].exception():
            return False
        filled = self._filled[0].result()
        return filled is None or all(copy.done() and not copy.exception() for copy in filled[2])

    def _arrive(self) -> _Arrived | None:
        """Wait until the next window is gathered, and queue its copying to the device."""
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
        # Waiting for a blocking event leaves the core to the threads.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.buffers.stream):
            self.buffers.stream.wait_event(slot.used)
            window = Window(slot.rows[: contents.n_rows], slot.order[: contents.n_ordered])
            window.rows.copy_(rows, non_blocking=True)
            window.order.copy_(_order(contents, device))
            copied.record(self.buffers.stream)
        return _Arrived(window, host, slot, copied)


def _order(contents: WindowContents, device: torch.device) -> Tensor:
    if not contents.n_ordered:
        return torch.empty(0, dtype=torch.int64, device=device)
    return permutation(contents.n_rows, contents.key, device, contents.first)[: contents.n_ordered]


def _gather(segments: list[Segment], out: Float32[np.ndarray, "_ input_dim"], share: int, n_shares: int) -> None:
    """Copy one share of a window's rows; numpy lets go of the GIL while it copies."""
    at = 0
    for arrays, starts, rows in segments:
        low, high = (len(rows) * i // n_shares for i in (share, share + 1))
        cuts = np.searchsorted(rows[low:high], starts) + low
        for array, start, a, b in zip(arrays, starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if a < b:
                # Any other mode has numpy write to a copy of `out` first.
                array.take(rows[a:b] - start, axis=0, out=out[at + a : at + b], mode="clip")
        at += len(rows)
