"""Benchmark of whole trials: their time once the rows are on the device, and a check of their quality and exact bits.

    python tests/bench/bench_trial.py [--data FOLDER --block 20] [--save tests/bench/rows.md]

Time: a trial has 446,396 training rows x 30 epochs, with validation on 53,604 rows after each, as in the notebook. The
first trial of a process, which compiles and captures, is reported beside the median of later ones. Between them, trials
of other shapes run. The same trial must give the same bits every time, and device memory must not have grown at the
end.

Quality: the same seed and steps are trained by the product's way and by the plain reference in float32, on --data's
block or on random rows. R² at every k and dead_ratio are shown side by side. On a CPU, all sizes are smaller.
"""

import argparse
import statistics
import time
from pathlib import Path

import machine
import torch
from bench_step import rows_of
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.data.batches.loader import ResidentBatches
from msae_sweep.sae import kernels
from msae_sweep.sae.engines.step_cache import StepCache
from msae_sweep.sae.train import TrainState, fit


def trial(
    settings: TrainingConfig, train: ResidentBatches, validation: ResidentBatches, steps: StepCache
) -> tuple[float, TrainState]:
    """Return the seconds from a trial's first line of code to its last epoch's metrics, and the state at its end."""
    device = train.x.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    state = TrainState.create(settings, train.x.shape[1], seed=settings.seed or 0, device=device, train=train)
    for _ in fit(state, train, validation, settings, steps):
        pass
    return time.perf_counter() - started, state


def weights(state: TrainState) -> list[Tensor]:
    return [tensor.clone() for tensor in state.model.state_dict().values()]


def timing(args: argparse.Namespace, device: torch.device) -> list[str]:
    x = rows_of(args.data, args.block, args.rows, args.input_dim, device)
    n_val = round(args.rows * 53_604 / 500_000)
    train, validation = ResidentBatches(x[n_val:], args.batch), ResidentBatches(x[:n_val], args.batch)
    base = TrainingConfig(batch_size=args.batch, epochs=args.epochs, early_stopping_patience=None, seed=0)
    others = [
        base.model_copy(update={"expansion_factor": 8.0, "weighting": "reverse", "seed": 1, "epochs": 2}),
        base.model_copy(update={"expansion_factor": 32.0, "learning_rate": 3e-3, "seed": 2, "epochs": 2}),
    ]
    steps = StepCache()
    first_seconds, state = trial(base, train, validation, steps)
    first_bits, later, held = weights(state), [], []
    for i in range(args.trials):
        trial(others[i % 2], train, validation, steps)
        seconds, state = trial(base, train, validation, steps)
        later.append(seconds)
        same = all(torch.equal(a, b) for a, b in zip(first_bits, weights(state), strict=True))
        assert same, f"trial {2 * i + 2} of the process has other bits than the first; no timing on a red check"
        if device.type == "cuda":
            held.append(torch.cuda.memory_allocated(device) / 2**20)
    low, median, high = machine.spread(later)
    point = state.points[-1]
    r2 = " ".join(f"{point[f'r2_k{k}']:.4f}" for k in base.levels)
    lines = [
        f"{len(train.x):,} rows x {args.epochs} epochs + validation on {n_val:,}: first trial of the process "
        f"{first_seconds:.2f} s, later ones median {median:.3f} s   20% {low:.3f}   80% {high:.3f}",
        f"  {statistics.median(p['samples_per_second'] for p in state.points) / 1e6:.2f} M rows/s while training; "
        f"R² {r2}, dead {point['dead_ratio']:.1%}",
        f"  the same bits in all of {args.trials + 1}, with trials of other shapes between them",
    ]
    if held:
        at = min(4, len(held) - 1)
        early, late = (f"{held[i]:,.0f} MiB after {2 * i + 3} trials" for i in (at, len(held) - 1))
        lines.append(f"  device memory: {early}, {late}")
        assert held[-1] <= held[at] + 1, "memory grows"
    return lines


def quality(args: argparse.Namespace, device: torch.device) -> list[str]:
    x = rows_of(args.data, args.block, args.quality_rows, args.input_dim, device)
    n_val = len(x) // 11
    train, validation = ResidentBatches(x[n_val:], args.batch), ResidentBatches(x[:n_val], args.batch)
    lines = []
    for weighting in ("uniform", "reverse"):
        base = TrainingConfig.model_validate(
            {"batch_size": args.batch, "epochs": args.quality_epochs, "early_stopping_patience": None, "seed": 0,
             "weighting": weighting, "k_levels": args.k_levels}
        )  # fmt: skip
        points = {}
        for name, settings in (
            ("float32", base.model_copy(update={"precision": "fp32"})),
            (kernels.choose_engine(device, base, x.shape[1]).name, base),
        ):
            seconds, state = trial(settings, train, validation, StepCache())
            points[name] = point = state.points[-1]
            r2 = " ".join(f"k={k} {point[f'r2_k{k}']:.4f}" for k in base.levels)
            lines.append(f"  {weighting:8} {name:12} R² {r2}   dead {point['dead_ratio']:.4f}   {seconds:.1f} s")
        a, b = points.values()
        off = max(abs(a[f"r2_k{k}"] - b[f"r2_k{k}"]) for k in base.levels)
        dead = abs(a["dead_ratio"] - b["dead_ratio"])
        lines.append(f"  {weighting:8} apart by at most {off:.4f} in R², {dead:.4f} in dead_ratio")
    n_steps = args.quality_epochs * (len(train.x) // args.batch)
    rows = "real" if args.data else "random"
    return [f"quality, k levels {args.k_levels}, {len(train.x):,} {rows} rows, {n_steps:,} steps:", *lines]


def main() -> None:
    """Print the rows, and append them to the file given by `--save`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, help="activation folder; random rows without")
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--rows", type=int, default=500_000 if on_gpu else 4_000)
    parser.add_argument("--input-dim", type=int, default=256 if on_gpu else 64)
    parser.add_argument("--batch", type=int, default=4096 if on_gpu else 512)
    parser.add_argument("--epochs", type=int, default=30 if on_gpu else 2)
    parser.add_argument("--trials", type=int, default=10 if on_gpu else 2)
    parser.add_argument("--quality-rows", type=int, default=40_000 if on_gpu else 4_000)
    parser.add_argument("--quality-epochs", type=int, default=360 if on_gpu else 2)
    parser.add_argument("--k-levels", default=[16, 32, 64, 128], help="of the quality part; all:128 for every k")
    parser.add_argument("--skip-timing", action="store_true", help="quality alone")
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    lines = [f"{machine.described(device)}; batch {args.batch}, {args.input_dim} -> 16x, k 16/32/64/128"]
    if not args.skip_timing:
        lines += timing(args, device)
    machine.report(lines + quality(args, device), args.save)


if __name__ == "__main__":
    main()
