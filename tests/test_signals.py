"""Tests that SIGTERM acts like Ctrl-C: any command ends with one line, and its exit code tells which signal it was."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from msae_sweep import signals
from msae_sweep.signals import sigterm_as_ctrl_c


def test_sigterm_raises_what_ctrl_c_raises_and_the_handler_from_before_is_back_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c(), sigterm_as_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signals.exit_code() == 143
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        signal.raise_signal(signal.SIGINT)
    assert signals.exit_code() == 130


def test_a_library_that_handles_ctrl_c_itself_gets_sigterm_too():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with sigterm_as_ctrl_c():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
    assert signals.exit_code() == 143


def test_where_a_shell_has_ctrl_c_ignored_sigterm_is_heard():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_is_taken_back_from_a_library_only_where_it_was_taken():
    before = signal.getsignal(signal.SIGTERM)
    signals.reclaim_sigterm()
    assert signal.getsignal(signal.SIGTERM) is before
    with sigterm_as_ctrl_c():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.reclaim_sigterm()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_in_another_thread_nothing_changes():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with sigterm_as_ctrl_c():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [before]


def test_handlers_that_a_library_leaves_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with signals.restored_handlers(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before


COMMAND = """
import atexit, sys, threading, time
from msae_sweep import cli
from msae_sweep.data import inspection

def busy(config):
    # Threads that a command leaves behind, as the preparation of data does.
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    atexit.register(print, "tidied up", flush=True)
    try:
        print("ready", flush=True)
        while True:  # a signal that comes just before a long sleep would be handled after it only
            time.sleep(0.1)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("the same command goes on")
        raise

inspection.inspect = busy
sys.argv = ["msae-sweep", "inspect", "planted"]
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_interrupted_says_one_line(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COMMAND)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == "msae-sweep: interrupted; the same command goes on\n"
    assert out == "tidied up\n"
