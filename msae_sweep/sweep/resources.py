"""What one trial holds, settled against the cluster as it is when the sweep begins, or against nodes still to come."""

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
"""How long a sweep waits for the first node that can run one of its trials: a cloud takes minutes to start one."""
POLL_SECONDS = 1.0


def gpus_per_trial(config: SweepConfig, say: Callable[[str], None]) -> float:
    """`resources.gpu`, with `auto` resolved; on return some node can run a trial.

    In a cluster that RAY_ADDRESS names, as it does in every Ray job, nodes may join: there it waits for one, and asks
    an autoscaler for it. `auto` is decided by what the cluster has then, and holds to the sweep's end.

    Args:
        say: takes a line for the user.

    Raises:
        DeviceError: no node can run a trial, and none is coming.
    """
    resources = config.resources
    _await_node("cpu", {"CPU": resources.cpu}, say)
    if resources.gpu == "auto":
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
        if not gpus and config.training.device == "auto" and nodes_may_join():
            say(
                "resources.gpu: auto, and the cluster has no GPU now: all trials train on CPUs, also when GPU nodes "
                "join later; write resources.gpu: 1 to wait for them"
            )
    else:
        gpus = resources.gpu
        _await_node("gpu", {"CPU": resources.cpu, "GPU": gpus}, say)
    if "cuda" in config.corners("device") and not gpus:
        raise DeviceError("training.device: cuda, but no GPU for a trial; write resources.gpu: 1 where there is one")
    return float(gpus)


def check_device(config: SweepConfig) -> None:
    """Check what can be known of the trials' device before the cluster is.

    Raises:
        DeviceError: a trial is to train on MPS, which this machine does not have.
    """
    if "mps" in config.corners("device") and not torch.backends.mps.is_available():
        raise DeviceError(f"training.device: mps is not there on {platform.system()}; write auto or cpu")


def trials_at_once(config: SweepConfig, gpus_per_trial: float) -> int | None:
    """How many trials the cluster as it is runs at a time; None where nothing but its cores limits them."""
    limits = [config.resources.max_concurrent] if config.resources.max_concurrent else []
    if gpus_per_trial:
        limits.append(int(ray.cluster_resources().get("GPU", 0) / gpus_per_trial))
    return min(limits, default=None)


def too_few(setting: str, asked: float, have: float) -> DeviceError:
    """The error to raise where no node has the CPUs or GPUs (`setting`) of one trial."""
    less = "0 or auto" if setting == "gpu" else "that or less"
    return DeviceError(f"resources.{setting}: {asked:g} a trial, but the cluster has {have:g}; write {less}")


def _await_node(setting: str, need: dict[str, float], say: Callable[[str], None]) -> None:
    need = {name: amount for name, amount in need.items() if amount}
    if _is_there(need):
        return
    asked, name = f"resources.{setting}: {need[setting.upper()]:g} a trial", setting.upper()
    if not nodes_may_join():
        have = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
        raise too_few(setting, need[name], have)
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    minutes = f"{JOIN_SECONDS / 60:g} minutes"
    say(f"{asked}, but no node has that yet; waiting up to {minutes} for one with {wanted}")
    # What an autoscaler sees. `request_resources` would replace what others asked for.
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
    """Whether some node can hold all of it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(name, 0) >= amount for name, amount in need.items()) for node in nodes)


def nodes_may_join() -> bool:
    """Whether the sweep runs on a cluster that RAY_ADDRESS names."""
    return cluster_address() is not None


def starts_ray_here() -> bool:
    """Whether a sweep would start a Ray of its own: none is named or connected to."""
    return not (nodes_may_join() or ray.is_initialized())
