"""Tests that a `StoreSync` keeps the order of its uploads and always ends. A folder stands in for the store."""

import threading

import pytest

from msae_sweep.errors import StorageError
from msae_sweep.paths import StoragePath
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.store_sync import StoreSync, fetch
from msae_sweep.track.journal import Journal


def lines_in(store) -> int:
    return sum(piece.read_bytes().count(b"\n") for piece in store.glob("journal/events-*.jsonl"))


def test_a_flush_waits_for_the_journals_lines_that_were_written_during_a_round(tmp_path, monkeypatch):
    copy, store = tmp_path / "copy", tmp_path / "store"
    journal = Journal(copy)
    mirror = StoreSync(copy, StoragePath(store))
    write, in_a_round, go_on = StoragePath.write, threading.Event(), threading.Event()

    def slow(place, content):
        in_a_round.set()
        go_on.wait()
        write(place, content)

    monkeypatch.setattr(StoragePath, "write", slow)
    journal.append("metrics", points=[])
    mirror.changed()
    in_a_round.wait()  # this round has looked at the journal already
    journal.append("artifacts", files=[])
    flushing = threading.Thread(target=mirror.flush)
    flushing.start()
    go_on.set()
    flushing.join()
    assert lines_in(store) == 2
    assert mirror.n_events == 2
    mirror.close()
    journal.close()


def test_a_fault_of_any_kind_ends_the_sweep_and_keeps_nobody_waiting(tmp_path, monkeypatch):
    def broken(place, content):
        raise ValueError("not an address")

    mirror = StoreSync(tmp_path / "copy", StoragePath(tmp_path / "store"))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "file").write_text("x")
    monkeypatch.setattr(StoragePath, "write", broken)
    mirror.changed(tmp_path / "copy" / "file")
    with pytest.raises(StorageError, match=r"^storage: ValueError: not an address; files not yet uploaded are lost"):
        mirror.flush()
    mirror.close()


@pytest.mark.parametrize("name", ["sweep.yaml", "identity.json", "data.json", "origins.json", "summary.json"])
def test_all_that_a_resumed_sweep_reads_is_fetched(tmp_path, name):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / name).write_text("{}")
    fetch(StoragePath(tmp_path / "store"), tmp_path / "copy")
    assert (tmp_path / "copy" / name).read_text() == "{}"


def test_a_file_that_only_the_store_has_comes_as_a_copy_of_its_own_and_stays_nowhere_else(tmp_path):
    shared = StoragePath(tmp_path / "store")
    folder = SweepFolder(tmp_path / "copy", shared)
    folder.create()
    model = folder.model_file("block5-000")
    assert folder.fetch(model) is None
    (shared / "trials/block5-000/model.pt").write(b"weights")
    copies = [folder.fetch(model) for _ in range(2)]
    assert [copy.read_bytes() for copy in copies] == [b"weights"] * 2
    assert len({copy.parent for copy in copies}) == 2
    assert {copy.name for copy in copies} == {"model.pt"}
    assert not model.exists()
    here = folder.path / "summary.json"
    here.write_text("{}")
    assert folder.fetch(here) == here
