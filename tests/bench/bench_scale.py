"""Benchmark of the driver of a large sweep on one machine: the cost of scheduling when training costs nothing.

    python tests/bench/bench_scale.py [--trials 1000] [--gpus 40] [--seconds 8] [--tracking-uri URI] [--storage WHERE]

Everything is the product's own (plan, scheduler, records, journal, display, MLflow) except the trial. A trial sleeps
its share of `--seconds` from rung to rung, reports 30 epochs and writes a small model, in a worker that holds a fake
GPU. Because ASHA stops trials, a trial takes a quarter of `--seconds` on average. The worker processes are started
beforehand, as the nodes of a cluster start theirs in parallel. `lost` is the share of the GPUs' time in which no trial
slept, from when all workers have reported until no trial is left to start. Ray's idle processes take 2% of a core each,
so two cores are too few for 64 of them.
"""

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import machine
import psutil
import ray
import torch
from ray import tune
from rich.console import Console

from msae_sweep.config import parse
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.sweep import run as sweep
from msae_sweep.sweep import tuning
from msae_sweep.sweep.callback import SweepCallback
from msae_sweep.sweep_folder.folder import SweepFolder

EPOCHS = 30


class SleepingTrial(tune.Trainable):  # type: ignore[misc]
    """Trial as the driver sees it, in a worker without torch."""

    def setup(self, config: dict[str, Any], *, seconds: float, start: float, folder: SweepFolder, model: bytes) -> None:
        """Set up the worker, once per process. It takes up to twice `start` seconds."""
        (folder.path / "begun").mkdir(parents=True, exist_ok=True)
        (folder.path / "begun" / str(os.getpid())).touch()
        time.sleep(start * random.uniform(0, 2))
        self._seconds, self._folder, self._model = seconds, folder, model
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial."""
        spec = new_config["trial"]
        self._id, self._rungs, self._epoch = spec["trial_id"], spec["rungs"], 0
        rng = random.Random(self._id)
        self._best, self._pace = rng.random(), 1 + rng.random()
        return True

    def step(self) -> dict[str, Any]:
        """Sleep until the next rung."""
        first, until = self._epoch, min([r for r in self._rungs if r > self._epoch], default=EPOCHS)
        slept = self._seconds * (until - first) / EPOCHS
        time.sleep(slept)
        self._epoch = until
        self._folder.write(self._folder.model_file(self._id), self._model, durable=False)
        return {
            "points": [self._point(epoch) for epoch in range(first + 1, until + 1)],
            "rungs": [[rung, self._point(rung)["objective"]] for rung in self._rungs if rung <= until],
            "epoch": until,
            "seconds": self._seconds * until / EPOCHS,
            "status": "completed" if until == EPOCHS else "running",
            "reason": "epochs" if until == EPOCHS else "",
            "done": until == EPOCHS,
            "heard_from": time.time(),
            "slept": slept,
            "worker": os.getpid(),
        }

    def _point(self, epoch: int) -> dict[str, float]:
        r2 = self._best * (1 - 0.5 ** (self._pace * epoch / 5))
        levels = {f"r2_k{k}": r2 for k in (16, 32, 64, 128)} | {f"l0_k{k}": float(k) for k in (16, 32, 64, 128)}
        rest = {"r2_mean": r2, "objective": r2, "dead_ratio": 0.0, "train_loss": 1 - r2, "val_loss": 1 - r2}
        return {**levels, **rest, "aux_loss": 0.0, "learning_rate": 1e-3, "epoch": float(epoch)}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return the epoch that a paused trial has reached."""
        return {"epoch": self._epoch}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Continue from the epoch of a checkpoint."""
        self._epoch = checkpoint["epoch"] if checkpoint else 0


class Heard(NamedTuple):
    """Result as the driver received it. Times are in seconds."""

    at: float
    worker: int
    trial: str
    said_at: float
    slept: float
    posted: int


def start_workers(n_gpus: int, folder: Path) -> None:
    """Start a process per GPU that imports what a trial needs, and wait until all of them exist at the same time."""
    folder.mkdir()

    @ray.remote(num_cpus=1, num_gpus=1)
    def up() -> None:
        import ray.tune  # noqa: F401

        (folder / str(os.getpid())).touch()
        while len(list(folder.iterdir())) < n_gpus:
            time.sleep(1)

    ray.get([up.remote() for _ in range(n_gpus)])


def lost(heard: list[Heard], n_gpus: int) -> tuple[float, float]:
    """Return the share of the GPUs' time in which no trial slept, and the seconds that were considered."""
    first_of_worker, first_of_trial = {}, {}
    for one in heard:
        first_of_worker.setdefault(one.worker, one.said_at)
        first_of_trial.setdefault(one.trial, one.said_at - one.slept)
    begin, end = sorted(first_of_worker.values())[:n_gpus][-1], max(first_of_trial.values())
    asleep = sum(max(0.0, min(one.said_at, end) - max(one.said_at - one.slept, begin)) for one in heard)
    return 1 - asleep / (n_gpus * (end - begin)), end - begin


def main() -> None:
    """Run one sweep and print its costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a trial that is not stopped early")
    parser.add_argument(
        "--start",
        type=float,
        default=0.0,
        help="seconds that a worker sleeps when it starts, on average; 0 to twice that",
    )
    parser.add_argument("--tracking-uri", help="default: SQLite in the temporary folder")
    parser.add_argument("--storage", help="default: the temporary folder")
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        machine.report(measured(args, Path(name)), args.save)


def measured(args: argparse.Namespace, folder: Path) -> list[str]:
    """Run the sweep and return the rows to print."""
    space = f"""
        name: scale
        data: {{path: planted, blocks: [5, 20], planted: {{rows: 3000, input_dim: 16}}}}
        space: {{learning_rate: {{loguniform: [2.0e-4, 4.0e-3]}}, weighting: {{choice: [uniform, reverse]}}}}
        training: {{epochs: {EPOCHS}, batch_size: 128, expansion_factor: 16}}
        search: {{trials_per_block: {args.trials // 2}}}
        asha: {{grace_epochs: 3, reduction_factor: 3}}
        resources: {{gpu: 1}}
        storage: {args.storage or folder / "sweeps"}
        tracking: {{uri: "{args.tracking_uri or f"sqlite:///{folder}/mlflow.db"}"}}
    """
    ray.init(num_cpus=args.gpus + 2, num_gpus=args.gpus, include_dashboard=False, log_to_driver=False)
    start_workers(args.gpus, folder / "up")
    of_epoch = dict.fromkeys(("train_loss", "val_loss", "dead_ratio"), [0.0] * EPOCHS)
    history = {**of_epoch, "val_r2": {f"r2_k{k}": [0.0] * EPOCHS for k in (16, 32, 64, 128)}}
    sae = MSAE(16, 256, [16, 32, 64, 128])
    file = model_file.ModelFile(sae, torch.zeros(16).numpy(), torch.ones(16).numpy(), history)
    model_file.save(file, folder / "model.pt")
    model = (folder / "model.pt").read_bytes()
    with_parameters = tune.with_parameters

    def sleeping(trainable: type, **parameters: Any) -> Any:
        """Replace the trial that trains by the one that sleeps."""
        own = {"seconds": args.seconds, "start": args.start, "model": model}
        return with_parameters(SleepingTrial, folder=parameters["folder"], **own)

    tuning.tune.with_parameters = sleeping
    heard: list[Heard] = []
    on_trial_result = SweepCallback.on_trial_result

    def listening(
        monitor: SweepCallback, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        reported = (result["worker"], trial.trial_id, result["heard_from"], result["slept"])
        heard.append(Heard(time.time(), *reported, monitor._record_writer.n_waiting))
        on_trial_result(monitor, iteration, trials, trial, result, **info)

    SweepCallback.on_trial_result = listening  # type: ignore[method-assign]
    trackers: list[Any] = []
    start = sweep.Tracker.start
    sweep.Tracker.start = lambda *a, **k: trackers.append(start(*a, **k)) or trackers[-1]  # type: ignore[method-assign]
    behind: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            behind.extend(tracker.status.pending for tracker in trackers)

    threading.Thread(target=watch, daemon=True).start()
    before, cpu_before = psutil.Process().memory_info().rss, sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    with open(folder / "log", "w", encoding="utf-8") as log:
        outcome = sweep.run(parse(space, []), command="bench", console=Console(file=log, width=160))
    ended.set()
    trials = [trial for block in outcome.summary["blocks"].values() for trial in block["trials"]]
    wall = heard[-1].at - heard[0].at
    share, seconds = lost(heard, args.gpus)
    slept = sum(one.slept for one in heard)
    events = len((outcome.folder.path / "journal" / "events.jsonl").read_bytes().splitlines())
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu_before
    begun = list((outcome.folder.path / "begun").iterdir())
    first_of_worker: dict[int, float] = {}
    for one in heard:
        first_of_worker.setdefault(one.worker, one.said_at - one.slept)
    up = max(first_of_worker.values()) - heard[0].at
    latency = [one.at - one.said_at for one in heard]
    stopped = sum(trial["status"] == "stopped_early" for trial in trials)
    return [
        f"{machine.described(torch.device('cpu'))}; load {os.getloadavg()[0]:.1f}; {len(trials)} trials of "
        f"{slept / len(trials):.1f} s ({stopped} stopped early), {args.gpus} fake GPUs, "
        f"MLflow by {args.tracking_uri or 'SQLite'}",
        f"lost                 {share:8.1%} of {args.gpus} GPUs' time in {seconds:.1f} s; from first to last report "
        f"{wall:.1f} s, asleep {slept / args.gpus:.1f} s a GPU",
        f"workers              {len(begun):8} begun, {len(first_of_worker)} of which trained, the last of them from "
        f"{up:.1f} s after the first result on",
        f"results              {len(heard) / wall:8.1f} a second, heard after a median of "
        f"{1e3 * statistics.median(latency):.0f} ms (90%: {1e3 * statistics.quantiles(latency, n=10)[-1]:.0f} ms)",
        f"driver's CPU         {1e3 * cpu / len(trials):8.1f} ms a trial, MLflow's client not in it; "
        f"memory + {(psutil.Process().memory_info().rss - before) / 2**10 / len(trials):.0f} KiB a trial",
        f"journal              {events / wall:8.1f} events a second, {max(behind, default=0):,} at most not sent yet; "
        f"most writes waiting {max(one.n_waiting for one in heard)}",
        f"MLflow at the end    {json.dumps(str(outcome.tracking))}",
    ]


if __name__ == "__main__":
    main()
