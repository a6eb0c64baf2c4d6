"""Tests of finding and reading records, as single files and in archives, and of cutting them into units."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from msae_sweep.errors import DataError
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


def texts(path: Path) -> dict[str, bytes]:
    return {record.name: record.data for record in read_records(path) if isinstance(record, Record)}


PACK = {".gz": gzip.compress, ".xz": partial(lzma.compress, preset=0), ".bz2": bz2.compress}


def test_a_record_is_found_by_its_own_path(tmp_path):
    (tmp_path / "a.SGF").write_bytes(b"(;B[aa])")
    assert list(read_records(tmp_path / "a.SGF")) == [Record("a.SGF", b"(;B[aa])")]


def test_folders_are_searched_to_any_depth_in_the_order_of_names(tmp_path):
    for name in ("b/c/2.sgf", "b/1.SGF", "z.sgf", "a.sgf", "notes.txt", "b/._1.sgf", "b/._2.zip", "._3.tar.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"(;)")
    assert names(tmp_path) == ["a.sgf", "b/1.SGF", "b/c/2.sgf", "z.sgf"]


@pytest.mark.parametrize(
    ("ending", "mode"),
    [
        (".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".TAR.GZ", "w:gz"), (".tar.xz", "w:xz"),
        (".txz", "w:xz"), (".tar.bz2", "w:bz2"), (".tbz2", "w:bz2"),
    ],
)  # fmt: skip
def test_a_tar_is_one_unit_and_gives_its_records(tmp_path, ending, mode):
    path = tmp_path / f"games{ending}"
    tar(path, mode, {"readme.txt": b"no", **GAMES})
    assert len(find_units(path)) == 1
    assert texts(path) == {f"{path.name}/{name}": data for name, data in GAMES.items()}


def test_a_zip_is_cut_into_units_that_together_give_its_records(tmp_path):
    path = tmp_path / "games.zip"
    zip_(path, {"readme.txt": b"no", **GAMES})
    units = find_units(path, records_per_unit=4)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 4), (4, 8), (8, 10)]
    read = [record for unit in units for record in read_unit(unit)]
    assert read == list(read_records(path))
    assert texts(path) == {f"games.zip/{name}": data for name, data in GAMES.items()}


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


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_record_is_one_unit_and_gives_its_games(tmp_path, ending):
    path = tmp_path / f"games.SGF{ending}"
    path.write_bytes(PACK[ending](b"\n".join(GAMES.values())))
    assert len(find_units(path)) == 1
    first, *others = GAMES.values()
    numbered = {f"{path.name}#{number}": data for number, data in enumerate(others, start=2)}
    assert texts(path) == {path.name: first, **numbered}
    assert [record.number for record in read_records(path)] == [(0, 0, game) for game in range(10)]


def test_a_games_number_says_its_file_its_member_and_its_place_and_ascends(tmp_path):
    zip_(tmp_path / "b.zip", {"readme.txt": b"no", "1.sgf": b"(;B[aa])(;B[bb])", "2.sgf": b"(;)"})
    tar(tmp_path / "c.tar.xz", "w:xz", {"readme.txt": b"no", "1.sgf": b"(;)", "2.sgf": b"(;B[aa])(;B[bb])"})
    (tmp_path / "a.sgf").write_bytes(b"(;B[aa])(;B[bb])")
    (tmp_path / "a.txt").write_bytes(b"not counted")
    numbers = [record.number for unit in find_units(tmp_path, records_per_unit=1) for record in read_unit(unit)]
    assert numbers == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (2, 1, 0), (2, 1, 1)]


def truncated(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("name", ["games.sgf.gz", "games.sgf.xz", "games.sgf.bz2", "games.tar.gz", "games.tar"])
def test_a_damaged_file_is_an_error_that_says_how_many_games_came_before(tmp_path, name):
    path = tmp_path / name
    rng = np.random.default_rng(0)  # noise cannot be compressed, so half of the file holds about half of the games
    games = {name: b"(;C[" + rng.bytes(200_000).hex().encode() + b"])" for name in GAMES}
    if ".tar" in name:
        tar(path, "w:gz" if name.endswith(".gz") else "w", games)
    else:
        path.write_bytes(PACK[path.suffix](b"".join(games.values())))
    truncated(path, 0.6)
    (unit,) = find_units(path, to_the_end=False)
    seen: list[object] = []
    with pytest.raises(DataError, match=rf"{name}: damaged after [1-9] games \(.*\); fetch it again") as caught:
        seen.extend(read_unit(unit))
    assert f"after {len(seen)} games" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("unpack the readable part" in str(caught.value)) == (".tar" not in name)


def test_an_archive_whose_last_bytes_are_missing_is_an_error_even_if_all_games_can_be_read(tmp_path):
    tar(tmp_path / "games.tar.gz", "w:gz", GAMES)
    truncated(tmp_path / "games.tar.gz", 0.99)
    with pytest.raises(DataError, match=r"games\.tar\.gz: damaged after \d+ games"):
        list(read_records(tmp_path))


def test_an_xz_file_that_is_cut_off_is_found_before_it_is_read_unless_only_its_beginning_is_wanted(tmp_path):
    path = tmp_path / "games.sgf.xz"
    path.write_bytes(lzma.compress(b"".join(GAMES.values())))
    find_units(path)
    truncated(path, 0.9)
    with pytest.raises(DataError, match=r"games\.sgf\.xz: is cut off, .*; fetch it again, or unpack .*xz -dc"):
        find_units(path)
    assert len(find_units(path, to_the_end=False)) == 1


@pytest.mark.parametrize(
    "name", ["games.zip", "games.tar", "games.tar.gz", "games.tgz", "g.txz", "g.sgf.xz", "g.sgf.gz"]
)
@pytest.mark.parametrize("data", [b"", b"no archive at all, only text" * 100])
def test_a_file_that_is_not_what_its_name_says_is_one_line_before_anything_is_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.sgf").write_bytes(b"(;)")
    with pytest.raises(DataError, match=rf"{name}: (is|cannot be read)") as caught:
        find_units(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_member_of_a_zip_does_not_cost_the_others(tmp_path):
    path = tmp_path / "games.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in GAMES.items():
            archive.writestr(name, data)
    path.write_bytes(path.read_bytes().replace(GAMES["004.sgf"], GAMES["004.sgf"].replace(b"aa", b"bb")))
    read = list(read_records(path))
    assert [record.name for record in read if isinstance(record, RefusedRecord)] == ["games.zip/004.sgf"]
    assert len(read) == 10


def test_a_damaged_member_of_a_zip_that_gave_some_games_is_an_error(tmp_path):
    path = tmp_path / "games.zip"
    rng = np.random.default_rng(0)
    games = [b"(;C[" + rng.bytes(300_000).hex().encode() + b"])" for _ in range(6)]
    zip_(path, {"all.sgf": b"".join(games)})
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"games\.zip/all\.sgf: damaged after [1-5] games"):
        list(read_records(path))


@pytest.mark.parametrize("name", ["games.sgf.xz", "games.tar.gz", "games.zip", "games.sgf"])
def test_the_bytes_that_were_read_are_counted(tmp_path, name):
    path = tmp_path / name
    rng = np.random.default_rng(0)
    games = {name: b"(;C[" + rng.bytes(200_000).hex().encode() + b"])" for name in GAMES}
    if name.endswith(".tar.gz"):
        tar(path, "w:gz", games)
    elif name.endswith(".zip"):
        zip_(path, games)
    else:
        text = b"".join(games.values())
        path.write_bytes(PACK[".xz"](text) if name.endswith(".xz") else text)
    counts: list[int] = []
    (unit,) = find_units(path)
    reader = read_unit(unit, counts.append)
    next(reader)
    next(reader)
    assert 0 < sum(counts) < path.stat().st_size, "not counted while reading"
    list(reader)
    assert path.stat().st_size * 0.95 < sum(counts) <= path.stat().st_size


def test_an_unreadable_record_is_named_and_not_fatal(tmp_path):
    (tmp_path / "gone.sgf").symlink_to(tmp_path / "nowhere")
    (refused,) = read_records(tmp_path)
    assert refused == RefusedRecord("gone.sgf", "broken", "cannot be read: No such file or directory")


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
