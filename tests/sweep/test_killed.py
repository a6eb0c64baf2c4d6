"""Tests that a sweep in separate processes whose driver or workers are killed ends like the undisturbed one."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from planted_sweep import ONE_WORKER, SPACE, database, results, run_quietly, sweep

from msae_sweep.sweep.resume import load_config

pytestmark = pytest.mark.usefixtures("ray_session")


def launch(folder: Path, *arguments: str) -> subprocess.Popen:
    (folder / "space.yaml").write_text(SPACE)
    command = [sys.executable, "-m", "msae_sweep", *arguments, "--tracking-uri", database(folder)]
    with open(folder / "out", "ab") as out:
        return subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=out, start_new_session=True,
            # Start a separate Ray instead of using the test session's.
            env={**os.environ, "RAY_ADDRESS": "local"},
        )  # fmt: skip


def finished_trials(folder: Path) -> set[str]:
    files = (folder / "sweeps" / "small" / "trials").glob("*/trial.json")
    return {f.parent.name for f in files if json.loads(f.read_text())["status"] in ("completed", "stopped_early")}


def wait_until(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the sweep ended before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.2)  # each look at all processes takes some 20 ms


CHANGES = ["data.blocks=[5]", "training.epochs=24", "asha.grace_epochs=3", "training.early_stopping_patience=null",
           "data.planted.rows=3000", "resources.checkpoint_seconds=0.5"]  # fmt: skip


def options(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sweep(tmp_path_factory.mktemp("undisturbed"), *CHANGES).summary


def test_a_driver_and_then_a_worker_are_killed_and_it_ends_as_the_undisturbed_sweep(undisturbed, tmp_path):
    # There is one worker, because starting a second one takes longer than it saves, and this process resumes the
    # sweep. The slow tests have two workers, and a process for every driver.
    ended = killed_after_a_trial(tmp_path, ONE_WORKER, during=check_listening)
    loss = threading.Thread(target=lose_a_worker, args=(tmp_path,))
    loss.start()
    config = load_config(tmp_path / "sweeps/small", database(tmp_path))
    assert not run_quietly(config, tmp_path, resume=True).interrupted
    loss.join()
    assert re.search(r"^block5-00\d starts again from its last state: The actor", (tmp_path / "log").read_text(), re.M)
    check_summary(tmp_path, ended, undisturbed)


@pytest.mark.slow
def test_drivers_that_are_killed_and_told_to_end_and_lost_workers_change_nothing(undisturbed, tmp_path):
    ended = killed_after_a_trial(tmp_path)
    told_to_end(launch(tmp_path, "resume", "sweeps/small"), tmp_path)
    process = launch(tmp_path, "resume", "sweeps/small")
    lose_workers(process, tmp_path)
    check_end(process, tmp_path, ended, undisturbed)


@pytest.mark.slow
def test_a_driver_that_is_killed_twice_and_resumed_ends_as_the_undisturbed_sweep(undisturbed, tmp_path):
    ended = killed_after_a_trial(tmp_path)
    process = launch(tmp_path, "resume", "sweeps/small")
    wait_until(lambda: len(finished_trials(tmp_path)) > len(ended), process)
    kill(process)
    check_end(launch(tmp_path, "resume", "sweeps/small"), tmp_path, ended, undisturbed)


@pytest.mark.slow
def test_a_lost_worker_costs_no_trial(undisturbed, tmp_path):
    process = launch(tmp_path, "run", "space.yaml", *options(CHANGES))
    lose_workers(process, tmp_path)
    check_end(process, tmp_path, {}, undisturbed)


def killed_after_a_trial(
    folder: Path, *changes: str, during: Callable[[subprocess.Popen], None] = lambda process: None
) -> dict[Path, int]:
    """Start a sweep and kill its driver when a trial has ended. Return when each model that exists then was written."""
    process = launch(folder, "run", "space.yaml", *options([*CHANGES, *changes]))
    wait_until(lambda: finished_trials(folder), process)
    during(process)
    kill(process)
    ended = finished_trials(folder)
    assert 0 < len(ended) < 4
    models = [folder / "sweeps/small/trials" / name / "model.pt" for name in ended]
    return {model: model.stat().st_mtime_ns for model in models}


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def told_to_end(driver: subprocess.Popen, folder: Path) -> None:
    """Send SIGTERM to a driver while a trial runs, as the schedulers of clusters do."""
    wait_until(lambda: workers_of(driver.pid), driver)
    driver.terminate()
    assert driver.wait(timeout=120) == 143
    said = output(folder)
    assert "Best trial of each block" in said
    assert said.endswith(f"interrupted; continue with: msae-sweep resume {folder}/sweeps/small\n")
    assert "Traceback" not in said
    assert "SIGTERM" not in said


def check_listening(driver: subprocess.Popen) -> None:
    """Assert that a Ray that a command starts listens on loopback alone and serves no pages of metrics."""
    listens = listening(driver.pid)
    assert {address for address, _ in listens} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not {port for _, port in listens} & {44217, 44227}, "Ray's pages of metrics ask for no token"


def listening(driver: int) -> set[tuple[str, int]]:
    """Return the addresses and ports on which a driver and its Ray wait for connections."""
    found = set()
    for process in (psutil.Process(driver), *psutil.Process(driver).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = process.net_connections(kind="inet")
            found |= {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def lose_workers(driver: subprocess.Popen, folder: Path) -> None:
    """Kill the trials' workers as soon as one of them has saved a state, and let the driver run to its end."""
    kill_workers(driver.pid, folder, lambda condition: wait_until(condition, driver))
    driver.wait(timeout=240)
    assert re.search(r"^block\d+-\d+ starts again from its last state: The actor", output(folder), re.MULTILINE)
    assert "Traceback" not in output(folder)


def lose_a_worker(folder: Path) -> None:
    """Kill the worker of a sweep that this process drives as soon as it has saved a state."""

    def wait(condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.1)

    kill_workers(os.getpid(), folder, wait)


def kill_workers(driver: int, folder: Path, wait: Callable[[Callable[[], Any]], None]) -> None:
    """Kill a driver's trial workers when one of them has saved a state."""
    wait(lambda: workers_of(driver))
    since = time.time()  # workers of a driver that was killed have ended by now
    states = (folder / "sweeps/small/trials").glob
    wait(lambda: any(written_since(state, since) for state in states("*/state.pt")))
    workers = workers_of(driver)
    assert workers
    for worker in workers:
        worker.kill()


def written_since(file: Path, since: float) -> bool:
    try:
        return file.stat().st_mtime > since
    except FileNotFoundError:  # a trial that ends deletes its state
        return False


def check_end(driver: subprocess.Popen, folder: Path, ended: dict[Path, int], undisturbed: dict[str, Any]) -> None:
    """Assert that a sweep ends like the undisturbed one, and has not written any of the existing models again."""
    assert driver.wait(timeout=240) == 0, output(folder)[-3000:]
    check_summary(folder, ended, undisturbed)


def check_summary(folder: Path, ended: dict[Path, int], undisturbed: dict[str, Any]) -> None:
    """Check that a sweep's results are the undisturbed ones, and that no model in `ended` was written again."""
    summary = json.loads((folder / "sweeps" / "small" / "summary.json").read_text())
    assert results(summary) == results(undisturbed)
    for model, before in ended.items():
        assert model.stat().st_mtime_ns == before, f"{model.parent.name} ran again"


def output(folder: Path) -> str:
    """Return the output of the drivers."""
    return (folder / "out").read_text()


def workers_of(driver: int) -> list[psutil.Process]:
    """Return every trial worker of one driver's Ray."""
    children = psutil.Process(driver).children(recursive=True)
    return [child for child in children if "Trainable" in command_line(child)]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
