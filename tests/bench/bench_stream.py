"""Benchmark of the loader with short training steps: rows per second, streamed beside resident, in one run.

    python tests/bench/bench_stream.py [--rows 446396] [--input-dim 256] [--batch 4096] [--step-ms 0.2] [--save FILE]

A stand-in for training gathers each batch and multiplies matrices for about `--step-ms`; on CUDA, the products are one
CUDA graph. Shards lie in shared memory, read-only, as in Ray's object store. The content of an epoch is checked first,
and no row is printed if it is wrong. The ways alternate, with several epochs each, of which the first is not counted.
Later ones begin with windows that were gathered while the previous epoch ended, as in training. On a GPU, the product's
own training at expansion 16, with no latent dead, is measured beside the stand-in.

`--register` also measures a rejected alternative: shards are page-locked in place and copied whole, without host
threads.
"""

import argparse
import mmap
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msae_sweep.config import TrainingConfig
from msae_sweep.data.batches.loader import ResidentBatches, ShardFetcher, StreamedBatches, WindowBatches, _tensor
from msae_sweep.data.batches.prefetch import n_gather_threads
from msae_sweep.data.batches.stream import WINDOW_BYTES
from msae_sweep.sae.train import StepCache, TrainState, _engine

Step = Callable[[Tensor, Tensor], None]
"""Function of a window's rows and the numbers of a batch's rows."""

NUMBER = 2.0**-19
"""Factor of a row's number, which keeps it from being an outlier among normal numbers. It is exact in float32."""

NEVER = 10**15
"""Number of rows after which a latent is dead."""


def make_shards(n_rows: int, input_dim: int, shard_rows: int) -> list[np.ndarray]:
    """Return random rows in shared memory. The first column is the row's number times `NUMBER`."""
    generator = np.random.default_rng(0)
    shards = []
    for start in range(0, n_rows, shard_rows):
        shape = (min(shard_rows, n_rows - start), input_dim)
        memory = mmap.mmap(-1, 4 * shape[0] * shape[1])  # this memory is shared, as forked processes would see it
        shard = np.frombuffer(memory, dtype=np.float32).reshape(shape)
        generator.standard_normal(out=shard, dtype=np.float32)
        shard[:, 0] = NUMBER * np.arange(start, start + shape[0])
        shard.flags.writeable = False
        shards.append(shard)
    return shards


def check(batches: WindowBatches) -> None:
    """Raise AssertionError if an epoch or the ordered rows are not what they should be."""
    seen = torch.cat([x[:, 0] / NUMBER for x in batches.epoch(1, 0)]).long()
    assert len(seen) == batches.n_rows - batches.n_rows % batches.batch_size, "rows are missing"
    assert len(seen.unique()) == len(seen), "a row came twice"
    ordered = torch.cat([x[:, 0] / NUMBER for x in batches.ordered()]).long()
    assert torch.equal(ordered.cpu(), torch.arange(batches.n_rows)), "rows are not in order"


def busy_step(batch_size: int, input_dim: int, step_ms: float, device: torch.device) -> Step:
    """Return a step that gathers a batch and then multiplies matrices for about `step_ms`."""
    on_gpu = device.type == "cuda"
    size = 2048 if on_gpu else 256
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    out = torch.empty_like(a)
    batch = torch.empty(batch_size, input_dim, device=device)

    def products(n: int) -> None:
        for _ in range(n):
            torch.mm(a, a, out=out)

    products(20)
    synchronize(device)
    n = round(step_ms / 1e3 / (timed(lambda: products(200), device) / 200))
    work: Callable[[], None] = lambda: products(n)  # noqa: E731
    if on_gpu and n:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            products(n)
        work = graph.replay

    def step(rows: Tensor, numbers: Tensor) -> None:
        torch.index_select(rows, 0, numbers, out=batch)
        work()

    step.operands = a, out  # the graph reads and writes these tensors, but does not keep them alive
    return step


def run_epoch(batches: WindowBatches, epoch: int, step: Step | None) -> None:
    """Run every batch of an epoch, or only gather its windows if there is no step."""
    for rows, order in batches.windows(epoch, 0):
        if step is not None:
            for numbers in torch.split(order, batches.batch_size):
                step(rows, numbers)


def trained(batches: WindowBatches, input_dim: int, device: torch.device) -> Callable[[int], object]:
    """Return a function that runs an epoch of the product's training, given its number."""
    settings = {"batch_size": batches.batch_size, "learning_rate": 1e-4, "seed": 0, "dead_after_samples": NEVER}
    config = TrainingConfig.model_validate(settings)
    state = TrainState.create(config, input_dim, seed=0, device=device, train=batches)
    engine = _engine(state, batches, config, StepCache())
    rates = [config.learning_rate] * (batches.n_rows // batches.batch_size)
    return lambda epoch: engine.train_epoch(batches, epoch, rates)


def registered(shards: list[np.ndarray], device: torch.device) -> str:
    """Return the cost of page-locking the shards in place, and the speed at which they are copied then, as text."""
    cudart, read_only = torch.cuda.cudart(), 8
    n_bytes = sum(shard.nbytes for shard in shards)
    target = torch.empty(max(map(len, shards)), shards[0].shape[1], device=device)
    locked: list[np.ndarray] = []
    started = time.perf_counter()
    try:
        for shard in shards:
            error = int(cudart.cudaHostRegister(shard.ctypes.data, shard.nbytes, read_only))
            if error:
                return f"page-locking in place fails: cudaError {error}"
            locked.append(shard)
        seconds = time.perf_counter() - started

        def copy_all() -> None:
            for shard in shards:
                target[: len(shard)].copy_(_tensor(shard), non_blocking=True)

        copy_all()
        copying = min(timed(copy_all, device) for _ in range(5))
        return (
            f"page-locking in place {seconds * 1e3:.0f} ms once, then whole shards {n_bytes / copying / 1e9:.1f} GB/s"
        )
    finally:
        torch.cuda.synchronize(device)
        for shard in locked:
            cudart.cudaHostUnregister(shard.ctypes.data)


def main() -> None:
    """Print a row for each way, the share of the resident speed, and the memory that streaming takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 446396), ("input-dim", 256), ("batch", 4096), ("window-mib", WINDOW_BYTES >> 20), ("shard-mib", 32),
        ("threads", 0), ("epochs", 8), ("rounds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-ms", type=float, default=0.2)
    parser.add_argument("--register", action="store_true", help="measure page-locked shards too (CUDA)")
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrays = make_shards(args.rows, args.input_dim, (args.shard_mib << 20) // (4 * args.input_dim))
    shards: list[ShardFetcher] = [lambda array=array: array for array in arrays]  # type: ignore[misc]
    n_threads = args.threads or n_gather_threads(device)
    step = busy_step(args.batch, args.input_dim, args.step_ms, device)

    before = reset_peak(device)
    streamed = StreamedBatches(
        shards, args.rows, args.input_dim, args.batch, device, args.window_mib << 20, n_threads=n_threads
    )
    run_epoch(streamed, 1, step)
    memory = f"streaming: {(peak(device) - before) / 2**20:.0f} MiB of the device at its peak, "
    memory += f"{pinned_bytes(streamed) / 2**20:.0f} MiB pinned"
    resident = ResidentBatches.load(shards, args.rows, args.input_dim, args.batch, device)
    for batches in (streamed, resident):
        check(batches)

    ways: dict[str, Callable[[int], object]] = {
        "resident": lambda epoch: run_epoch(resident, epoch, step),
        "streamed": lambda epoch: run_epoch(streamed, epoch, step),
        "streamed, no steps": lambda epoch: run_epoch(streamed, epoch, None),
    }
    if device.type == "cuda":
        ways["training, resident"] = trained(resident, args.input_dim, device)
        ways["training, streamed"] = trained(streamed, args.input_dim, device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds):
        for name, run in ways.items():
            first = 100 * round_ + 1
            for epoch in range(first, first + args.epochs + 1):
                seconds = timed(lambda r=run, e=epoch: r(e), device)  # type: ignore[misc]
                if epoch > first:
                    times[name].append(seconds)

    n_used = args.rows - args.rows % args.batch
    lines = [
        f"{machine(device)}; torch {torch.__version__}; commit {commit()}; {args.rows:,} x {args.input_dim} float32 in "
        f"{len(shards)} shards, batch {args.batch}, step {args.step_ms:g} ms; windows of {args.window_mib} MiB, "
        f"{n_threads} threads; {args.rounds} x {args.epochs} epochs"
    ]
    for name, values in times.items():
        low, median, high = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
        lines.append(
            f"{name:20} median {median * 1e3:8.1f} ms   20% {low * 1e3:8.1f}   80% {high * 1e3:8.1f}   "
            f"{n_used / median / 1e6:6.2f} M rows/s   {4 * n_used * args.input_dim / median / 1e9:5.1f} GB/s"
        )
    for what in ("", "training, ") if device.type == "cuda" else ("",):
        share = statistics.median(times[f"{what}resident"]) / statistics.median(times[f"{what}streamed"])
        lines.append(f"{what}streamed at {share:.0%} of the resident speed")
    lines.append(memory)
    if args.register and device.type == "cuda":
        lines.append(registered(arrays, device))
    print("\n".join(lines))
    if args.save:
        with args.save.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes, including the device's work."""
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Start to count the device's peak memory, and return the bytes that tensors hold now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def pinned_bytes(batches: StreamedBatches) -> int:
    """Return the pinned bytes of the buffers that are kept after an epoch. torch rounds each up to a power of two."""
    assert batches._kept.pipeline is not None
    return sum(1 << (host.nbytes - 1).bit_length() for host in batches._kept.pipeline.buffers.host if host.is_pinned())


def machine(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return f"{torch.cuda.get_device_name()}, driver {driver}"


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
