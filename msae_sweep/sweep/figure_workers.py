"""Draws figures, and does other short jobs, in parallel, in Ray workers on the driver's node.

A figure of a report takes 0.2 s and the notebook's figure 1.5 s, most of it in Python. A sweep of three blocks has 25
figures, so drawing them one after another would delay its end by 6 s.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from msae_sweep.report.style import Drawing, Job, draw_job

MOST_WORKERS = 8
"""Maximum number of workers; with more, each would import matplotlib for only a figure or two."""
T = TypeVar("T")


def draw_in_workers(jobs: Sequence[Job]) -> Callable[[], list[Drawing | None]]:
    """Start to draw the figures of a report, as `run_in_workers` does; the returned function waits for them."""
    return run_in_workers([partial(draw_job, job) for job in jobs])


def run_in_workers(jobs: Sequence[Callable[[], T]]) -> Callable[[], list[T]]:
    """Start to run `jobs` in Ray workers; the returned function waits for their results, in the order of `jobs`.

    With fewer than four cores, the returned function runs the jobs in this process instead.

    Args:
        jobs: picklable functions, each of which draws a figure or measures something.
    """

    def here() -> list[T]:
        return [job() for job in jobs]

    most = min((os.cpu_count() or 1) // 2, MOST_WORKERS)
    if most < 2:
        return here
    n = min(most, len(jobs))
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # The tasks request no CPU, because other work in the cluster may hold all CPUs for long.
    task = ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(_do)
    shares = [task.remote(jobs[i::n]) for i in range(n)]

    def ended() -> list[T]:
        try:
            done = ray.get(shares)
        except ray.exceptions.RayError:
            # A worker did not start or was lost, or a job failed, in which case the error is raised here.
            return here()
        return [done[i % n][i // n] for i in range(len(jobs))]

    return ended


def _do(jobs: Sequence[Callable[[], T]]) -> list[T]:
    return [job() for job in jobs]
