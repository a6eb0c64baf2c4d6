"""Tests that one line of native code is dropped from stderr, and no other."""

import os

import pytest

from msae_sweep.stderr_filter import without_line


def test_only_the_lines_with_the_marker_are_dropped(capfd):
    os.write(2, b"before: a false alarm\n")
    with without_line(b"false alarm"):
        os.write(2, b"a false alarm\nan error\n")
        os.write(2, b"without an end")
    os.write(2, b", after: a false alarm\n")
    assert capfd.readouterr().err == "before: a false alarm\nan error\nwithout an end, after: a false alarm\n"


def test_stderr_is_restored_after_an_error(capfd):
    with pytest.raises(ValueError, match="inside"), without_line(b"false alarm"):
        raise ValueError("inside")
    os.write(2, b"a false alarm\n")
    assert capfd.readouterr().err == "a false alarm\n"
