"""Draws figures side by side, in Ray's workers beside the driver.

One of a report takes 0.2 s, the notebook's 1.5 s, most of it in Python; a sweep of three blocks has 25 of them, and its
end would wait for 6 s.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from msae_sweep.report.style import Drawing, Job, drawn

MOST_WORKERS = 8
"""More would each import matplotlib for a figure or two."""
T = TypeVar("T")


def side_by_side(jobs: Sequence[Job]) -> Callable[[], list[Drawing | None]]:
    """`beside` for the figures of a report."""
    return beside([partial(drawn, job) for job in jobs])


def beside(jobs: Sequence[Callable[[], T]]) -> Callable[[], list[T]]:
    """Begin to draw; what it returns waits for the drawings. On fewer than four cores this process draws.

    Args:
        jobs: picklable; each draws a figure.
    """

    def here() -> list[T]:
        return [job() for job in jobs]

    most = min((os.cpu_count() or 1) // 2, MOST_WORKERS)
    if most < 2:
        return here
    n = min(most, len(jobs))
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # They ask for no CPU: what else runs in the cluster may hold all of them for long.
    task = ray.remote(num_cpus=0, scheduling_strategy=on_this_node)(_do)
    shares = [task.remote(jobs[i::n]) for i in range(n)]

    def ended() -> list[T]:
        try:
            done = ray.get(shares)
        except ray.exceptions.RayError:
            # A worker that could not be had or was lost, or a figure that cannot be drawn, which then says so here.
            return here()
        return [done[i % n][i // n] for i in range(len(jobs))]

    return ended


def _do(jobs: Sequence[Callable[[], T]]) -> list[T]:
    return [job() for job in jobs]
