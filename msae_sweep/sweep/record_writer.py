"""Writes things down in a thread of its own, one after another, so that Tune's loop never waits for a disk.

The order is what makes it safe: whatever is on disk after a kill or a power cut is what was posted up to some moment.
A verdict is never there without the results that it came from, and a trial that is said to have ended has its model.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Self

MOST_WAITING = 64
"""Writes that may wait; whoever posts one more waits too, so that a slow disk bounds what a kill can lose."""


class RecordWriter:
    """Carries out what is posted, in order; after the first failure nothing more is written, and the end raises it.

    Nothing is written before `begin` has returned. It may wait for the data of all blocks, which takes minutes, while
    trials of the first block train already. Until then nobody who posts is made to wait.
    """

    def __init__(self, begin: Callable[[], object] = lambda: None) -> None:
        self._begin = begin
        self._has_begun = False
        self._waiting: deque[Callable[[], object]] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scribe")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until all is written, also where the sweep is ending with an error.

        Raises:
            Exception: what a write raised, e.g. the `StorageError` of a full disk.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def posted(self) -> int:
        """How many writes wait, without the one that is being carried out."""
        return len(self._waiting)

    @property
    def failed(self) -> bool:
        """Whether a write failed; the sweep should end, and leaving the scribe says why."""
        return self._error is not None

    def fail(self, error: BaseException) -> None:
        """Note that the sweep cannot go on, for a reason that was found elsewhere; the first reason counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def post(self, write: Callable[[], object]) -> None:
        """Have `write` called after all that was posted before; it must not depend on what changes meanwhile."""
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
