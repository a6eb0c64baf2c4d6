"""Batches of rows that are more than the device may hold: random runs of rows pass through it in small windows."""

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

from msae_sweep.data.batches.prefetch import Segment, WindowBuffers, WindowContents, WindowPrefetcher, copying_threads
from msae_sweep.data.batches.windows import Window, WindowBatches, order_key, permutation

Shard = Callable[[], np.ndarray]
"""Fetches one shard [rows, input_dim], read-only float32, contiguous."""

WINDOW_BYTES = 64 << 20
"""Rows in a window: at 4096 × 256, 16 steps or 3.5 ms of a fast GPU.

Training begins when the first window is there, so a window is few milliseconds of copying, where data that just exceed
the budget are perhaps 22 ms of training (450 MB). It must still outlast what a window costs whatever its size: beside
an H100, 446,396 × 256 were gathered by eight threads and copied in 38 ms by windows of 32 MiB, in 24 by 64, and no
faster by 128 MiB. A power of two, because torch pins powers of two.
"""

MIX_BYTES = 512 << 20
"""Shards whose rows are mixed: they are held by reference where they lie in shared memory, so this costs no copy."""

RUN_BYTES = 16 << 10
"""Neighbouring rows that stay in one window.

Chosen by measurement, 1 KiB rows of 14 shards gathered into windows on two cores: 4.2 GB/s in runs of 1 row, 4.6 of 4,
6.0 of 16, 6.2 of 64 and of 1024 rows; copying whole shards 6.8.
"""

RUNS_A_WINDOW = 64
"""At least; where rows or windows are so small that `RUN_BYTES` would leave fewer, runs are shorter."""


class StreamedBatches(WindowBatches):
    """Rows that pass through two windows on the device, gathered from shared memory by threads that run ahead.

    Every window holds random runs of `RUN_BYTES` from a group of random shards of `MIX_BYTES` together, so its rows are
    mixed nearly as those of resident batches are, however small it is. It holds whole batches; only an epoch's last
    rows, others in every epoch, are left out.

    The threads run on into the next epoch of the same seed, so that its first windows are there when it is asked for:
    without that it would begin with gathering one, 3.5 ms, a seventh of an epoch just above the budget.
    What they have begun is dropped when anything else is asked for, and with it an exception that nobody has met.

    Held at most, from the first iteration on and by all batch sizes together: on a GPU 2 windows, and up to 64 bytes a
    row of a window for its order; on the host 3 windows, and references to two groups of shards (three while a window
    straddles two), which are copies where the shards lie on other nodes, with 8 bytes a row for their order. A window
    is one batch where that is larger.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
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
        self._n_threads = n_threads or copying_threads(device)
        row_bytes = 4 * input_dim
        self._window_rows = max(1, window_bytes // row_bytes)
        shards_mixed = max(1, mix_bytes * len(shards) // max(1, row_bytes * n_rows))
        run = max(1, min(RUN_BYTES // row_bytes, self._window_rows // RUNS_A_WINDOW))
        self._plans = _Plans(list(shards), n_rows, shards_mixed, run)
        self._kept = _Kept()

    def with_batch_size(self, batch_size: int) -> "StreamedBatches":
        """The same shards and buffers in batches of another size."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def expect(self, epoch: int, seed: int) -> None:
        """Nothing: the next epoch's first windows are gathered while this one's last are used, whoever asks."""

    def windows(self, epoch: int, seed: int) -> Generator[Window, None, None]:
        """See `WindowBatches`."""
        size = self._whole_window()
        # A last window that holds no batch is left out.
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
        """See `WindowBatches`."""
        self._kept.going_on_to(None)
        pipeline = WindowPrefetcher(self._plans.in_order(self._whole_window()), self._buffers(), self._n_threads)
        try:
            while (window := pipeline.next()) is not None:
                yield window.rows
        finally:
            self._kept.keep(pipeline, None)

    def _whole_window(self) -> int:
        """Rows in a window: whole batches, so that none is cut."""
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
    """What one iteration leaves for the next: the pipeline that has begun the next epoch, or only its buffers."""

    buffers: WindowBuffers | None = None
    pipeline: WindowPrefetcher | None = None
    goes_on_to: _Wanted | None = None

    def going_on_to(self, wanted: _Wanted | None) -> WindowPrefetcher | None:
        """The pipeline, if this is what it has begun; another one is closed."""
        pipeline, self.pipeline = self.pipeline, None
        if pipeline is None or wanted == self.goes_on_to:
            return pipeline
        self.keep(pipeline, None)
        return None

    def keep(self, pipeline: WindowPrefetcher, goes_on_to: _Wanted | None) -> None:
        """Keep a pipeline that goes on; of one that does not, or of a second one, only the buffers."""
        if goes_on_to is not None and self.pipeline is None:
            self.pipeline, self.goes_on_to = pipeline, goes_on_to
        else:
            pipeline.close()
            self.buffers = pipeline.buffers


class _Group(NamedTuple):
    """Shards whose rows are mixed."""

    shards: list[int]
    runs_key: int | None
    """Of the order of their runs; None leaves it."""
    rows_key: int
    """Of the order of rows in the epoch's windows."""
    is_last: bool
    """Of its epoch."""


class _Fetched(NamedTuple):
    """A group's shards, and the order in which their rows come into windows."""

    group: _Group
    arrays: list[np.ndarray]
    starts: Int64[np.ndarray, " shards_and_one"]
    """Of each shard in all of them laid end to end, and their total."""
    rows: Int64[np.ndarray, " n"]
    """Numbers of rows in the shards laid end to end."""


class _Plans(NamedTuple):
    """What windows are to hold. Apart from `StreamedBatches`, so that no plan keeps the buffers it is used with."""

    shards: list[Shard]
    n_rows: int
    shards_mixed: int
    run: int
    """Neighbouring rows that stay together."""

    def epochs(self, epoch: int, seed: int, size: int, batch_size: int) -> Generator[WindowContents, None, None]:
        """Windows of `size` rows of this epoch, then of the next, without end."""
        with contextlib.closing(self._fetched(self._random_groups(epoch, seed))) as fetched:
            yield from self._windows(fetched, size, batch_size)

    def in_order(self, size: int) -> Generator[WindowContents, None, None]:
        """Windows of `size` rows, the last smaller, of every shard in turn."""
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
    ) -> Generator[WindowContents, None, None]:
        segments: list[Segment] = []
        n, first = 0, 0

        def contents() -> WindowContents:
            return WindowContents(segments, n, n - n % batch_size if batch_size else 0, group.rows_key, first)

        for group, arrays, starts, rows in fetched:
            while len(rows):
                # Ascending, so that each shard's lie together; `Window.order` shuffles them.
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
        """The rows of a group in the order in which they come into windows."""
        if key is None:
            return np.arange(n_rows)
        runs = permutation(-(-n_rows // self.run), key, torch.device("cpu")).numpy()
        rows = (runs[:, None] * self.run + np.arange(self.run)).ravel()
        # The run at the shards' end may be shorter; a mask over all rows would take longer than the rest of this.
        end = (int(np.flatnonzero(runs == len(runs) - 1)[0]) + 1) * self.run
        return np.delete(rows, slice(end - (len(rows) - n_rows), end))

    def _fetched(self, groups: Iterable[_Group]) -> Generator[_Fetched, None, None]:
        """Groups, their shards, and their rows in order; the next group is made ready while one is used.

        By one thread: a shard on this node takes 0.15 ms, and four threads took 0.4 ms a shard in Ray's locks.
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
        """On the reader's thread, when it has fetched the group's shards: an order of 450,000 rows takes it 8 ms."""
        arrays = [array.result() for array in fetched]
        starts = np.cumsum([0, *map(len, arrays)])
        return _Fetched(group, arrays, starts, self._mixed(int(starts[-1]), group.runs_key))
