"""Draws a report's figures side by side, in Ray's workers beside the driver.

A figure takes 0.2 s, most of it in Python; a sweep of three blocks has 25 of them, and its end would wait for 5 s.
"""

import os
from collections.abc import Callable, Sequence

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from msae_sweep.results.report.style import Drawing, Job, drawn, drawn_here

MOST_WORKERS = 8
"""More would each import matplotlib for a figure or two."""


def side_by_side(jobs: Sequence[Job]) -> Callable[[], list[Drawing | None]]:
    """Begin to draw; what it returns waits for the drawings. On fewer than four cores this process draws."""
    n = min((os.cpu_count() or 1) // 2, MOST_WORKERS, len(jobs))
    if n < 2:
        return drawn_here(jobs)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # They ask for no CPU: what else runs in the cluster may hold all of them for long.
    task = ray.remote(num_cpus=0, scheduling_strategy=here)(_draw)
    shares = [task.remote(jobs[i::n]) for i in range(n)]

    def ended() -> list[Drawing | None]:
        drawings: list[Drawing | None] = [None] * len(jobs)
        try:
            for i, share in enumerate(ray.get(shares)):
                drawings[i::n] = share
        except ray.exceptions.RayError:
            # A worker that could not be had or was lost, or a figure that cannot be drawn, which then says so here.
            return drawn_here(jobs)()
        return drawings

    return ended


def _draw(jobs: Sequence[Job]) -> list[Drawing | None]:
    return [drawn(job) for job in jobs]
