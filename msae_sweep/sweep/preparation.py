"""Prepares the blocks while trial workers start and train on those that are ready.

A worker takes seconds until it can train: it starts a process, imports modules, opens a device and compiles kernels. On
a machine with fewer GPUs than cores, a worker can do so while the data is prepared, and trials of the first block need
not wait for the last block. Where trials may take every core, all blocks are prepared first: a trial that waits for its
block would hold the core on which the block is to be prepared.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from msae_sweep.config import SweepConfig
from msae_sweep.data.prepare import shards
from msae_sweep.data.prepare.shards import PreparedBlock
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.errors import SweepError
from msae_sweep.sweep.ready_blocks import ReadyBlocks
from msae_sweep.sweep.resources import trials_at_once

CORES_TO_PREPARE = 4
"""Minimum number of free cores for preparing blocks while workers start.

With fewer, the preparation loses more time to the starting workers than these gain: on two busy cores the first step
came 10 to 13 s after the start instead of 7 to 11 s.
"""


class Interrupted(SweepError):
    """Error raised to callers that wait for the data, if the trials ended before it was ready."""


class Preparation:
    """Preparation of a sweep's blocks, in a thread of the driver."""

    def __init__(self, config: SweepConfig, infos: Sequence[BlockInfo], on_progress: Callable[[str], None]) -> None:
        """Start the preparation."""
        self.input_dims = {info.block: info.input_dim for info in infos}
        """Width of every block that will be prepared, in the sweep's order."""
        self._config, self._say = config, on_progress
        self._prepared: dict[int, PreparedBlock] = {}
        self._error: BaseException | None = None
        # The actor runs on the driver's node, so that only the loss of that node loses it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._ready = ray.remote(num_cpus=0, scheduling_strategy=here)(ReadyBlocks).remote()
        self._settled = threading.Event()
        # The thread is a daemon, so that a driver that ends with an error does not wait for data.
        self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)
        self._thread.start()

    def wait(self) -> dict[int, PreparedBlock]:
        """Return every block once all are ready; may be called from any thread.

        Raises:
            DataError: the rows cannot be used.
            Interrupted: `abandon` was called before all blocks were ready.
        """
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._prepared

    def abandon(self) -> None:
        """Give up blocks that are not ready yet: whoever waits for one, or for all, gets an error."""
        if not self._settled.is_set():
            self._settle(Interrupted("interrupted before the data was ready; run the command again"))

    def close(self) -> None:
        """Give up blocks that are not ready, and end the actor that hands out blocks; prepared blocks stay."""
        self.abandon()
        ray.kill(self._ready)

    def blocks(self) -> "PreparedBlocks":
        """Return the mapping from which trials get their blocks."""
        return PreparedBlocks(self._ready)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._prepared = shards.prepare_blocks(
                self._config.data.model_copy(update={"blocks": tuple(self.input_dims)}),
                self._config.storage,
                batch_size=max(int(b) for b in self._config.corners("batch_size")),
                on_progress=self._on_progress,
                on_ready=lambda prepared: self._ready.put.remote(prepared.block, [ray.put(prepared)]),
            )
        except BaseException as error:
            self._settle(error)
        else:
            self._on_progress(f"data ready after {time.monotonic() - started:.1f} s")
            self._settle(None)

    def _on_progress(self, line: str) -> None:
        # Threads may go on after `abandon`, but their progress no longer matters.
        if not self._settled.is_set():
            self._say(line)

    def _settle(self, error: BaseException | None) -> None:
        if error is not None:
            self._error = error
            self._ready.give_up.remote()
        self._settled.set()


class PreparedBlocks:
    """Picklable mapping from block number to prepared block; a lookup waits until the block is ready."""

    def __init__(self, ready: Any) -> None:
        """Create the mapping from `ready`, a handle of the actor `ReadyBlocks`."""
        self._ready = ready
        self._known: dict[int, PreparedBlock] = {}

    def __getitem__(self, block: int) -> PreparedBlock:
        if block not in self._known:
            (reference,) = ray.get(self._ready.get.remote(block))
            self._known[block] = ray.get(reference)
        return self._known[block]

    def __contains__(self, block: int) -> bool:
        """Return whether a block is ready."""
        return block in self._known or bool(ray.get(self._ready.has.remote(block)))


def enough_free_cores(config: SweepConfig, gpus_per_trial: float) -> bool:
    """Return whether at least half of the cluster's cores, and at least four, stay free while trials run.

    As many trials as can run at once are assumed to do so; if only the cores limit their number, none stay free.
    """
    at_once = trials_at_once(config, gpus_per_trial)
    cores = ray.cluster_resources().get("CPU", 0)
    return at_once is not None and cores - at_once * config.resources.cpu >= max(CORES_TO_PREPARE, cores / 2)
