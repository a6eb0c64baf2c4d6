"""Benchmark of the handoff between two trials in one worker: its time, its parts, and a check that nothing remains.

    python tests/bench/bench_handoff.py [--trials 100] [--rows 2000]

The benchmark drives a trial worker as Ray Tune does, but in this process, so that the times include no messages and no
driver. Blocks, expansions and weightings alternate. The first trial is repeated at the end and must give the same
numbers.
"""

import argparse
import copy
import gc
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import machine
import psutil
import ray
import torch
from ray import tune

from msae_sweep.config import parse
from msae_sweep.data.prepare import shards
from msae_sweep.sweep.space import plan
from msae_sweep.sweep.trial import MSAETrial
from msae_sweep.sweep_folder.folder import SweepFolder

SPACE = """
name: handoff
data: {{path: planted, blocks: [5, 20], planted: {{rows: {rows}, input_dim: 256, dictionary_size: 1024}}}}
space:
  learning_rate: {{loguniform: [2.0e-4, 4.0e-3]}}
  expansion_factor: {{grid: [16, 8]}}
  weighting: {{grid: [uniform, reverse]}}
training: {{epochs: 2, batch_size: {batch}}}
asha: null
search: {{trials_per_block: {trials}}}
"""

PARTS: dict[str, list[float]] = defaultdict(list)


class Timed(MSAETrial):
    """Trial that records how long the parts of a handoff take."""

    def _timed(self, part: str, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return getattr(MSAETrial, part)(self, *arguments)
        finally:
            PARTS[part].append(time.perf_counter() - started)

    def _save_model(self) -> None:
        self._timed("_save_model")

    def _save_state(self) -> None:
        self._timed("_save_state")

    def _begin(self) -> None:
        self._timed("_begin")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return bool(self._timed("reset_config", new_config))


def run(worker: MSAETrial) -> tuple[list[dict[str, float]], float, float]:
    """Return a trial's epochs without timings, and the times when its training began and ended."""
    reports = [worker.train()]
    while not reports[-1]["done"]:  # a trial that compiles for a long time sends reports in between
        reports.append(worker.train())
    points = [
        {key: value for key, value in point.items() if key != "samples_per_second"}
        for report in reports
        for point in report["points"]
    ]
    return points, reports[0]["trained"][0], reports[-1]["trained"][1]


def memory() -> str:
    """Return the memory of the process and of the GPU as text."""
    gc.collect()
    text = f"{psutil.Process().memory_info().rss / 2**20:,.0f} MiB resident"
    if torch.cuda.is_available():
        text += f", {torch.cuda.memory_allocated() / 2**20:,.0f} MiB on the GPU"
    return text


def main() -> None:
    """Print how long a handoff and its parts take, and the memory after more and more trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("trials", 100), ("rows", 2000), ("batch-size", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as name:
        config = parse(SPACE.format(rows=args.rows, batch=args.batch_size, trials=-(-args.trials // 2)), [])
        prepared = shards.prepare_blocks(config.data, name, batch_size=args.batch_size)
        specs = []
        for record in plan(config, list(prepared)):
            training = record.training(config.training).model_dump(mode="json")
            spec = {"trial_id": record.trial_id, "block": record.block, "rungs": [], "training": training}
            specs.append({"trial": spec | {"input_dim": 256}})
        gpus = 1 if torch.cuda.is_available() else 0
        made = tune.with_parameters(
            Timed, prepared=prepared, folder=SweepFolder(Path(name) / "sweep"), cpus=1, gpus=gpus, checkpoint_seconds=30
        )
        worker = made(copy.deepcopy(specs[0]))
        lines, gaps = [], []
        first, _, ended = run(worker)
        for i, spec in enumerate([*specs[1:], specs[0]], start=2):
            worker.reset(copy.deepcopy(spec))
            again, began, ended_next = run(worker)
            gaps.append(began - ended)
            ended = ended_next
            if i % max(1, args.trials // 5) == 0:
                lines.append(f"after {i:4} trials: {memory()}")
        assert again == first, "a trial in a used worker came out otherwise; no timing on a red check"
    device = torch.device("cuda" if gpus else "cpu")
    print(machine.described(device), f"256 -> 4096 and 2048; {len(gaps)} handoffs", sep="\n")
    for part, times in {"handoff": gaps, **PARTS}.items():
        low, median, high = (1e3 * value for value in machine.spread(times))
        print(f"{part:14} median {median:7.1f} ms   20% {low:7.1f}   80% {high:7.1f}   ({len(times)})")
    print("\n".join(lines))
    ray.shutdown()


if __name__ == "__main__":
    main()
