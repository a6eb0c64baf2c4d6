"""SIGTERM, which Slurm, Kubernetes and `ray job stop` send, is treated as Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_open = False
"""Whether SIGTERM is ours now."""
_terminated = False
"""Whether SIGTERM has come since `sigterm_as_ctrl_c` was entered."""
_leaving_with: int | None = None


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, until this is left; then the handler from before is back.

    Only the main thread can set handlers: in any other, and inside another `sigterm_as_ctrl_c`, nothing changes.
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
        # None: a handler that was not set from Python, which Python cannot set again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def sigterm_is_ours() -> bool:
    """Whether `sigterm_as_ctrl_c` is open, in a thread that can set handlers."""
    return _open and threading.current_thread() is threading.main_thread()


def reclaim_sigterm() -> None:
    """Set the handler of `sigterm_as_ctrl_c` again, where that is open: a library may have set its own meanwhile."""
    if sigterm_is_ours():
        signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def handlers_put_back(*numbers: signal.Signals) -> Iterator[None]:
    """Put back the handlers of these signals afterwards: a library that sets its own may leave them."""
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
    """Exit code of a command that was interrupted: 143 after SIGTERM, 130 after Ctrl-C."""
    return 128 + (signal.SIGTERM if _terminated else signal.SIGINT)


def leave_at_once(code: int) -> None:
    """Let the process end without waiting for its threads: what they do is not wanted any more.

    A further signal ends it where it is. `end_if_leaving` must have been registered with `atexit`.
    """
    global _leaving_with
    _leaving_with = code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def end_if_leaving() -> None:
    """End the process where `leave_at_once` was called, before Python takes itself apart under its threads."""
    if _leaving_with is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_leaving_with)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True
    # While trials run it is Ray Tune's handler, which ends its loop in order and then gives back the one from before.
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    if callable(on_ctrl_c):
        on_ctrl_c(signal.SIGINT, frame)
    else:  # ignored, as a shell has it for a command in the background
        raise KeyboardInterrupt
