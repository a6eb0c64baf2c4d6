"""Benchmark of one training step on this machine: the product's ways beside the notebook's way, in one run.

    python tests/bench/bench_step.py [--data FOLDER --block 20] [--expansions 8,16,32,64] [--save tests/bench/rows.md]

A step is everything that training needs: fetching the rows, forward pass, loss, auxiliary loss, backward pass,
projection, Adam, unit norm, and counting which latents fired. The notebook's way takes a top-k and a dense decode for
each level, in float32. The losses of both are compared first, and no row is printed if they differ. On CUDA, the
product's own loop is timed epoch by epoch with everything between the steps, and its time is divided by its steps. With
25% of the latents dead, single steps are timed, each of which begins with the same latents dead. On a CPU, the two ways
alternate, so that their ratio holds when the machine's speed drifts. Rows are random combinations of 4096 directions,
or those of --data, repeated up to --rows.
"""

import argparse
from pathlib import Path

import machine
import torch
from torch import Tensor

from msae_sweep.config import DataConfig, TrainingConfig
from msae_sweep.data.batches.loader import ResidentBatches
from msae_sweep.data.sources.catalog import open_source
from msae_sweep.sae import kernels
from msae_sweep.sae.engines.autograd import AutogradEngine
from msae_sweep.sae.engines.step_cache import StepCache
from msae_sweep.sae.kernels import Reconstruction
from msae_sweep.sae.train import TrainState, _engine

NEVER = 10**15


def notebooks_way(
    x: Tensor, W_enc: Tensor, W_dec: Tensor, pre_bias: Tensor, k_levels: tuple[int, ...]
) -> Reconstruction:
    """Reconstruct x with a separate top-k and a dense decode for every level."""
    pre_acts = torch.relu((x - pre_bias) @ W_enc.T)
    x_hats = []
    for k in k_levels:
        values, indices = pre_acts.topk(k, dim=1)
        x_hats.append(torch.zeros_like(pre_acts).scatter(1, indices, values) @ W_dec + pre_bias)
    return Reconstruction(torch.stack(x_hats), values, indices)


def rows_of(data: Path | None, block: int, n_rows: int, input_dim: int, device: torch.device) -> Tensor:
    """Return standardised rows [n_rows, input_dim]."""
    generator = torch.Generator().manual_seed(0)
    if data is not None:
        source = open_source(DataConfig(path=str(data)))
        x = torch.cat([torch.from_numpy(source.read(r).x).float() for r in source.row_ranges(block, 8192)])
        x = x.repeat(-(-n_rows // len(x)), 1)[:n_rows]
    else:
        directions = torch.randn(4096, input_dim, generator=generator)
        x = torch.zeros(n_rows, input_dim)
        for _ in range(16):
            which = (4096 * torch.rand(n_rows, generator=generator) ** 2).long()
            x += torch.rand(n_rows, 1, generator=generator) * directions[which]
    std = x.std(dim=0)
    return ((x - x.mean(dim=0)) / torch.where(std > 0, std, 1)).to(device)


def fresh(config: TrainingConfig, batches: ResidentBatches, device: torch.device) -> TrainState:
    return TrainState.create(config, batches.x.shape[1], seed=0, device=device, train=batches)


def losses(config: TrainingConfig, batches: ResidentBatches, device: torch.device, reconstruct: object) -> list[float]:
    """Return the mean loss of each of two epochs of three steps."""
    few = ResidentBatches(batches.x[: 3 * config.batch_size].contiguous(), config.batch_size)
    state = fresh(config, few, device)
    if reconstruct is None:
        engine = _engine(state, few, config, None)
    else:
        engine = AutogradEngine(state, config, reconstruct, NEVER)
    return [engine.train_epoch(few, epoch, [config.learning_rate] * 3).train_loss for epoch in (1, 2)]


def check(config: TrainingConfig, batches: ResidentBatches, device: torch.device) -> None:
    """Raise AssertionError if the product's losses differ from those of the notebook's way."""
    expected = losses(config.model_copy(update={"precision": "fp32"}), batches, device, notebooks_way)
    got = losses(config, batches, device, None)
    for a, b in zip(got, expected, strict=True):
        assert abs(a / b - 1) < 0.01, f"losses {got}, expected {expected}; no timing on a red check"


def epoch_times(engine: object, batches: ResidentBatches, lr: float, device: torch.device, epochs: int) -> list[float]:
    """Return the milliseconds per step of every epoch in the product's own loop."""
    n_steps = batches.n_rows // batches.batch_size
    numbers = iter(range(1, 1000))
    run = lambda: engine.train_epoch(batches, next(numbers), [lr] * n_steps)  # noqa: E731
    return [ms / n_steps for ms in machine.milliseconds(run, device, epochs, warm_up=3)]


def row(name: str, times: list[float], device: torch.device, baseline: float | None = None) -> str:
    low, median, high = machine.spread(times)
    ratio = "" if baseline is None else f"   {baseline / median:5.1f}x"
    peak = f"   {torch.cuda.max_memory_allocated(device) / 2**20:7,.0f} MiB" if device.type == "cuda" else ""
    return f"{name:44} median {median:8.3f} ms   20% {low:8.3f}   80% {high:8.3f}{peak}{ratio}"


def fused_rows(
    config: TrainingConfig, batches: ResidentBatches, device: torch.device, epochs: int, baseline: float | None
) -> list[str]:
    """Return the rows of one expansion: the loop with no latent dead, steps with aux-k, and validation."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    state = fresh(config, batches, device)
    engine = _engine(state, batches, config, StepCache())
    engine.dead_after_samples = NEVER  # so that no latent is dead
    engine.step.aux.dead_after.fill_(NEVER)
    name = f"fused, expansion {config.expansion_factor:g}"
    lines = [row(f"{name}, none dead", epoch_times(engine, batches, 1e-4, device, epochs), device, baseline)]
    step, hidden_dim = engine.step, state.model.hidden_dim
    (window,) = batches.windows(1, 0)
    step.set_window(*window)
    step.set_schedule(torch.tensor([[1e-9, 1.0]]).expand(4096, 2))
    for share in (0.0, 0.25):
        since = torch.zeros_like(step.samples_since_fired)
        dead = torch.randperm(hidden_dim, generator=torch.Generator().manual_seed(0))[: int(share * hidden_dim)]
        since[dead.to(device)] = 2 * NEVER

        def ten_steps(since: Tensor = since) -> None:
            for _ in range(10):
                step.hyper.counters.zero_()
                step.samples_since_fired.copy_(since)
                step.train(dead_possible=True)

        times = [ms / 10 for ms in machine.milliseconds(ten_steps, device, 20)]
        lines.append(row(f"  aux-k at work, {share:.0%} of the latents dead", times, device))
    times = [ms / 10 for ms in machine.milliseconds(lambda: [step.evaluate() for _ in range(10)], device, 10)]
    return [*lines, row("  validation, a step", times, device)]


def on_cuda(args: argparse.Namespace, x: Tensor, device: torch.device) -> list[str]:
    lines = []
    expansions = [float(e) for e in args.expansions.split(",")]
    batches = ResidentBatches(x, args.batch)

    def config(expansion: float, **changes: object) -> TrainingConfig:
        settings = {"expansion_factor": expansion, "batch_size": args.batch, "learning_rate": 1e-4, "seed": 0}
        return TrainingConfig.model_validate(settings | changes)

    check(config(16), batches, device)
    few = ResidentBatches(x[: 20 * args.batch].contiguous(), args.batch)
    baseline = None
    for name, precision, reconstruct in (
        ("notebook's way, fp32", "fp32", notebooks_way),
        ("notebook's way, bf16", "bf16", notebooks_way),
        ("plain reference, fp32", "fp32", kernels.reference.reconstruct),
    ):
        torch.cuda.reset_peak_memory_stats(device)
        settings = config(16, precision=precision)
        engine = AutogradEngine(fresh(settings, few, device), settings, reconstruct, NEVER)
        times = epoch_times(engine, few, 1e-4, device, 5)
        baseline = baseline or machine.spread(times)[1]
        lines.append(row(f"{name}, expansion 16", times, device, baseline))
        del engine
    for expansion in expansions:
        same = baseline if expansion == 16 else None
        lines += fused_rows(config(expansion), batches, device, args.epochs, same)
    four = config(16)
    every = config(16, k_levels=f"all:{four.levels[-1]}")
    for settings, name in ((four, "fused, expansion 16, four levels"), (every, "fused, expansion 16, every k to 128")):
        torch.cuda.reset_peak_memory_stats(device)
        engine = _engine(fresh(settings, batches, device), batches, settings, None)
        engine.dead_after_samples = NEVER
        engine.step.aux.dead_after.fill_(NEVER)
        lines.append(row(name, epoch_times(engine, batches, 1e-4, device, args.epochs), device, baseline))
    return lines


def on_cpu(args: argparse.Namespace, x: Tensor, device: torch.device) -> list[str]:
    config = TrainingConfig(batch_size=args.batch, expansion_factor=float(args.expansions.split(",")[0]))
    batches = ResidentBatches(x, args.batch)
    check(config, batches, device)
    choice = kernels.choose_engine(device, config, x.shape[1])
    engines = {
        "notebook's way": AutogradEngine(fresh(config, batches, device), config, notebooks_way, NEVER),
        f"product ({choice.name})": AutogradEngine(fresh(config, batches, device), config, choice.reconstruct, NEVER),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    batch = x[: args.batch]
    for i in range(args.epochs + 2):
        for name, engine in engines.items():
            times[name] += machine.milliseconds(lambda engine=engine: engine.step(batch, 8e-4), device, 1, 0)[i < 2 :]
    baseline = machine.spread(next(iter(times.values())))[1]
    return [row(name, values, device, baseline) for name, values in times.items()]


def main() -> None:
    """Print a row for each way, and append the rows to the file given by `--save`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="activation folder; random rows without")
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--rows", type=int, help="default: 446,396 on CUDA, three batches on a CPU")
    parser.add_argument("--input-dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--expansions", help="default: 8,16,32,64 on CUDA, 16 on a CPU")
    parser.add_argument("--epochs", type=int, default=7, help="timed epochs (CUDA) or steps (CPU)")
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    args.expansions = args.expansions or ("8,16,32,64" if on_gpu else "16")
    x = rows_of(args.data, args.block, args.rows or (446_396 if on_gpu else 3 * args.batch), args.input_dim, device)
    lines = [
        f"{machine.described(device)}; batch {args.batch}, input_dim {x.shape[1]}, k 16/32/64/128, "
        f"{'real' if args.data else 'random'} rows, {args.epochs} {'epochs' if on_gpu else 'steps'}"
    ]
    machine.report(lines + (on_cuda if on_gpu else on_cpu)(args, x, device), args.save)


if __name__ == "__main__":
    main()
