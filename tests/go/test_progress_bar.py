"""Tests of the progress lines of an extraction."""

import io

import pytest
from rich.console import Console

from msae_sweep.go import progress_bar
from msae_sweep.go.progress_bar import BytesProgress, GamesProgress, progress_display


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


def test_reading_is_said_in_bytes_when_it_takes_longer_than_a_moment(now):
    console = Console(file=io.StringIO(), width=100)
    with progress_display(console) as display:
        display.show_bytes(BytesProgress("reading games", 0, 9_800_000_000))
        now[0] += 6
        display.show_bytes(BytesProgress("reading games", 1_234_000_000, 9_800_000_000))
        now[0] += 1
        display.show_bytes(BytesProgress("reading games", 1_300_000_000, 9_800_000_000))
        now[0] += 5
        display.show_bytes(BytesProgress("reading games", 9_800_000_000, 9_800_000_000))
        display(GamesProgress(0, 1000, 0, ""))
    assert console.file.getvalue().splitlines() == [
        "reading games: 1.2 of 9.8 GB",
        "reading games: 9.8 of 9.8 GB",
        "0 of 1,000 positions",
    ]


def test_reading_and_positions_have_a_bar_each(now):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress_display(console) as display:
        display.show_bytes(BytesProgress("reading games", 512, 700))
        display(GamesProgress(250, 1000, 0, ""))
    text = console.file.getvalue()
    assert "512 of 700 bytes" in text
    assert "250/1,000" in text
