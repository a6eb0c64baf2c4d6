"""Batches of data that exceed the device budget: random runs of rows pass through the device in small windows."""

import contextlib
import copy
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from msae_sweep.data.batches.prefetch import Segment, WindowBuffers, WindowPlan, WindowPrefetcher, n_gather_threads
from msae_sweep.data.batches.windows import Window, WindowBatches, order_key, permutation

ShardFetcher = Callable[[], np.ndarray]
"""Function that fetches one shard [rows, input_dim], a read-only, contiguous float32 array."""

WINDOW_BYTES = 64 << 20
"""Bytes of rows in a window: at 4096 × 256, these are 16 steps or 3.5 ms of a fast GPU.

Training begins when the first window has arrived. Copying a window should therefore take few milliseconds, because an
epoch of data that just exceed the budget (450 MB) takes perhaps 22 ms. A window must still be large enough to outweigh
its fixed cost: beside an H100, eight threads gathered and copied 446,396 × 256 in 38 ms with windows of 32 MiB, in
24 ms with 64 MiB, and no faster with 128 MiB. The size is a power of two, because torch pins powers of two.
"""

MIX_BYTES = 512 << 20
"""Bytes of the shards whose rows are mixed with each other.

Shards in shared memory are held by reference, so mixing them costs no copy."""

RUN_BYTES = 16 << 10
"""Bytes of neighbouring rows that stay together in one window; such a group of rows is called a run.

Chosen by measurement, with rows of 1 KiB from 14 shards gathered into windows on two cores: 4.2 GB/s with runs of
1 row, 4.6 GB/s with 4 rows, 6.0 with 16, 6.2 with 64 and also with 1024; copying whole shards reached 6.8 GB/s.
"""

RUNS_A_WINDOW = 64
"""Minimum number of runs in a window.

If a window is so small that it holds fewer runs of `RUN_BYTES`, runs are shorter, but never shorter than one row."""


class StreamedBatches(WindowBatches):
    """Batches whose rows pass through two windows on the device; threads prefetch them from shared memory.

    Every window holds random runs of `RUN_BYTES` from a group of random shards, which are `MIX_BYTES` in total. Its
    rows are therefore mixed nearly as well as those of resident batches, however small the window is. A window holds
    whole batches; only the last rows of an epoch, which differ from epoch to epoch, are left out.

    The threads continue with the next epoch of the same seed, so that its first windows are ready when it is requested.
    Otherwise every epoch would begin by gathering a window, which takes 3.5 ms, or a seventh of an epoch if the data
    just exceed the budget. If anything else is requested, the work that has begun is dropped, and with it any exception
    that has not been raised yet.

    Maximum memory, from the first iteration on and shared by all batch sizes: on a GPU, 2 windows and up to 64 bytes
    per row of a window for its order; on the host, 3 windows and references to two groups of shards (three while a
    window straddles two groups), with 8 bytes per row for their order. References to shards on other nodes are copies.
    If a batch is larger than a window, the window is one batch.
    """

    def __init__(
        self,
        shards: Sequence[ShardFetcher],
        n_rows: int,
        input_dim: int,
        batch_size: int,
        device: torch.device,
        window_bytes: int = WINDOW_BYTES,
        mix_bytes: int = MIX_BYTES,
        n_threads: int | None = None,
    ) -> None:
        self.n_rows, self.batch_size = n_rows, batch_size
        self._input_dim, self._device = input_dim, device
        self._n_threads = n_threads or n_gather_threads(device)
        row_bytes = 4 * input_dim
        self._window_rows = max(1, window_bytes // row_bytes)
        shards_mixed = max(1, mix_bytes * len(shards) // max(1, row_bytes * n_rows))
        run = max(1, min(RUN_BYTES // row_bytes, self._window_rows // RUNS_A_WINDOW))
        self._plans = _Plans(list(shards), n_rows, shards_mixed, run)
        self._kept = _Kept()

    def with_batch_size(self, batch_size: int) -> "StreamedBatches":
        """Return batches of another size that share the shards and buffers of these."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def prefetch_order(self, epoch: int, seed: int) -> None:
        """Do nothing: while an epoch's last windows are used, the threads gather the next epoch's first anyway."""

    def windows(self, epoch: int, seed: int) -> Generator[Window, None, None]:
        """See `WindowBatches.windows`."""
        size = self._whole_window()
        # The last window is left out if it holds no whole batch.
        n_windows = self.n_rows // size + (self.n_rows % size >= self.batch_size)
        if not n_windows:
            return
        wanted = (epoch, seed, self.batch_size)
        pipeline = self._kept.going_on_to(wanted)
        if pipeline is None:
            plan = self._plans.epochs(epoch, seed, size, self.batch_size)
            pipeline = WindowPrefetcher(plan, self._buffers(), self._n_threads)
        ended = False
        try:
            for _ in range(n_windows):
                window = pipeline.next()
                assert window is not None, "the plan of epochs is endless"
                yield window
            pipeline.release()
            ended = True
        finally:
            self._kept.keep(pipeline, (epoch + 1, seed, self.batch_size) if ended else None)

    def pieces(self) -> Generator[Tensor, None, None]:
        """See `WindowBatches.pieces`."""
        self._kept.going_on_to(None)
        pipeline = WindowPrefetcher(self._plans.in_order(self._whole_window()), self._buffers(), self._n_threads)
        try:
            while (window := pipeline.next()) is not None:
                yield window.rows
        finally:
            self._kept.keep(pipeline, None)

    def _whole_window(self) -> int:
        """Return the number of rows in a window: a multiple of the batch size, so that no batch is cut."""
        return max(1, self._window_rows // self.batch_size) * self.batch_size

    def _buffers(self) -> WindowBuffers:
        n_rows = max(self._window_rows, self.batch_size)
        buffers, self._kept.buffers = self._kept.buffers, None
        if buffers is None or buffers.n_rows < n_rows:
            buffers = WindowBuffers(n_rows, self._input_dim, self._device)
        return buffers


_Wanted = tuple[int, int, int]
"""Epoch, seed and batch size."""


@dataclass
class _Kept:
    """State that one iteration leaves to the next: a prefetcher that has begun the next epoch, or only its buffers."""

    buffers: WindowBuffers | None = None
    pipeline: WindowPrefetcher | None = None
    goes_on_to: _Wanted | None = None

    def going_on_to(self, wanted: _Wanted | None) -> WindowPrefetcher | None:
        """Return the kept prefetcher if it has begun `wanted`; otherwise close it, keep its buffers, return None."""
        pipeline, self.pipeline = self.pipeline, None
        if pipeline is None or wanted == self.goes_on_to:
            return pipeline
        self.keep(pipeline, None)
        return None

    def keep(self, pipeline: WindowPrefetcher, goes_on_to: _Wanted | None) -> None:
        """Keep a prefetcher that has begun the epoch `goes_on_to`.

        If `goes_on_to` is None, or another prefetcher is kept already, close this one and keep only its buffers.
        """
        if goes_on_to is not None and self.pipeline is None:
            self.pipeline, self.goes_on_to = pipeline, goes_on_to
        else:
            pipeline.close()
            self.buffers = pipeline.buffers


class _Group(NamedTuple):
    """Shards whose rows are mixed with each other."""

    shards: list[int]
    """Numbers of the shards."""
    runs_key: int | None
    """Key of the order of the group's runs; with None, rows stay in their original order."""
    rows_key: int
    """Key of the order of rows in the epoch's windows."""
    is_last: bool
    """True for the last group of an epoch."""


class _Fetched(NamedTuple):
    """Shards of a group, and the order in which their rows are put into windows."""

    group: _Group
    arrays: list[np.ndarray]
    starts: Int64[np.ndarray, " shards_and_one"]
    """Offset of each shard in the concatenation of all shards, followed by the total number of rows."""
    rows: Int64[np.ndarray, " n"]
    """Row numbers in the concatenation of all shards, in the order in which they are put into windows."""


class _Plans(NamedTuple):
    """Plans of the contents of windows; separate from `StreamedBatches`, so that no plan keeps buffers alive."""

    shards: list[ShardFetcher]
    n_rows: int
    shards_mixed: int
    run: int
    """Number of neighbouring rows that stay together."""

    def epochs(self, epoch: int, seed: int, size: int, batch_size: int) -> Generator[WindowPlan, None, None]:
        """Yield windows of `size` rows of this epoch, then of the next, without end; an epoch's last may be smaller."""
        with contextlib.closing(self._fetched(self._random_groups(epoch, seed))) as fetched:
            yield from self._windows(fetched, size, batch_size)

    def in_order(self, size: int) -> Generator[WindowPlan, None, None]:
        """Yield windows of `size` rows of every shard in turn; the last window may be smaller."""
        last = len(self.shards) - 1
        groups = (_Group([i], None, 0, i == last) for i in range(last + 1))
        with contextlib.closing(self._fetched(groups)) as fetched:
            yield from self._windows(fetched, size, None)

    def _random_groups(self, epoch: int, seed: int) -> Iterator[_Group]:
        for number in itertools.count(epoch):
            shards = permutation(len(self.shards), order_key(seed, number, 0), torch.device("cpu")).tolist()
            rows_key = order_key(seed, number)
            for i in range(0, len(shards), self.shards_mixed):
                is_last = i + self.shards_mixed >= len(shards)
                yield _Group(shards[i : i + self.shards_mixed], order_key(seed, number, 1, i), rows_key, is_last)

    def _windows(
        self, fetched: Iterable[_Fetched], size: int, batch_size: int | None
    ) -> Generator[WindowPlan, None, None]:
        segments: list[Segment] = []
        n, first = 0, 0

        def contents() -> WindowPlan:
            return WindowPlan(segments, n, n - n % batch_size if batch_size else 0, group.rows_key, first)

        for group, arrays, starts, rows in fetched:
            while len(rows):
                # Ascending order keeps the rows of each shard together; `Window.order` shuffles them.
                segments.append(Segment(arrays, starts, np.sort(rows[: size - n])))
                rows = rows[size - n :]
                n += len(segments[-1].rows)
                if n == size:
                    yield contents()
                    segments, n, first = [], 0, first + size
            if group.is_last:
                assert first + n == self.n_rows, f"{first + n} rows in the shards, {self.n_rows} expected"
                if n >= (batch_size or 1):
                    yield contents()
                segments, n, first = [], 0, 0

    def _mixed(self, n_rows: int, key: int | None) -> Int64[np.ndarray, " n_rows"]:
        """Return the row numbers of a group in the order in which they are put into windows."""
        if key is None:
            return np.arange(n_rows)
        runs = permutation(-(-n_rows // self.run), key, torch.device("cpu")).numpy()
        rows = (runs[:, None] * self.run + np.arange(self.run)).ravel()
        # The run at the end of the shards may be shorter, so the row numbers beyond the end are deleted. A mask over
        # all rows would take longer than the rest of this function.
        end = (int(np.flatnonzero(runs == len(runs) - 1)[0]) + 1) * self.run
        return np.delete(rows, slice(end - (len(rows) - n_rows), end))

    def _fetched(self, groups: Iterable[_Group]) -> Generator[_Fetched, None, None]:
        """Yield each group with its shards and the order of its rows; the next group is prepared while one is used.

        One thread does this: a shard on this node takes 0.15 ms, and with four threads it took 0.4 ms, spent in Ray's
        locks.
        """
        reader = ThreadPoolExecutor(1, "shard-reader")
        coming: deque[Future[_Fetched]] = deque()
        try:
            for group in itertools.chain(groups, [None]):
                if group is not None:
                    arrays = [reader.submit(self.shards[i]) for i in group.shards]
                    coming.append(reader.submit(self._in_order_of, group, arrays))
                if coming and (group is None or len(coming) == 2):
                    yield coming.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)

    def _in_order_of(self, group: _Group, fetched: list[Future[np.ndarray]]) -> _Fetched:
        """Return a group with its shards and the order of its rows.

        This runs on the reader's thread, after it has fetched the group's shards; to order 450,000 rows takes 8 ms.
        """
        arrays = [array.result() for array in fetched]
        starts = np.cumsum([0, *map(len, arrays)])
        return _Fetched(group, arrays, starts, self._mixed(int(starts[-1]), group.runs_key))
