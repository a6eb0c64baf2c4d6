"""Tests of `msae-sweep encode` and of the reader of its codes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from model_files import example_model_file, raw_rows

import msae_sweep as ms
from msae_sweep import cli
from msae_sweep.config import DataConfig, PlantedConfig
from msae_sweep.errors import ConfigError, DataError
from msae_sweep.models import codes as reader
from msae_sweep.models import dense_codes, encode
from msae_sweep.models.find import FoundModel
from msae_sweep.sae import model_file

CPU = torch.device("cpu")
N_ROWS = 250


@pytest.fixture
def found() -> FoundModel:
    return FoundModel(example_model_file(), 5, "msae_block5.pt")


@pytest.fixture
def rows(found) -> np.ndarray:
    return raw_rows(found.file, N_ROWS)


@pytest.fixture(params=["npy", "h5", "series"])
def data(request, tmp_path, rows) -> DataConfig:
    """The rows with index columns: in two chunks of npy, in HDF5, or in HDF5 under the original series' names."""
    index = {"game_id": np.arange(N_ROWS) // 10, "ply": (np.arange(N_ROWS) % 10).astype(np.int32)}
    folder = tmp_path / "activations"
    folder.mkdir()
    if request.param == "npy":
        (folder / "block5").mkdir()
        np.save(folder / "block5" / "chunk_0000.npy", rows[:100])
        np.save(folder / "block5" / "chunk_0001.npy", rows[100:])
        for name, values in index.items():
            np.save(folder / f"{name}.npy", values)
        return DataConfig(path=str(folder))
    series = request.param == "series"
    with h5py.File(folder / "activations.h5", "w") as file:
        file["block5"] = rows
        file["game_ids" if series else "game_id"] = index["game_id"]
        file["move_numbers" if series else "ply"] = index["ply"]
    return DataConfig(path=str(folder / "activations.h5"))


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch) -> None:
    """Ranges of 40 rows, so that the rows have several parts."""
    monkeypatch.setattr("msae_sweep.models.evaluate.RANGE_BYTES", 40 * 8 * 12)


def encode_into(out: Path | str, found: FoundModel, data: DataConfig, k: int | None = None) -> bool:
    plan = encode.make_encoding_plan(found, data, None, k)
    folder = encode.CodesFolder(str(out), plan)
    return encode.encode(folder, partial(encode.encode_here, model=found.file.model, device=CPU, write=folder.write))


def test_the_codes_equal_encode_at_every_level_in_the_order_of_the_rows(tmp_path, found, data, rows):
    assert encode_into(tmp_path / "codes", found, data)
    codes, sae = ms.open_codes(tmp_path / "codes"), ms.SAE(found.file)
    assert (len(codes), codes.hidden_dim, codes.k, codes.k_levels) == (N_ROWS, 48, 8, (2, 4, 8))
    for k in range(1, 9):
        expected = sae.encode(rows, k)
        np.testing.assert_allclose(codes.dense(k=k), expected, rtol=1e-5, atol=1e-6)
        sparse = codes.csr(k=k)
        assert sparse.shape == (N_ROWS, 48)
        assert (sparse.data > 0).all()
        np.testing.assert_array_equal(sparse.toarray(), codes.dense(k=k))
    values, indices = codes.entries(90, 110)
    assert (np.diff(values, axis=1) <= 0).all(), "values descend"
    assert indices.dtype == np.uint16
    np.testing.assert_allclose(codes.dense(90, 110), sae.encode(rows[90:110]), rtol=1e-5, atol=1e-6)
    assert codes.columns == ("game_id", "ply")
    assert codes.column("game_id").tolist() == (np.arange(N_ROWS) // 10).tolist()
    assert codes.column("ply").tolist() == (np.arange(N_ROWS) % 10).tolist()
    assert sum(len(part) for part, _ in codes.batches(64)) == N_ROWS
    np.testing.assert_array_equal(np.concatenate([part for part, _ in codes.batches(64)]), codes.entries()[0])


def test_the_folder_is_one_table_for_other_readers(tmp_path, found, data):
    encode_into(tmp_path / "codes.parquet", found, data)
    assert len(list((tmp_path / "codes.parquet").glob("part_*.parquet"))) > 2
    assert pq.read_table(tmp_path / "codes.parquet").num_rows == N_ROWS
    table = pd.read_parquet(tmp_path / "codes.parquet")
    assert set(table.columns) == {"indices", "values", "game_id", "ply"}
    assert len(table["values"][0]) == 8


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_an_interrupted_encoding_continues_with_the_missing_parts_alone(tmp_path, found, data, monkeypatch):
    out = tmp_path / "codes"
    encode_into(out, found, data)
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("part_*")}
    whole = ms.open_codes(out).dense()
    assert not encode_into(out, found, data), "it was complete"
    manifest = json.loads((out / reader.MANIFEST).read_text())
    (out / reader.MANIFEST).write_text(json.dumps({**manifest, "complete": False}))
    (out / "part_00002.parquet").unlink()
    with pytest.raises(DataError, match="its encoding is unfinished; run the same"):
        ms.open_codes(out)
    assert encode_into(out, found, data)
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("part_*")}
    assert [name for name in before if before[name] != after[name]] == ["part_00002.parquet"]
    np.testing.assert_array_equal(ms.open_codes(out).dense(), whole)


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_another_question_or_other_files_in_the_folder_are_refused(tmp_path, found, data):
    encode_into(tmp_path / "codes", found, data)
    with pytest.raises(ConfigError, match="holds other codes, with k 8 instead of 4; give another folder"):
        encode_into(tmp_path / "codes", found, data, k=4)
    other = FoundModel(example_model_file(1), 5, "other")
    with pytest.raises(ConfigError, match="holds other codes, with model_sha256"):
        encode_into(tmp_path / "codes", other, data)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and holds no codes"):
        encode_into(tmp_path / "mine", found, data)


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_a_full_disk_is_one_line_and_keeps_finished_parts(tmp_path, found, data, monkeypatch):
    plan = encode.make_encoding_plan(found, data, None)
    folder = encode.CodesFolder(str(tmp_path / "codes"), plan)

    def write(i: int, codes: encode.RangeCodes) -> None:
        if i == 3:
            raise OSError(28, "No space left on device")
        folder.write(i, codes)

    with pytest.raises(DataError, match="No space left on device; finished parts are kept; run the same command"):
        encode.encode(folder, partial(encode.encode_here, model=found.file.model, device=CPU, write=write))
    assert {0, 1, 2} <= folder.begin()
    assert encode_into(tmp_path / "codes", found, data)


def dense(out: Path, found: FoundModel, data: DataConfig) -> Path:
    file = dense_codes.DenseFile(out, encode.make_encoding_plan(found, data, None))
    dense_codes.write_dense(file, found.file.model, CPU)
    return file.path


def test_the_series_file_has_its_layout_and_every_latent_before_any_top_k(tmp_path, found, data, rows, monkeypatch):
    monkeypatch.setattr(dense_codes, "CHUNK_ROWS", 60)
    path = dense(tmp_path, found, data)
    assert path == tmp_path / "block5_features.h5"
    with h5py.File(path) as file:
        dataset = file["block5"]
        assert (dataset.shape, dataset.dtype, dataset.chunks) == ((N_ROWS, 48), np.float32, (60, 48))
        assert (dataset.compression, dataset.compression_opts) == ("gzip", 4)
        assert dict(dataset.attrs) == {"block_idx": 5, "hidden_dim": 48, "input_dim": 12}
        model, standardised = found.file.model, (rows - found.file.mean) / found.file.std
        expected = torch.relu((torch.from_numpy(standardised) - model.pre_bias) @ model.W_enc.T).detach()
        np.testing.assert_allclose(dataset[:], expected, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob(".*")), "chunks are removed"
    file = dense_codes.DenseFile(tmp_path, encode.make_encoding_plan(found, data, None))
    assert not dense_codes.write_dense(file, found.file.model, CPU), "complete already"
    with pytest.raises(ConfigError, match=r"block5_features\.h5 exists and was not made from this model and data"):
        dense(tmp_path, FoundModel(example_model_file(1), 5, "other"), data)


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_a_disk_without_room_for_the_series_file_keeps_its_chunks(tmp_path, found, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(dense_codes.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DataError, match=r"block5_features.h5: No space left on device; finished chunks are kept"):
            dense(tmp_path / "sae_features", found, data)
    assert not list((tmp_path / "sae_features").glob("*.part"))
    assert dense(tmp_path / "sae_features", found, data).is_file()


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_what_a_kill_left_half_written_is_no_obstacle(tmp_path, found, data):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / f"._codes.json.{'0' * 32}.part").write_text("{")
    assert encode_into(tmp_path / "codes", found, data)
    assert {file.name[:5] for file in (tmp_path / "codes").iterdir()} == {"_code", "part_"}


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_an_interrupted_series_file_continues_after_its_last_chunk(tmp_path, found, data, monkeypatch):
    monkeypatch.setattr(dense_codes, "CHUNK_ROWS", 60)
    whole = h5py.File(dense(tmp_path / "whole.h5", found, data))["block5"][:]
    with monkeypatch.context() as patch:
        patch.setattr(dense_codes.DenseFile, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as stopped:
            dense(tmp_path / "again.h5", found, data)
    assert stopped.value.__notes__ == ["finished chunks are kept; run the same command to continue"]
    (tmp_path / ".again.h5.parts" / "chunk_00003").unlink()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / ".again.h5.parts").glob("chunk_0000[0-2]")}
    seen: list[int] = []
    file = dense_codes.DenseFile(tmp_path / "again.h5", encode.make_encoding_plan(found, data, None))
    assert file.begin() == 3
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    dense_codes.write_dense(file, found.file.model, CPU, lambda done, _: seen.append(done))
    assert seen[0] == 180
    np.testing.assert_array_equal(h5py.File(file.path)["block5"][:], whole)
    other = FoundModel(example_model_file(1), 5, "other")
    (tmp_path / ".third.h5.parts").mkdir()
    (tmp_path / ".third.h5.parts" / "identity.json").write_text(json.dumps(file.plan.identity))
    with pytest.raises(ConfigError, match="was begun with another model_sha256"):
        dense(tmp_path / "third.h5", other, data)


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_the_command_on_the_cluster_writes_what_one_process_writes(tmp_path, found, data, ray_session, monkeypatch):
    from msae_sweep.sweep.ray_encoding import encode_on_cluster

    encode_into(tmp_path / "here", found, data)
    plan = encode.make_encoding_plan(found, data, None)
    folder = encode.CodesFolder(str(tmp_path / "there"), plan)
    assert encode.encode(folder, partial(encode_on_cluster, model=found.file.model, folder=folder))
    here, there = (ms.open_codes(tmp_path / name) for name in ("here", "there"))
    # Tasks compute on a GPU where there is one.
    np.testing.assert_allclose(here.dense(), there.dense(), rtol=1e-4, atol=1e-5)
    assert there.column("game_id").tolist() == here.column("game_id").tolist()


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_codes_in_an_object_store_are_written_and_read(tmp_path, object_store, found, data):
    where = f"{object_store.bucket}/codes.parquet"
    assert encode_into(where, found, data)
    encode_into(tmp_path / "here", found, data)
    np.testing.assert_array_equal(ms.open_codes(where).dense(30, 90), ms.open_codes(tmp_path / "here").dense(30, 90))
    assert not encode_into(where, found, data)


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_names_of_games_stay_text_and_planted_data_has_no_columns(tmp_path, found, data):
    np.save(Path(data.path) / "game_id.npy", names := np.array([f"game {i // 10}" for i in range(N_ROWS)]))
    encode_into(tmp_path / "codes", found, data)
    assert ms.open_codes(tmp_path / "codes").column("game_id").tolist() == names.tolist()
    planted = DataConfig(path="planted", planted=PlantedConfig(rows=300, input_dim=12, dictionary_size=24))
    encode_into(tmp_path / "planted", found, planted)
    codes = ms.open_codes(tmp_path / "planted")
    assert (codes.n_rows, codes.columns) == (300, ())


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_a_sweep_that_drops_rows_is_refused_as_every_row_gets_a_code(tmp_path, found, rows, data):
    rows[7] = np.inf
    np.save(Path(data.path) / "block5" / "chunk_0000.npy", rows[:100])
    with pytest.raises(DataError, match="row 7: NaN or Inf; fix them, because every row gets a code"):
        encode_into(tmp_path / "codes", found, data.model_copy(update={"drop_nonfinite": True}))


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_codes_that_cannot_be_read_are_one_line(tmp_path, found, data):
    encode_into(folder := tmp_path / "codes", found, data)
    codes, manifest = ms.open_codes(folder), folder / reader.MANIFEST
    with pytest.raises(ConfigError, match="k: 9 must be 1 to 8"):
        codes.csr(k=9)
    with pytest.raises(ConfigError, match="rows 0 to 251: must lie within 0 to 250"):
        codes.dense(0, 251)
    with pytest.raises(ConfigError, match="column point: must be one of game_id, ply"):
        codes.column("point")
    (folder / reader.part_name(2)).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"part_00002.parquet: cannot be read"):
        ms.open_codes(folder)
    for content in ("[]", "{", '{"format": 1}'):
        manifest.write_text(content)
        with pytest.raises(DataError, match="holds no codes"):
            ms.open_codes(folder)


@pytest.fixture
def command(tmp_path, found, monkeypatch):
    """Function that runs the command in a folder with a model and data, and returns its exit code."""
    model_file.save(found.file, tmp_path / "msae_block5.pt")
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["msae-sweep", "encode", "msae_block5.pt", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return run


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_the_command_writes_codes_and_says_how_they_are_read(command, data, capsys):
    assert command("--data", "activations", "--out", "codes.parquet") == 0
    assert "codes.parquet: 250 rows x 48 latents, k = 1 to 8" in (said := capsys.readouterr().out)
    assert 'msae_sweep.open_codes("codes.parquet") reads it' in said
    assert command("--data", "activations", "--out", "codes.parquet") == 0
    assert "was complete already" in capsys.readouterr().out
    assert command("--data", "activations", "--out", ".", "--format", "notebook") == 0
    assert Path("block5_features.h5").is_file()


WRONG = {
    "no data": (["--out", "c"], "--data: missing; give activations, because msae_block5.pt is not a sweep folder"),
    "another width": (["--data", "wide", "--out", "c"], "rows of width 9, but"),
    "k above hidden_dim": (["--data", "activations", "--out", "c", "--k", "49"], "--k: 49 must be 1 to 48"),
    "k of all latents": (["--data", "activations", "--out", ".", "--format", "notebook", "--k", "4"], "--k: only for"),
    "a file as folder": (
        ["--data", "activations", "--out", "msae_block5.pt", "--format", "notebook"],
        "msae_block5.pt is not a folder",
    ),
    "another block": (["--data", "activations", "--out", "c", "--block", "7"], "no block 7 in"),
    "a row of NaN": (["--data", "nan", "--out", "c"], "row 7: NaN or Inf; fix them, because every row"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_wrong_input_is_one_line(command, data, rows, capsys, case):
    for name, content in (("wide", np.zeros((20, 9), np.float32)), ("nan", rows.copy())):
        Path(name, "block5").mkdir(parents=True)
        if name == "nan":
            content[7, 3] = np.nan
        np.save(Path(name, "block5", "chunk_0000.npy"), content)
    options, says = WRONG[case]
    assert command(*options) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("data", ["npy"], indirect=True)
def test_importing_the_reader_imports_no_torch(data):
    done = subprocess.run(
        [sys.executable, "-c", "import msae_sweep, sys; msae_sweep.open_codes; assert 'torch' not in sys.modules"],
        env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
