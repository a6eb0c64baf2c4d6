import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.errors import DeviceError
from msae_sweep.sae import train
from msae_sweep.sae.engines.autograd import AutogradEngine
from msae_sweep.sae.kernels import reference
from msae_sweep.sae.train import TrainState, choose_device, fit, learning_rate_at

CPU = torch.device("cpu")


class Rows:
    """Batches with only what `fit` asks of them."""

    def __init__(self, x: Tensor, batch_size: int) -> None:
        self.x, self.n_rows, self.batch_size = x, len(x), batch_size

    def epoch(self, epoch: int, seed: int) -> Iterator[Tensor]:
        order = torch.randperm(self.n_rows, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        for start in range(0, self.n_rows - self.batch_size + 1, self.batch_size):
            yield self.x[order[start : start + self.batch_size]]

    def ordered(self) -> Iterator[Tensor]:
        return iter(self.x.split(self.batch_size))


def planted(rows: int = 2200, seed: int = 0) -> tuple[Rows, Rows]:
    """Return training and validation rows with four active directions out of 32 in 16 dimensions, standardised."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    active = torch.rand(rows, 32, generator=generator).argsort(dim=1) < 4
    x = (active * (1 + torch.rand(rows, 32, generator=generator))) @ dictionary
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    return Rows(x[200:], 200), Rows(x[:200], 200)


def config(**changes: object) -> TrainingConfig:
    settings = {"k_levels": [2, 4, 8], "expansion_factor": 4, "batch_size": 200, "epochs": 6, "aux_k": 8}
    return TrainingConfig.model_validate({**settings, "learning_rate": 3e-3, **changes})


def train_fresh(settings: TrainingConfig, seed: int = 0) -> tuple[TrainState, list[train.Progress]]:
    rows, validation = planted()
    state = TrainState.create(settings, 16, seed=seed, device=CPU, train=rows)
    return state, list(fit(state, rows, validation, settings))


def test_training_improves_r2_at_every_level():
    _, progress = train_fresh(config(epochs=20))
    first, last = progress[0].metrics, progress[-1].metrics
    assert all(last[f"r2_k{k}"] > first[f"r2_k{k}"] for k in (2, 4, 8))
    assert last["r2_k8"] > 0.8
    assert last["train_loss"] < first["train_loss"]


def test_progress_has_every_named_metric_each_epoch():
    _, progress = train_fresh(config(epochs=2))
    names = {*(f"{m}_k{k}" for m in ("r2", "l0") for k in (2, 4, 8)), "r2_mean", "objective", "dead_ratio"}
    names |= {"train_loss", "val_loss", "aux_loss", "learning_rate", "epoch", "samples_seen", "samples_per_second"}
    assert [set(p.metrics) for p in progress] == [names, names]
    assert [p.metrics["samples_seen"] for p in progress] == [2000, 4000]
    assert [p.stop_reason for p in progress] == [None, "epochs"]


@pytest.mark.parametrize("changes", [{}, {"warmup_steps": 15, "decay": "cosine", "gradient_clip": 0.5}])
def test_stop_and_resume_gives_the_same_weights_bit_for_bit(changes):
    settings = config(dead_after_samples=400, **changes)
    whole, whole_progress = train_fresh(settings)

    rows, validation = planted()
    state = TrainState.create(settings, 16, seed=0, device=CPU, train=rows)
    for progress in fit(state, rows, validation, settings):
        if progress.epoch == 3:
            break
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    resumed = TrainState.create(settings, 16, seed=99, device=CPU)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    rest = list(fit(resumed, rows, validation, settings))

    assert [p.epoch for p in rest] == [4, 5, 6]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    for name, tensor in whole.best_weights.items():
        assert torch.equal(tensor, resumed.best_weights[name]), name
    same = [{k: v for k, v in p.items() if k != "samples_per_second"} for p in whole.points]
    assert same == [{k: v for k, v in p.items() if k != "samples_per_second"} for p in resumed.points]
    assert whole_progress[-1].stop_reason == rest[-1].stop_reason


def test_the_seed_decides_the_result_and_the_global_generator_does_not():
    torch.manual_seed(5)
    first, _ = train_fresh(config(epochs=2), seed=1)
    torch.manual_seed(6)
    second, _ = train_fresh(config(epochs=2), seed=1)
    third, _ = train_fresh(config(epochs=2), seed=2)
    assert torch.equal(first.model.W_dec, second.model.W_dec)
    assert not torch.equal(first.model.W_dec, third.model.W_dec)


def test_decoder_rows_keep_unit_norm():
    state, _ = train_fresh(config(epochs=2))
    torch.testing.assert_close(state.model.W_dec.norm(dim=1), torch.ones(64))
    free, _ = train_fresh(config(epochs=2, normalize_decoder=False))
    assert (free.model.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_the_best_weights_are_those_of_the_epoch_with_the_highest_objective():
    settings = config(epochs=8, learning_rate=0.02)
    state, progress = train_fresh(settings)
    objectives = [p.metrics["objective"] for p in progress]
    assert state.best_epoch == objectives.index(max(objectives)) + 1
    _, validation = planted()
    best = state.best_model()
    x = validation.x
    r2 = 1 - ((best(x) - x) ** 2).sum().item() / ((x - x.mean(dim=0)) ** 2).sum().item()
    assert r2 == pytest.approx(progress[state.best_epoch - 1].metrics["r2_k8"], abs=1e-5)


def test_training_ends_after_patience_epochs_without_a_better_objective(monkeypatch):
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    monkeypatch.setattr(train, "objective", lambda r2_mean, dead_ratio: next(scores))
    state, progress = train_fresh(config(epochs=6, early_stopping_patience=3))
    assert (len(progress), state.best_epoch, state.stop_reason) == (5, 2, "patience")


def test_a_diverged_loss_ends_training_by_name_and_no_metric_is_nan():
    state, progress = train_fresh(config(learning_rate=1e30, normalize_decoder=False))
    assert progress[-1].stop_reason == "diverged"
    assert all(torch.isfinite(torch.tensor(list(p.metrics.values()))).all() for p in progress)
    assert len(state.points) == len(progress) - 1


def test_latents_that_never_fire_count_as_dead_and_aux_k_wakes_them():
    rows, validation = planted()
    ratios = {}
    for aux_k in (0, 16):
        settings = config(epochs=12, aux_k=aux_k, aux_coefficient=1.0, dead_after_samples=400)
        state = TrainState.create(settings, 16, seed=0, device=CPU)
        # Half of the encoder is scaled down: its pre_acts are small and never among the top 8.
        state.model.W_enc.data[:32] *= 1e-3
        ratios[aux_k] = [p.metrics["dead_ratio"] for p in fit(state, rows, validation, settings)]
    assert ratios[0][0] > 0.4
    assert ratios[0][-1] > 0.4
    assert ratios[16][-1] < 0.1


def test_dead_latents_are_counted_by_samples_since_they_fired():
    settings = config(epochs=1, learning_rate=1e-9)
    rows, validation = planted()
    state = TrainState.create(settings, 16, seed=0, device=CPU)
    state.model.W_enc.data[0] = 0
    list(fit(state, rows, validation, settings))
    assert state.samples_since_fired[0] == 2000
    assert (state.samples_since_fired[1:] < 2000).any()


def test_a_single_level_is_a_plain_topk_sae():
    _, progress = train_fresh(config(k_levels=[4], epochs=2))
    assert {key for key in progress[-1].metrics if key.startswith("r2_k")} == {"r2_k4"}


def test_uniform_and_reverse_train_different_models():
    uniform, _ = train_fresh(config(epochs=1))
    reverse, _ = train_fresh(config(epochs=1, weighting="reverse"))
    assert not torch.equal(uniform.model.W_dec, reverse.model.W_dec)


def test_the_geometric_median_start_is_used():
    settings = config(pre_bias_init="geometric_median")
    state = TrainState.create(settings, 16, seed=0, device=CPU, train=planted()[0])
    assert state.model.pre_bias.abs().max() > 0


def test_the_encoder_starts_at_the_scale_with_the_least_loss():
    rows, _ = planted()
    x = next(rows.epoch(1, 0))
    settings = config(weighting="reverse", encoder_init="scaled")

    def loss_at(factor: float) -> float:
        state = TrainState.create(settings, 16, seed=0, device=CPU, train=rows)
        state.model.W_enc.data *= factor
        x_hats = state.model.reconstruct(x).x_hats
        return train.loss.reconstruction_loss(x, x_hats, train.loss.level_weights(3, "reverse")).item()

    assert loss_at(1) < min(loss_at(0.97), loss_at(1.03))
    unscaled = TrainState.create(config(encoder_init="transpose"), 16, seed=0, device=CPU, train=rows).model
    assert torch.equal(unscaled.W_enc, unscaled.W_dec)


def test_learning_rate_warms_up_then_decays():
    settings = config(learning_rate=1.0, warmup_steps=4, decay="linear", decay_fraction=0.5)
    rates = [learning_rate_at(step, 20, settings) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert {learning_rate_at(step, 20, config(learning_rate=1.0)) for step in range(20)} == {1.0}


def test_history_is_in_the_notebooks_form():
    settings = config(epochs=3)
    state, _ = train_fresh(settings)
    history = state.history(settings)
    series = {"train_loss", "train_rec_loss", "train_aux_loss", "val_loss", "dead_ratio"}
    assert set(history) == series | {"objective", "val_r2"}
    assert set(history["val_r2"]) == {"r2_k2", "r2_k4", "r2_k8"}
    assert all(len(history[key]) == 3 for key in series)
    for total, rec, aux in zip(*(history[f"train_{key}loss"] for key in ("", "rec_", "aux_")), strict=True):
        assert total == pytest.approx(rec + settings.aux_coefficient * aux)


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceError, match="cuda is not available"):
        choose_device(config(device="cuda"), holds_gpu=False)
    assert choose_device(config(), holds_gpu=False).type in ("cpu", "mps")


def test_all_k_puts_every_k_into_the_loss_and_measures_r2_at_four():
    settings = config(k_levels="all:8", aux_k=0, epochs=1)
    rows, validation = planted()
    state = TrainState.create(settings, 16, seed=0, device=CPU, train=rows)
    x = next(rows.epoch(1, 0))
    losses = [(state.model(x, k) - x).square().mean().item() for k in range(1, 9)]
    loss, _, _ = AutogradEngine(state, settings, reference.reconstruct, 10**9).step(x, 1e-3)
    assert loss.item() == pytest.approx(sum(losses) / 8, rel=1e-5)
    (progress,) = fit(state, rows, validation, settings)
    assert {k for k in progress.metrics if k.startswith("r2_k")} == {"r2_k1", "r2_k2", "r2_k4", "r2_k8"}
    assert state.best_model().k_levels == (1, 2, 4, 8)
