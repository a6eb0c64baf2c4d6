"""Fast operations beside their plain references, and the one place that chooses between them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from msae_sweep.sae.kernels import reference, sparse_cpu
from msae_sweep.sae.kernels.reference import Reconstruction

__all__ = ["Choice", "Reconstruction", "choose"]


class Choice(NamedTuple):
    """An implementation of `reconstruct`, its name, and why it was taken."""

    reconstruct: Callable[..., Reconstruction]
    name: str
    reason: str


def choose(device: torch.device) -> Choice:
    """The fastest `reconstruct` that is right on `device`; its reason is said at start-up and goes with the run."""
    if device.type != "cpu":
        return Choice(reference.reconstruct, "reference", f"no faster kernel for {device.type} yet")
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return Choice(reference.reconstruct, "reference", "this torch is built without MKL, so no sparse products")
    return Choice(sparse_cpu.reconstruct, "sparse_cpu", "MKL's sparse products")
