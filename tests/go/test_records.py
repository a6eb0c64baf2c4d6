"""Tests of finding and reading records, as single files and in archives, and of cutting them into units."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from msae_sweep.errors import DataError
from msae_sweep.go import records
from msae_sweep.go.records import Record, RefusedRecord, find_units, read_records, read_unit

GAMES = {f"{number:03}.sgf": f"(;SZ[19]C[{number}];B[aa])".encode() for number in range(10)}


def tar(path: Path, mode: str, members: dict[str, bytes]) -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def zip_(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def names(path: Path) -> list[str]:
    return [record.name for record in read_records(path)]


def test_a_record_is_found_by_its_own_path(tmp_path):
    (tmp_path / "a.SGF").write_bytes(b"(;B[aa])")
    assert list(read_records(tmp_path / "a.SGF")) == [Record("a.SGF", b"(;B[aa])")]


def test_folders_are_searched_to_any_depth_in_the_order_of_names(tmp_path):
    for name in ("b/c/2.sgf", "b/1.SGF", "z.sgf", "a.sgf", "notes.txt", "b/._1.sgf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"(;)")
    assert names(tmp_path) == ["a.sgf", "b/1.SGF", "b/c/2.sgf", "z.sgf"]


@pytest.mark.parametrize(
    ("ending", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".TAR.GZ", "w:gz")]
)
def test_a_tar_is_one_unit_and_gives_its_records(tmp_path, ending, mode):
    path = tmp_path / f"games{ending}"
    tar(path, mode, {"readme.txt": b"no", **GAMES})
    assert len(find_units(path)) == 1
    assert list(read_records(path)) == [Record(f"{path.name}/{name}", data) for name, data in GAMES.items()]


def test_a_zip_is_cut_into_units_that_together_give_its_records(tmp_path):
    path = tmp_path / "games.zip"
    zip_(path, {"readme.txt": b"no", **GAMES})
    units = find_units(path, records_per_unit=4)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 4), (4, 8), (8, 10)]
    read = [record for unit in units for record in read_unit(unit)]
    assert read == list(read_records(path)) == [Record(f"games.zip/{name}", data) for name, data in GAMES.items()]


def test_archives_inside_folders_are_read_beside_loose_records(tmp_path):
    (tmp_path / "deep").mkdir()
    tar(tmp_path / "deep" / "x.tgz", "w:gz", {"in/1.sgf": b"(;)"})
    zip_(tmp_path / "deep" / "y.zip", {"2.sgf": b"(;)"})
    (tmp_path / "deep" / "a.sgf").write_bytes(b"(;)")
    assert names(tmp_path) == ["deep/a.sgf", "deep/x.tgz/in/1.sgf", "deep/y.zip/2.sgf"]


def test_records_are_read_lazily(tmp_path):
    tar(tmp_path / "games.tar", "w", GAMES)
    reader = read_records(tmp_path / "games.tar")
    assert next(reader) == Record("games.tar/000.sgf", GAMES["000.sgf"])


def test_a_tar_is_read_without_keeping_what_it_held(tmp_path, monkeypatch):
    tar(tmp_path / "games.tar", "w", GAMES)
    kept = []
    through = tarfile.TarFile.next

    def watched(self):
        kept.append(len(self.members))
        return through(self)

    monkeypatch.setattr(tarfile.TarFile, "next", watched)
    assert len(names(tmp_path)) == 10
    assert max(kept) <= 1


def test_a_truncated_archive_gives_what_came_before_and_is_named(tmp_path):
    path = tmp_path / "games.tar.gz"
    rng = np.random.default_rng(0)  # noise cannot be compressed, so half of the file holds half of the records
    tar(path, "w:gz", {name: data + rng.bytes(20_000) for name, data in GAMES.items()})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *before, last = read_records(path)
    assert 0 < len(before) < 10
    assert all(isinstance(record, Record) for record in before)
    assert isinstance(last, RefusedRecord)
    assert (last.name, last.kind) == ("games.tar.gz", "broken")


@pytest.mark.parametrize("name", ["games.zip", "games.tar", "games.tar.gz", "games.tgz"])
@pytest.mark.parametrize("data", [b"", b"no archive at all, only text" * 100])
def test_what_is_no_archive_is_named_and_not_fatal(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.sgf").write_bytes(b"(;)")
    refused, record = read_records(tmp_path)
    assert isinstance(refused, RefusedRecord)
    assert refused.name == name
    assert refused.reason.startswith("cannot be read: ")
    assert record == Record("z.sgf", b"(;)")


def test_a_damaged_member_of_a_zip_does_not_cost_the_others(tmp_path):
    path = tmp_path / "games.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in GAMES.items():
            archive.writestr(name, data)
    path.write_bytes(path.read_bytes().replace(GAMES["004.sgf"], GAMES["004.sgf"].replace(b"aa", b"bb")))
    read = list(read_records(path))
    assert [record.name for record in read if isinstance(record, RefusedRecord)] == ["games.zip/004.sgf"]
    assert len(read) == 10


def test_an_unreadable_record_is_named_and_not_fatal(tmp_path):
    (tmp_path / "gone.sgf").symlink_to(tmp_path / "nowhere")
    (refused,) = read_records(tmp_path)
    assert refused == RefusedRecord("gone.sgf", "broken", "cannot be read: No such file or directory")


def test_a_record_too_long_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 2**20)
    (tmp_path / "a.sgf").write_bytes(b" " * (2**20 + 1))
    tar(tmp_path / "b.tgz", "w:gz", {"b.sgf": b" " * 2**22})
    zip_(tmp_path / "c.zip", {"c.sgf": b" " * 2**22})
    assert {record.reason for record in read_records(tmp_path)} == {"longer than 1 MiB; split it into smaller files"}


def test_names_are_valid_text(tmp_path):
    zip_(tmp_path / "c.zip", {"囲碁.sgf": b"(;)"})
    tar(tmp_path / "d.tar", "w", {"\udcff.sgf": b"(;)"})
    assert names(tmp_path) == ["c.zip/囲碁.sgf", "d.tar/\\udcff.sgf"]


@pytest.mark.parametrize("made", [None, "notes.txt"])
def test_a_path_without_records_says_what_would_be_right(tmp_path, made):
    if made:
        (tmp_path / made).write_bytes(b"")
    with pytest.raises(DataError, match=r"must be \.sgf files"):
        find_units(tmp_path if made else tmp_path / "nowhere")
