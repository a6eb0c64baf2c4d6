import pickle
import tempfile
from urllib.parse import urlsplit

import numpy as np
import pytest
from activation_files import WRITERS, write_npy
from servers import S3, SlowProxy, in_environment

from msae_sweep.config import DataConfig
from msae_sweep.data.sources.catalog import open_source
from msae_sweep.errors import ConfigError, DataError, SweepError
from msae_sweep.paths import StoragePath, check_file


def test_a_place_in_a_store_is_used_as_a_folder_is(object_store, tmp_path):
    for root in (StoragePath(object_store.bucket) / "used", StoragePath(tmp_path)):
        assert not (root / "a").exists()
        (root / "a" / "b.txt").write(b"hello")
        (root / "a" / "b.txt").write(b"hello again")
        (root / "c.txt").write(b"x" * 10)
        assert [str(place)[len(str(root)) :] for place in root.folders()] == ["/a"]
        assert [str(place)[len(str(root)) :] for place in root.files()] == ["/c.txt"]
        sizes = {place.relative_to(root).as_posix(): info.size for place, info in root.files(recursive=True).items()}
        assert sizes == {"a/b.txt": 11, "c.txt": 10}
        assert (root / "a").is_folder()
        assert (root / "a/b.txt").is_file()
        with (root / "a/b.txt").open() as file:
            file.seek(6)
            assert file.read(5) == b"again"
        with pytest.raises(FileNotFoundError):
            (root / "none").read()
        pickle.loads(pickle.dumps(root / "a")).delete()
        (root / "never there").delete()
        assert not root.folders()
        assert [place.name for place in root.files()] == ["c.txt"]


def test_a_store_that_takes_its_time_is_waited_for(object_store):
    host, port = urlsplit(object_store.environment["AWS_ENDPOINT_URL"]).netloc.split(":")
    proxy = SlowProxy(host, int(port))
    proxy.delay_seconds = 4.0  # the timeout of AWS's own client is 3 s
    place = StoragePath(f"{object_store.bucket}/slow?endpoint_override={urlsplit(proxy.endpoint).netloc}&scheme=http")
    place.check()
    proxy.close()
    assert proxy.n_answers == 1, "it was asked again"


def test_what_no_store_answers_is_said_in_one_line(object_store):
    for uri, says in (
        ("s3://not-there/x", "no bucket not-there"),
        ("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http", "s3://bucket/x: "),
    ):
        with pytest.raises(SweepError, match=says) as caught:
            StoragePath(uri).check()
        assert "\n" not in str(caught.value)
        assert not any(secret in str(caught.value) for secret in object_store.secrets)


def test_a_place_holds_no_secret_and_keeps_what_leads_to_another_store(object_store):
    place = StoragePath("s3://bucket/a?endpoint_override=host:1&scheme=http") / "b"
    assert place.uri == "s3://bucket/a/b?endpoint_override=host:1&scheme=http"
    assert str(place.parent) == "s3://bucket/a"
    used = StoragePath(object_store.bucket) / "x"
    assert used.exists() in (True, False)
    assert not any(secret.encode() in pickle.dumps(used) for secret in object_store.secrets)


@pytest.mark.parametrize("write", WRITERS)
def test_activations_in_a_store_are_those_on_a_disk(object_store, tmp_path, rows, write):
    local = WRITERS[write](tmp_path / "data", rows, np.arange(len(rows)) // 7)
    there = StoragePath(object_store.bucket) / write
    folder = StoragePath(local)
    for file in folder.files(recursive=True) if folder.is_folder() else [folder]:
        way = file.relative_to(folder).as_posix() if folder.is_folder() else file.name
        (there / way).write(file.read())
    uri = there.uri if folder.is_folder() else (there / folder.name).uri
    here, remote = (pickle.loads(pickle.dumps(open_source(DataConfig(path=path)))) for path in (str(local), uri))
    assert here.infos().keys() == remote.infos().keys()
    for block, info in here.infos().items():
        assert remote.infos()[block]._replace(where="") == info._replace(where="")
        assert remote.infos()[block].where.startswith("s3://bucket/")
        ranges = remote.row_ranges(block, 130)
        assert len(ranges) == len(here.row_ranges(block, 130)) > 1
        for a, b in zip(here.row_ranges(block, 130), ranges, strict=True):
            x, y = here.read(a), remote.read(b)
            np.testing.assert_array_equal(x.x, y.x)
            assert (x.groups is None) == (y.groups is None)
            if x.groups is not None:
                np.testing.assert_array_equal(x.groups, y.groups)
        assert remote.fingerprint(block) == remote.fingerprint(block)


def test_a_fingerprint_changes_with_what_lies_in_the_store(object_store, tmp_path, rows):
    local = StoragePath(write_npy(tmp_path / "data", rows))
    there = StoragePath(object_store.bucket) / "changing"
    for file in local.files(recursive=True):
        (there / file.relative_to(local).as_posix()).write(file.read())
    before = open_source(DataConfig(path=there.uri)).fingerprint(5)
    chunk = there / "block5" / "chunk_0000.npy"
    content = chunk.read()
    chunk.write(content + b"\0")
    assert open_source(DataConfig(path=there.uri)).fingerprint(5) != before


def test_nothing_there_is_said_in_one_line(object_store):
    with pytest.raises(DataError, match=r"data.path: s3://bucket/nowhere does not exist"):
        open_source(DataConfig(path="s3://bucket/nowhere"))


def test_another_environment_leads_to_another_store(object_store, tmp_path_factory):
    (StoragePath(object_store.bucket) / "only-here").write(b"1")
    with S3(tmp_path_factory.mktemp("other")) as other, in_environment(other.environment()):
        assert not StoragePath(other.bucket).files(recursive=True)
    assert (StoragePath(object_store.bucket) / "only-here").read() == b"1"


def test_whether_a_file_can_be_written_is_found_out_without_a_trace(tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for name in ("old.json", "new.json", "some/new/folder/new.json"):
        check_file("--out", tmp_path / name)
    with pytest.raises(ConfigError, match=f"--out: {tmp_path} is a folder; give a file"):
        check_file("--out", tmp_path)
    with pytest.raises(ConfigError, match=r"old.json cannot be written: .*old.json is not a folder"):
        check_file("--out", tmp_path / "old.json" / "new.json")

    def full(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written: Read-only file system"):
        check_file("--out", tmp_path / "new.json")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.json").read_text() == "old"
