"""Model uploads that run in parallel to the events that follow them.

Sending a model takes longer than sending everything else of a trial.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from msae_sweep.track.journal import Entry

Upload = Callable[[], None]


class _Step(NamedTuple):
    """An event that was sent except for its upload, if it has one."""

    entry: Entry
    upload: Future[None] | None


class Uploads:
    """Queue of events in their order, some with a running upload. Only one thread may use it."""

    def __init__(self, at_once: int) -> None:
        """Start a thread pool for uploads.

        Args:
            at_once: largest number of uploads that run in parallel. With 1 there is no pool, and `add` runs the upload.
        """
        self.at_once = at_once
        self._pool = ThreadPoolExecutor(at_once, "upload") if at_once > 1 else None
        self._steps: deque[_Step] = deque()

    def add(self, entry: Entry, upload: Upload | None) -> None:
        """Append an event, and start its upload if it has one."""
        if upload is not None and self._pool is None:
            upload()
            upload = None
        future = self._pool.submit(upload) if self._pool is not None and upload is not None else None
        self._steps.append(_Step(entry, future))

    def concern(self, trial_ids: set[str]) -> bool:
        """Return whether the queue holds an upload of one of these trials."""
        return any(step.upload is not None and step.entry.event.get("trial_id") in trial_ids for step in self._steps)

    def done(self, at_most: int) -> Iterator[Entry]:
        """Remove and yield the events in order, up to the first whose upload is still running.

        Wait while more than `at_most` uploads are running. If an upload failed, its exception is raised here.
        """
        while self._steps:
            upload = self._steps[0].upload
            if upload is not None:
                if not upload.done() and self._n_under_way() <= at_most:
                    return
                upload.result()
            yield self._steps.popleft().entry

    def drop(self) -> None:
        """Remove all events, cancel the uploads that have not started, and wait for those that have."""
        uploads = [step.upload for step in self._steps if step.upload is not None]
        self._steps.clear()
        wait([upload for upload in uploads if not upload.cancel()])

    def _n_under_way(self) -> int:
        return sum(step.upload is not None and not step.upload.done() for step in self._steps)
