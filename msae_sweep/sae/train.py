"""Training of one MSAE: `fit` is a generator of `Progress`.

The caller owns the state that `fit` changes. Stopping, saving the state and resuming from it therefore loses nothing.
"""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.errors import DeviceError
from msae_sweep.sae import kernels, loss
from msae_sweep.sae.engines.autograd import AutogradEngine, Engine
from msae_sweep.sae.engines.step_cache import StepCache
from msae_sweep.sae.metrics import objective, total_sum_of_squares
from msae_sweep.sae.state import Batches, StopReason, TrainState

__all__ = ["Batches", "Progress", "StepCache", "TrainState", "choose_device", "fit", "learning_rate_at"]


class Progress(NamedTuple):
    """Result of one epoch of training and validation."""

    epoch: int
    """Number of finished epochs, from 1."""
    metrics: dict[str, float]
    """Metrics under the names of the README's table, finite ones only: a diverged epoch lacks those that are not."""
    is_best: bool
    """True if this epoch's weights are the best so far."""
    stop_reason: StopReason | None
    """Reason why training ends after this epoch, or None if it goes on."""


def fit(
    state: TrainState,
    train: Batches,
    validation: Batches,
    config: TrainingConfig,
    steps: StepCache | None = None,
) -> Iterator[Progress]:
    """Train from the current epoch of `state` to the last one, yielding after each epoch.

    The caller stops early by ceasing to iterate. The state is complete at every yield: if it is saved there and loaded
    into a fresh state, training goes on to the same weights, bit for bit. Training ends after `config.epochs`, after
    `early_stopping_patience` epochs without a better objective, or when a metric is no longer finite (`diverged`; that
    epoch is not recorded). `steps` caches captured steps for other calls.
    """
    engine = _engine(state, train, config, steps)
    steps_per_epoch = train.n_rows // train.batch_size
    variance: float | None = None

    while state.epoch < config.epochs and state.stop_reason is None:
        epoch, started = state.epoch + 1, time.perf_counter()
        total_steps = steps_per_epoch * config.epochs
        rates = [learning_rate_at(state.step + i, total_steps, config) for i in range(steps_per_epoch)]
        result = engine.train_epoch(train, epoch, rates)
        _synchronize(state.samples_since_fired.device)
        seconds = time.perf_counter() - started
        if variance is None:
            variance = total_sum_of_squares(validation.ordered())
        split = engine.evaluate(validation, variance)
        metrics = split.compute()
        weights = loss.level_weights(len(config.levels), config.weighting).double()
        samples = steps_per_epoch * train.batch_size
        metrics |= {
            "objective": objective(metrics["r2_mean"], result.dead_ratio),
            "dead_ratio": result.dead_ratio,
            "train_loss": result.train_loss,
            "val_loss": (weights @ split.mean_squared_error()).item(),
            "aux_loss": result.aux_loss,
            "learning_rate": rates[-1],
            "epoch": epoch,
            "samples_seen": state.samples_seen + samples,
            "samples_per_second": samples / seconds,
        }
        yield _finish_epoch(state, metrics, split.activation_counts, config)


def _engine(state: TrainState, train: Batches, config: TrainingConfig, steps: StepCache | None) -> Engine:
    device = state.samples_since_fired.device
    choice = kernels.choose_engine(device, config, state.model.input_dim)
    dead_after_samples = config.dead_after_samples or train.n_rows
    if choice.reconstruct is not None:
        return AutogradEngine(state, config, choice.reconstruct, dead_after_samples)
    from msae_sweep.sae.engines.fused import FusedEngine

    return FusedEngine(state, config, train.batch_size, dead_after_samples, StepCache() if steps is None else steps)


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, a plateau, then the chosen decay towards 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.learning_rate
    decay_steps = max(1, round(total_steps * config.decay_fraction))
    left = min(1.0, (total_steps - step) / decay_steps)
    return config.learning_rate * (left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


def choose_device(config: TrainingConfig, *, holds_gpu: bool) -> torch.device:
    """Return the device to train on; `auto` uses a GPU only if Ray has assigned one to the trial (`holds_gpu`).

    Raises:
        DeviceError: `training.device` names a device that this machine does not have.
    """
    if config.device == "auto":
        if holds_gpu:
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[config.device]:
        raise DeviceError(f"training.device: {config.device} is not available; write auto or cpu")
    return torch.device(config.device)


def _finish_epoch(
    state: TrainState, metrics: dict[str, float], activation_counts: Tensor, config: TrainingConfig
) -> Progress:
    epoch = int(metrics["epoch"])
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    if len(finite) < len(metrics):
        state.stop_reason = "diverged"
        return Progress(epoch, finite, False, state.stop_reason)
    is_best = not state.best_epoch or metrics["objective"] > state.points[state.best_epoch - 1]["objective"]
    state.points.append(metrics)
    if is_best:
        state.best_epoch = epoch
        state.best_counts = activation_counts
        state.best_weights = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
    if config.early_stopping_patience and epoch - state.best_epoch >= config.early_stopping_patience:
        state.stop_reason = "patience"
    elif epoch >= config.epochs:
        state.stop_reason = "epochs"
    return Progress(epoch, metrics, is_best, state.stop_reason)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
