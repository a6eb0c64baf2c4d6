"""Whether the node that a trial runs on has been told to go.

Ray drains a node whose `ray start --block` gets SIGTERM (Kubernetes, Slurm, a spot machine's notice) or that the
autoscaler takes back: it gets no new work, and goes after RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, by default 30 s.
"""

import time

import ray
from ray._private.state import state as cluster_state

POLL_SECONDS = 1.0
"""Asking took 0.3 ms on one machine, most of it the head's: a thousand trials keep a third of a core busy."""


class PreemptionWatch:
    """Of one process's node; asks the cluster at most every `POLL_SECONDS`."""

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._asked_at = -POLL_SECONDS
        self._given = False

    @property
    def given(self) -> bool:
        """Whether this node is about to go; a node that was told to go does not stay."""
        if not self._given and time.monotonic() - self._asked_at >= POLL_SECONDS:
            self._asked_at = time.monotonic()
            # Not a public call, but what Ray's own Train and Serve ask.
            self._given = self._node in cluster_state.get_draining_nodes()
        return self._given
