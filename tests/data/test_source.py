import tracemalloc

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from activation_files import WRITERS, table, write_h5, write_npy, write_parquet

from msae_sweep.config import DataConfig, PlantedConfig
from msae_sweep.data.sources.base import block_number
from msae_sweep.data.sources.catalog import check_blocks, open_source
from msae_sweep.data.sources.npy import NpySource
from msae_sweep.errors import DataError
from msae_sweep.paths import StoragePath


def read_all(path: str, block: int = 5, rows: int = 64) -> tuple[np.ndarray, np.ndarray | None]:
    source = open_source(DataConfig(path=path))
    parts = [source.read(row_range) for row_range in source.row_ranges(block, rows)]
    groups = None if parts[0].groups is None else np.concatenate([p.groups for p in parts])
    return np.concatenate([p.x for p in parts]), groups


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_rows_and_games_that_were_written(tmp_path, rows, games, form):
    x, groups = read_all(WRITERS[form](tmp_path / form, rows, games))
    np.testing.assert_array_equal(x, rows)
    np.testing.assert_array_equal(groups, games)


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("size", [1, 37, 10_000])
def test_ranges_cover_every_row_once_and_know_where_they_stand(tmp_path, rows, form, size):
    source = open_source(DataConfig(path=WRITERS[form](tmp_path / form, rows)))
    ranges = source.row_ranges(5, size)
    ends = [r.first_row + r.stop - r.start for r in ranges]
    assert [r.first_row for r in ranges] == [0, *ends[:-1]]
    assert ends[-1] == len(rows)
    for r in ranges[:5]:
        np.testing.assert_array_equal(source.read(r).x, rows[r.first_row : r.first_row + r.stop - r.start])


def test_without_games_there_are_no_groups(tmp_path, rows):
    assert read_all(write_npy(tmp_path, rows))[1] is None


def test_float16_stays_float16(tmp_path, rows):
    source = open_source(DataConfig(path=write_npy(tmp_path, rows.astype(np.float16))))
    assert source.infos()[5].dtype == "float16"


def test_column_major_and_big_endian_chunks_are_read_as_they_are(tmp_path, rows):
    folder = tmp_path / "block5"
    folder.mkdir()
    np.save(folder / "chunk_0.npy", np.asfortranarray(rows))
    np.save(folder / "chunk_1.npy", rows.astype(">f4"))
    np.testing.assert_array_equal(read_all(str(tmp_path))[0], np.concatenate([rows, rows]))


@pytest.mark.parametrize(("scheme", "most"), [("", 1 << 20), ("file://", 20 << 20)], ids=["disk", "store"])
def test_a_range_of_a_column_major_chunk_takes_no_more_memory_than_a_few_columns(tmp_path, scheme, most):
    n_rows, width = 1 << 21, 16
    (folder := tmp_path / "block5").mkdir()
    array = np.lib.format.open_memmap(folder / "chunk_0.npy", "w+", "f2", (n_rows, width), True)
    array[70_000:70_100] = expected = np.random.default_rng(0).normal(size=(100, width)).astype("f2")
    array.flush()
    source = NpySource(StoragePath(f"{scheme}{tmp_path}"))
    row_range = source.row_ranges(5, 100)[0]._replace(start=70_000, stop=70_100)
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(source.read(row_range).x, expected)
        assert tracemalloc.get_traced_memory()[1] < most < array.nbytes
    finally:
        tracemalloc.stop()


def test_chunks_follow_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "block5"
    folder.mkdir()
    for i in (0, 2, 10):
        np.save(folder / f"chunk_{i}.npy", np.full((4, 3), i, dtype=np.float32))
    assert read_all(str(tmp_path))[0][:, 0].tolist() == [0] * 4 + [2] * 4 + [10] * 4


@pytest.mark.parametrize(
    ("name", "block"),
    [("block5", 5), ("block_05", 5), ("Block-20", 20), ("blocks/35/activations", 35), ("5", 5), ("layer12", 12),
     ("block5_v2", 5), ("res2/3", None), ("mean", None), ("resblock7", 7)],
)  # fmt: skip
def test_names_tell_their_block(name, block):
    assert block_number(name) == block


@pytest.mark.parametrize("name", ["block5", "5", "blocks/5/activations", "block_05"])
def test_hdf5_datasets_may_have_any_name_that_tells_the_block(tmp_path, rows, name):
    np.testing.assert_array_equal(read_all(write_h5(tmp_path, rows, name=name))[0], rows)


def test_a_folder_that_holds_activations_h5_is_read_as_that_file(tmp_path, rows):
    write_h5(tmp_path, rows)
    np.testing.assert_array_equal(read_all(str(tmp_path))[0], rows)


def test_parquet_files_may_be_one_a_block_or_one_folder_a_block(tmp_path, rows):
    (tmp_path / "block5").mkdir()
    for i, part in enumerate(np.array_split(rows, 2)):
        pq.write_table(table(part, name="activations"), tmp_path / "block5" / f"part-{i}.parquet")
    pq.write_table(table(rows, name="x"), tmp_path / "block20.parquet")
    assert set(open_source(DataConfig(path=str(tmp_path))).infos()) == {5, 20}
    np.testing.assert_array_equal(read_all(str(tmp_path))[0], rows)


def test_games_may_be_named_by_text(tmp_path, rows, games):
    names = np.array([f"game-{g}" for g in games])
    _, groups = read_all(write_npy(tmp_path, rows, names))
    _, first_seen = np.unique(groups, return_inverse=True)
    assert len(np.unique(groups)) == len(np.unique(games))
    assert all(len(set(first_seen[games == g])) == 1 for g in range(5))


def test_the_fingerprint_changes_with_the_data_and_only_then(tmp_path, rows):
    path = write_npy(tmp_path, rows)
    before = open_source(DataConfig(path=path)).fingerprint(5)
    assert open_source(DataConfig(path=path)).fingerprint(5) == before
    np.save(tmp_path / "block5" / "chunk_0001.npy", rows[:40])
    assert open_source(DataConfig(path=path)).fingerprint(5) != before


def test_planted_rows_do_not_depend_on_how_they_are_cut():
    source = open_source(DataConfig(path="planted", planted=PlantedConfig(rows=5000)))
    whole = source.read(source.row_ranges(5, 5000)[0])
    parts = [source.read(r) for r in source.row_ranges(5, 777)]
    np.testing.assert_array_equal(np.concatenate([p.x for p in parts]), whole.x)
    np.testing.assert_array_equal(np.concatenate([p.groups for p in parts]), whole.groups)


def broken_width(folder, rows):
    write_npy(folder, rows)
    np.save(folder / "block5" / "chunk_0001.npy", rows[:, :4])
    return str(folder)


def truncated_npy(folder, rows):
    write_npy(folder, rows)
    file = folder / "block5" / "chunk_0001.npy"
    file.write_bytes(file.read_bytes()[:-100])
    return str(folder)


def empty_npy(folder, rows):
    write_npy(folder, rows)
    (folder / "block5" / "chunk_0001.npy").write_bytes(b"")
    return str(folder)


def truncated_h5(folder, rows):
    path = write_h5(folder, rows)
    (folder / "activations.h5").write_bytes((folder / "activations.h5").read_bytes()[:-500])
    return path


def one_array(array):
    def write(folder, rows):
        (folder / "block5").mkdir(parents=True)
        np.save(folder / "block5" / "chunk_0000.npy", array, allow_pickle=True)
        return str(folder)

    return write


def nothing(folder, rows):
    folder.mkdir()
    return str(folder)


def ragged_parquet(folder, rows):
    folder.mkdir()
    pq.write_table(pa.table({"block5": pa.array([[1.0], [1.0, 2.0]])}), folder / "a.parquet")
    return str(folder)


def twice_in_h5(folder, rows):
    write_h5(folder, rows, name="block5")
    return write_h5(folder, rows, name="layer5")


def cube_in_h5(folder, rows):
    return write_h5(folder, rows.reshape(10, 50, 6), name="block5")


def archive_as_npy(folder, rows):
    (folder / "block5").mkdir(parents=True)
    with open(folder / "block5" / "chunk_0000.npy", "wb") as file:
        np.savez(file, rows=rows)
    return str(folder)


def without_dataspace(folder, rows):
    folder.mkdir()
    with h5py.File(folder / "activations.h5", "w") as file:
        file["block5"] = h5py.Empty("f4")
    return str(folder)


def lists_of_lists(folder, rows):
    folder.mkdir()
    inner = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(20)), 5)
    pq.write_table(pa.table({"block5": pa.FixedSizeListArray.from_arrays(inner, 2)}), folder / "a.parquet")
    return str(folder)


BROKEN = {
    "missing folder": (lambda folder, rows: str(folder / "nowhere"), "does not exist"),
    "empty folder": (nothing, "holds no activations"),
    "chunks of different width": (broken_width, r"chunk_0001.npy: width 4, but chunk_0000.npy has 6"),
    "truncated npy": (truncated_npy, r"chunk_0001.npy: cannot be read: truncated"),
    "empty npy": (empty_npy, r"chunk_0001.npy: cannot be read: truncated"),
    "truncated h5": (truncated_h5, "activations.h5: cannot be read as HDF5"),
    "1-D array": (one_array(np.zeros(30, dtype=np.float32)), "1-D array of shape"),
    "3-D array": (one_array(np.zeros((3, 3, 3), dtype=np.float32)), "3-D array of shape"),
    "object array": (one_array(np.array([{}, {}], dtype=object)), "an object array"),
    "whole numbers": (one_array(np.zeros((9, 3), dtype=np.int64)), "dtype int64; must be one of float16"),
    "no rows": (one_array(np.zeros((0, 3), dtype=np.float32)), "empty array"),
    "ragged parquet": (ragged_parquet, "lists of varying size"),
    "two datasets of one block": (twice_in_h5, "both name block 5"),
    "3-D dataset": (cube_in_h5, "3-D array"),
    "one number": (one_array(np.float32(3)), "0-D array of shape"),
    "an archive called npy": (archive_as_npy, "chunk_0000.npy: cannot be read: not an .npy file"),
    "dataset without a dataspace": (without_dataspace, "0-D array"),
    "lists of lists": (lists_of_lists, "dtype object; must be one of float16"),
    "fractional games": (lambda f, rows: write_npy(f, rows, np.zeros(500)), "game_id of dtype float64"),
    "fractional games in h5": (lambda f, rows: write_h5(f, rows, np.zeros(500)), "game_id of dtype float64"),
    "fractional games in parquet": (lambda f, rows: write_parquet(f, rows, np.zeros(500)), "game_id of dtype float64"),
    "too few games in h5": (lambda f, rows: write_h5(f, rows, np.zeros(3, dtype=int)), "3 entries.*500 rows"),
    "too few games": (lambda f, rows: write_npy(f, rows, np.zeros(3, dtype=int)), "game_id.npy: 3 entries.*500 rows"),
    "2-D games": (lambda f, rows: write_npy(f, rows, np.zeros((500, 2), dtype=int)), "game_id.npy: 2-D array"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_data_is_one_line_that_names_the_place(tmp_path, rows, case):
    write, says = BROKEN[case]
    with pytest.raises(DataError, match=says) as caught:
        check_blocks(DataConfig(path=write(tmp_path / "data", rows)), batch_size=10)
    assert "\n" not in str(caught.value)


def test_a_text_file_is_no_source(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="holds no activations"):
        open_source(DataConfig(path=str(tmp_path / "notes.txt")))
    (tmp_path / "fake.parquet").write_text("hello")
    with pytest.raises(DataError, match="cannot be read"):
        check_blocks(DataConfig(path=str(tmp_path / "fake.parquet")), batch_size=1)


def test_a_block_that_is_not_there_is_named_with_those_that_are(tmp_path, rows):
    path = write_npy(tmp_path, rows)
    with pytest.raises(DataError, match=r"no block 7 in .*; found 5"):
        check_blocks(DataConfig(path=path, blocks=(7,)), batch_size=10)


def test_fewer_rows_than_a_batch_are_refused(tmp_path, rows):
    with pytest.raises(DataError, match=r"500 rows leave about 450 .*batch_size 4096; lower batch_size"):
        check_blocks(DataConfig(path=write_npy(tmp_path, rows)), batch_size=4096)


def test_a_split_by_game_needs_games(tmp_path, rows):
    with pytest.raises(DataError, match="has no game_id"):
        check_blocks(DataConfig(path=write_npy(tmp_path, rows), split_by="game_id"), batch_size=10)


def test_given_statistics_must_be_there(tmp_path, rows):
    with pytest.raises(DataError, match=r"no normalization_stats\.npz"):
        check_blocks(DataConfig(path=write_npy(tmp_path, rows), use_given_stats=True), batch_size=10)


@pytest.mark.parametrize(
    ("stats", "says"),
    [
        ({"mean": np.zeros(6)}, "must contain the arrays mean and std"),
        ({"mean": np.zeros(3), "std": np.ones(3)}, r"both must be \(6,\)"),
        ({"mean": np.zeros(6), "std": np.full(6, np.nan)}, "NaN, Inf or a negative std"),
        ({"mean": np.zeros(6), "std": np.full(6, -1.0)}, "NaN, Inf or a negative std"),
        (None, "must contain the arrays mean and std"),
    ],
)
def test_given_statistics_must_fit(tmp_path, rows, stats, says):
    config = DataConfig(path=write_npy(tmp_path, rows), use_given_stats=True)
    file = tmp_path / "block5" / "normalization_stats.npz"
    if stats is None:
        file.write_bytes(b"PK\x03\x04 no archive")
    else:
        np.savez(file, **stats)
    with pytest.raises(DataError, match=says):
        check_blocks(config, batch_size=10)


def test_a_missing_game_is_refused_when_it_is_read(tmp_path, rows):
    games = pa.array([*range(499), None], pa.int64())
    pq.write_table(table(rows).append_column("game_id", games), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet rows .*: column game_id has nulls"):
        read_all(str(tmp_path))


def test_a_path_may_begin_at_home(tmp_path, rows, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npy(tmp_path / "activations", rows)
    assert open_source(DataConfig(path="~/activations")).infos()[5].n_rows == len(rows)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (
            "s3://key:hidden@bucket/activations",
            r"s3://bucket/activations: a URI must not hold credentials; put them into",
        ),
        ("s3://bucket/a?access_key=k&secret_key=hidden", "must not hold credentials"),
        ("ftp://host/activations", "ftp://host: "),
    ],
)
def test_a_uri_with_a_password_or_of_no_store_is_refused_in_one_line_without_the_password(uri, says):
    with pytest.raises(DataError, match=says) as caught:
        check_blocks(DataConfig(path=uri), batch_size=10)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_games_are_never_loaded(tmp_path, rows):
    path = write_npy(tmp_path, rows)
    np.save(tmp_path / "game_id.npy", np.array([{}] * len(rows), dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="object array"):
        check_blocks(DataConfig(path=path), batch_size=10)


def test_an_h5_file_without_blocks_lists_what_it_has(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["mean"] = np.zeros(3)
    with pytest.raises(DataError, match=r"no dataset with a block number in its name .*found mean"):
        check_blocks(DataConfig(path=str(tmp_path / "a.h5")), batch_size=10)


def test_small_parquet_row_groups_are_read_together_and_large_ones_cut(tmp_path, rows):
    source = open_source(DataConfig(path=write_parquet(tmp_path, rows)))
    assert [r.stop - r.start for r in source.row_ranges(5, 100)] == [140, 140, 140, 80]
    assert [r.stop - r.start for r in source.row_ranges(5, 35)] == [35] * 14 + [10]
