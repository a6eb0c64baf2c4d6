"""Reading of files that may be compressed with gzip, xz or bzip2, with the number of bytes read from the disk."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from msae_sweep.errors import DataError, first_line

_OPENERS: dict[str, Callable[[BinaryIO], io.BufferedIOBase]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
_SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tbz2": ".tar.bz2"}
_UNPACK = {".gz": "gzip -dc", ".xz": "xz -dc", ".bz2": "bzip2 -dc"}
"""Commands that write what can be read of a damaged file to their standard output."""

DAMAGES = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""Exceptions with which Python's modules report a damaged compressed file."""


def without_compression(name: str) -> tuple[str, str]:
    """Return a lower-case file name without the ending of its compression, and that ending, which may be empty."""
    lower = name.lower()
    for short, long in _SHORT.items():
        if lower.endswith(short):
            lower = lower.removesuffix(short) + long
    ending = next((ending for ending in _OPENERS if lower.endswith(ending)), "")
    return lower.removesuffix(ending), ending


class OpenedFile(NamedTuple):
    """Open file, which is unpacked where its name says that it is compressed."""

    file: io.BufferedIOBase
    """The unpacked content."""
    n_bytes: Callable[[], int]
    """Function that returns how many bytes have been read from the disk."""


@contextlib.contextmanager
def open_unpacked(path: str | Path) -> Iterator[OpenedFile]:
    """Open a file for the duration of the `with` block."""
    _, ending = without_compression(str(path))
    with open(path, "rb") as raw:
        if not ending:
            yield OpenedFile(raw, raw.tell)
            return
        with _OPENERS[ending](raw) as file:
            yield OpenedFile(file, raw.tell)


def check_compression(path: str | Path, to_the_end: bool) -> None:
    """Check a compressed file's first bytes, and of an .xz file also that it has an end, without unpacking it.

    Args:
        path: a file, compressed or not.
        to_the_end: False accepts a file of which only the beginning is there.

    Raises:
        DataError: the file is not what its name says, or it is cut off.
    """
    _, ending = without_compression(str(path))
    if not ending:
        return
    try:
        with open_unpacked(path) as opened:
            opened.file.read(1)
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            # An xz file ends with these two letters, after which there may be zeros.
            has_end = ending != ".xz" or file.read().rstrip(b"\0").endswith(b"YZ")
    except DAMAGES as error:
        raise DataError(f"{path}: cannot be read as {ending}: {reason_of(error)}") from None
    if not size:
        raise DataError(f"{path}: is empty; must be a file compressed as {ending}")
    if to_the_end and not has_end:
        raise DataError(f"{path}: is cut off, because the end of the .xz file is missing; {way_out(path)}")


def way_out(path: str | Path) -> str:
    """Return what a user can do about a damaged file."""
    rest, ending = without_compression(str(path))
    again = "fetch it again"
    if not ending or rest.endswith(".tar"):
        return again
    return f"{again}, or unpack the readable part (`{_UNPACK[ending]} {path} > part.sgf`) and give that"


def reason_of(error: BaseException) -> str:
    """Return an exception's reason in one line."""
    return getattr(error, "strerror", None) or first_line(error)
