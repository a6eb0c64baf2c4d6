"""Handle SIGTERM, which Slurm, Kubernetes and `ray job stop` send, in the same way as Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_open = False
"""True while `sigterm_as_ctrl_c` is open."""
_terminated = False
"""True if SIGTERM has arrived since `sigterm_as_ctrl_c` was entered."""
_leaving_with: int | None = None
"""Exit code that was given to `request_immediate_exit`; None if it was not called."""


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C while the context is open, and restore the previous handler on exit.

    Only the main thread can set signal handlers. In any other thread, and inside another `sigterm_as_ctrl_c`, nothing
    changes.
    """
    global _open, _terminated
    if threading.current_thread() is not threading.main_thread() or _open:
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    _open, _terminated = True, False
    try:
        yield
    finally:
        _open = False
        # `before` is None if the handler was not set from Python. Python cannot restore such a handler.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def sigterm_handled_here() -> bool:
    """Return whether `sigterm_as_ctrl_c` is open and this is the main thread, which can set signal handlers."""
    return _open and threading.current_thread() is threading.main_thread()


def reclaim_sigterm() -> None:
    """Set the handler of `sigterm_as_ctrl_c` again if the context is open, because a library may have replaced it."""
    if sigterm_handled_here():
        signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def restored_handlers(*numbers: signal.Signals) -> Iterator[None]:
    """Restore the handlers of these signals on exit, because a library that sets its own may not restore them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def exit_code() -> int:
    """Return the exit code of an interrupted command: 143 after SIGTERM, 130 after Ctrl-C."""
    return 128 + (signal.SIGTERM if _terminated else signal.SIGINT)


def request_immediate_exit(code: int) -> None:
    """Arrange that this process exits with `code` without waiting for its threads, whose work is no longer needed.

    A further SIGINT or SIGTERM kills the process at once. `exit_if_requested` must have been registered with `atexit`.
    """
    global _leaving_with
    _leaving_with = code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def exit_if_requested() -> None:
    """Exit by `os._exit` if that was requested, before Python's shutdown breaks threads that still run."""
    if _leaving_with is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_leaving_with)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True
    # While trials run, SIGINT has Ray Tune's handler. It ends Tune's loop in order and then restores the previous one.
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    if callable(on_ctrl_c):
        on_ctrl_c(signal.SIGINT, frame)
    else:  # SIGINT is ignored, as a shell sets it for a command in the background
        raise KeyboardInterrupt
