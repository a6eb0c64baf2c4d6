"""Everything that training changes: model, Adam's moments, when latents last fired, history and best weights."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.sae import loss
from msae_sweep.sae.model import MSAE, geometric_median

StopReason = Literal["epochs", "patience", "diverged"]


class Batches(Protocol):
    """Standardised rows of one split, on the trial's device; `data.batches.windows.WindowBatches` satisfies it."""

    n_rows: int
    batch_size: int

    def windows(self, epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch window by window: rows [n, input_dim] and their order [m], m a multiple of batch_size."""

    def prefetch_order(self, epoch: int, seed: int) -> None:
        """Draw now the order that `windows(epoch, seed)` will need, if it can be drawn in advance."""

    def epoch(self, epoch: int, seed: int) -> Iterator[Tensor]:
        """Yield the rows of `windows` in their order, as full batches [batch_size, input_dim]."""

    def pieces(self) -> Iterator[Tensor]:
        """Yield every row once, in order; every piece but the last has a multiple of batch_size rows."""

    def ordered(self) -> Iterator[Tensor]:
        """Yield every row once, in order, in batches; the last batch may be smaller."""


class AdamMoments(NamedTuple):
    """Adam's two moments of one parameter: float32 tensors of the parameter's shape."""

    mean: Tensor
    square: Tensor


@dataclass
class TrainState:
    """Everything that training changes. `fit` mutates it; the caller owns it and may save it between epochs."""

    model: MSAE
    seed: int
    """Seed of the order of rows; the initialisation has used it already."""
    samples_since_fired: Tensor
    """int64 [hidden_dim]: number of training rows since each latent last fired (value > 0 among the largest k)."""
    moments: dict[str, AdamMoments] = field(default_factory=dict)
    """Adam's moments of every parameter by name, as of the last finished epoch; empty before the first. While an engine
    trains, it keeps the current moments itself. The state holds no `torch.optim.Adam`, because that takes a second or
    more to import what it needs, and the fused step can do without."""
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
        """Return a fresh state; the same seed gives the same weights on every device.

        `train` provides the rows for the initialisations that depend on data (`encoder_init: scaled`, `pre_bias_init:
        geometric_median`): the first batch of the first epoch. Without `train`, these parameters are initialised as in
        the other settings, which is enough if a saved state is loaded next.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MSAE(input_dim, config.hidden_dim(input_dim), config.levels, config.weighting)
        if train is not None:
            first_batch = next(train.epoch(1, seed)).cpu()
            if config.pre_bias_init == "geometric_median":
                model.pre_bias.data = geometric_median(first_batch)
            if config.encoder_init == "scaled":
                model.W_enc.data *= encoder_scale(model, first_batch, config)
        model.to(device)
        silent = torch.zeros(model.hidden_dim, dtype=torch.int64, device=device)
        return cls(model, seed, silent)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.points)

    @property
    def samples_seen(self) -> int:
        """Number of training rows seen, counted again in every epoch."""
        return int(self.points[-1]["samples_seen"]) if self.points else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors, numbers and text only, so that `torch.load(weights_only=True)` can read it."""
        return {
            "model": self.model.state_dict(),
            "moments": {name: moments._asdict() for name, moments in self.moments.items()},
            "seed": self.seed,
            "samples_since_fired": self.samples_since_fired,
            "step": self.step,
            "points": self.points,
            "best_weights": self.best_weights,
            "best_epoch": self.best_epoch,
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, raw: dict[str, Any]) -> None:
        """Load the result of `state_dict` into this state, on this state's own device."""
        device = self.samples_since_fired.device
        self.model.load_state_dict(raw["model"])
        self.moments = {
            name: AdamMoments(**{key: tensor.to(device) for key, tensor in moments.items()})
            for name, moments in raw["moments"].items()
        }
        self.seed, self.step, self.points = raw["seed"], raw["step"], list(raw["points"])
        self.samples_since_fired = raw["samples_since_fired"].to(device)
        self.best_weights = {name: tensor.to(device) for name, tensor in raw["best_weights"].items()}
        self.best_epoch, self.stop_reason = raw["best_epoch"], raw["stop_reason"]

    def best_model(self) -> MSAE:
        """Return a copy of the model with the best epoch's weights, on the CPU."""
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.best_weights.items()}
        return MSAE(**self.model.config, parameters=weights)  # type: ignore[arg-type]

    def history(self, config: TrainingConfig) -> dict[str, Any]:
        """Return the losses, `dead_ratio` and `val_r2` by level under the notebook's names, and `objective`.

        The training loss is `train_rec_loss` + `aux_coefficient` · `train_aux_loss`.
        """
        series = {key: [p[key] for p in self.points] for key in ("train_loss", "val_loss", "dead_ratio", "objective")}
        aux = [p["aux_loss"] for p in self.points]
        series["train_aux_loss"] = aux
        series["train_rec_loss"] = [
            total - config.aux_coefficient * part for total, part in zip(series["train_loss"], aux, strict=True)
        ]
        levels = {f"r2_k{k}": [p[f"r2_k{k}"] for p in self.points] for k in self.model.k_levels}
        return {**series, "val_r2": levels}


@torch.no_grad()
def encoder_scale(model: MSAE, x: Tensor, config: TrainingConfig) -> float:
    """Return the factor c on W_enc that minimises the loss on `x` before training, or 1 if no positive c does.

    Scaling the encoder scales every code and keeps its order, so x̂_l − pre_bias is linear in c and least squares gives
    c = Σ_l α_l ⟨x − b, x̂_l − b⟩ / Σ_l α_l ‖x̂_l − b‖². Without scaling, x̂ starts far too large and the first epochs
    only shrink it. Measured at block 20 of the real activations (40,000 rows, lr 8e-4, 4096 latents), R² at k = 16 /
    128 is 0.52 / 0.76 unscaled and 0.63 / 0.86 scaled after 200 steps; after 3,264 steps it is 0.80 / 0.96 unscaled and
    0.78 / 0.90 scaled. Scaling is therefore for short runs, and not the default.
    """
    weights = loss.level_weights(len(config.levels), config.weighting)
    # Computed on the CPU by the reference, whatever the trial's device, so that every device starts the same.
    directions = model.reconstruct(x).x_hats - model.pre_bias
    along = weights @ (directions * (x - model.pre_bias)).sum(dim=(1, 2))
    size = weights @ directions.square().sum(dim=(1, 2))
    return (along / size).item() if along > 0 and size > 0 else 1.0
