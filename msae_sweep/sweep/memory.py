"""Checks that memory and disk suffice for a sweep, so that a sweep that cannot fit is refused before it starts.

Only lower bounds of the need are compared, so nothing is refused that might fit: a trial holds its state whatever else
the step needs, and rows that do not fit on a device are streamed.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from msae_sweep.config import SweepConfig
from msae_sweep.data.batches.loader import machine_bytes
from msae_sweep.data.prepare import shards
from msae_sweep.data.sources.base import BlockInfo
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.sweep.resources import starts_ray_here
from msae_sweep.sweep.space import plan

STATE_BYTES = 16
"""Bytes of a trial's state per parameter: weight, Adam's two moments and weight of the best epoch, all float32."""

ASK_BYTES = 2 << 30
"""State size that is taken to fit any device; the cluster's devices are queried only for models with a larger state.

A query takes as long as a worker's imports.
"""

ASK_SECONDS = 60.0
"""Seconds that a query waits for a device that is not free."""


class ModelSize(NamedTuple):
    """Size of one trial's model."""

    input_dim: int
    hidden_dim: int

    @property
    def n_parameters(self) -> int:
        """Number of parameters in W_enc, W_dec and pre_bias."""
        return 2 * self.input_dim * self.hidden_dim + self.input_dim

    @property
    def state_bytes(self) -> int:
        """Bytes that a trial holds on its device while it trains, without rows and intermediate results."""
        return STATE_BYTES * self.n_parameters


def check_memory_and_disk(config: SweepConfig, infos: Sequence[BlockInfo]) -> None:
    """Check what can be checked before Ray starts: disk space for the shards and, if Ray is to start here, memory.

    Raises:
        ConfigError: the sweep is to run on this machine, and no device of it can hold one of the models.
        DataError: the disk or this machine cannot hold the shards of the rows.
    """
    _check_disk(config, infos)
    if not starts_ray_here():
        return
    _check_models(config, infos, _largest_device_here)
    need = sum(map(shard_bytes, infos))
    room = machine_bytes() + shutil.disk_usage(_spill_folder()).free
    if need > room and not config.data.drop_nonfinite and "RAY_object_spilling_config" not in os.environ:
        raise DataError(
            f"{_rows(infos)} take {size(need)} in Ray's object store, but memory and {_spill_folder()} together have "
            f"{size(room)}; {_fewer(config)}"
        )


def check_devices(config: SweepConfig, infos: Sequence[BlockInfo], gpus: float) -> None:
    """Check the models against the largest device of the cluster, which is queried only for large models.

    Args:
        gpus: GPUs per trial.

    Raises:
        ConfigError: no device of the cluster can hold one of the models.
    """
    _check_models(config, infos, lambda: _largest_device(gpus))


def shard_bytes(info: BlockInfo) -> int:
    """Return the size of a block's prepared shards, which are float32, in bytes."""
    return 4 * info.n_rows * info.input_dim


def model_of(input_dim: int, expansion_factor: float) -> ModelSize:
    """Return the model size of a trial with this expansion factor on rows of this width."""
    return ModelSize(input_dim, round(input_dim * expansion_factor))


def size(n_bytes: int) -> str:
    """Return a number of bytes as text with a unit, e.g. `1.5 GiB`."""
    amount = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} PiB" if amount < 1e6 else f"{amount:.1e} PiB"


def _check_models(config: SweepConfig, infos: Sequence[BlockInfo], capacity: Callable[[], int | None]) -> None:
    for info in infos:
        if _largest(info, config.corners("expansion_factor")).state_bytes <= ASK_BYTES:
            continue
        factors: Iterable[float] = config.corners("expansion_factor")
        if config.search.algorithm != "optuna":
            # These searches' trials are known in advance, and may need less than the largest value that is possible.
            factors = {record.training(config.training).expansion_factor for record in plan(config, [info.block])}
        largest, room = _largest(info, factors), capacity()
        if room is not None and largest.state_bytes > room:
            raise ConfigError(
                f"training.expansion_factor: {largest.hidden_dim:,} latents of width {info.input_dim} (block "
                f"{info.block}) are {largest.n_parameters:,} parameters, which take {size(largest.state_bytes)} with "
                f"Adam's moments and the best epoch's parameters, but the largest device has {size(room)}; lower "
                "expansion_factor"
            )


def _largest(info: BlockInfo, factors: Iterable[float]) -> ModelSize:
    return model_of(info.input_dim, max(map(float, factors)))


def _largest_device_here() -> int:
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return max(machine_bytes(), *(torch.cuda.get_device_properties(i).total_memory for i in cuda), 0)


def _largest_device(gpus: float) -> int | None:
    """Return the memory in bytes of the largest device of the cluster that a trial could have.

    Returns:
        None where it is unknown: a node has not answered within `ASK_SECONDS`, a query failed, or no node qualifies.
    """
    ask = ray.remote(num_cpus=0, num_gpus=min(gpus, 1.0), max_retries=0)(_device_bytes)
    nodes = [node for node in ray.nodes() if node["Alive"] and (not gpus or node["Resources"].get("GPU", 0) >= gpus)]
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [ask.options(scheduling_strategy=node).remote(gpus > 0) for node in there]
    answered, silent = ray.wait(asked, num_returns=len(asked), timeout=ASK_SECONDS) if asked else ([], [])
    for task in silent:
        ray.cancel(task, force=True)
    # A node that has not answered may have the largest device.
    if silent or not answered:
        return None
    try:
        return max(ray.get(answered))
    except ray.exceptions.RayError:
        return None


def _device_bytes(on_gpu: bool) -> int:
    return int(torch.cuda.get_device_properties(0).total_memory) if on_gpu else machine_bytes()


def _check_disk(config: SweepConfig, infos: Sequence[BlockInfo]) -> None:
    if "://" in config.storage or config.data.drop_nonfinite:
        return
    free = shutil.disk_usage(_existing(Path(config.storage))).free
    if sum(map(shard_bytes, infos)) <= free:
        return
    reusable = shards.prepared_manifests(config.data, config.storage)
    missing = [info for info in infos if info.block not in reusable]
    if (need := sum(map(shard_bytes, missing))) > free:
        raise DataError(
            f"{_rows(missing)} take {size(need)} as prepared shards, but {config.storage} has {size(free)} free; "
            f"{_fewer(config)}, or give another --storage"
        )


def _rows(infos: Sequence[BlockInfo]) -> str:
    blocks = f"block {infos[0].block}" if len(infos) == 1 else f"{len(infos)} blocks"
    return f"data: {sum(info.n_rows for info in infos):,} rows of {blocks}"


def _fewer(config: SweepConfig) -> str:
    return "lower data.planted.rows" if config.data.path == "planted" else "sweep fewer of data.blocks at a time"


def _existing(path: Path) -> Path:
    """Return the nearest folder that exists: `path` or one of its parents."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _spill_folder() -> Path:
    """Return the folder to which Ray spills objects that do not fit into its object store, unless set otherwise."""
    return _existing(Path(os.environ.get("RAY_TMPDIR", "/tmp")).absolute())
