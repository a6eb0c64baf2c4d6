"""Ray actor of an extraction: boards of a chunk → activations of the tapped blocks → files."""

import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
import torch
from torch import Tensor

from msae_sweep.errors import DataError
from msae_sweep.go.activation_folder import INDEX, ActivationFolder
from msae_sweep.go.board import SIZE
from msae_sweep.go.leela import Network, gather_points, spatial_mean
from msae_sweep.go.pipeline import BATCH, ChunkBoards, unpack_boards
from msae_sweep.go.planes import planes

if TYPE_CHECKING:
    from msae_sweep.go.extract import ExtractionSettings


class StageSeconds(NamedTuple):
    """Seconds that an extraction spent in each stage, summed over all parallel tasks, devices and threads."""

    reading: float = 0.0
    """Wall-clock seconds until all games were read."""
    boards: float = 0.0
    """Seconds in which CPU tasks replayed games."""
    waiting: float = 0.0
    """Seconds in which devices had no chunk to compute, counted from when their network was ready."""
    network: float = 0.0
    """Seconds in which devices computed planes, tower and points."""
    copying: float = 0.0
    """Seconds in which devices copied rows to the host."""
    writing: float = 0.0
    """Seconds in which threads wrote chunks; with a GPU, in parallel with the computing."""
    finishing: float = 0.0
    """Wall-clock seconds for writing the formats and the index of all chunks."""

    @property
    def busy(self) -> float:
        """Share of the devices' time in which they computed; 0 if they never did."""
        return self.network / ((self.network + self.waiting + self.copying) or 1.0)


def device_here() -> torch.device:
    """Return the device that a network uses in this process: CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ExtractionActor:
    """Actor that computes and writes the activations of chunks; it keeps the network on its device.

    With a GPU, several threads call the actor concurrently. Each thread queues its chunk's work behind the previous
    chunk's, then waits and writes outside the lock. The GPU therefore always has a chunk to compute while others are
    copied and written.
    """

    def __init__(self, weights: list[Any], settings: "ExtractionSettings", folder: ActivationFolder) -> None:
        self.settings, self.folder = settings, folder
        self.device = device_here()
        if self.device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        self.network = Network(ray.get(weights[0]), self.device, settings.precision)
        self.turn = threading.Lock()
        self.ended = self._mark()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Compute and write one chunk; return its position count, device and stage seconds once it is written."""
        chunk = unpack_boards(batch)
        points = chunk.points
        with self.turn:
            before, began = self.ended, self._mark()
            rows, sums = self._activations(chunk)
            computed = self._mark()
            rows, sums = self._on_host(rows), self._on_host(sums)
            copied = self.ended = self._mark()
        if isinstance(copied, torch.cuda.Event):
            copied.synchronize()
        writing = time.perf_counter()
        for block, (_, squares) in sums.items():
            if not squares.isfinite().all():
                raise DataError(
                    f"block {block}: an activation exceeds the range of {self.settings.dtype}; write --dtype float32"
                )
        index = {name: np.repeat(getattr(chunk, name), points.shape[1]) for name in INDEX if name != "point"}
        index |= {"ply": index["ply"].astype(np.int32), "point": points.reshape(-1)}
        self.folder.write_chunk(chunk.number, _arrays(rows), _arrays(sums), index)
        choice = self.network.choice
        seconds = StageSeconds(
            boards=chunk.seconds,
            waiting=_seconds(before, began),
            network=_seconds(began, computed),
            copying=_seconds(computed, copied),
            writing=time.perf_counter() - writing,
        )
        return {
            "n_positions": [len(points)],
            "device": [f"{self.device.type}: {choice.name} ({choice.reason})"],
            **{name: [value] for name, value in seconds._asdict().items()},
        }

    def _activations(self, chunk: ChunkBoards) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return each block's rows, and the sum of its rows with the sum of their squares.

        Rows have shape [positions · points, filters] and the dtype of the files; the sums are float64 [2, filters].
        """
        blocks, dtype = self.settings.blocks, getattr(torch, self.settings.dtype)
        parts: dict[int, list[Tensor]] = {block: [] for block in blocks}
        for start in range(0, len(chunk.boards), BATCH[self.device.type]):
            part = slice(start, start + BATCH[self.device.type])
            boards = self._on_device(chunk.boards[part])
            x = planes(boards, self._on_device(chunk.black_to_move[part]), self.network.choice.dtype)
            points = self._on_device(chunk.points[part])
            if self.settings.first_row == "bottom":
                x = x.flip(2)
                points = (SIZE - 1 - points // SIZE) * SIZE + points % SIZE
            outputs = self.network(x, blocks, heads=False)
            for block in blocks:
                tapped = outputs.activations[block]
                if self.settings.sampling.points == "mean":
                    taken = spatial_mean(tapped)
                else:
                    taken = gather_points(tapped, points).flatten(0, 1)
                parts[block].append(taken.to(dtype))
        rows = {block: torch.cat(found) for block, found in parts.items()}
        exact = ((block, found.double()) for block, found in rows.items())
        return rows, {block: torch.stack([found.sum(0), found.square().sum(0)]) for block, found in exact}

    def _on_device(self, array: np.ndarray) -> Tensor:
        """Return a copy of `array` on the device.

        The copy starts from pinned memory, because a copy from pageable memory waits for all work queued before it.
        """
        tensor = torch.tensor(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _on_host(self, tensors: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return copies in pinned memory, which are complete once the device has passed the event `ended`."""
        if self.device.type != "cuda":
            return tensors
        hosts = {block: torch.empty_like(tensor, device="cpu", pin_memory=True) for block, tensor in tensors.items()}
        for block, host in hosts.items():
            host.copy_(tensors[block], non_blocking=True)
        return hosts

    def _mark(self) -> "_Mark":
        """Return a time stamp: on a GPU a CUDA event recorded in the current stream, on a CPU the clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


_Mark = float | torch.cuda.Event


def _seconds(start: _Mark, end: _Mark) -> float:
    """Return the seconds between two time stamps that the device has passed."""
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3  # type: ignore[arg-type]
    assert not isinstance(end, torch.cuda.Event)
    return end - start


def _arrays(tensors: dict[int, Tensor]) -> dict[int, np.ndarray]:
    return {block: tensor.numpy() for block, tensor in tensors.items()}
