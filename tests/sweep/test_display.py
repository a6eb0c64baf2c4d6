"""Tests of the display of a running sweep: which trials run, how fast, and how the others ended."""

import io
import sys
import threading

import pytest
from rich.console import Console

from msae_sweep.config import SweepConfig, parse
from msae_sweep.sweep.display import Display
from msae_sweep.sweep.space import plan
from msae_sweep.sweep_folder.rungs import STOPPED_AT
from msae_sweep.sweep_folder.trial_record import TrialRecord


def config(blocks: int = 2) -> SweepConfig:
    return parse(f"""
name: shown
data: {{path: planted, blocks: {list(range(1, blocks + 1))}}}
space: {{learning_rate: {{loguniform: [1.0e-4, 1.0e-2]}}, expansion_factor: {{choice: [8, 16]}}}}
training: {{epochs: 12}}
search: {{trials_per_block: 24}}
asha: {{grace_epochs: 1, reduction_factor: 3}}
""")


def point(epoch: int, objective: float = 0.5) -> dict[str, float]:
    r2 = {f"r2_k{k}": objective for k in (16, 32, 64, 128)}
    speed = {"samples_seen": 4096.0 * epoch, "samples_per_second": 1e4}
    return {**r2, **speed, "epoch": epoch, "objective": objective, "dead_ratio": 0.023, "learning_rate": 1e-3}


def display(height: int = 40, blocks: int = 2, width: int = 120) -> tuple[Display, list[TrialRecord], Console]:
    console = Console(file=io.StringIO(), width=width, height=height)
    settings = config(blocks)
    records = plan(settings, list(range(1, blocks + 1)))
    shown = Display(console, settings, len(records), lambda: "")
    shown.show(records)
    return shown, records, console


def drawn(shown: Display, console: Console) -> str:
    console.print(shown._render())
    text = console.file.getvalue()
    console.file.seek(0)
    console.file.truncate()
    return text


def run(shown: Display, record: TrialRecord, epochs: int, objective: float = 0.5) -> None:
    record.status = "running"
    record.add_points([point(e, objective) for e in range(record.epochs + 1, epochs + 1)])
    shown.update(record)


def test_the_live_view_shows_which_trials_run_with_epoch_and_objective():
    shown, records, console = display()
    run(shown, records[0], 4, objective=0.6123)
    records[2].status = "running"
    run(shown, records[4], 1)  # it waits at the first rung, which records[2] has not reached
    text = drawn(shown, console)
    rows = {line.split()[1]: line for line in text[text.index("Running") :].splitlines() if "block" in line}
    assert "4/12" in rows[records[0].trial_id]
    assert "0.6123" in rows[records[0].trial_id]
    assert "trains" in rows[records[0].trial_id]
    assert "starts" in rows[records[2].trial_id]
    assert "waits at a rung" in rows[records[4].trial_id]


@pytest.mark.parametrize("width", [100, 120, 160])
@pytest.mark.parametrize(("height", "rows"), [(24, 3), (40, 8), (90, 8)])
def test_the_live_view_fits_a_terminal_whatever_runs(height, rows, width):
    shown, records, console = display(height, blocks=12, width=width)
    for record in records:
        run(shown, record, 2)
    drawn(shown, console)
    text = drawn(shown, console)
    assert f"and {288 - rows} more" in text
    assert f"and {12 - rows} more blocks" in text
    assert len(text.splitlines()) <= height


def test_rows_a_second_and_the_time_left_are_in_the_status_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("msae_sweep.sweep.display.time.monotonic", lambda: now[0])
    shown, records, _ = display()
    assert "left" not in shown._status_line()
    for epoch in range(1, 6):
        now[0] += 1
        run(shown, records[0], epoch)
    line = shown._status_line()
    assert "4,096 rows/s" in line
    assert "about" in line
    assert "47 pending, 1 running" in line or "1 running, 47 pending" in line


@pytest.mark.parametrize(
    ("status", "reason", "epochs", "said"),
    [
        ("stopped_early", f"{STOPPED_AT}1", 1, "stopped early by ASHA at epoch 1: objective 0.5000"),
        ("completed", "epochs", 12, "completed after 12 epochs: objective 0.5000"),
        ("completed", "patience", 9, "completed after 9 epochs (patience): objective 0.5000"),
        ("diverged", "diverged", 1, "diverged after 1 epoch: objective 0.5000"),
        ("failed", "out of memory", 0, "failed after 0 epochs (out of memory): no epoch finished"),
    ],
)
def test_the_end_of_a_trial_is_said_once_and_in_words(status, reason, epochs, said):
    shown, records, console = display()
    records[0].add_points([point(e) for e in range(1, epochs + 1)])
    records[0].status, records[0].reason = status, reason
    shown.trial_ended(records[0])
    text = " ".join(console.file.getvalue().split())
    assert text.startswith(f"{records[0].trial_id} {said}")
    assert text.count(f"epoch {epochs}") + text.count(f"{epochs} epoch") == 1


def test_trials_may_be_added_while_another_thread_draws():
    shown, _, _ = display()
    failures: list[BaseException] = []
    ended = threading.Event()

    def draw() -> None:
        try:
            while not ended.is_set():
                shown._render()
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=draw) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for i in range(3000):
            shown.update(TrialRecord(f"block1-{100 + i % 1500}x{i}", 1, 100 + i, {}, 0, "pending"))
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not failures
