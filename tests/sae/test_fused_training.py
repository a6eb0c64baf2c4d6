"""Tests that the fused step trains like autograd up to bfloat16, is repeatable, and keeps no traces of other trials."""

import copy
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, and without it the fused step is not taken")

from msae_sweep.config import TrainingConfig
from msae_sweep.data.batches.loader import ResidentBatches
from msae_sweep.sae import kernels, loss
from msae_sweep.sae.engines.step_cache import StepCache
from msae_sweep.sae.kernels import fused_step, packing, sparse_cpu
from msae_sweep.sae.model import MSAE
from msae_sweep.sae.train import TrainState, fit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = kernels.EngineChoice(kernels.reference.reconstruct, "reference", "")
FUSED = kernels.EngineChoice(None, "fused", "")


def rows(n: int, input_dim: int = 16, seed: int = 0) -> Tensor:
    """Return standardised rows that are sparse combinations of 24 directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, input_dim, generator=generator), dim=1)
    codes = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.15)
    x = codes @ directions
    return ((x - x.mean(dim=0)) / x.std(dim=0)).to(DEVICE)


def config(**changes: object) -> TrainingConfig:
    # There are so few rows because a step takes seconds in Triton's interpreter.
    settings = {"k_levels": [2, 4], "expansion_factor": 2, "batch_size": 8, "epochs": 2, "learning_rate": 3e-3,
                "aux_k": 8, "dead_after_samples": 8, "encoder_init": "scaled", "seed": 1}  # fmt: skip
    return TrainingConfig.model_validate(settings | changes)


def batches(settings: TrainingConfig) -> tuple[ResidentBatches, ResidentBatches]:
    x = rows(12 + 9)
    return (
        ResidentBatches(x[:12].contiguous(), settings.batch_size),
        ResidentBatches(x[12:].contiguous(), settings.batch_size),
    )


def train(
    settings: TrainingConfig,
    choice: kernels.EngineChoice = FUSED,
    steps: StepCache | None = None,
    state: TrainState | None = None,
    until: int | None = None,
) -> TrainState:
    training, validation = batches(settings)
    if state is None:
        state = TrainState.create(settings, 16, seed=settings.seed, device=DEVICE, train=training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "choose_engine", lambda *_: choice)
        for progress in fit(state, training, validation, settings, steps):
            if progress.epoch == until:
                break
    return state


def same_bits(a: TrainState | dict[str, Any], b: TrainState | dict[str, Any]) -> bool:
    def flat(value: object) -> Iterator[object]:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                if key != "samples_per_second":
                    yield from flat(value[key])
        elif isinstance(value, list):
            for part in value:
                yield from flat(part)
        else:
            yield value.tolist() if isinstance(value, Tensor) else value

    first, second = (state.state_dict() if isinstance(state, TrainState) else state for state in (a, b))
    return list(flat(first)) == list(flat(second))


@pytest.fixture(scope="module")
def first_epoch() -> dict[str, Any]:
    """State after the first epoch, as it is saved."""
    return train(config(), until=1).state_dict()


@pytest.fixture(scope="module")
def undisturbed() -> TrainState:
    return train(config())


def test_the_fused_step_trains_as_autograd_does(undisturbed):
    expected = train(config(), REFERENCE)
    for got, wanted in zip(undisturbed.points, expected.points, strict=True):
        assert got.keys() == wanted.keys()
        for key in ("r2_k2", "r2_k4", "train_loss", "val_loss"):
            assert got[key] == pytest.approx(wanted[key], abs=0.02), key
        assert got["aux_loss"] == pytest.approx(wanted["aux_loss"], abs=0.2)  # one latent more or less may be dead
        assert got["dead_ratio"] == pytest.approx(wanted["dead_ratio"], abs=0.05)
        assert got["l0_k4"] == pytest.approx(wanted["l0_k4"], abs=0.2)
        assert got["samples_seen"] == wanted["samples_seen"]
    for state in (undisturbed, expected):
        n_active = 9 * state.points[state.best_epoch - 1]["l0_k4"]
        assert state.best_counts.sum().item() == pytest.approx(n_active), "counts of the best epoch's validation rows"
    assert undisturbed.points[-1]["aux_loss"] > 0, "no latent was dead, so the auxiliary loss was not compared"


def test_stopping_and_going_on_gives_the_same_bits_as_never_stopping(undisturbed, first_epoch):
    settings = config()
    resumed = TrainState.create(settings, 16, seed=99, device=DEVICE)
    resumed.load_state_dict(copy.deepcopy(first_epoch))
    assert same_bits(train(settings, state=resumed), undisturbed)


@pytest.mark.slow
def test_a_trial_in_a_used_process_equals_one_in_a_fresh_process(first_epoch):
    steps = StepCache()
    train(
        config(weighting="reverse", learning_rate=1e-2, seed=5, adam_beta1=0.5, aux_coefficient=0.5, epochs=1),
        steps=steps,
    )
    assert same_bits(train(config(), steps=steps, until=1).state_dict(), first_epoch)
    assert len(steps) == 1, "both have one shape and share one captured step"


def test_a_step_that_runs_out_of_memory_when_it_is_captured_gets_the_memory_of_the_others(monkeypatch):
    steps, attempts, alive = StepCache(), weakref.WeakSet(), []
    shapes = [fused_step.Shape(8, 16, 64, (4,), (4,), 0, True, False)._replace(batch=batch) for batch in (8, 16)]
    first = weakref.ref(steps.get(shapes[0], DEVICE))

    def capture(step):
        attempts.add(step)
        alive.append(len(attempts))
        if first() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused_step.FusedStep, "capture", capture)
    assert steps.get(shapes[1], DEVICE).shape == shapes[1]
    assert (len(steps), alive) == (1, [1, 1]), "the failed attempt was still held"


@pytest.mark.slow
def test_the_fused_step_goes_on_from_autograds_state_and_back():
    settings = config()
    mixed = train(settings, REFERENCE, until=1)
    mixed = train(settings, state=mixed)
    mixed = train(config(epochs=3), REFERENCE, state=mixed)
    expected = train(config(epochs=3), REFERENCE)
    for key in ("r2_k4", "val_loss"):
        assert mixed.points[-1][key] == pytest.approx(expected.points[-1][key], abs=0.02)


@pytest.mark.slow
def test_every_k_in_the_loss_measures_r2_at_four_of_them():
    settings = config(k_levels="all:16", epochs=1)
    fused_state, expected = train(settings), train(settings, REFERENCE)
    assert settings.levels == (2, 4, 8, 16)
    for key in ("r2_k2", "r2_k16", "train_loss", "val_loss"):
        assert fused_state.points[-1][key] == pytest.approx(expected.points[-1][key], abs=0.02), key


def test_a_diverged_trial_is_named_so():
    state = train(config(learning_rate=1e30, normalize_decoder=False, epochs=2))
    assert state.stop_reason == "diverged"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"weighting": "reverse", "dead": 0.5}, marks=pytest.mark.slow),
        {"batch": 37, "input_dim": 30, "hidden_dim": 44, "k_levels": (1, 3, 10)},
        pytest.param(
            {"batch": 17, "loss_levels": tuple(range(1, 13)), "k_levels": (3, 12), "dead": 0.9},
            marks=pytest.mark.slow,
        ),
        pytest.param({"batch": 1, "k_levels": (128,), "hidden_dim": 128}, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_a_whole_step_are_those_of_autograd(changes):
    changes = {"batch": 40, "input_dim": 32, "hidden_dim": 64, "k_levels": (4, 8), "dead": 0.0,
               "weighting": "uniform"} | changes  # fmt: skip
    batch, input_dim, hidden_dim = changes["batch"], changes["input_dim"], changes["hidden_dim"]
    loss_levels = changes.get("loss_levels", changes["k_levels"])
    settings = config(k_levels=changes["k_levels"], weighting=changes["weighting"])
    torch.manual_seed(0)
    model = MSAE(input_dim, hidden_dim, changes["k_levels"])
    for parameter in (model.W_enc, model.W_dec):  # the products read bfloat16, so that nothing is rounded twice
        parameter.data = parameter.data.bfloat16().float()
    model.W_enc.data += 0.125 * torch.randn(hidden_dim, input_dim).bfloat16().float()
    model.W_enc.data = model.W_enc.data.bfloat16().float()
    x = torch.randn(batch, input_dim).bfloat16().float().to(DEVICE)
    model.to(DEVICE)
    is_dead = torch.rand(hidden_dim) < changes["dead"]

    step = fused_step.FusedStep(
        fused_step.Shape(batch, input_dim, hidden_dim, changes["k_levels"], loss_levels, 16, True, False), DEVICE
    )
    step.capture()
    for moments in (step.W_enc, step.W_dec, step.pre_bias):
        for tensor in moments:
            tensor.zero_()
    step.W_enc.value[:hidden_dim, :input_dim] = model.W_enc.data
    step.W_dec.value[:hidden_dim, :input_dim] = model.W_dec.data
    step.copy_weights()
    weights = loss.level_weights(len(loss_levels), settings.weighting)
    step.level_scales.copy_(2 * weights / (batch * input_dim))
    step.rank_scales.copy_(torch.tensor(fused_step.rank_scales(step.level_scales.tolist(), loss_levels)))
    step.hyper.constants.copy_(torch.tensor([0.9, 0.999, 1e-8, 1.0]))
    step.set_schedule(torch.tensor([[1e-3, 0.03]]))
    step.aux.dead_after.fill_(7)
    step.aux.coefficient.fill_(0.25)
    step.samples_since_fired.zero_()
    step.samples_since_fired[:hidden_dim][is_dead.to(DEVICE)] = 7
    step.hyper.counters.zero_()
    step.hyper.totals.zero_()
    step.set_window(x, torch.arange(batch, device=DEVICE))
    step.train(dead_possible=True)

    # The kernel chooses which latents a row uses, which other tests check. The rest comes from autograd in float64.
    taken, latents = packing.split_codes(step.codes[:, : loss_levels[-1]])
    W_enc, W_dec = (p.detach().double().requires_grad_() for p in (model.W_enc, model.W_dec))
    bias = torch.zeros(input_dim, dtype=torch.float64, device=DEVICE, requires_grad=True)
    pre_acts = (x.double() - bias) @ W_enc.T
    values = pre_acts.gather(1, latents.long()) * (taken > 0)
    x_hat, total = bias.expand(batch, -1), torch.zeros((), dtype=torch.float64, device=DEVICE)
    for (low, high), weight in zip(zip((0, *loss_levels), loss_levels, strict=False), weights.tolist(), strict=True):
        x_hat = x_hat + (values[:, low:high, None] * W_dec[latents[:, low:high].long()]).sum(dim=1)
        total = total + weight * (x_hat - x).square().mean()
    residual = (x - x_hat).detach()
    dead_latents = is_dead.nonzero().flatten().to(DEVICE)
    aux = torch.zeros((), dtype=torch.float64, device=DEVICE)
    if len(dead_latents):
        places = torch.relu(pre_acts[:, dead_latents]).float().bfloat16().sort(dim=1, descending=True, stable=True)[1]
        chosen = torch.zeros(batch, len(dead_latents), device=DEVICE).scatter(1, places[:, :16], 1.0)
        aux = ((torch.relu(pre_acts[:, dead_latents]) * chosen) @ W_dec[dead_latents] - residual).square().sum()
        aux = aux / residual.square().sum()
    (total + 0.25 * aux).backward()

    got = step.gradients.W_dec.double()
    used = int(step.entries.cursors[1])
    got.index_add_(0, step.entries.parts[:used].long(), step.gradients.W_dec_parts[:used].double())
    assert step.hyper.totals[0].item() == pytest.approx(total.item(), rel=0.01)
    assert step.hyper.totals[1].item() == pytest.approx(aux.item(), rel=0.02)
    for name, gradient, expected in (
        ("W_dec", got[:hidden_dim, :input_dim], W_dec.grad),
        ("W_enc", step.grad_W_enc[:hidden_dim, :input_dim], W_enc.grad),
        ("pre_bias", step.bias_sums.sum(dim=0)[:input_dim], bias.grad),
    ):
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error < 0.02, f"{name}: {error:.1e}"
    for padded in (step.W_enc.value, step.W_dec.value):
        assert not padded[hidden_dim:].any()
        assert not padded[:, input_dim:].any()


def test_the_cpu_and_small_gpus_say_why_they_do_not_take_the_fused_step():
    choice = kernels.choose_engine(torch.device("cpu"), config(), 16)
    assert choice.reconstruct in (sparse_cpu.reconstruct, kernels.reference.reconstruct)
    assert choice.reason


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_precision_that_the_fused_step_has_not_is_a_said_reason(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    choice = kernels.choose_engine(torch.device("cuda"), config(precision=precision), 16)
    assert choice.name == "reference"
    assert precision in choice.reason


@pytest.mark.parametrize(
    ("changes", "input_dim", "said"),
    [
        ({"expansion_factor": 4096}, 64, "hidden_dim 262144"),
        ({"k_levels": [1024], "expansion_factor": 64}, 64, "k 1024"),
        ({}, 5000, "input_dim 5000"),
    ],
)
def test_shapes_that_are_too_large_fall_back_and_say_so(changes, input_dim, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    choice = kernels.choose_engine(torch.device("cuda"), config(**changes), input_dim)
    assert choice.name == "reference"
    assert said in choice.reason


def test_a_gpu_without_bfloat16_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "7.5" in kernels.choose_engine(torch.device("cuda"), config(), 16).reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled by every other test")
@pytest.mark.parametrize(
    "shape",
    ["notebook", "odd", "narrow", *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("widest", "most"))],
)
def test_every_kernel_compiles_for_a_gpu(shape):
    script = Path(__file__).with_name("compile_kernels.py")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, str(script), shape], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert "_update_weights" in done.stdout
