"""Training by the fused step: one captured graph per step, and one transfer to the host per epoch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.sae import loss
from msae_sweep.sae.engines.autograd import EpochResult
from msae_sweep.sae.engines.step_cache import StepCache
from msae_sweep.sae.kernels import adam
from msae_sweep.sae.kernels.fused_step import SCHEDULE_STEPS, Shape, rank_scales
from msae_sweep.sae.metrics import SplitMetrics
from msae_sweep.sae.state import AdamMoments, Batches, TrainState


class FusedEngine:
    """Engine that trains one trial's weights in a `FusedStep`, and copies them to the state after every epoch."""

    def __init__(
        self, state: TrainState, config: TrainingConfig, batch_size: int, dead_after_samples: int, steps: StepCache
    ) -> None:
        self.state, self.config = state, config
        self.batch_size, self.dead_after_samples = batch_size, dead_after_samples
        shape = Shape(
            batch=batch_size,
            input_dim=state.model.input_dim,
            hidden_dim=state.model.hidden_dim,
            k_levels=config.levels,
            loss_levels=config.loss_levels,
            aux_k=config.aux_k if config.aux_coefficient else 0,
            normalize_decoder=config.normalize_decoder,
            clips=config.gradient_clip is not None,
        )
        self.fused_step = steps.get(shape, state.samples_since_fired.device)
        self._set_hyperparameters(shape)
        self._load_state()
        self._longest_silent = int(state.samples_since_fired.max())
        self._corrections: tuple[int, np.ndarray] | None = None

    def train_epoch(self, train: Batches, epoch: int, learning_rates: Sequence[float]) -> EpochResult:
        """Train one epoch; see `Engine.train_epoch`."""
        step, state = self.fused_step, self.state
        schedule = _schedule(learning_rates, self._corrections_of(len(learning_rates)))
        done = 0
        for rows, order in train.windows(epoch, state.seed):
            step.set_window(rows, order)
            for _ in range(len(order) // self.batch_size):
                if done % SCHEDULE_STEPS == 0:
                    step.set_schedule(schedule[done : done + SCHEDULE_STEPS])
                # As long as the latent that has been silent longest is not dead, none is; then the device decides.
                step.train(dead_possible=self._longest_silent + done * self.batch_size >= self.dead_after_samples)
                done += 1
        step.forget_window()
        if epoch < self.config.epochs:
            # The device is still busy with the queued steps, and can draw the next order concurrently.
            train.prefetch_order(epoch + 1, state.seed)
        assert done == len(learning_rates), f"{done} batches, {len(learning_rates)} expected"
        state.step += done
        self._store_state()
        # The copies are made anew every epoch, so that an epoch after a resume starts as after another epoch.
        step.copy_weights()
        hidden_dim = state.model.hidden_dim
        counts = torch.stack([step.fired[:hidden_dim].sum(), state.samples_since_fired.max()])
        results = torch.cat([step.hyper.totals, counts.double()])
        # These calls come before the host waits for the device; afterwards the device would wait for the host.
        self._clear_sums()
        self._corrections_of(done)
        main, aux, n_fired, longest_silent = results.tolist()
        self._longest_silent = int(longest_silent)
        return EpochResult(
            train_loss=(main + self.config.aux_coefficient * aux) / done,
            aux_loss=aux / done,
            dead_ratio=1 - n_fired / hidden_dim,
        )

    def evaluate(self, validation: Batches, total_sum_of_squares: float) -> SplitMetrics:
        """Return the metrics over the whole split; see `Engine.evaluate`."""
        step, model = self.fused_step, self.state.model
        split = SplitMetrics(
            k_levels=model.k_levels,
            input_dim=model.input_dim,
            hidden_dim=model.hidden_dim,
            total_sum_of_squares=total_sum_of_squares,
            device=step.device,
        )
        for sums in (step.error_sums, step.active_sums, step.activation_counts):
            sums.zero_()
        n_rows = 0
        for piece in validation.pieces():
            step.set_window(piece, None)
            for _ in range(0, len(piece), self.batch_size):
                step.evaluate()
            n_rows += len(piece)
        step.forget_window()
        split.add(n_rows, step.error_sums, step.active_sums, step.activation_counts[: model.hidden_dim])
        return split

    def _set_hyperparameters(self, shape: Shape) -> None:
        step, config = self.fused_step, self.config
        # The gradient of α · mean((x̂ − x)²) in x̂ is 2 α / (batch · input_dim) · (x̂ − x).
        weights = loss.level_weights(len(shape.loss_levels), config.weighting)
        scales = (2 * weights.double() / (shape.batch * shape.input_dim)).float()
        step.level_scales.copy_(scales)
        step.rank_scales.copy_(torch.tensor(rank_scales(scales.tolist(), shape.loss_levels)))
        clip = float("inf") if config.gradient_clip is None else config.gradient_clip
        step.hyper.constants.copy_(torch.tensor([config.adam_beta1, config.adam_beta2, config.adam_eps, clip]))
        step.aux.dead_after.fill_(self.dead_after_samples)
        step.aux.coefficient.fill_(config.aux_coefficient)

    def _load_state(self) -> None:
        step, state = self.fused_step, self.state
        for name, parameter in state.model.named_parameters():
            padded = self._padded(name)
            for tensor in padded:
                tensor.zero_()
            _inner(padded.value, parameter).copy_(parameter.detach())
            if name in state.moments:
                _inner(padded.mean, parameter).copy_(state.moments[name].mean)
                _inner(padded.square, parameter).copy_(state.moments[name].square)
        step.samples_since_fired.zero_()
        step.samples_since_fired[: state.model.hidden_dim].copy_(state.samples_since_fired)
        step.copy_weights()
        self._clear_sums()

    def _corrections_of(self, n_steps: int) -> np.ndarray:
        """Return Adam's bias corrections of the next steps; cached, so that they can be computed in advance."""
        before, kept = self.state.step, self._corrections
        if kept is None or kept[0] != before or len(kept[1]) != n_steps:
            kept = self._corrections = before, _bias_corrections(n_steps, before, self.config)
        return kept[1]

    def _clear_sums(self) -> None:
        """Reset the sums that are accumulated over an epoch."""
        self.fused_step.hyper.totals.zero_()
        self.fused_step.fired.zero_()

    @torch.no_grad()
    def _store_state(self) -> None:
        step, state = self.fused_step, self.state
        for name, parameter in state.model.named_parameters():
            padded = self._padded(name)
            parameter.copy_(_inner(padded.value, parameter))
            state.moments[name] = AdamMoments(
                _inner(padded.mean, parameter).clone(), _inner(padded.square, parameter).clone()
            )
        state.samples_since_fired = step.samples_since_fired[: state.model.hidden_dim].clone()

    def _padded(self, name: str) -> adam.AdamParameter:
        """Return the padded tensors of the parameter `name` and of its moments."""
        padded: adam.AdamParameter = getattr(self.fused_step, name)
        return padded


def _inner(padded: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a padded tensor that the parameter occupies."""
    return padded[tuple(slice(size) for size in parameter.shape)]


def _bias_corrections(n_steps: int, steps_before: int, config: TrainingConfig) -> np.ndarray:
    """Return 1 − β₁^t and sqrt(1 − β₂^t) of the next steps, [steps, 2] in float64."""
    t = np.arange(1, n_steps + 1) + steps_before
    return np.stack([1 - config.adam_beta1**t, np.sqrt(1 - config.adam_beta2**t)], axis=1)


def _schedule(learning_rates: Sequence[float], corrections: np.ndarray) -> Tensor:
    """Return learning_rate / (1 − β₁^t) and sqrt(1 − β₂^t), [steps, 2], computed in float64 and stored in float32.

    `FusedStep.set_schedule` copies them to the device. Each step, a kernel of `kernels/bias_gradient.py` copies the
    step's row to where `_adam` in `kernels/adam.py` reads it.
    """
    schedule = corrections.astype(np.float32)
    schedule[:, 0] = np.asarray(learning_rates) / corrections[:, 0]
    return torch.from_numpy(schedule)
