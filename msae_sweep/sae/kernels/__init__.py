"""Fast operations with their plain references, and `choose_engine`, the only place that chooses between them."""

import importlib.util
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from msae_sweep.config import TrainingConfig
from msae_sweep.sae.kernels import reference, sparse_cpu
from msae_sweep.sae.kernels.reference import Reconstruction

__all__ = ["EngineChoice", "Reconstruct", "Reconstruction", "choose_engine"]

Reconstruct = Callable[..., Reconstruction]

MAX_INPUT_DIM, MAX_HIDDEN_DIM, MAX_K = 4096, 131_072, 512
"""Limits of the fused step, in this order: it holds a decoder row in registers, stores a latent's number in 17 bits,
and sorts a row's codes in registers."""


class EngineChoice(NamedTuple):
    """Chosen way to train a trial, with its name and the reason for the choice."""

    reconstruct: Reconstruct | None
    """Operation that autograd differentiates, or None for the fused step, which needs no autograd."""
    name: str
    reason: str


def choose_engine(device: torch.device, config: TrainingConfig, input_dim: int) -> EngineChoice:
    """Return the fastest correct way on `device`, and why it was chosen.

    `sweep/trial.py` reports the reason with a trial's first result; `sweep/callback.py` prints it and tags the run.
    """
    if device.type == "cpu":
        if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
            return EngineChoice(sparse_cpu.reconstruct, "sparse_cpu", "MKL's sparse products")
        return EngineChoice(
            reference.reconstruct, "reference", "this torch is built without MKL, which sparse products need"
        )
    hindrance = "no kernels for MPS" if device.type != "cuda" else _hindrance(device, config, input_dim)
    if hindrance is not None:
        return EngineChoice(reference.reconstruct, "reference", hindrance)
    return EngineChoice(None, "fused", "one captured graph a step: bf16 products, float32 sums and weights")


def _hindrance(device: torch.device, config: TrainingConfig, input_dim: int) -> str | None:
    """Return the reason why the fused step cannot be used on a CUDA device, or None if it can."""
    hidden_dim = config.hidden_dim(input_dim)
    if config.precision != "bf16":
        return f"training.precision: {config.precision}; the fused step is bf16"
    if torch.version.hip is not None:
        return "the fused step is not written for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} has no bfloat16 units; 8.0 or higher is needed"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton.language

    if not hasattr(triton.language, "topk"):
        return f"triton {triton.__version__} has no topk; 3.4 or newer is needed"
    if "out_dtype" not in (inspect.getdoc(torch.mm) or ""):
        return f"torch {torch.__version__} has no product of bf16 into float32; 2.8 or newer is needed"
    for name, value, most in (
        ("input_dim", input_dim, MAX_INPUT_DIM),
        ("hidden_dim", hidden_dim, MAX_HIDDEN_DIM),
        ("k", config.levels[-1], MAX_K),
    ):
        if value > most:
            return f"{name} {value} exceeds the fused step's limit {most}"
    return None
