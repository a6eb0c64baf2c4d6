"""Models on their way to MLflow, beside the events that follow: an upload takes longer than all else of a trial."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from msae_sweep.track.journal import Entry

Upload = Callable[[], None]


class _Step(NamedTuple):
    """An event whose quick part was sent."""

    entry: Entry
    upload: Future[None] | None


class Uploads:
    """Events in their order, some with an upload that is under way; used by one thread."""

    def __init__(self, at_once: int) -> None:
        """`at_once`: with 1, an upload is done where it is added."""
        self.at_once = at_once
        self._pool = ThreadPoolExecutor(at_once, "upload") if at_once > 1 else None
        self._steps: deque[_Step] = deque()

    def add(self, entry: Entry, upload: Upload | None) -> None:
        """Begin the upload of an event, where it has one."""
        if upload is not None and self._pool is None:
            upload()
            upload = None
        future = self._pool.submit(upload) if self._pool is not None and upload is not None else None
        self._steps.append(_Step(entry, future))

    def concern(self, trial_ids: set[str]) -> bool:
        """Whether one of these trials has an upload under way."""
        return any(step.upload is not None and step.entry.event.get("trial_id") in trial_ids for step in self._steps)

    def done(self, at_most: int) -> Iterator[Entry]:
        """The events in order up to the first whose upload is under way; wait while more than `at_most` are.

        What an upload failed of is raised here.
        """
        while self._steps:
            upload = self._steps[0].upload
            if upload is not None:
                if not upload.done() and self._n_under_way() <= at_most:
                    return
                upload.result()
            yield self._steps.popleft().entry

    def drop(self) -> None:
        """Forget all; those that have begun are waited for."""
        uploads = [step.upload for step in self._steps if step.upload is not None]
        self._steps.clear()
        wait([upload for upload in uploads if not upload.cancel()])

    def _n_under_way(self) -> int:
        return sum(step.upload is not None and not step.upload.done() for step in self._steps)
