"""A sweep whose driver or workers are killed, in processes of its own, ends as the undisturbed one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from planted_sweep import SPACE, database, results, sweep

pytestmark = pytest.mark.usefixtures("ray_session")


def launch(folder: Path, *arguments: str) -> subprocess.Popen:
    (folder / "space.yaml").write_text(SPACE)
    command = [sys.executable, "-m", "msae_sweep", *arguments, "--tracking-uri", database(folder)]
    with open(folder / "out", "ab") as out:
        return subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=out, start_new_session=True,
            # A Ray of its own, not the test session's.
            env={**os.environ, "RAY_ADDRESS": "local"},
        )  # fmt: skip


def finished_trials(folder: Path) -> set[str]:
    files = (folder / "sweeps" / "small" / "trials").glob("*/trial.json")
    return {f.parent.name for f in files if json.loads(f.read_text())["status"] in ("completed", "stopped_early")}


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.05)


CHANGES = ["data.blocks=[5]", "training.epochs=24", "asha.grace_epochs=3", "training.early_stopping_patience=null",
           "data.planted.rows=8000", "resources.checkpoint_seconds=0.5"]  # fmt: skip
LONGER = [word for change in CHANGES for word in ("--set", change)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sweep(tmp_path_factory.mktemp("undisturbed"), *CHANGES).summary


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_driver_that_is_killed_and_resumed_ends_as_the_undisturbed_sweep(kills, undisturbed, tmp_path):
    process = launch(tmp_path, "run", "space.yaml", *LONGER)
    wait_until(lambda: finished_trials(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ended = finished_trials(tmp_path)
    times = {name: (tmp_path / "sweeps/small/trials" / name / "model.pt").stat().st_mtime_ns for name in ended}
    assert ended
    assert len(ended) < 4

    if kills == 2:
        process = launch(tmp_path, "resume", "sweeps/small")
        wait_until(lambda: len(finished_trials(tmp_path)) > len(ended), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    assert launch(tmp_path, "resume", "sweeps/small").wait(timeout=240) == 0, (tmp_path / "out").read_text()[-3000:]
    summary = json.loads((tmp_path / "sweeps" / "small" / "summary.json").read_text())
    assert results(summary) == results(undisturbed)
    for name, before in times.items():
        assert (tmp_path / "sweeps/small/trials" / name / "model.pt").stat().st_mtime_ns == before, f"{name} ran again"


def test_a_lost_worker_costs_no_trial(undisturbed, tmp_path):
    process = launch(tmp_path, "run", "space.yaml", *LONGER)
    wait_until(lambda: list((tmp_path / "sweeps/small/trials").glob("*/state.pt")), process)
    killed = kill_workers(process.pid)
    out = (tmp_path / "out").read_text
    assert process.wait(timeout=240) == 0, out()[-3000:]
    assert killed
    assert re.search(r"^block\d+-\d+ starts again from its last state: The actor", out(), re.MULTILINE)
    assert "Traceback" not in out()
    summary = json.loads((tmp_path / "sweeps" / "small" / "summary.json").read_text())
    assert results(summary) == results(undisturbed)


def kill_workers(driver: int) -> int:
    """kill -9 every trial worker of one driver's Ray."""
    children = psutil.Process(driver).children(recursive=True)
    workers = [child for child in children if "Trainable" in " ".join(child.cmdline())]
    for worker in workers:
        worker.kill()
    return len(workers)
