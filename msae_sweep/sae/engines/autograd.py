"""Training by autograd: any device, any precision, and the plain way that the fused step is held against."""

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
    """What an epoch of training gives; means over its steps."""

    train_loss: float
    """Of the whole loss, auxiliary part included."""
    aux_loss: float
    dead_ratio: float
    """Share of latents that fired for no row of the epoch."""


class Engine(Protocol):
    """Something that trains a `TrainState`, which is whole again after every call."""

    def train_epoch(self, train: Batches, epoch: int, learning_rates: Sequence[float]) -> EpochResult:
        """One epoch, a step for each learning rate; returns when the device is done."""

    def evaluate(self, validation: Batches, total_variance: float) -> SplitMetrics:
        """R² and the rest over the whole split, with the weights as they are."""


class AutogradEngine:
    """Batches through a `reconstruct`, its gradients through `torch.optim.Adam`."""

    def __init__(
        self, state: TrainState, config: TrainingConfig, reconstruct: kernels.Reconstruct, dead_after_samples: int
    ) -> None:
        self.state, self.config, self.reconstruct = state, config, reconstruct
        self.device = state.samples_since_fired.device
        self.weights = loss.level_weights(len(config.loss_levels), config.weighting).to(self.device)
        self.dead_after_samples = dead_after_samples
        self._optimizer = self._adam()

    def train_epoch(self, train: Batches, epoch: int, learning_rates: Sequence[float]) -> EpochResult:
        """See `Engine`."""
        state = self.state
        fired = torch.zeros(state.model.hidden_dim, dtype=torch.bool, device=self.device)
        # Losses of an epoch add up on the device: reading one each step would wait for the GPU each step.
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
    def evaluate(self, validation: Batches, total_variance: float) -> SplitMetrics:
        """See `Engine`."""
        model = self.state.model
        split = SplitMetrics(model.k_levels, model.input_dim, total_variance, self.device)
        with _precision(self.config, self.device):
            for x in validation.ordered():
                split.update(x, self.reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, model.k_levels))
        return split

    def step(self, x: Tensor, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """One optimiser step; returns the loss, the auxiliary loss, and bool [hidden_dim]: which latents fired."""
        state, config, model = self.state, self.config, self.state.model
        x_hats, values, indices = self.reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, config.loss_levels)
        total = loss.reconstruction_loss(x, x_hats, self.weights)
        aux = total.new_zeros(())
        # Until dead_after_samples rows have passed nothing can be dead, and looking would make the device wait.
        if config.aux_k and config.aux_coefficient and (state.step + 1) * len(x) > self.dead_after_samples:
            dead = state.samples_since_fired >= self.dead_after_samples
            aux = loss.aux_loss(x, x_hats[-1], dead, model.W_enc, model.W_dec, model.pre_bias, config.aux_k)
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
        # Counting with integers, because it gives the same result in any order.
        counts = torch.zeros(model.hidden_dim, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, indices.flatten(), (values > 0).flatten().int())
        fired = counts > 0
        state.samples_since_fired = torch.where(fired, 0, state.samples_since_fired + len(x))
        state.step += 1
        return total.detach(), aux.detach(), fired

    def _adam(self) -> torch.optim.Adam:
        """Adam as it stood at the state's last epoch."""
        state, config = self.state, self.config
        # Fused Adam is one pass over the parameters on CPU and CUDA; MPS takes torch's default.
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
    """Matrix products in the configured arithmetic, only on CUDA; torch's global switch is put back afterwards."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    # A GPU without bfloat16 units would only emulate it.
    bf16 = config.precision == "bf16" and torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
