"""Files and folders on a disk or in an object store, told apart by how they are named; through pyarrow's file systems.

`s3://bucket/folder` and whatever else pyarrow knows (gs, hdfs, …) are object stores; all else is a path. Credentials
come from the environment, as everywhere (AWS_ACCESS_KEY_ID … or the machine's role), and so does another endpoint than
Amazon's (AWS_ENDPOINT_URL); `?endpoint_override=host:port&scheme=http` behind a URI does too. A place is picklable, and
opened anew by every process with its own environment: it never holds a secret.
"""

import contextlib
import functools
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from msae_sweep.errors import ConfigError, MsaeSweepError, SweepError, first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

T = TypeVar("T")

TRIES = 4
"""Of one request to a store that answers with an error, a second apart and then longer; pyarrow tries again itself."""

REQUEST_SECONDS = 30.0
"""How long a store may be silent in the middle of a request. AWS' own 3 s end every call to a slow store."""

S3_VARIABLES = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_PROFILE",
)  # fmt: skip
"""What says where an S3 store is and who asks. Changed within a process, it leads to another store."""


def is_uri(text: str) -> bool:
    """Whether `text` names a place in an object store."""
    return "://" in text


class StoragePath:
    """A file or folder that may exist. Immutable; `/` goes down."""

    def __init__(self, where: str | Path) -> None:
        """A path, made absolute, or a URI.

        Raises:
            SweepError: a URI with a password in it, which would end up in logs and files.
        """
        text = str(where)
        if not is_uri(text):
            self._base, self._query = str(Path(text).expanduser().absolute()), ""
            return
        parts = urlsplit(text)
        if parts.username is not None or "secret" in parts.query or "access_key" in parts.query:
            raise SweepError(
                f"{parts.scheme}://{parts.hostname}{parts.path}: a URI must not hold credentials; put them into the "
                "environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
            )
        self._base, self._query = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/"), parts.query

    def __truediv__(self, name: str) -> "StoragePath":
        below = object.__new__(StoragePath)
        below._base, below._query = f"{self._base}/{name}", self._query
        return below

    def __str__(self) -> str:
        return self._base

    def __repr__(self) -> str:
        return f"Place({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoragePath) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @property
    def uri(self) -> str:
        """What makes the same place again."""
        return f"{self._base}?{self._query}" if self._query else self._base

    @property
    def is_remote(self) -> bool:
        """Whether it lies in an object store."""
        return is_uri(self._base)

    @property
    def path(self) -> Path:
        """The path of a place on a disk."""
        assert not self.is_remote, f"{self} is no path"
        return Path(self._base)

    @property
    def name(self) -> str:
        """The last part."""
        return self._base.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "StoragePath":
        """The folder that holds it."""
        return self.like(self._base.rsplit("/", 1)[0])

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The name's ending, with the dot."""
        return Path(self.name).suffix

    def relative_to(self, folder: "StoragePath") -> Path:
        """The way from `folder` to here."""
        return Path(self._base).relative_to(folder._base)

    @property
    def filesystem(self) -> "FileSystem":
        """pyarrow's, for what takes one."""
        if not self.is_remote:
            return _filesystem("", "", "", ())
        parts, environment = urlsplit(self._base), tuple(map(os.environ.get, S3_VARIABLES))
        return _filesystem(parts.scheme, parts.netloc, self._query, environment)

    @property
    def inside(self) -> str:
        """How `filesystem` names this place."""
        return self._base.split("://", 1)[1] if self.is_remote else self._base

    def is_file(self) -> bool:
        """Whether a file is here."""
        return bool(self.info().is_file)

    def is_folder(self) -> bool:
        """Whether a folder is here; in a store, whether anything lies below."""
        return self.info().type.name == "Directory"

    def exists(self) -> bool:
        """Whether anything is here."""
        return self.info().type.name != "NotFound"

    def info(self) -> "FileInfo":
        """What is known of it: `is_file`, `size`, `mtime_ns`."""
        return self._asked(lambda: self.filesystem.get_file_info(self.inside))

    def children(self) -> list["StoragePath"]:
        """Files and folders directly below, by name; none where there is no folder."""
        return sorted((self / info.base_name for info in self._below()), key=str)

    def folders(self) -> list["StoragePath"]:
        """Folders directly below, by name."""
        return sorted((self / info.base_name for info in self._below() if info.type.name == "Directory"), key=str)

    def files(self, *, recursive: bool = False) -> dict["StoragePath", "FileInfo"]:
        """Files below by name, with what is known of them: `size` in bytes, `mtime_ns`."""
        files = [info for info in self._below(recursive=recursive) if info.is_file]
        return {self / info.path[len(self.inside) :].lstrip("/"): info for info in sorted(files, key=_path)}

    def like(self, text: str) -> "StoragePath":
        """The place that another one of the same store or disk calls itself."""
        named = object.__new__(StoragePath)
        named._base, named._query = text, self._query
        return named

    def open(self) -> Any:
        """The file for reading, seekable; closes as a context manager does."""
        return self._asked(lambda: self.filesystem.open_input_file(self.inside))

    def read(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: none is here.
        """

        def whole() -> bytes:
            with self.filesystem.open_input_file(self.inside) as file:
                return bytes(file.read())

        return self._asked(whole)

    def write(self, content: bytes | memoryview) -> None:
        """Put a file here, whole or not at all: readers see the old one or the new one. Folders come to be.

        Raises:
            OSError: not possible.
        """
        if self.is_remote:
            self._asked(lambda: self._put(content))
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.name}.{uuid.uuid4().hex}.part")
        try:
            part.write_bytes(content)
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove the file, or the folder with all below; nothing where nothing is."""
        info = self.info()
        with contextlib.suppress(FileNotFoundError):
            if info.is_file:
                self._asked(lambda: self.filesystem.delete_file(self.inside))
            elif info.type.name == "Directory":
                self._asked(lambda: self.filesystem.delete_dir(self.inside))

    def check(self) -> None:
        """Find out whether the store answers, where this is in one.

        Raises:
            SweepError: it does not, or says no; one line.
        """
        if not self.is_remote:
            return
        try:
            bucket = self.filesystem.get_file_info(self.inside.split("/")[0])
        except (OSError, ValueError) as error:
            raise SweepError(f"{self}: {_reason(error)}") from None
        if bucket.type.name == "NotFound":
            raise SweepError(f"{self}: no bucket {self.inside.split('/')[0]} there, or it may not be seen")

    def _put(self, content: bytes | memoryview) -> None:
        with self.filesystem.open_output_stream(self.inside) as stream:
            stream.write(content)

    def _below(self, *, recursive: bool = False) -> Iterator["FileInfo"]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.inside, allow_not_found=True, recursive=recursive)
        yield from self._asked(lambda: self.filesystem.get_file_info(selector))

    def _asked(self, request: Callable[[], T]) -> T:
        """A request to a store is tried again where it failed for no reason of ours."""
        if not self.is_remote:
            return request()
        for attempt in range(TRIES):
            try:
                return request()
            except (FileNotFoundError, PermissionError, MsaeSweepError):
                raise
            except OSError as error:
                if attempt == TRIES - 1 or "ACCESS_DENIED" in str(error) or "InvalidAccessKeyId" in str(error):
                    raise OSError(f"{self}: {_reason(error)}") from None
            time.sleep(2.0**attempt)
        raise AssertionError("unreachable")


def check_file(option: str, path: Path) -> None:
    """Find out whether the file that `option` names can be written, before the work that fills it; leaves no trace.

    Raises:
        ConfigError: it is a folder, or it or its folder cannot be written.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{option}: {path} is a folder; give a file")
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written: {error.strerror}") from None
    if not path.exists():
        check_folder(option, path.parent)


def check_folder(option: str, path: Path) -> None:
    """Find out whether files can be made in a folder, which may have to be made itself; leaves no trace.

    Raises:
        ConfigError: it, or what lies on the way to it, is a file or cannot be written.
    """
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise ConfigError(f"{option}: {path} cannot be written: {there} is no folder")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written: {error.strerror}") from None


def _path(info: "FileInfo") -> str:
    return str(info.path)


def _reason(error: BaseException) -> str:
    """The beginning of a store's long answer says what it was."""
    return first_line(error)[:300]


@functools.lru_cache(maxsize=32)
def _filesystem(scheme: str, bucket: str, query: str, environment: tuple[str | None, ...]) -> "FileSystem":
    """One for each kind of place, environment (values of `S3_VARIABLES`) and process: it keeps connections.

    Raises:
        SweepError: no such kind, or its store cannot be asked where the bucket is.
    """
    from pyarrow import fs

    if not scheme:
        return fs.LocalFileSystem()
    options = dict(parse_qsl(query))
    if scheme == "s3":
        # A small file is one request instead of three.
        options.setdefault("allow_delayed_open", "true")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and "endpoint_override" not in options:
            options |= {"endpoint_override": urlsplit(endpoint).netloc, "scheme": urlsplit(endpoint).scheme}
        # Where none is named Amazon is asked where the bucket is; another store has no regions.
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region or "endpoint_override" in options:
            options.setdefault("region", region or "us-east-1")
    try:
        found, _ = fs.FileSystem.from_uri(f"{scheme}://{bucket}/" + (f"?{urlencode(options)}" if options else ""))
        if scheme == "s3":
            # A URI cannot say how patient it is to be; but it is checked, and the bucket's region is known now.
            plain = {key: value == "true" if value in ("true", "false") else value for key, value in options.items()}
            patience = {"request_timeout": REQUEST_SECONDS, "connect_timeout": REQUEST_SECONDS}
            found = fs.S3FileSystem(**plain | {"region": found.region} | patience)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise SweepError(f"{scheme}://{bucket}: {_reason(error)}") from None
    return found
