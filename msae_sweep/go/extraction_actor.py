"""The actor of an extraction: boards of a chunk → activations of the tapped blocks → files."""

import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
import torch
from torch import Tensor

from msae_sweep.errors import DataError
from msae_sweep.go.activation_folder import INDEX, OutputFolder
from msae_sweep.go.board import SIZE
from msae_sweep.go.leela import Network, gather_points, spatial_mean
from msae_sweep.go.pipeline import BATCH, Boards, unpacked
from msae_sweep.go.planes import planes

if TYPE_CHECKING:
    from msae_sweep.go.extract import ExtractionSettings


class StageSeconds(NamedTuple):
    """Where an extraction's time went, summed over everything that worked at a time."""

    reading: float = 0.0
    """Until all games were read, on the clock."""
    boards: float = 0.0
    """CPU tasks replaying games."""
    waiting: float = 0.0
    """Devices that had no chunk to compute, from when their network was ready."""
    network: float = 0.0
    """Devices computing: planes, tower, points."""
    copying: float = 0.0
    """Devices sending rows to the host."""
    writing: float = 0.0
    """Threads writing chunks, which on a GPU is beside the computing."""
    finishing: float = 0.0
    """Making the formats and the index of all chunks, on the clock."""

    @property
    def busy(self) -> float:
        """The share of the devices' time in which they computed; 0 if they never did."""
        return self.network / ((self.network + self.waiting + self.copying) or 1.0)


def device_here() -> torch.device:
    """The device that a network takes in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class ExtractionActor:
    """Boards of a chunk → activations → files; keeps the network on its device.

    On a GPU several threads call it at a time. Each queues its chunk's work behind that of the last one, and waits and
    writes outside of the lock: so the GPU always has a chunk to go on with while others are copied and written.
    """

    def __init__(self, weights: list[Any], settings: "ExtractionSettings", folder: OutputFolder) -> None:
        self.settings, self.folder = settings, folder
        self.device = device_here()
        if self.device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        self.network = Network(ray.get(weights[0]), self.device, settings.precision)
        self.turn = threading.Lock()
        self.ended = self._mark()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Compute and write one chunk; what it returns is said when the files are there."""
        chunk = unpacked(batch)
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
                raise DataError(f"block {block}: an activation exceeds {self.settings.dtype}; write --dtype float32")
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

    def _activations(self, chunk: Boards) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Every block's rows [positions · points, filters] in the type of the files; their sum and that of squares."""
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
        """A copy there. From pinned memory: from any other, it would wait for all the work that is queued before it."""
        tensor = torch.tensor(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _on_host(self, tensors: dict[int, Tensor]) -> dict[int, Tensor]:
        """Pinned copies, there once `ended` is."""
        if self.device.type != "cuda":
            return tensors
        hosts = {block: torch.empty_like(tensor, device="cpu", pin_memory=True) for block, tensor in tensors.items()}
        for block, host in hosts.items():
            host.copy_(tensors[block], non_blocking=True)
        return hosts

    def _mark(self) -> "_Mark":
        """Now, as the device's queue of work sees it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


_Mark = float | torch.cuda.Event


def _seconds(start: _Mark, end: _Mark) -> float:
    """Between two marks that the device has passed."""
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3  # type: ignore[arg-type]
    assert not isinstance(end, torch.cuda.Event)
    return end - start


def _arrays(tensors: dict[int, Tensor]) -> dict[int, np.ndarray]:
    return {block: tensor.numpy() for block, tensor in tensors.items()}
