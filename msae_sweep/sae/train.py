"""Training one MSAE: a generator of `Progress`, whose state goes out and in, so that stop + resume loses nothing."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.errors import DeviceError
from msae_sweep.sae import kernels, loss
from msae_sweep.sae.metrics import SplitMetrics, objective
from msae_sweep.sae.model import MSAE, geometric_median

StopReason = Literal["epochs", "patience", "diverged"]


class Batches(Protocol):
    """Standardised rows of one split, on the trial's device."""

    n_rows: int
    batch_size: int

    def epoch(self, epoch: int, seed: int) -> Iterator[Tensor]:
        """Full batches [batch_size, input_dim] in an order that depends on `epoch` and `seed` alone."""

    def ordered(self) -> Iterator[Tensor]:
        """Every row once, in order; the last batch may be smaller."""


class Progress(NamedTuple):
    """What one epoch gave."""

    epoch: int
    """Epochs finished, from 1."""
    metrics: dict[str, float]
    """Finite numbers only, under the names of the README's table; a diverged epoch lacks those that are not."""
    is_best: bool
    """Whether this epoch's weights are the best so far."""
    stop_reason: StopReason | None
    """Why training ends here, or None."""


@dataclass
class TrainState:
    """Everything that training changes; `fit` mutates it, the caller owns it and may save it between epochs."""

    model: MSAE
    optimizer: torch.optim.Adam
    seed: int
    """Decides the order of rows; initialisation has used it already."""
    samples_since_fired: Tensor
    """int64 [hidden_dim]: training rows since each latent last fired (value > 0 among the largest k)."""
    step: int = 0
    points: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every finished epoch."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    """Epoch with the highest objective, 0 before the first."""
    stop_reason: StopReason | None = None

    @classmethod
    def create(
        cls, config: TrainingConfig, input_dim: int, *, seed: int, device: torch.device, train: Batches | None = None
    ) -> "TrainState":
        """A fresh state; the same seed gives the same weights on every device.

        `train` gives the rows for the starts that look at data (`encoder_init: scaled`, `pre_bias_init:
        geometric_median`): the first batch of the first epoch. Without it those parameters start as for the others,
        which is right where a saved state is loaded next.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MSAE(input_dim, config.hidden_dim(input_dim), config.k_levels, config.weighting)
        if train is not None:
            first_batch = next(train.epoch(1, seed)).cpu()
            if config.pre_bias_init == "geometric_median":
                model.pre_bias.data = geometric_median(first_batch)
            if config.encoder_init == "scaled":
                model.W_enc.data *= encoder_scale(model, first_batch, config)
        model.to(device)
        # Fused Adam is one pass over the parameters on CPU and CUDA; MPS takes torch's default.
        optimizer = torch.optim.Adam(
            model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=device.type in ("cpu", "cuda"),
        )
        silent = torch.zeros(model.hidden_dim, dtype=torch.int64, device=device)
        return cls(model, optimizer, seed, silent)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.points)

    @property
    def samples_seen(self) -> int:
        """Training rows seen, counted again in every epoch."""
        return int(self.points[-1]["samples_seen"]) if self.points else 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text only, so that `torch.load(weights_only=True)` reads it back."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seed": self.seed,
            "samples_since_fired": self.samples_since_fired,
            "step": self.step,
            "points": self.points,
            "best_weights": self.best_weights,
            "best_epoch": self.best_epoch,
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, raw: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, on this state's own device."""
        device = self.samples_since_fired.device
        self.model.load_state_dict(raw["model"])
        self.optimizer.load_state_dict(raw["optimizer"])
        self.seed, self.step, self.points = raw["seed"], raw["step"], list(raw["points"])
        self.samples_since_fired = raw["samples_since_fired"].to(device)
        self.best_weights = {name: tensor.to(device) for name, tensor in raw["best_weights"].items()}
        self.best_epoch, self.stop_reason = raw["best_epoch"], raw["stop_reason"]

    def best_model(self) -> MSAE:
        """A copy of the model with the best epoch's weights, on the CPU."""
        model = MSAE(**self.model.config)  # type: ignore[arg-type]
        model.load_state_dict({name: tensor.cpu() for name, tensor in self.best_weights.items()})
        return model

    def history(self) -> dict[str, Any]:
        """The notebook's `history`: `train_loss`, `val_loss`, `dead_ratio`, `val_r2` by level; and `objective`."""
        series = {key: [p[key] for p in self.points] for key in ("train_loss", "val_loss", "dead_ratio", "objective")}
        levels = {f"r2_k{k}": [p[f"r2_k{k}"] for p in self.points] for k in self.model.k_levels}
        return {**series, "val_r2": levels}


def fit(state: TrainState, train: Batches, validation: Batches, config: TrainingConfig) -> Iterator[Progress]:
    """Train from where `state` stands to the last epoch, yielding after each; stop early by ceasing to iterate.

    The state is whole at every yield: saved there and loaded into a fresh one, it goes on to the same weights, on the
    CPU bit for bit. Ends after `config.epochs`, after `early_stopping_patience` epochs without a better objective, or
    when a loss is no longer finite (`diverged`; that epoch is not recorded).
    """
    device = state.samples_since_fired.device
    model, choice = state.model, kernels.choose(device)
    weights = loss.level_weights(len(config.k_levels), config.weighting).to(device)
    dead_after_samples = config.dead_after_samples or train.n_rows
    steps_per_epoch = train.n_rows // train.batch_size

    while state.epoch < config.epochs and state.stop_reason is None:
        epoch, started = state.epoch + 1, time.perf_counter()
        fired = torch.zeros(model.hidden_dim, dtype=torch.bool, device=device)
        # Losses of an epoch add up on the device: reading one each step would wait for the GPU each step.
        sums = torch.zeros(2, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        learning_rate = config.learning_rate
        with _precision(config, device):
            for x in train.epoch(epoch, state.seed):
                learning_rate = learning_rate_at(state.step, steps_per_epoch * config.epochs, config)
                train_loss, aux, fired_now = _step(state, x, config, choice, weights, dead_after_samples, learning_rate)
                sums += torch.stack([train_loss, aux])
                fired |= fired_now
                state.step += 1
            _synchronize(device)
            seconds = time.perf_counter() - started
            split = _validate(model, validation, choice)
        train_loss_mean, aux_mean = (sums / steps_per_epoch).tolist()
        metrics = split.compute()
        dead_ratio = 1 - fired.sum().item() / model.hidden_dim
        samples = steps_per_epoch * train.batch_size
        metrics |= {
            "objective": objective(metrics["r2_mean"], dead_ratio),
            "dead_ratio": dead_ratio,
            "train_loss": train_loss_mean,
            "val_loss": (weights.cpu().double() @ split.mean_squared_error().double()).item(),
            "aux_loss": aux_mean,
            "learning_rate": learning_rate,
            "epoch": epoch,
            "samples_seen": state.samples_seen + samples,
            "samples_per_second": samples / seconds,
        }
        yield _finish_epoch(state, metrics, config)


@torch.no_grad()
def encoder_scale(model: MSAE, x: Tensor, config: TrainingConfig) -> float:
    """The factor c on W_enc that minimises the loss on `x` before training, 1 where there is none.

    Scaling the encoder scales every code and keeps its order, so x̂_l − pre_bias is linear in c and least squares gives
    c = Σ_l α_l ⟨x − b, x̂_l − b⟩ / Σ_l α_l ‖x̂_l − b‖². Unscaled, x̂ starts far too large and the first epochs only shrink
    it. Measured at block 20 of the real activations (40,000 rows, lr 8e-4, 4096 latents), R² at k = 16 / 128: after 200
    steps 0.52 / 0.76 unscaled and 0.63 / 0.86 scaled; after 3,264 steps 0.80 / 0.96 unscaled and 0.78 / 0.90 scaled.
    So it is for short runs, and not the default.
    """
    weights = loss.level_weights(len(config.k_levels), config.weighting)
    # On the CPU by the reference, whatever the trial's device: the same start everywhere.
    directions = model.reconstruct(x).x_hats - model.pre_bias
    along = weights @ (directions * (x - model.pre_bias)).sum(dim=(1, 2))
    size = weights @ directions.square().sum(dim=(1, 2))
    return (along / size).item() if along > 0 and size > 0 else 1.0


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, a plateau, then the chosen decay towards 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.learning_rate
    decay_steps = max(1, round(total_steps * config.decay_fraction))
    left = min(1.0, (total_steps - step) / decay_steps)
    return config.learning_rate * (left if config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)


def choose_device(config: TrainingConfig, *, holds_gpu: bool) -> torch.device:
    """The device of a trial that holds a GPU or does not; `auto` never takes a GPU that Ray has not given.

    Raises:
        DeviceError: `training.device` names a device that is not there.
    """
    if config.device == "auto":
        if holds_gpu:
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[config.device]:
        raise DeviceError(f"training.device: {config.device} is not there; write auto or cpu")
    return torch.device(config.device)


def _step(
    state: TrainState,
    x: Tensor,
    config: TrainingConfig,
    choice: kernels.Choice,
    weights: Tensor,
    dead_after_samples: int,
    learning_rate: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimiser step; returns the loss, the auxiliary loss, and bool [hidden_dim]: which latents fired."""
    model = state.model
    x_hats, values, indices = choice.reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, model.k_levels)
    total = loss.reconstruction_loss(x, x_hats, weights)
    aux = total.new_zeros(())
    # Until dead_after_samples rows have passed nothing can be dead, and looking would make the device wait.
    if config.aux_k and config.aux_coefficient and (state.step + 1) * len(x) > dead_after_samples:
        dead = state.samples_since_fired >= dead_after_samples
        aux = loss.aux_loss(x, x_hats[-1], dead, model.W_enc, model.W_dec, model.pre_bias, config.aux_k)
        total = total + config.aux_coefficient * aux
    state.optimizer.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    if config.normalize_decoder:
        model.project_decoder_gradient_()
    if config.gradient_clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    if config.normalize_decoder:
        model.normalize_decoder_()
    # Counting with integers, because it gives the same result in any order.
    counts = torch.zeros(model.hidden_dim, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, indices.flatten(), (values > 0).flatten().int())
    fired = counts > 0
    state.samples_since_fired = torch.where(fired, 0, state.samples_since_fired + len(x))
    return total.detach(), aux.detach(), fired


@torch.no_grad()
def _validate(model: MSAE, validation: Batches, choice: kernels.Choice) -> SplitMetrics:
    split = SplitMetrics(model.k_levels, model.input_dim, model.pre_bias.device)
    for x in validation.ordered():
        split.update(x, choice.reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, model.k_levels))
    return split


def _finish_epoch(state: TrainState, metrics: dict[str, float], config: TrainingConfig) -> Progress:
    epoch = int(metrics["epoch"])
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    if len(finite) < len(metrics):
        state.stop_reason = "diverged"
        return Progress(epoch, finite, False, state.stop_reason)
    is_best = not state.best_epoch or metrics["objective"] > state.points[state.best_epoch - 1]["objective"]
    state.points.append(metrics)
    if is_best:
        state.best_epoch = epoch
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


@contextlib.contextmanager
def _precision(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Matrix products in the configured arithmetic, only on CUDA; torch's global switch is put back afterwards."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=config.precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
