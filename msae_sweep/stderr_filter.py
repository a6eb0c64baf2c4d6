"""Drops one known line that a library's native code writes to stderr."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def without_line(marker: bytes) -> Iterator[None]:
    """Drop the lines that contain `marker` from file descriptor 2 while the context is open; pass on all others.

    Native code writes to the descriptor itself, so replacing `sys.stderr` would not catch it.
    """
    sys.stderr.flush()
    original = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)

    def pass_on() -> None:
        with open(reading, "rb") as lines:
            for line in lines:
                if marker not in line:
                    os.write(original, line)

    thread = threading.Thread(target=pass_on, name="stderr-filter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)
        # A process that was started meanwhile may keep the pipe open; the thread then goes on in the background.
        thread.join(1.0)
        if not thread.is_alive():
            os.close(original)
