"""Shards to batches: one tensor on the device where it fits, else a shuffled stream of shards."""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Shard = Callable[[], np.ndarray]
"""Fetches one shard [rows, input_dim], read-only float32."""

WINDOW_BYTES = 512 << 20
"""Rows of at most this many bytes are mixed with one another when streaming."""


class Batches(Protocol):
    """What `sae.train.fit` needs of a split."""

    n_rows: int
    batch_size: int

    def epoch(self, epoch: int, seed: int) -> Iterator[Tensor]:
        """Full batches in an order that follows from `epoch` and `seed` alone; a last partial one is left out."""

    def ordered(self) -> Iterator[Tensor]:
        """Every row once, in order; the last batch may be smaller."""

    def with_batch_size(self, batch_size: int) -> "Batches":
        """The same rows, not copied, in batches of another size."""


class Loaded(NamedTuple):
    """Batches, and why they are kept as they are."""

    batches: Batches
    reason: str


def make_batches(
    shards: Sequence[Shard], n_rows: int, input_dim: int, batch_size: int, device: torch.device, budget_bytes: int
) -> Loaded:
    """Resident batches where the rows take at most `budget_bytes` of the device, streamed ones otherwise."""
    need = 4 * n_rows * input_dim
    sizes = f"{need / 2**20:,.0f} MiB of rows, {budget_bytes / 2**20:,.0f} MiB allowed on {device}"
    if need <= budget_bytes:
        return Loaded(ResidentBatches.load(shards, n_rows, input_dim, batch_size, device), f"resident: {sizes}")
    # On the device lie a window, its copy behind what was left over, and a batch; on the host the window to come.
    window_bytes = min(WINDOW_BYTES, budget_bytes // 3)
    streamed = StreamedBatches(shards, n_rows, input_dim, batch_size, device, window_bytes)
    return Loaded(streamed, f"streamed: {sizes}")


def default_budget(device: torch.device, share: float = 1.0) -> int:
    """Bytes that data may take: half of the device's free memory (on a CPU, of the machine's), times `share`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.5 * share)
    return int(_machine_bytes() * 0.5 * share)


class ResidentBatches:
    """All rows in one tensor on the device."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        self.x, self.n_rows, self.batch_size = x, len(x), batch_size

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

    def epoch(self, epoch: int, seed: int) -> Iterator[Tensor]:
        """A fresh permutation of all rows each epoch, so the rows left over differ from epoch to epoch."""
        # Drawn on the CPU: the same order on every device.
        order = torch.randperm(self.n_rows, generator=_generator(seed, epoch)).to(self.x.device)
        for start in range(0, self.n_rows - self.batch_size + 1, self.batch_size):
            yield self.x[order[start : start + self.batch_size]]

    def ordered(self) -> Iterator[Tensor]:
        """See `Batches`."""
        return iter(torch.split(self.x, self.batch_size))


class StreamedBatches:
    """Shards in random order, mixed within a window of several; the next window is fetched while this one is used.

    A window goes to the device whole and is shuffled there. What does not fill a batch at its end goes into the next
    window; only an epoch's last rows are left out.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        n_rows: int,
        input_dim: int,
        batch_size: int,
        device: torch.device,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self.n_rows, self.batch_size = n_rows, batch_size
        self._shards, self._input_dim, self._device = list(shards), input_dim, device
        shard_bytes = 4 * input_dim * max(1, n_rows // max(1, len(self._shards)))
        self._shards_a_window = max(1, window_bytes // max(1, shard_bytes))

    def with_batch_size(self, batch_size: int) -> "StreamedBatches":
        """The same shards in batches of another size."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def epoch(self, epoch: int, seed: int) -> Iterator[Tensor]:
        """See `Batches`."""
        generator = _generator(seed, epoch)
        shard_order = torch.randperm(len(self._shards), generator=generator).tolist()
        left_over = torch.empty(0, self._input_dim, device=self._device)
        # Closed by hand: not every Python closes an inner generator as soon as the outer one is.
        with contextlib.closing(self._windows(shard_order)) as windows:
            for window in windows:
                rows = torch.cat([left_over, window])
                # Drawn on the CPU: the same order on every device.
                order = torch.randperm(len(rows), generator=generator).to(self._device)
                whole = len(rows) - len(rows) % self.batch_size
                for start in range(0, whole, self.batch_size):
                    yield rows[order[start : start + self.batch_size]]
                left_over = rows[order[whole:]]

    def ordered(self) -> Iterator[Tensor]:
        """See `Batches`."""
        left_over = torch.empty(0, self._input_dim, device=self._device)
        with contextlib.closing(self._windows(range(len(self._shards)))) as windows:
            for window in windows:
                rows = torch.cat([left_over, window])
                whole = len(rows) - len(rows) % self.batch_size
                yield from torch.split(rows[:whole], self.batch_size) if whole else ()
                left_over = rows[whole:].clone()
        if len(left_over):
            yield left_over

    def _windows(self, order: Sequence[int]) -> Generator[Tensor, None, None]:
        """Rows of the shards in `order`, some shards at a time, on the device."""
        groups = [order[i : i + self._shards_a_window] for i in range(0, len(order), self._shards_a_window)]
        with ThreadPoolExecutor(1, thread_name_prefix="shards") as pool:
            coming = pool.submit(self._read, groups[0])
            for following in [*groups[1:], None]:
                window = coming.result().to(self._device, non_blocking=True)
                if following is not None:
                    coming = pool.submit(self._read, following)
                yield window

    def _read(self, numbers: Sequence[int]) -> Tensor:
        """Some shards in one host tensor, pinned where it goes to a GPU."""
        arrays = [self._shards[i]() for i in numbers]
        n_rows = sum(len(array) for array in arrays)
        window = torch.empty(n_rows, self._input_dim, pin_memory=self._device.type == "cuda")
        return torch.cat([_tensor(array) for array in arrays], out=window)


def _machine_bytes() -> int:
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


def _generator(seed: int, epoch: int) -> torch.Generator:
    state = int(np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % 2**63)
