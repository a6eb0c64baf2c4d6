"""File system through which Ray Tune uses an object store without making useless requests.

Tune creates a folder for every trial, which takes five requests each although an object store has no folders. At the
end it looks for log files of every trial, which are never written because `ray_cluster.connect` turns them off: four
requests each, one after another. For 1,000 trials this takes minutes, and in a slow store hours.
"""

from typing import Any

from pyarrow import NativeFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, FileType, PyFileSystem

NEVER_WRITTEN = ("/result.json", "/progress.csv")
"""Path endings of Tune's own logs of a trial, which are turned off."""


def tune_filesystem_view(store: FileSystem) -> PyFileSystem:
    """Return a file system for Tune that passes everything on to `store` except useless requests."""
    return PyFileSystem(_ForTune(store))


class _ForTune(FileSystemHandler):  # type: ignore[misc]
    def __init__(self, store: FileSystem) -> None:
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ForTune) and bool(self._store == other._store)

    def __ne__(self, other: object) -> bool:
        # pyarrow calls both `__eq__` and `__ne__`.
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return f"tune+{self._store.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self._store.normalize_path(path))

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        missing = [path for path in paths if path.endswith(NEVER_WRITTEN)]
        infos = {path: FileInfo(path, FileType.NotFound) for path in missing}
        if asked := [path for path in paths if path not in infos]:
            infos |= dict(zip(asked, self._store.get_file_info(asked), strict=True))
        return [infos[path] for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        return list(self._store.get_file_info(selector))

    def delete_dir(self, path: str) -> None:
        self._store.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self._store.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a whole store is not emptied")

    def delete_file(self, path: str) -> None:
        self._store.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._store.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._store.copy_file(src, dest)

    def open_input_stream(self, path: str) -> NativeFile:
        return self._store.open_input_stream(path)

    def open_input_file(self, path: str) -> NativeFile:
        return self._store.open_input_file(path)

    def open_output_stream(self, path: str, metadata: dict[str, Any] | None) -> NativeFile:
        return self._store.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: dict[str, Any] | None) -> NativeFile:
        return self._store.open_append_stream(path, metadata=metadata)
