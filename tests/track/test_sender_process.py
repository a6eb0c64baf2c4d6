"""Tests of the sender in a process of its own, as a sweep uses it. Everything else about it is tested in a thread."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from small_sweep import SWEEP_ID, Store, assert_whole, start, tell, tell_end, tell_start, tell_trial, tracking

from msae_sweep.track.sender_process import SenderProcess
from msae_sweep.track.tracker import Tracker, sync

HERE = Path(__file__).parent


def senders(parent: int | None = None) -> list[psutil.Process]:
    """Return the sender processes of a driver that are alive."""
    found = psutil.Process(parent).children() if parent else psutil.process_iter()
    return [
        p
        for p in found
        if "msae_sweep.track.sender_process" in " ".join(_command(p)) and p.status() != psutil.STATUS_ZOMBIE
    ]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def scratch() -> list[str]:
    """Return the names of the temporary folders that senders keep."""
    return [path.name for path in Path(tempfile.gettempdir()).glob("msae-sender-*")]


def wait_until(happened, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def begin(folder: Path, uri: str) -> Tracker:
    return start(folder, uri, sending=SenderProcess)


def test_what_is_told_reaches_mlflow(uri, tmp_path):
    tracker = begin(tmp_path / "sweep", uri)
    (process,) = senders(os.getpid())
    assert os.getpgid(process.pid) != os.getpgid(0), "an interrupt from the terminal would reach it"
    tell(tracker, tmp_path / "sweep")
    wait_until(lambda: tracker.status.sent)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray's job server may still send these signals to it
        process.send_signal(number)
    assert senders(os.getpid()) == [process]
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 0), report
    assert_whole(Store(uri))
    assert not senders(os.getpid())
    assert not scratch(), "files of models that were sent"


@pytest.mark.slow
def test_lightning_which_takes_ten_seconds_is_not_imported_for_a_model(uri, tmp_path, monkeypatch):
    imported = tmp_path / "imported"
    (tmp_path / "pytorch_lightning.py").write_text(f"open({str(imported)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    tracker = begin(tmp_path / "sweep", uri)
    tell(tracker, tmp_path / "sweep")
    assert tracker.close(timeout_seconds=60).pending == 0
    assert_whole(Store(uri))
    assert not imported.exists()


def test_a_sender_that_is_killed_is_started_again_and_nothing_is_lost_or_doubled(uri, tmp_path):
    folder = tmp_path / "sweep"
    tracker = begin(folder, uri)
    tell_start(tracker)
    wait_until(lambda: tracker.status.sent == 1)
    (first,) = senders(os.getpid())
    assert os.getpgid(first.pid) != os.getpgid(0), "an interrupt from the terminal would reach it"
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray's job server sends them to the sender too
        first.send_signal(number)
    assert senders(os.getpid()) == [first]
    first.kill()
    for trial_id in ("block5-000", "block5-001", "block20-000", "block20-001"):
        tell_trial(tracker, folder, trial_id)
    tell_end(tracker, folder)
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 0), report
    assert_whole(Store(uri))
    assert not senders(os.getpid())
    assert not scratch(), "files of models that were sent"


DRIVER = """
import sys, time
from pathlib import Path
sys.path[:0] = {here!r}
import small_sweep
from msae_sweep.track.sender_process import SenderProcess
folder = Path(sys.argv[1])
tracker = small_sweep.start(folder, sys.argv[2], sending=SenderProcess)
small_sweep.tell(tracker, folder)
print("told", flush=True)
time.sleep(60)
"""


def test_it_ends_with_its_driver_and_its_command_line_shows_no_password(uri, tmp_path):
    folder = tmp_path / "sweep"
    command = [
        sys.executable,
        "-c",
        DRIVER.format(here=[str(HERE), str(HERE.parent)]),
        str(folder),
        "http://me:secret@127.0.0.1:9",
    ]
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout.readline() == "told\n"
        assert scratch()
        (process,) = senders(driver.pid)
        assert not [word for word in process.cmdline() if "secret" in word]
        driver.kill()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert not scratch()
    report = sync(folder, uri, tracking(uri))
    assert (report.pending, report.refused) == (0, 0), report
    assert_whole(Store(uri))


@pytest.mark.slow
def test_one_that_is_killed_while_all_is_closed_is_started_again_too(uri, tmp_path):
    tracker = begin(tmp_path / "sweep", uri)
    tell(tracker, tmp_path / "sweep")
    senders(os.getpid())[0].kill()
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 0), report
    assert_whole(Store(uri))


def test_what_fails_is_told_and_closing_does_not_wait_for_ever(tmp_path):
    tracker = begin(tmp_path / "sweep", "http://127.0.0.1:9")
    tell_start(tracker)
    wait_until(lambda: "127.0.0.1" in tracker.status.last_error)
    assert tracker.status.pending == 1
    report = tracker.close(timeout_seconds=0)
    assert report.pending == 1
    assert "127.0.0.1" in report.reason
    assert not senders(os.getpid())


class Elsewhere:
    """Sweep folder in an object store. Its files are fetched as copies when they are asked for, or not at all."""

    def __init__(self, folder: Path, gone: str = "") -> None:
        self.folder, self.gone, self.fetched = folder, gone, []

    def n_sendable(self, written: int) -> int:
        return written

    def on_upload(self, call) -> None:
        pass

    def fetch(self, path: Path) -> Path | None:
        self.fetched.append(path.name)
        if path.name == self.gone:
            raise OSError("no answer from the store")
        hidden = path.with_name(path.name + ".elsewhere")
        if not hidden.exists():
            return path if path.exists() else None
        copy = Path(tempfile.mkdtemp(dir=self.folder, prefix="fetched-")) / path.name
        shutil.copyfile(hidden, copy)
        return copy


@pytest.mark.slow
def test_files_that_lie_elsewhere_are_fetched_by_the_driver(uri, tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    shared = Elsewhere(folder)
    tracker = Tracker.start(folder, tracking(uri), sweep_id=SWEEP_ID, shared=shared)
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-000")
    model = next(folder.rglob("model.pt"))
    model.rename(model.with_name("model.pt.elsewhere"))
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 0), report
    assert "model.pt" in shared.fetched
    assert Store(uri).models("block5-000")
    assert not list(folder.glob("fetched-*")), "a copy outlived its upload"


@pytest.mark.slow
def test_a_store_that_does_not_answer_loses_no_event(uri, tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    shared = Elsewhere(folder, gone="model.pt")
    tracker = Tracker.start(folder, tracking(uri), sweep_id=SWEEP_ID, shared=shared)
    tell_start(tracker)
    tell_trial(tracker, folder, "block5-000")
    wait_until(lambda: "no answer from the store" in tracker.status.last_error)
    shared.gone = ""
    report = tracker.close(timeout_seconds=60)
    assert (report.pending, report.refused) == (0, 0), report
    assert Store(uri).models("block5-000")
