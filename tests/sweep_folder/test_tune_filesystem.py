"""Tests of the view of an object store that Ray Tune gets."""

import pickle

from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from msae_sweep.sweep_folder.tune_filesystem import tune_filesystem_view


def test_tune_makes_no_folders_and_asks_for_no_logs(tmp_path):
    store = tune_filesystem_view(LocalFileSystem())
    store.create_dir(str(tmp_path / "tune" / "block5-000"), recursive=True)
    assert not list(tmp_path.iterdir())
    # The file is not found even if there is one, because the store is not asked.
    (tmp_path / "result.json").write_text("{}")
    assert store.get_file_info(str(tmp_path / "result.json")).type == FileType.NotFound


def test_everything_else_reaches_the_store(tmp_path):
    store = pickle.loads(pickle.dumps(tune_filesystem_view(LocalFileSystem())))
    assert store == tune_filesystem_view(LocalFileSystem())
    marker = str(tmp_path / "marker")
    with store.open_output_stream(marker) as file:
        file.write(b"here")
    assert (tmp_path / "marker").read_bytes() == b"here"
    names = [str(tmp_path / "result.json"), marker, str(tmp_path / "absent")]
    kinds = [info.type for info in store.get_file_info(names)]
    assert kinds == [FileType.NotFound, FileType.File, FileType.NotFound]
    assert [info.path for info in store.get_file_info(FileSelector(str(tmp_path)))] == [marker]
    with store.open_input_file(marker) as file:
        assert file.read() == b"here"
    store.move(marker, marker + "2")
    store.delete_file(marker + "2")
    assert not list(tmp_path.iterdir())
