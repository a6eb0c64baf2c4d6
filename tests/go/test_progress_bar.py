"""Tests of the progress lines of an extraction."""

import io

import pytest
from rich.console import Console

from msae_sweep.go import progress_bar
from msae_sweep.go.progress_bar import GamesProgress, progress_display


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """Clock that stands still until it is set."""
    clock = [100.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])
    return clock


def test_no_speed_and_no_time_left_are_said_before_there_is_one(now):
    console = Console(file=io.StringIO(), width=100)
    with progress_display(console) as report:
        report(GamesProgress(0, 1000, 0, ""))
        now[0] += 10
        report(GamesProgress(250, 1000, 0, "cpu"))
        now[0] += 30
        report(GamesProgress(1000, 1000, 0, "cpu"))
    assert console.file.getvalue().splitlines() == [
        "0 of 1,000 positions",
        "network on cpu",
        "250 of 1,000 positions · 25/s · 30 s left",
        "1,000 of 1,000 positions · 25/s",
    ]


def test_the_bar_has_no_speed_before_there_is_one(now):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress_display(console) as report:
        report(GamesProgress(0, 1000, 0, ""))
        assert "0/s" not in console.file.getvalue()
        now[0] += 10
        report(GamesProgress(250, 1000, 0, ""))
    assert "25/s" in console.file.getvalue()
