"""Search for game records in files, folders and archives, and reading of their bytes one record at a time.

A path is an .sgf file, an archive of them (.tar, .tar.gz, .tgz, .zip), or a folder of both at any depth. `find_units`
lists the units that workers open; `read_unit` opens one unit and yields its records.

A loose file is one unit. A zip has a directory, so it is split into ranges of members that workers read in parallel. A
tar is one unit: gzip can only be read from its start, so k workers on one .tar.gz would each have to unpack everything
before their part, which is (k + 1) / 2 times the work without finishing earlier. Reading is also the cheap part: 2,082
games were read from a .tar.gz at 22,000 games/s and parsed at 1,400 games/s on the same core (2026-11-23). A pipeline
should therefore read a tar in one task, pass the bytes on, and split the parsing after `read_unit`, not before.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from msae_sweep.errors import DataError, first_line

TARS = (".tar", ".tar.gz", ".tgz")
MAX_RECORD_BYTES = 64 * 2**20
"""Size limit of a record, so that one bad archive member cannot fill a worker's memory; 64 MiB is some 40,000 games."""


class ReadUnit(NamedTuple):
    """Part of the input that one worker opens: a loose record, a whole tar, or some records of a zip."""

    file: str
    name: str
    """Path of the file relative to the searched path; the names of its records begin with it."""
    start: int = 0
    """Index of the first record to read from a zip, counted over its .sgf members."""
    stop: int | None = None
    """Index after the last record to read from a zip; None reads to the end."""


class Record(NamedTuple):
    """Bytes of one SGF file, which usually, but not necessarily, contains one game."""

    name: str
    data: bytes


class RefusedRecord(NamedTuple):
    """Record, game or archive that gives no positions, with the reason; a run counts these and continues."""

    name: str
    kind: Literal["broken", "size", "duplicate"]
    reason: str


def find_units(path: Path, records_per_unit: int = 4096) -> list[ReadUnit]:
    """Return the units of a file or folder, sorted by name, without reading any record.

    Raises:
        DataError: the path does not exist, or it contains no file that can hold a record.
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
        raise DataError(f"{path}: no such file or folder; must be .sgf files or archives of them")
    units = [unit for name, file in files for unit in _units_of(file, name, records_per_unit)]
    if not units:
        raise DataError(f"{path}: contains no game records; must be .sgf files, or .tar, .tar.gz, .tgz or .zip of them")
    return units


def read_unit(unit: ReadUnit) -> Iterator[Record | RefusedRecord]:
    """Yield the records of a unit in their stored order, with one record in memory at a time."""
    if _is_record(unit.file):
        yield from _loose(unit)
    elif unit.file.lower().endswith(TARS):
        yield from _members_of_tar(unit)
    else:
        yield from _members_of_zip(unit)


def read_records(path: Path) -> Iterator[Record | RefusedRecord]:
    """Yield the records of a file or folder, sorted by file name and then in their stored order.

    Raises:
        DataError: in the same cases as `find_units`.
    """
    for unit in find_units(path):
        yield from read_unit(unit)


def _is_record(file: str) -> bool:
    # For each file that macOS archives it adds a file named "._…", which holds attributes and is not a record.
    return file.lower().endswith(".sgf") and not os.path.basename(file).startswith("._")


def _units_of(file: Path, name: str, records_per_unit: int) -> Iterator[ReadUnit]:
    if _is_record(name) or name.lower().endswith(TARS):
        yield ReadUnit(str(file), name)
    elif name.lower().endswith(".zip"):
        try:
            with zipfile.ZipFile(file) as archive:
                n_records = len(_records_in(archive))
        except (OSError, zipfile.BadZipFile):
            # The file is listed as a unit, so that `read_unit` reports this error like all other read errors.
            yield ReadUnit(str(file), name)
            return
        for start in range(0, n_records, records_per_unit):
            yield ReadUnit(str(file), name, start, min(start + records_per_unit, n_records))


def _loose(unit: ReadUnit) -> Iterator[Record | RefusedRecord]:
    name = _printable(unit.name)
    try:
        with open(unit.file, "rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        yield _unreadable(name, error)
        return
    yield _record(name, data)


def _members_of_tar(unit: ReadUnit) -> Iterator[Record | RefusedRecord]:
    try:
        with tarfile.open(unit.file, "r|*") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps about 1 KB for each member that it has read, which it never needs again when streaming.
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isfile() or not _is_record(member.name):
                    continue
                file = archive.extractfile(member)
                assert file is not None
                yield _record(_printable(f"{unit.name}/{member.name}"), file.read(MAX_RECORD_BYTES + 1))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        # Records before a damaged place in the stream have been yielded; only the rest is lost.
        yield _unreadable(_printable(unit.name), error)


def _members_of_zip(unit: ReadUnit) -> Iterator[Record | RefusedRecord]:
    try:
        archive = zipfile.ZipFile(unit.file)
    except (OSError, zipfile.BadZipFile) as error:
        yield _unreadable(_printable(unit.name), error)
        return
    with archive:
        for member in _records_in(archive)[unit.start : unit.stop]:
            name = _printable(f"{unit.name}/{member.filename}")
            try:
                with archive.open(member) as file:
                    data = file.read(MAX_RECORD_BYTES + 1)
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
                # zipfile raises RuntimeError for a password or an unknown compression method.
                yield _unreadable(name, error)
                continue
            yield _record(name, data)


def _records_in(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if _is_record(member.filename)]


def _record(name: str, data: bytes) -> Record | RefusedRecord:
    if len(data) > MAX_RECORD_BYTES:
        return RefusedRecord(name, "broken", f"longer than {MAX_RECORD_BYTES >> 20} MiB; split it into smaller files")
    return Record(name, data)


def _unreadable(name: str, error: Exception) -> RefusedRecord:
    reason = getattr(error, "strerror", None) or first_line(error)
    return RefusedRecord(name, "broken", f"cannot be read: {reason}")


def _printable(name: str) -> str:
    """Return the name as valid UTF-8. Names in file systems and archives may be invalid, and Arrow refuses those."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
