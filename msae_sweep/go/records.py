"""Where game records lie, and their bytes, one at a time.

A path is an .sgf file, an archive of them (.tar, .tar.gz, .tgz, .zip), or a folder of both, however deep. `find_units`
lists what workers open; `read_unit` opens one of them and yields its records.

A loose file is a unit. A zip has a directory, so it is cut into ranges of members that workers read side by side. A tar
is one unit: gzip can only be read from its start, so k workers on one .tar.gz would each unpack what lies before their
part, (k + 1) / 2 times the work for no shorter wait. Reading is also the cheap part: 2,082 games came out of a .tar.gz
at 22,000 a second and were parsed at 1,400 on the same core (2026-11-23). So a pipeline reads a tar in one task and
hands the bytes on; it should cut the work of parsing after `read_unit`, not before.
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
"""A longer record is refused, so that one bad member cannot fill a worker's memory; 64 MiB hold some 40,000 games."""


class Unit(NamedTuple):
    """What one worker opens: a loose record, a whole tar, or some records of a zip."""

    file: str
    name: str
    """The file as records' names begin: relative to the path that was searched."""
    start: int = 0
    """First record of a zip, counted over its .sgf members."""
    stop: int | None = None
    """First record of a zip that is not read any more; None reads to its end."""


class Record(NamedTuple):
    """One file's bytes; usually, but not necessarily, one game."""

    name: str
    data: bytes


class RefusedRecord(NamedTuple):
    """A record, game or archive that gives no positions, and why; a run counts these and goes on."""

    name: str
    kind: Literal["broken", "size", "duplicate"]
    reason: str


def find_units(path: Path, records_per_unit: int = 4096) -> list[Unit]:
    """Units of a file or folder, sorted by name; no record is read yet.

    Raises:
        DataError: nothing there, or nothing that can hold a record.
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
        raise DataError(f"{path}: no game records there; must be .sgf files, or .tar, .tar.gz, .tgz or .zip of them")
    return units


def read_unit(unit: Unit) -> Iterator[Record | RefusedRecord]:
    """Records of a unit in the order in which they lie there, one in memory at a time."""
    if _is_record(unit.file):
        yield from _loose(unit)
    elif unit.file.lower().endswith(TARS):
        yield from _members_of_tar(unit)
    else:
        yield from _members_of_zip(unit)


def read_records(path: Path) -> Iterator[Record | RefusedRecord]:
    """Records of a file or folder, sorted by file and then as they lie in it.

    Raises:
        DataError: as `find_units`.
    """
    for unit in find_units(path):
        yield from read_unit(unit)


def _is_record(file: str) -> bool:
    # macOS puts a "._" beside each file that it archives: attributes, not a record.
    return file.lower().endswith(".sgf") and not os.path.basename(file).startswith("._")


def _units_of(file: Path, name: str, records_per_unit: int) -> Iterator[Unit]:
    if _is_record(name) or name.lower().endswith(TARS):
        yield Unit(str(file), name)
    elif name.lower().endswith(".zip"):
        try:
            with zipfile.ZipFile(file) as archive:
                n_records = len(_records_in(archive))
        except (OSError, zipfile.BadZipFile):
            # Reading it names the fault, where all faults are named.
            yield Unit(str(file), name)
            return
        for start in range(0, n_records, records_per_unit):
            yield Unit(str(file), name, start, min(start + records_per_unit, n_records))


def _loose(unit: Unit) -> Iterator[Record | RefusedRecord]:
    name = _printable(unit.name)
    try:
        with open(unit.file, "rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        yield _unreadable(name, error)
        return
    yield _record(name, data)


def _members_of_tar(unit: Unit) -> Iterator[Record | RefusedRecord]:
    try:
        with tarfile.open(unit.file, "r|*") as archive:
            while (member := archive.next()) is not None:
                # tarfile keeps what it has seen, about 1 KB a member; over a stream it never needs that again.
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isfile() or not _is_record(member.name):
                    continue
                file = archive.extractfile(member)
                assert file is not None
                yield _record(_printable(f"{unit.name}/{member.name}"), file.read(MAX_RECORD_BYTES + 1))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        # What came before it stands: a stream that breaks is lost from there on only.
        yield _unreadable(_printable(unit.name), error)


def _members_of_zip(unit: Unit) -> Iterator[Record | RefusedRecord]:
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
                # RuntimeError is what zipfile says of a password or an unknown compression.
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
    """The name as valid UTF-8: what a file system or an archive holds may not be, and Arrow refuses it then."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
