"""Benchmark of a whole ASHA sweep on this machine: its duration, how that time is spent, and how busy the GPU is.

    python tests/bench/bench_sweep.py [--rows 500000] [--blocks 3] [--trials 24] [--epochs 30] [--max-gpus N]

Activations are made first, outside the timed part: sparse combinations of a random dictionary plus noise, as float16
npy chunks. The clock starts after `ray.init`. On a machine without a GPU, small numbers show what surrounds the
training: with `--rows 200 --batch-size 64` an epoch trains in about 20 ms, so nearly all of the time is overhead.

A gap is the time between the last training step of one trial and the first step of the next trial in the same worker. A
turn is the corresponding time within one trial, from report to report.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import ray
import torch
from rich.console import Console

from msae_sweep.config import parse
from msae_sweep.sweep import preparation, ray_cluster
from msae_sweep.sweep import run as sweep
from msae_sweep.sweep.callback import SweepCallback

CHUNK_ROWS = 50_000
SAMPLE_SECONDS = 0.1


def write_activations(folder: Path, blocks: int, rows: int, input_dim: int) -> None:
    """Write the rows of each block, which are sums of about sixteen of 1024 directions, with noise."""

    def write(block: int, start: int) -> None:
        rng = np.random.default_rng([block, start])
        directions = np.random.default_rng(block).standard_normal((1024, input_dim), dtype=np.float32)
        n_rows = min(CHUNK_ROWS, rows - start)
        x = 0.05 * rng.standard_normal((n_rows, input_dim), dtype=np.float32)
        for _ in range(16):
            # The square makes some directions frequent and most of them rare.
            which = (1024 * rng.random(n_rows, dtype=np.float32) ** 2).astype(np.int32)
            x += rng.exponential(size=(n_rows, 1)).astype(np.float32) * directions[which]
        np.save(folder / f"block{block}" / f"chunk_{start // CHUNK_ROWS:04d}.npy", x.astype(np.float16))

    for block in range(blocks):
        (folder / f"block{block}").mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(write, block, start) for block in range(blocks) for start in range(0, rows, CHUNK_ROWS)]
        for job in jobs:
            job.result()


class Watch:
    """Recorder that wraps functions of the sweep and keeps a list of (from, to) times by name."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.results: list[dict[str, Any]] = []

    def wrap(self, owner: Any, name: str, as_: str) -> None:
        """Record every call of `owner.name` under the name `as_`."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans[as_].append((started, time.time()))

        setattr(owner, name, timed)

    def watch_results(self) -> None:
        """Keep the reports of all trials."""
        on_trial_result = SweepCallback.on_trial_result

        def keeping(monitor: SweepCallback, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            self.results.append(
                {key: result.get(key) for key in ("hostname", "pid", "trained", "epoch")}
                | {"trial_id": trial.config["trial"]["trial_id"], "heard": time.time()}
            )
            on_trial_result(monitor, iteration, trials, trial, result, **info)

        SweepCallback.on_trial_result = keeping  # type: ignore[method-assign]

    def seconds(self, name: str) -> float:
        """Return the seconds of all recorded calls together."""
        return sum(end - start for start, end in self.spans[name])


class GpuUse:
    """Sampler that reads how busy the GPUs are, in percent, from nvidia-smi. It has no samples if there is none."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, float]] = []

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Take samples while the context is open."""
        if shutil.which("nvidia-smi") is None:
            yield
            return
        command = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
        process = subprocess.Popen(
            [*command, f"--loop-ms={round(1000 * SAMPLE_SECONDS)}"], stdout=subprocess.PIPE, text=True
        )
        thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            process.terminate()
            thread.join()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            index, percent = line.split(",")
            self.samples.append((time.time(), int(index), float(percent)))

    def mean(self, start: float, end: float, n_gpus: int) -> float | None:
        """Return the mean over the first `n_gpus` devices between two times, or None without samples."""
        values = [percent for at, index, percent in self.samples if start <= at <= end and index < n_gpus]
        return statistics.mean(values) if values else None


def gaps(results: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return the seconds in which a worker did not train: between trials, and between reports of one trial."""
    between, within = [], []
    workers = defaultdict(list)
    for result in results:
        if result["trained"]:
            workers[result["hostname"], result["pid"]].append(result)
    for reports in workers.values():
        for before, after in itertools.pairwise(reports):
            gap = after["trained"][0] - before["trained"][1]
            (within if before["trial_id"] == after["trial_id"] else between).append(gap)
    return between, within


def spread(values: list[float]) -> str:
    """Return the median and the 90th percentile as text."""
    if len(values) < 2:
        return "–"
    return (
        f"median {statistics.median(values):.3f} s, 90% {statistics.quantiles(values, n=10)[-1]:.3f} s ({len(values)})"
    )


def main() -> None:
    """Run one sweep and print its measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 500_000), ("blocks", 3), ("trials", 24), ("epochs", 30), ("batch-size", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--input-dim", type=int, default=256)
    parser.add_argument("--expansions", type=float, nargs="+", default=[16])
    parser.add_argument("--gpu-share", type=float, default=1.0, help="GPUs a trial, where there is one")
    parser.add_argument("--max-gpus", type=int, help="of those that are there")
    parser.add_argument("--set", action="append", default=[], help="as for msae-sweep run")
    parser.add_argument("--save", type=Path, help="append the row to this file, as JSON")
    args = parser.parse_args()
    n_gpus = min(torch.cuda.device_count(), args.max_gpus if args.max_gpus is not None else 10**9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_activations(folder / "activations", args.blocks, args.rows, args.input_dim)
        os.sync()  # otherwise pending writes would happen during the measurement
        space = f"""
            name: bench
            data: {{path: {folder}/activations}}
            space:
              learning_rate: {{loguniform: [2.0e-4, 4.0e-3]}}
              expansion_factor: {{choice: {args.expansions}}}
              weighting: {{choice: [uniform, reverse]}}
            training: {{epochs: {args.epochs}, batch_size: {args.batch_size}}}
            search: {{trials_per_block: {args.trials}}}
            asha: {{grace_epochs: 3, reduction_factor: 3}}
            resources: {{gpu: {args.gpu_share if n_gpus else 0}}}
            tracking: {{uri: "sqlite:///{folder}/mlflow.db"}}
            storage: {folder}/sweeps
        """
        config = parse(space, args.set)
        connect(n_gpus)
        watch, use = Watch(), GpuUse()
        for owner, function, as_ in (
            (sweep, "check_blocks", "check"),
            (preparation.shards, "prepare_blocks", "prepare"),
            (sweep.Tuning, "run", "tune"),
            (sweep.final_files, "write", "summary"),
            (sweep.Tracker, "close", "tracking"),
        ):
            watch.wrap(owner, function, as_)
        watch.watch_results()
        with use.sampling(), open(folder / "log", "w", encoding="utf-8") as log:
            started = time.time()
            outcome = sweep.run(config, command="bench", console=Console(file=log, width=160))
            ended = time.time()
        row = summarise(args, watch, use, outcome, started, ended, n_gpus)
    for key, value in row.items():
        print(f"{key:18} {value}")
    if args.save:
        with open(args.save, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    ray.shutdown()


def connect(n_gpus: int) -> None:
    """Call `ray_cluster.connect`, but let Ray have only `n_gpus` GPUs."""
    init: Callable[..., Any] = ray.init
    ray.init = lambda **options: init(**options, num_gpus=n_gpus)  # type: ignore[assignment]
    ray_cluster.connect()
    ray.init = init


def summarise(
    args: Any, watch: Watch, use: GpuUse, outcome: Any, started: float, ended: float, n_gpus: int
) -> dict[str, Any]:
    """Return the row of one sweep."""
    trials = [trial for block in outcome.summary["blocks"].values() for trial in block["trials"]]
    (tune_from, tune_to), wall = watch.spans["tune"][0], ended - started
    trained = [result for result in watch.results if result["trained"]]
    first = min(result["trained"][0] for result in trained)
    last = max(result["trained"][1] for result in trained)
    training = sum(result["trained"][1] - result["trained"][0] for result in trained)
    workers = {(result["hostname"], result["pid"]) for result in trained}
    slots = round(n_gpus / args.gpu_share) if n_gpus else min(len(workers), os.cpu_count() or 1)
    share = training / slots
    between, within = gaps(watch.results)
    busy, busy_trials = use.mean(started, ended, n_gpus), use.mean(first, last, n_gpus)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    driver = ""
    if n_gpus:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{n_gpus} x {torch.cuda.get_device_name()}, driver {driver}"
        if n_gpus
        else f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "software": f"torch {torch.__version__}, ray {ray.__version__}, commit {commit}",
        "sweep": f"{len(trials)} trials, {args.blocks} blocks x {args.rows:,} rows, {args.epochs} epochs, "
        f"batch {args.batch_size}, expansions {args.expansions}, {sum(t['epochs'] for t in trials)} epochs in all",
        "wall": f"{wall:.1f} s",
        "trials per minute": f"{60 * len(trials) / wall:.1f} over the wall, "
        f"{60 * len(trials) / (last - first):.1f} from first to last step",
        "check": f"{watch.seconds('check'):.1f} s",
        "preparation": f"{watch.spans['prepare'][-1][1] - watch.spans['prepare'][0][0]:.1f} s",
        "first step": f"{first - tune_from:.1f} s after tuning began, {first - started:.1f} s after the start",
        "trials": f"{last - first:.1f} s first to last step; training {training:.1f} s in {len(workers)} processes",
        "tuning's end": f"{tune_to - last:.1f} s after the last step",
        "summary": f"{watch.seconds('summary'):.1f} s",
        "tracking": f"{watch.seconds('tracking'):.1f} s, {outcome.tracking}",
        "gap": spread(between),
        "turn": spread(within),
        "training share": f"{share / wall:.0%} of the wall, {share / (last - first):.0%} of trials",
        "GPU busy": "–" if busy is None else f"{busy:.0f}% of the wall, {busy_trials or 0:.0f}% of trials",
    }


if __name__ == "__main__":
    main()
