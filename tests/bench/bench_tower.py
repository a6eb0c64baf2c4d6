"""Benchmark of a Leela Zero tower on this machine: positions per second of the plain and the fast way, in one run.

    python tests/bench/bench_tower.py [--weights FILE | --blocks 40 --filters 256] [--batches 256,1024,2048] [--heads]
                                      [--taps 5,20,35] [--save tests/bench/rows.md]

Planes lie on the device. A pass ends when ten points of every tap have been gathered there, and goes no further than
the last tap unless `--heads` is given. Every way is first compared with float32 on a few positions, block by block, and
no row is printed if one differs by more than the rounding errors of its type. The ways alternate, so that their ratio
holds when the machine's speed drifts. On CUDA, the fused way is also measured with cuDNN's own search for the fastest
algorithm.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import machine
import torch
from torch import Tensor

from msae_sweep.go.leela import Network, gather_points
from msae_sweep.go.weights import Weights, random_weights, read_weights

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest relative error of a tap. Rounding errors add up to 0.1% (fp16) and 0.8% (bf16) at block 35 of 40 × 256."""


class Way(NamedTuple):
    name: str
    network: Network
    search: bool = False
    """If True, cuDNN tries its algorithms at every new shape and keeps the fastest."""

    def settings(self) -> AbstractContextManager[None]:
        return torch.backends.cudnn.flags(enabled=True, benchmark=True) if self.search else nullcontext()


def ways(weights: Weights, device: torch.device) -> Iterator[Way]:
    """Yield the ways to measure. The first is the one that the others are compared with."""
    yield Way("plain fp32", Network(weights, device, "fp32", fused=False))
    if device.type != "cuda":
        yield Way("plain bf16", Network(weights, device, "bf16", fused=False))
        return
    yield Way("plain fp16", Network(weights, device, "fp16", fused=False))
    for precision in ("bf16", "fp16"):
        network = Network(weights, device, precision)
        yield Way(f"{network.choice.name} {precision}", network)
    yield Way(f"{network.choice.name} {precision}, search", network, search=True)


def random_planes(n: int, device: torch.device) -> Tensor:
    """Return planes with stones on two of five points, where black and white are to move in turn."""
    generator = torch.Generator().manual_seed(0)
    planes = (torch.rand(n, 18, 19, 19, generator=generator) < 0.2).to(torch.uint8)
    planes[:, 16] = (torch.arange(n) % 2 == 0)[:, None, None]
    planes[:, 17] = 1 - planes[:, 16]
    return planes.to(device)


def check(found: list[Way], taps: list[int], device: torch.device) -> list[str]:
    """Return the relative errors of every way by tap. Raise AssertionError if one is too large."""
    planes, lines = random_planes(8, device), []
    expected = found[0].network(planes, taps).activations
    for name, network, _ in found[1:]:
        got = network(planes, taps).activations
        errors = {b: float((got[b].float() - x).norm() / x.norm()) for b, x in expected.items()}
        limit = TOLERANCE[network.choice.dtype]
        assert max(errors.values()) < limit, f"{name}: errors {errors} exceed {limit}; no timing on a red check"
        shown = ", ".join(f"{error:.3%} at block {block}" for block, error in errors.items())
        lines.append(f"{name:18} relative error {shown}; {network.choice.reason}")
    return lines


def macs(weights: Weights, last: int) -> int:
    """Return the number of multiplications per position, up to block `last`."""
    return 361 * 9 * weights.filters * (18 + 2 * last * weights.filters)


def timed(found: list[Way], batch: int, taps: list[int], heads: bool, repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds of each pass for every way. The ways alternate."""
    device = found[0].network.device
    planes = random_planes(batch, device)
    points = torch.randint(0, 361, (batch, 10), generator=torch.Generator().manual_seed(0)).to(device)

    def one_pass(network: Network) -> Callable[[], object]:
        return lambda: [gather_points(x, points) for x in network(planes, taps, heads).activations.values()]

    times: dict[str, list[float]] = {way.name: [] for way in found}
    for i in range(repeats + 2):
        for way in found:
            with way.settings():
                took = machine.milliseconds(one_pass(way.network), device, 1, warm_up=2 if i == 0 else 0)
            times[way.name] += took if i >= 2 else []
    return times


def main() -> None:
    """Print a row for each way and batch size, and append the rows to the file given by `--save`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="Leela Zero's text weights; random ones without")
    parser.add_argument("--blocks", type=int, help="default: 40 on CUDA, 6 on a CPU")
    parser.add_argument("--filters", type=int, help="default: 256 on CUDA, 64 on a CPU")
    parser.add_argument("--batches", help="default: 256,1024,2048 on CUDA, 16,64 on a CPU")
    parser.add_argument("--taps", help="default: 5,20,35, as far as there are so many blocks, else the last block")
    parser.add_argument("--heads", action="store_true", help="the whole tower, policy and value too")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if args.weights is not None:
        weights = read_weights(args.weights)
    else:
        weights = random_weights(args.blocks or (40 if on_gpu else 6), args.filters or (256 if on_gpu else 64), seed=0)
    n_blocks = len(weights.blocks)
    taps = [int(b) for b in args.taps.split(",")] if args.taps else [b for b in (5, 20, 35) if b < n_blocks]
    taps = taps or [n_blocks - 1]
    found = list(ways(weights, device))
    kind = "given" if args.weights else "random"
    lines = [
        f"{machine.described(device)}; {n_blocks} x {weights.filters}, {kind} weights, taps {taps}, "
        f"{'with' if args.heads else 'without'} heads; {args.repeats} passes in turns",
        *check(found, taps, device),
    ]
    work = 2 * macs(weights, n_blocks if args.heads else max(taps) + 1)
    for batch in [int(b) for b in (args.batches or ("256,1024,2048" if on_gpu else "16,64")).split(",")]:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        times = timed(found, batch, taps, args.heads, args.repeats)
        baseline = machine.spread(times[found[0].name])[1]
        for name, values in times.items():
            low, median, high = machine.spread(values)
            speed = 1e3 * batch / median
            lines.append(
                f"batch {batch:5}  {name:18} median {median:8.2f} ms   20% {low:8.2f}   80% {high:8.2f}   "
                f"{speed:8,.0f} positions/s   {speed * work / 1e12:6.2f} TFLOP/s   {baseline / median:5.1f}x"
            )
        if on_gpu:
            lines.append(f"batch {batch:5}  peak {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB, all ways")
    machine.report(lines, args.save)


if __name__ == "__main__":
    main()
