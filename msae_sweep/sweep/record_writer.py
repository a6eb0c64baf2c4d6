"""Carries out a sweep's writes one after another in a thread, so that Tune's loop does not wait for the disk.

The fixed order makes it safe: after a kill or a power cut, the disk holds all writes that were posted up to some moment
and none after it. A verdict is never on disk without the results that led to it, and a trial whose record says that it
ended has its model.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Self

MOST_WAITING = 64
"""Maximum number of waiting writes.

Further calls of `post` block, which limits what a kill can lose when the disk is slow.
"""


class RecordWriter:
    """Context manager whose thread carries out posted writes in order.

    After the first failure nothing more is written, and leaving the context raises that error.

    Nothing is written before `begin` has returned. `begin` may wait for the data of all blocks, which takes minutes,
    while trials of the first block train already. Until it has returned, `post` never blocks.
    """

    def __init__(self, begin: Callable[[], object] = lambda: None) -> None:
        self._begin = begin
        self._has_begun = False
        self._waiting: deque[Callable[[], object]] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="record-writer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until everything is written, also if the sweep ends with an error.

        Raises:
            Exception: a write raised it, e.g. the `StorageError` of a full disk, or it was passed to `fail`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def n_waiting(self) -> int:
        """Number of waiting writes, without the one that is being carried out."""
        return len(self._waiting)

    @property
    def failed(self) -> bool:
        """True after a failed write or a call of `fail`; the sweep should then end, and `__exit__` raises the error."""
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        """Record an error from elsewhere because of which the sweep cannot go on; only the first error is kept."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def post(self, write: Callable[[], object]) -> None:
        """Queue `write` behind all writes posted before; it must not depend on anything that changes meanwhile."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._has_begun or len(self._waiting) < MOST_WAITING or self._error is not None
            )
            self._waiting.append(write)
            self._changed.notify_all()

    def _run(self) -> None:
        self._carry_out(self._begin)
        with self._changed:
            self._has_begun = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                write = self._waiting.popleft()
                self._changed.notify_all()
            self._carry_out(write)

    def _carry_out(self, write: Callable[[], object]) -> None:
        if self._error is None:
            try:
                write()
            except BaseException as error:
                self.fail(error)
