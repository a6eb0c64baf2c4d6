"""Detects that the node on which a trial runs is about to be preempted.

Ray drains a node when its `ray start --block` gets SIGTERM (from Kubernetes, Slurm, or a spot machine's preemption
notice) or when the autoscaler takes the node back. A draining node gets no new work, and is shut down after
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, by default 30 s.
"""

import time

import ray
from ray._private.state import state as cluster_state

POLL_SECONDS = 1.0
"""Minimum seconds between two queries.

A query took 0.3 ms on one machine, most of it on the head node: a thousand trials keep a third of a core busy.
"""


class PreemptionWatch:
    """Watch for the preemption of this process's node; the cluster is queried at most every `POLL_SECONDS`."""

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._asked_at = -POLL_SECONDS
        self._is_draining = False

    @property
    def is_draining(self) -> bool:
        """True if this node is draining; it then stays True, because draining is never undone."""
        if not self._is_draining and time.monotonic() - self._asked_at >= POLL_SECONDS:
            self._asked_at = time.monotonic()
            # This call is not public, but Ray's own Train and Serve use it.
            self._is_draining = self._node in cluster_state.get_draining_nodes()
        return self._is_draining
