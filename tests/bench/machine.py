"""Functions that the benchmarks share: they describe the machine, summarise times, and print and keep rows."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def described(device: torch.device) -> str:
    """Return GPU and driver, or processor and threads, with the versions of torch and Triton and the commit."""
    versions = f"torch {torch.__version__}"
    try:
        import triton

        versions += f", triton {triton.__version__}"
    except ImportError:
        pass
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        where = f"{torch.cuda.get_device_name(device)}, driver {driver}"
    else:
        where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{where}; {versions}; commit {commit()}"


def commit() -> str:
    """Return the short hash of the checkout, with + if it has changes, or ? outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "?"


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 2) -> list[float]:
    """Return times of `run` in milliseconds, including the device's work: by events on CUDA, otherwise by the clock."""
    times = []
    for i in range(warm_up + repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            elapsed = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - began)
        if i >= warm_up:
            times.append(elapsed)
    return times


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th percentile, the median and the 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], statistics.median(values), tenths[7]


def report(lines: Sequence[str], save: Path | None) -> None:
    """Print lines, and append them to a file of rows."""
    text = "\n".join(lines)
    print(text, flush=True)
    if save is not None:
        with save.open("a", encoding="utf-8") as file:
            file.write(f"```\n{text}\n```\n")
