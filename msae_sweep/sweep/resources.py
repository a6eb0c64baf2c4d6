"""Resources of one trial, resolved against the cluster when the sweep begins, or against nodes that still join it."""

import platform
import time
from collections.abc import Callable

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from msae_sweep.config import SweepConfig
from msae_sweep.errors import DeviceError
from msae_sweep.sweep.ray_cluster import cluster_address

JOIN_SECONDS = 1800.0
"""Seconds that a sweep waits for the first node that can run one of its trials: a cloud takes minutes to start one."""
POLL_SECONDS = 1.0


def gpus_per_trial(config: SweepConfig, say: Callable[[str], None]) -> float:
    """Return `resources.gpu` with `auto` resolved, once some node can run a trial.

    Nodes may join a cluster that RAY_ADDRESS names, which every Ray job sets. There the function waits for a node, and
    requests one from an autoscaler. `auto` is resolved by what the cluster has then, and stays so until the sweep ends.

    Args:
        say: takes a line for the user.

    Raises:
        DeviceError: no node can run a trial, and none that can has joined; or a trial needs CUDA, but gets no GPU.
    """
    resources = config.resources
    _await_node("cpu", {"CPU": resources.cpu}, say)
    if resources.gpu == "auto":
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        if not gpus and config.training.device == "auto" and nodes_may_join():
            say(
                "resources.gpu: auto, and the cluster has no GPU now: all trials train on CPUs, even if GPU nodes "
                "join later; write resources.gpu: 1 to wait for them"
            )
    else:
        gpus = resources.gpu
        _await_node("gpu", {"CPU": resources.cpu, "GPU": gpus}, say)
    if "cuda" in config.corners("device") and not gpus:
        raise DeviceError("training.device: cuda, but a trial gets no GPU; write resources.gpu: 1 if there is a GPU")
    return float(gpus)


def check_device(config: SweepConfig) -> None:
    """Check the trials' device as far as that is possible before Ray is connected.

    Raises:
        DeviceError: a trial is to train on MPS, and this machine has none.
    """
    if "mps" in config.corners("device") and not torch.backends.mps.is_available():
        raise DeviceError(f"training.device: mps is not available on {platform.system()}; write auto or cpu")


def trials_at_once(config: SweepConfig, gpus_per_trial: float) -> int | None:
    """Return how many trials the cluster can run at a time now; None if only its cores limit the number."""
    limits = [config.resources.max_concurrent] if config.resources.max_concurrent else []
    if gpus_per_trial:
        limits.append(int(ray.cluster_resources().get("GPU", 0) / gpus_per_trial))
    return min(limits, default=None)


def too_few_error(setting: str, asked: float, have: float) -> DeviceError:
    """Return the error to raise if no node has the CPUs or GPUs (`setting`) of one trial."""
    less = "0 or auto" if setting == "gpu" else "that or less"
    return DeviceError(f"resources.{setting}: {asked:g} per trial, but no node has more than {have:g}; write {less}")


def _await_node(setting: str, need: dict[str, float], say: Callable[[str], None]) -> None:
    need = {name: amount for name, amount in need.items() if amount}
    if _is_there(need):
        return
    asked, name = f"resources.{setting}: {need[setting.upper()]:g} per trial", setting.upper()
    if not nodes_may_join():
        have = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
        raise too_few_error(setting, need[name], have)
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    minutes = f"{JOIN_SECONDS / 60:g} minutes"
    say(f"{asked}, but no node has that yet; waiting up to {minutes} for one with {wanted}")
    # An autoscaler sees this demand. `request_resources` would replace the requests of others.
    demand = placement_group([need])
    try:
        until = time.monotonic() + JOIN_SECONDS
        while not _is_there(need):
            if time.monotonic() > until:
                raise DeviceError(f"{asked}, but no node with {wanted} joined within {minutes}")
            time.sleep(POLL_SECONDS)
    finally:
        remove_placement_group(demand)


def _is_there(need: dict[str, float]) -> bool:
    """Return whether some node has all of these resources in total, used or free."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0) >= amount for name, amount in need.items()) for node in nodes)


def nodes_may_join() -> bool:
    """Return whether the sweep runs on a cluster that RAY_ADDRESS names, which nodes may join."""
    return cluster_address() is not None


def starts_ray_here() -> bool:
    """Return whether a sweep would start its own Ray: RAY_ADDRESS names no cluster, and none is connected."""
    return not (nodes_may_join() or ray.is_initialized())
