"""Training by autograd on any device and in any precision; the tests check the fused step against it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.sae import kernels, loss
from msae_sweep.sae.metrics import SplitMetrics
from msae_sweep.sae.state import AdamMoments, Batches, TrainState


class EpochResult(NamedTuple):
    """Result of one epoch of training; losses are means over its steps."""

    train_loss: float
    """Total loss, including the auxiliary part."""
    aux_loss: float
    dead_ratio: float
    """Share of latents that fired for no row of the epoch."""


class Engine(Protocol):
    """Interface of an engine, which trains a `TrainState`; the state is complete again after every call."""

    def train_epoch(self, train: Batches, epoch: int, learning_rates: Sequence[float]) -> EpochResult:
        """Train one epoch, with one step for each learning rate, and return when the device has finished."""

    def evaluate(self, validation: Batches, total_sum_of_squares: float) -> SplitMetrics:
        """Return the metrics of the current weights over the whole split."""


class AutogradEngine:
    """Engine that differentiates a `reconstruct` operation and passes the gradients to `torch.optim.Adam`."""

    def __init__(
        self, state: TrainState, config: TrainingConfig, reconstruct: kernels.Reconstruct, dead_after_samples: int
    ) -> None:
        self.state, self.config, self.reconstruct = state, config, reconstruct
        self.device = state.samples_since_fired.device
        self.weights = loss.level_weights(len(config.loss_levels), config.weighting).to(self.device)
        self.dead_after_samples = dead_after_samples
        self._optimizer = self._adam()

    def train_epoch(self, train: Batches, epoch: int, learning_rates: Sequence[float]) -> EpochResult:
        """Train one epoch; see `Engine.train_epoch`."""
        state = self.state
        fired = torch.zeros(state.model.hidden_dim, dtype=torch.bool, device=self.device)
        # The losses of an epoch are summed on the device: reading one each step would wait for the GPU each step.
        sums = torch.zeros(2, device=self.device, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        with _precision(self.config, self.device):
            for x, learning_rate in zip(train.epoch(epoch, state.seed), learning_rates, strict=True):
                train_loss, aux, fired_now = self.step(x, learning_rate)
                sums += torch.stack([train_loss, aux])
                fired |= fired_now
        state.moments = {
            name: AdamMoments(adam["exp_avg"], adam["exp_avg_sq"])
            for name, parameter in state.model.named_parameters()
            if (adam := self._optimizer.state.get(parameter))
        }
        train_loss_mean, aux_mean = (sums / len(learning_rates)).tolist()
        return EpochResult(train_loss_mean, aux_mean, 1 - fired.sum().item() / state.model.hidden_dim)

    @torch.no_grad()
    def evaluate(self, validation: Batches, total_sum_of_squares: float) -> SplitMetrics:
        """Return the metrics over the whole split; see `Engine.evaluate`."""
        model = self.state.model
        split = SplitMetrics(
            k_levels=model.k_levels,
            input_dim=model.input_dim,
            hidden_dim=model.hidden_dim,
            total_sum_of_squares=total_sum_of_squares,
            device=self.device,
        )
        with _precision(self.config, self.device):
            for x in validation.ordered():
                split.update(x, self.reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, model.k_levels))
        return split

    def step(self, x: Tensor, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Run one optimiser step; return the loss, the auxiliary loss, and bool [hidden_dim]: which latents fired."""
        state, config, model = self.state, self.config, self.state.model
        x_hats, values, indices = self.reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, config.loss_levels)
        total = loss.reconstruction_loss(x, x_hats, self.weights)
        aux = total.new_zeros(())
        # No latent can be dead before dead_after_samples rows have passed, and the check would make the device wait.
        if config.aux_k and config.aux_coefficient and (state.step + 1) * len(x) > self.dead_after_samples:
            dead = state.samples_since_fired >= self.dead_after_samples
            aux = loss.aux_loss(
                x=x,
                x_hat=x_hats[-1],
                dead=dead,
                W_enc=model.W_enc,
                W_dec=model.W_dec,
                pre_bias=model.pre_bias,
                aux_k=config.aux_k,
            )
            total = total + config.aux_coefficient * aux
        self._optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        if config.normalize_decoder:
            model.project_decoder_gradient_()
        if config.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        if config.normalize_decoder:
            model.normalize_decoder_()
        # Integer counts are used because they give the same result in any order of addition.
        counts = torch.zeros(model.hidden_dim, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, indices.flatten(), (values > 0).flatten().int())
        fired = counts > 0
        state.samples_since_fired = torch.where(fired, 0, state.samples_since_fired + len(x))
        state.step += 1
        return total.detach(), aux.detach(), fired

    def _adam(self) -> torch.optim.Adam:
        """Return Adam with the moments and the step count of the state's last finished epoch."""
        state, config = self.state, self.config
        # Fused Adam takes one pass over the parameters on CPU and CUDA; MPS uses torch's default.
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(
            state.model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=fused,
        )
        for name, parameter in state.model.named_parameters():
            if name in state.moments:
                mean, square = state.moments[name]
                step = torch.tensor(float(state.step), device=self.device if fused else "cpu")
                optimizer.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        return optimizer


@contextlib.contextmanager
def _precision(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Run matrix products on CUDA in the configured precision, and restore torch's global switch afterwards."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    # A GPU without bfloat16 units would only emulate bfloat16.
    bf16 = config.precision == "bf16" and torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
