"""Search for game records in files, folders and archives, and reading of their games one at a time.

A path is an .sgf file, plain or compressed (.gz, .xz, .bz2), an archive of them (.zip, or .tar, plain or compressed),
or a folder of all of these at any depth. `find_units` lists the units that workers open; `read_unit` opens one unit and
yields its games. An .sgf file may hold millions of games; about one game is in memory at a time.

A file is one unit. A zip has a directory, so it is split into ranges of members that workers read in parallel. Any
other compressed file can only be read from its start, so k workers on one of them would each have to unpack everything
before their part, which is (k + 1) / 2 times the work without finishing earlier. Reading is also the cheap part: 2,082
games were read from a .tar.gz at 22,000 games/s and parsed at 1,400 games/s on the same core (2026-11-23). A pipeline
should therefore read a unit in one task, pass the bytes on, and split the parsing after `read_unit`, not before.

A damaged archive or compressed file is an error, because an unknown part of its games is missing. One that cannot be
read in itself (an .sgf file, or a member of a zip) is refused and named, and the others are read.
"""

import io
import itertools
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Literal, NamedTuple

from msae_sweep.errors import DataError
from msae_sweep.go.compressed import (
    DAMAGES,
    OpenedFile,
    check_compression,
    open_unpacked,
    reason_of,
    way_out,
    without_compression,
)
from msae_sweep.go.sgf_stream import PIECE_BYTES, TooLong, split_games

_TAR_BYTES = 2**16
"""Number of bytes that are read from a tar at a time. Its standard of 10 KB makes five times as many calls."""
_RIGHT = ".sgf files (also .gz, .xz or .bz2), or .tar (also .gz, .xz or .bz2) or .zip archives of .sgf files"


class ReadUnit(NamedTuple):
    """Part of the input that one worker opens: a file, or some members of a zip."""

    file: str
    name: str
    """Path of the file relative to the searched path; the names of its records begin with it."""
    file_number: int = 0
    """Index of the file among all files that can hold records, sorted by name."""
    start: int = 0
    """Index of the first member to read from a zip, counted over its .sgf members."""
    stop: int | None = None
    """Index after the last member to read from a zip; None reads to the end."""


class Record(NamedTuple):
    """Text of one game."""

    name: str
    """Name of the file or member, with the suffix `#2`, `#3` … from the second game of a file on."""
    data: bytes
    number: tuple[int, int, int] = (0, 0, 0)
    """Index of the game's file, of the member in an archive, and of the game in it. Numbers ascend in stored order."""


class RefusedRecord(NamedTuple):
    """File or game that gives no positions, with the reason; a run counts these and continues."""

    name: str
    kind: Literal["broken", "size", "duplicate", "damaged"]
    reason: str
    number: tuple[int, int, int] = (0, 0, 0)


def find_units(path: Path, records_per_unit: int = 4096, to_the_end: bool = True) -> list[ReadUnit]:
    """Return the units of a file or folder, sorted by name, without reading any record.

    Args:
        path: the file or folder.
        records_per_unit: maximum number of a zip's members in one unit.
        to_the_end: False accepts an .xz file of which only the beginning is there.

    Raises:
        DataError: the path does not exist, it contains no file that can hold a record, or an archive or compressed file
            is not what its name says.
    """
    if path.is_file():
        files = [(path.name, path)]
    elif path.is_dir():
        files = sorted(
            (Path(folder, name).relative_to(path).as_posix(), Path(folder, name))
            for folder, _, names in os.walk(path)
            for name in names
        )
    else:
        raise DataError(f"{path}: no such file or folder; must be {_RIGHT}")
    files = [(name, file) for name, file in files if _is_record(name) or _is_archive(name)]
    units = [
        unit
        for number, (name, file) in enumerate(files)
        for unit in _units_of(ReadUnit(str(file), name, number), records_per_unit, to_the_end)
    ]
    if not units:
        raise DataError(f"{path}: contains no game records; must be {_RIGHT}")
    return units


def read_unit(unit: ReadUnit, count: Callable[[int], None] = lambda _: None) -> Iterator[Record | RefusedRecord]:
    """Yield the games of a unit in their stored order, with one game in memory at a time.

    Args:
        unit: the unit.
        count: called now and then with the number of bytes that were read from the disk since its last call.

    Raises:
        DataError: the unit is an archive or a compressed file that is damaged.
    """
    if _is_record(unit.name):
        return _games_of_file(unit, count)
    if unit.name.lower().endswith(".zip"):
        return _games_of_zip(unit, count)
    return _games_of_tar(unit, count)


def read_records(path: Path) -> Iterator[Record | RefusedRecord]:
    """Yield the games of a file or folder, sorted by file name and then in their stored order.

    Raises:
        DataError: in the same cases as `find_units` and `read_unit`.
    """
    for unit in find_units(path):
        yield from read_unit(unit)


def games_in(name: str, pieces: Iterable[bytes], number: tuple[int, int] = (0, 0)) -> Iterator[Record | RefusedRecord]:
    """Yield the games of an SGF text.

    Args:
        name: name of the file or member.
        pieces: the text in consecutive pieces, as in `split_games`.
        number: index of the file and of the member, with which the games' numbers begin.
    """
    pieces, n_games = iter(pieces), 0
    first = next(pieces, b"")
    for n_games, text in enumerate(split_games(itertools.chain([first], pieces)), start=1):
        own = name if n_games == 1 else f"{name}#{n_games}"
        if isinstance(text, TooLong):
            reason = f"longer than {text.limit >> 20} MiB; split it into smaller files"
            yield RefusedRecord(own, "broken", reason, (*number, n_games - 1))
        else:
            yield Record(own, text, (*number, n_games - 1))
    if n_games == 0:
        yield RefusedRecord(name, "broken", "no SGF game in it" if first.strip() else "empty", (*number, 0))


def _is_record(name: str) -> bool:
    return without_compression(name)[0].endswith(".sgf") and not _is_of_macos(name)


def _is_archive(name: str) -> bool:
    return (without_compression(name)[0].endswith(".tar") or name.lower().endswith(".zip")) and not _is_of_macos(name)


def _is_of_macos(name: str) -> bool:
    # For each file that macOS archives or copies it adds a file named "._…", which holds attributes.
    return os.path.basename(name).startswith("._")


def _units_of(unit: ReadUnit, records_per_unit: int, to_the_end: bool) -> Iterator[ReadUnit]:
    if not unit.name.lower().endswith(".zip"):
        try:
            check_compression(unit.file, to_the_end)
            if _is_archive(unit.name):
                with open_unpacked(unit.file) as opened, tarfile.open(fileobj=opened.file, mode="r|"):
                    pass
        except (*DAMAGES, tarfile.TarError) as error:
            raise DataError(f"{unit.file}: is no readable archive: {reason_of(error)}; {way_out(unit.file)}") from None
        yield unit
        return
    try:
        with zipfile.ZipFile(unit.file) as archive:
            n_records = len(_members_of(archive))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{unit.file}: is no readable archive: {reason_of(error)}; {way_out(unit.file)}") from None
    for start in range(0, n_records, records_per_unit):
        yield unit._replace(start=start, stop=min(start + records_per_unit, n_records))


def _games_of_file(unit: ReadUnit, count: Callable[[int], None]) -> Iterator[Record | RefusedRecord]:
    name, n_games = _printable(unit.name), 0
    try:
        with open_unpacked(unit.file) as opened:
            pieces = _Pieces(opened, count).of(opened.file)
            for game in games_in(name, pieces, (unit.file_number, 0)):
                n_games += isinstance(game, Record)
                yield game
    except DAMAGES as error:
        if not without_compression(unit.file)[1]:
            yield RefusedRecord(name, "broken", f"cannot be read: {reason_of(error)}", (unit.file_number, 0, n_games))
        else:
            raise _damaged(unit, n_games, error) from None


def _games_of_tar(unit: ReadUnit, count: Callable[[int], None]) -> Iterator[Record | RefusedRecord]:
    n_games = 0
    try:
        with (
            open_unpacked(unit.file) as opened,
            tarfile.open(fileobj=opened.file, mode="r|", bufsize=_TAR_BYTES) as archive,
        ):
            pieces, member_number = _Pieces(opened, count), 0
            while (member := archive.next()) is not None:
                # tarfile keeps about 1 KB for each member that it has read, which it never needs again when streaming.
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isfile() or not _is_plain_record(member.name):
                    continue
                file = archive.extractfile(member)
                assert file is not None
                name = _printable(f"{unit.name}/{member.name}")
                for game in games_in(name, pieces.of(file), (unit.file_number, member_number)):
                    n_games += isinstance(game, Record)
                    yield game
                member_number += 1
            # Damage behind the last member, such as a missing checksum, is noticed only when all is read.
            for _ in pieces.of(opened.file):
                pass
    except (*DAMAGES, tarfile.TarError) as error:
        raise _damaged(unit, n_games, error) from None


def _games_of_zip(unit: ReadUnit, count: Callable[[int], None]) -> Iterator[Record | RefusedRecord]:
    try:
        archive = zipfile.ZipFile(unit.file)
    except (OSError, zipfile.BadZipFile) as error:
        raise _damaged(unit, 0, error) from None
    with archive:
        for member_number, member in enumerate(_members_of(archive)[unit.start : unit.stop], start=unit.start):
            name, n_games = _printable(f"{unit.name}/{member.filename}"), 0
            number = (unit.file_number, member_number)
            try:
                with archive.open(member) as file:
                    for game in games_in(name, iter(partial(file.read, PIECE_BYTES), b""), number):
                        n_games += isinstance(game, Record)
                        yield game
            except (*DAMAGES, zipfile.BadZipFile, RuntimeError) as error:
                # zipfile raises RuntimeError for a password or an unknown compression method.
                if n_games:
                    raise _damaged(unit._replace(file=f"{unit.file}/{member.filename}"), n_games, error) from None
                yield RefusedRecord(name, "broken", f"cannot be read: {reason_of(error)}", (*number, 0))
            count(member.compress_size)


class _Pieces:
    """Reading in pieces from an open file or the members of an archive in it, while bytes from the disk are counted."""

    def __init__(self, opened: OpenedFile, count: Callable[[int], None]) -> None:
        self.opened, self.count = opened, count
        self.counted = 0

    def of(self, file: IO[bytes] | io.BufferedIOBase) -> Iterator[bytes]:
        """Yield the content of `file`, which is the open file or a member of it."""
        while True:
            piece = file.read(PIECE_BYTES)
            n_bytes = self.opened.n_bytes()
            self.count(n_bytes - self.counted)
            self.counted = n_bytes
            if not piece:
                return
            yield piece


def _is_plain_record(name: str) -> bool:
    return _is_record(name) and not without_compression(name)[1]


def _members_of(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if _is_plain_record(member.filename)]


def _damaged(unit: ReadUnit, n_games: int, error: BaseException) -> DataError:
    return DataError(f"{unit.file}: damaged after {n_games:,} games ({reason_of(error)}); {way_out(unit.file)}")


def _printable(name: str) -> str:
    """Return the name as valid UTF-8. Names in file systems and archives may be invalid, and Arrow refuses those."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
