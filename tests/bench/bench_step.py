"""One training step on this machine: the product's way beside the notebook's way, in one run.

    python tests/bench/bench_step.py [--batch 4096] [--input-dim 256] [--hidden-dim 4096] [--steps 7]

A step is everything that training needs: forward, loss, backward, decoder projection, Adam, unit norm. The notebook's
way takes a top-k and a dense decode for each level. Losses and gradients of both are compared first; no row is printed
if they differ. The two ways take turns, so that the ratio holds when the machine's speed drifts.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.sae import kernels, loss
from msae_sweep.sae.kernels import Reconstruction
from msae_sweep.sae.train import TrainState, _step


def notebooks_way(
    x: Tensor, W_enc: Tensor, W_dec: Tensor, pre_bias: Tensor, k_levels: tuple[int, ...]
) -> Reconstruction:
    """A top-k of its own and a dense decode for every level."""
    pre_acts = torch.relu((x - pre_bias) @ W_enc.T)
    x_hats = []
    for k in k_levels:
        values, indices = pre_acts.topk(k, dim=1)
        x_hats.append(torch.zeros_like(pre_acts).scatter(1, indices, values) @ W_dec + pre_bias)
    return Reconstruction(torch.stack(x_hats), values, indices)


def check(x: Tensor, config: TrainingConfig, choice: kernels.Choice, input_dim: int) -> None:
    """Raise AssertionError where the two ways differ."""
    weights = loss.level_weights(len(config.k_levels), config.weighting).to(x.device)
    found = []
    for reconstruct in (notebooks_way, choice.reconstruct):
        model = TrainState.create(config, input_dim, seed=0, device=x.device).model
        result = reconstruct(x, model.W_enc, model.W_dec, model.pre_bias, model.k_levels)
        loss.reconstruction_loss(x, result.x_hats, weights).backward()
        found.append([result.x_hats.detach(), model.W_enc.grad, model.W_dec.grad, model.pre_bias.grad])
    for expected, got in zip(*found, strict=True):
        error = ((got - expected).norm() / expected.norm()).item()
        assert error < 1e-4, f"the two ways differ by {error:.1e}; no timing on a red check"


def main() -> None:
    """Print a row for each way, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4096), ("input-dim", 256), ("hidden-dim", 4096), ("steps", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainingConfig(expansion_factor=args.hidden_dim / args.input_dim, batch_size=args.batch)
    torch.manual_seed(0)
    x = torch.randn(args.batch, args.input_dim, device=device)
    choice = kernels.choose(device)
    check(x, config, choice, args.input_dim)

    weights = loss.level_weights(len(config.k_levels), config.weighting).to(device)
    ways: dict[str, tuple[kernels.Choice, TrainState]] = {
        "notebook's way": (
            kernels.Choice(notebooks_way, "notebook", ""),
            TrainState.create(config, args.input_dim, seed=0, device=device),
        ),
        f"product ({choice.name})": (choice, TrainState.create(config, args.input_dim, seed=0, device=device)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(args.steps + 2):
        for name, (way, state) in ways.items():
            seconds = timed(lambda way=way, state=state: _step(state, x, config, way, weights, 10**9, 8e-4), device)
            if i >= 2:
                times[name].append(seconds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{where}; torch {torch.__version__}; commit {commit}; float32; batch {args.batch}, "
        f"{args.input_dim} -> {args.hidden_dim}, k {list(config.k_levels)}; {args.steps} steps"
    )
    for name, values in times.items():
        low, median, high = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
        print(f"{name:24} median {median * 1e3:8.1f} ms   20% {low * 1e3:8.1f}   80% {high * 1e3:8.1f}")
    slow, fast = (statistics.median(values) for values in times.values())
    print(f"ratio {slow / fast:.1f}x")


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the device's work done."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
