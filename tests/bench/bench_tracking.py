"""Benchmark of a driver that reports a thousand trials to MLflow: cost of a call, and how far the sender falls behind.

    python tests/bench/bench_tracking.py [--trials 1000] [--epochs 30] [--at-once 16] [--seconds 16] [--server WHERE]

Journal, sender and models are the product's own; only training is left out. `--at-once` trials run side by side, for
`--seconds` each. One epoch of all of them is reported, then the next one when it is due. The model has 8 MB
(256 x 4,096) unless --hidden-dim says otherwise. `--server postgres` is `mlflow server` on PostgreSQL with artifacts in
an S3 store, all on this machine. `sqlite` is what a sweep on one machine uses. Anything else is a tracking URI.
"""

import argparse
import contextlib
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import S3, Mlflow, Postgres

from msae_sweep.config import TrackingConfig, TrainingConfig
from msae_sweep.sae import model_file
from msae_sweep.sae.model import MSAE
from msae_sweep.track.connection import connect
from msae_sweep.track.tracker import Tracker, sync

INPUT_DIM = 256
K_LEVELS = (16, 32, 64, 128)
SCORES = (
    *(f"r2_k{k}" for k in K_LEVELS),
    *(f"l0_k{k}" for k in K_LEVELS),
    *("r2_mean", "objective", "dead_ratio", "train_loss", "val_loss", "aux_loss"),
    *("learning_rate", "samples_seen", "samples_per_second"),
)


def main() -> None:
    """Report a sweep to MLflow and print the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=16.0, help="of a trial")
    parser.add_argument("--hidden-dim", type=int, default=4096)
    parser.add_argument("--server", default="postgres", help="postgres, sqlite, or a tracking URI")
    parser.add_argument("--save", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, server(args.server, Path(name)) as uri:
        machine.report(measured(args, Path(name) / "sweep", uri), args.save)


@contextlib.contextmanager
def server(which: str, folder: Path) -> Iterator[str]:
    """Start the server if necessary, and yield its tracking URI."""
    if which == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
    elif which == "postgres":
        if reason := Postgres.why_not() or S3.why_not():
            sys.exit(reason)
        with Postgres() as database, S3(folder / "s3") as store:
            keys = {**store.environment(), "MLFLOW_S3_ENDPOINT_URL": store.endpoint}
            artifacts = f"{store.bucket}/mlflow"
            with Mlflow(folder / "mlflow", database.uri, artifacts=artifacts, environment=keys, workers=4) as mlflow:
                yield mlflow.uri
    else:
        yield which


def measured(args: argparse.Namespace, folder: Path, uri: str) -> list[str]:
    """Run the benchmark and return the rows to print."""
    connect(uri).search_experiments()
    training = TrainingConfig(epochs=args.epochs, k_levels=K_LEVELS).model_dump(mode="json")
    of_epoch = dict.fromkeys(("train_loss", "val_loss", "dead_ratio"), [0.0] * args.epochs)
    history = {**of_epoch, "val_r2": {f"r2_k{k}": [0.0] * args.epochs for k in K_LEVELS}}
    sae = MSAE(INPUT_DIM, args.hidden_dim, list(K_LEVELS))
    model = folder / "model.pt"
    folder.mkdir()
    file = model_file.ModelFile(sae, np.zeros(INPUT_DIM, np.float32), np.ones(INPUT_DIM, np.float32), history)
    model_file.save(file, model)
    tracker = Tracker.start(folder, TrackingConfig(uri=uri, experiment=f"bench-{os.getpid()}"), sweep_id="bench")
    calls: list[float] = []
    behind: list[tuple[float, int]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            behind.append((time.monotonic() - started, tracker.status.pending))

    def told(call, **arguments) -> None:  # type: ignore[no-untyped-def]
        begun = time.perf_counter()
        call(**arguments)
        calls.append(time.perf_counter() - begun)

    started = time.monotonic()
    threading.Thread(target=watch, daemon=True).start()
    told(
        tracker.sweep_started,
        name="bench", params={}, tags={}, config_yaml="", datasets={},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    n_events, due = 1, time.monotonic()
    for first in range(0, args.trials, args.at_once):
        trials = [f"block5-{i:04d}" for i in range(first, min(first + args.at_once, args.trials))]
        for trial in trials:
            told(tracker.trial_started, trial_id=trial, block=5, params={"block": 5, **training})
        for epoch in range(1, args.epochs + 1):
            due += args.seconds / args.epochs
            time.sleep(max(0.0, due - time.monotonic()))
            for trial in trials:
                scores = dict(zip(SCORES, rng.random(len(SCORES)).tolist(), strict=True))
                point = {"epoch": epoch, "time_ms": int(time.time() * 1000), **scores}
                told(tracker.metrics, trial_id=trial, points=[point])
        for trial in trials:
            told(
                tracker.trial_ended,
                trial_id=trial, status="completed", reason="epochs", best={**scores, "epoch": args.epochs},
                model_file=model,
            )  # fmt: skip
        n_events += len(trials) * (args.epochs + 2)
    seconds = time.monotonic() - started
    at_end = tracker.status.pending
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    told(tracker.sweep_ended, status="completed", artifacts=[], champions={}, metrics={})
    report = tracker.close(timeout_seconds=3600)
    ended.set()
    drained = time.monotonic() - started - seconds
    assert (report.pending, report.refused) == (0, 0), report
    late = max(0.0, seconds - args.seconds * -(-args.trials // args.at_once))
    quantiles = statistics.quantiles(calls, n=1000)
    third = [max((n for at, n in behind if lo <= at / seconds < lo + 1 / 3), default=0) for lo in (0, 1 / 3, 2 / 3)]
    again = sync(folder, uri, TrackingConfig(uri=uri, experiment=f"bench-{os.getpid()}"))
    assert again.pending == 0, again
    return [
        f"{machine.described(torch.device('cpu'))}; load {os.getloadavg()[0]:.1f}; {args.trials} trials x "
        f"{args.epochs} epochs, {args.at_once} at once of {args.seconds:g} s each, models of "
        f"{model.stat().st_size / 2**20:.1f} MiB, MLflow: {args.server}",
        f"telling took         {seconds:8.1f} s, {late:.1f} s more than the trials; {n_events / seconds:.1f} events/s",
        f"a call of the driver {1e3 * statistics.median(calls):8.2f} ms (99%: {1e3 * quantiles[989]:.2f}, "
        f"99.9%: {1e3 * quantiles[998]:.2f}, most {1e3 * max(calls):.0f})",
        f"not sent yet         {at_end:8,} events at the last trial's end; at most {third} in each third of the time",
        f"sent after           {drained:8.1f} s more; the whole at {args.trials / (seconds + drained):.2f} trials/s",
        f"CPU of the driver    {1e3 * cpu / args.trials:8.1f} ms a trial; the sender is a process of its own",
    ]


if __name__ == "__main__":
    main()
