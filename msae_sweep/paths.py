"""Paths of files and folders on a disk or in an object store, read and written through pyarrow's file systems.

A URI such as `s3://bucket/folder`, with any scheme that pyarrow supports (gs, hdfs, …), is in an object store. Any
other text is a path on a disk. Credentials come from the environment as usual (AWS_ACCESS_KEY_ID …, or the machine's
role). An endpoint other than Amazon's comes from AWS_ENDPOINT_URL, or from the end of the URI:
`?endpoint_override=host:port&scheme=http`. A `StoragePath` can be pickled. Every process opens it again with its own
environment, so it never holds a secret.
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

MAX_ATTEMPTS = 4
"""Attempts at one request to a store, with waits of 1, 2 and 4 seconds between them. pyarrow also retries by itself."""

REQUEST_SECONDS = 30.0
"""Seconds that a store may be silent during a request. AWS's default of 3 s would end every call to a slow store."""

S3_VARIABLES = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_PROFILE",
)  # fmt: skip
"""Environment variables that select an S3 store and an account. If one changes within a process, later requests go to
the store that the variables then select."""


def is_uri(text: str) -> bool:
    """Return whether `text` is a URI in an object store."""
    return "://" in text


class StoragePath:
    """Immutable path of a file or folder, which need not exist. The operator `/` appends a name."""

    def __init__(self, where: str | Path) -> None:
        """Take a path on a disk, which is made absolute, or a URI.

        Raises:
            SweepError: the URI contains a password, which would end up in logs and files.
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
        return f"StoragePath({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoragePath) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    @property
    def uri(self) -> str:
        """Path or URI from which `StoragePath` makes an equal object."""
        return f"{self._base}?{self._query}" if self._query else self._base

    @property
    def is_remote(self) -> bool:
        """True if the path is in an object store."""
        return is_uri(self._base)

    @property
    def path(self) -> Path:
        """`Path` of a file or folder on a disk. It must not be called for an object store."""
        assert not self.is_remote, f"{self} is no path"
        return Path(self._base)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self._base.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "StoragePath":
        """Folder that contains this path."""
        return self.like(self._base.rsplit("/", 1)[0])

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """Suffix of the name, with the dot."""
        return Path(self.name).suffix

    def relative_to(self, folder: "StoragePath") -> Path:
        """Return this path relative to `folder`."""
        return Path(self._base).relative_to(folder._base)

    @property
    def filesystem(self) -> "FileSystem":
        """File system of pyarrow that contains this path, for functions that take one."""
        if not self.is_remote:
            return _filesystem("", "", "", ())
        parts, environment = urlsplit(self._base), tuple(map(os.environ.get, S3_VARIABLES))
        return _filesystem(parts.scheme, parts.netloc, self._query, environment)

    @property
    def inside(self) -> str:
        """Path within `filesystem`: bucket and key in an object store, the absolute path on a disk."""
        return self._base.split("://", 1)[1] if self.is_remote else self._base

    def is_file(self) -> bool:
        """Return whether a file exists at this path."""
        return bool(self.info().is_file)

    def is_folder(self) -> bool:
        """Return whether a folder exists at this path; in an object store, whether anything exists below it."""
        return self.info().type.name == "Directory"

    def exists(self) -> bool:
        """Return whether a file or folder exists at this path."""
        return self.info().type.name != "NotFound"

    def info(self) -> "FileInfo":
        """Return pyarrow's information on this path, such as `is_file`, `size` in bytes and `mtime_ns`."""
        return self._asked(lambda: self.filesystem.get_file_info(self.inside))

    def folders(self) -> list["StoragePath"]:
        """Return the folders directly below, sorted by name."""
        return sorted((self / info.base_name for info in self._below() if info.type.name == "Directory"), key=str)

    def files(self, *, recursive: bool = False) -> dict["StoragePath", "FileInfo"]:
        """Return the files directly below, or at any depth with `recursive`, sorted by name.

        Each comes with pyarrow's information on it, such as `size` in bytes and `mtime_ns`.
        """
        files = [info for info in self._below(recursive=recursive) if info.is_file]
        return {self / info.path[len(self.inside) :].lstrip("/"): info for info in sorted(files, key=_path)}

    def like(self, text: str) -> "StoragePath":
        """Return the path whose `str` is `text`, in the same object store or on the same disk as this one."""
        named = object.__new__(StoragePath)
        named._base, named._query = text, self._query
        return named

    def open(self) -> Any:
        """Open the file for reading. The result is seekable and a context manager."""
        return self._asked(lambda: self.filesystem.open_input_file(self.inside))

    def read(self) -> bytes:
        """Return the content of the file.

        Raises:
            FileNotFoundError: there is no file at this path.
        """

        def whole() -> bytes:
            with self.filesystem.open_input_file(self.inside) as file:
                return bytes(file.read())

        return self._asked(whole)

    def write(self, content: bytes | memoryview) -> None:
        """Write the file atomically: readers see either the old content or the new. Missing folders are created.

        Raises:
            OSError: the file cannot be written.
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
        """Delete the file, or the folder and everything below it. Do nothing if neither exists."""
        info = self.info()
        with contextlib.suppress(FileNotFoundError):
            if info.is_file:
                self._asked(lambda: self.filesystem.delete_file(self.inside))
            elif info.type.name == "Directory":
                self._asked(lambda: self.filesystem.delete_dir(self.inside))

    def check(self) -> None:
        """Check that the object store can be used. On a disk, do nothing.

        Raises:
            SweepError: the store does not respond, refuses access or has no such bucket; the message is one line.
        """
        if not self.is_remote:
            return
        try:
            bucket = self.filesystem.get_file_info(self.inside.split("/")[0])
        except (OSError, ValueError) as error:
            raise SweepError(f"{self}: {_reason(error)}") from None
        if bucket.type.name == "NotFound":
            raise SweepError(f"{self}: there is no bucket {self.inside.split('/')[0]}, or you have no access to it")

    def _put(self, content: bytes | memoryview) -> None:
        with self.filesystem.open_output_stream(self.inside) as stream:
            stream.write(content)

    def _below(self, *, recursive: bool = False) -> Iterator["FileInfo"]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.inside, allow_not_found=True, recursive=recursive)
        yield from self._asked(lambda: self.filesystem.get_file_info(selector))

    def _asked(self, request: Callable[[], T]) -> T:
        """Run `request`; in an object store, attempt it up to `MAX_ATTEMPTS` times where an error may pass."""
        if not self.is_remote:
            return request()
        for attempt in range(MAX_ATTEMPTS):
            try:
                return request()
            except (FileNotFoundError, PermissionError, MsaeSweepError):
                raise
            except OSError as error:
                if attempt == MAX_ATTEMPTS - 1 or "ACCESS_DENIED" in str(error) or "InvalidAccessKeyId" in str(error):
                    raise OSError(f"{self}: {_reason(error)}") from None
            time.sleep(2.0**attempt)
        raise AssertionError("unreachable")


def check_file(option: str, path: Path) -> None:
    """Check, before the work starts, that the file given to `option` can be written. Nothing is left behind.

    Raises:
        ConfigError: the path is a folder, or the file or its folder cannot be written.
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
    """Check that files can be created in a folder, which need not exist yet. Nothing is left behind.

    Raises:
        ConfigError: the folder, or its nearest existing parent, is a file or cannot be written.
    """
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise ConfigError(f"{option}: {path} cannot be written: {there} is not a folder")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written: {error.strerror}") from None


def _path(info: "FileInfo") -> str:
    return str(info.path)


def _reason(error: BaseException) -> str:
    """Return the first 300 characters of a store's error message. Its beginning names the cause, and it can be long."""
    return first_line(error)[:300]


@functools.lru_cache(maxsize=32)
def _filesystem(scheme: str, bucket: str, query: str, environment: tuple[str | None, ...]) -> "FileSystem":
    """Return the pyarrow file system for a URI's scheme, bucket and query; with an empty scheme, that of the disks.

    Each process caches the file systems, because they keep connections open. `environment`, the values of
    `S3_VARIABLES`, is only a part of the cache key.

    Raises:
        SweepError: pyarrow does not support the scheme, or the store cannot be asked for the bucket's region.
    """
    from pyarrow import fs

    if not scheme:
        return fs.LocalFileSystem()
    options = dict(parse_qsl(query))
    if scheme == "s3":
        # With this, pyarrow writes a small file in one request instead of three.
        options.setdefault("allow_delayed_open", "true")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and "endpoint_override" not in options:
            options |= {"endpoint_override": urlsplit(endpoint).netloc, "scheme": urlsplit(endpoint).scheme}
        # If no region is set, pyarrow asks Amazon for the bucket's region. Other stores have no regions.
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region or "endpoint_override" in options:
            options.setdefault("region", region or "us-east-1")
    try:
        found, _ = fs.FileSystem.from_uri(f"{scheme}://{bucket}/" + (f"?{urlencode(options)}" if options else ""))
        if scheme == "s3":
            # A URI cannot contain timeouts, so the file system is made again with them. The first one was still needed:
            # `from_uri` has checked the URI and found the bucket's region.
            plain = {key: value == "true" if value in ("true", "false") else value for key, value in options.items()}
            patience = {"request_timeout": REQUEST_SECONDS, "connect_timeout": REQUEST_SECONDS}
            found = fs.S3FileSystem(**plain | {"region": found.region} | patience)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise SweepError(f"{scheme}://{bucket}: {_reason(error)}") from None
    return found
