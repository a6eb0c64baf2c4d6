import json
import threading

import numpy as np
import pytest
import ray
import ray.data
from activation_files import WRITERS, write_npy

from msae_sweep.config import DataConfig
from msae_sweep.data.prepare import shards
from msae_sweep.data.prepare.shard_folder import ShardFolder
from msae_sweep.data.prepare.split import RunningMoments, is_validation, standardise
from msae_sweep.data.sources.catalog import open_source
from msae_sweep.errors import DataError, SweepError
from msae_sweep.paths import StoragePath


def prepare(path, storage, **settings):
    config = DataConfig.model_validate({"path": path, "val_split": 0.2, **settings})
    return shards.prepare_blocks(config, str(storage), batch_size=10)


def arrays(block):
    train, val = (np.concatenate([fetch() for fetch in s]) for s in (block.train_shards(), block.val_shards()))
    return train, val


def sides(x, block, **settings):
    """Return the training and validation rows, split and standardised with plain numpy."""
    held_out = is_validation(np.arange(len(x)), 0, 0.2)
    mean, std = x[~held_out].astype("f8").mean(axis=0), x[~held_out].astype("f8").std(axis=0)
    std[2] = np.inf  # the constant channel becomes 0
    return (x[~held_out] - mean) / std, (x[held_out] - mean) / std


# The next tests cover the split and the moments, which are pure functions.


def test_about_val_split_of_the_rows_is_held_out():
    for seed in (0, 1, -5, 2**63):
        assert is_validation(np.arange(100_000), seed, 0.1).mean() == pytest.approx(0.1, abs=0.005)


def test_the_split_depends_on_the_id_and_the_seed_alone():
    ids = np.random.default_rng(0).permutation(10_000)
    whole = is_validation(ids, 3, 0.1)
    parts = np.concatenate([is_validation(part, 3, 0.1) for part in np.array_split(ids, 7)])
    np.testing.assert_array_equal(whole, parts)
    assert (is_validation(ids, 4, 0.1) != whole).any()


def test_merged_moments_equal_numpys_float64_also_far_from_zero():
    x = np.random.default_rng(0).normal(size=(5000, 3)) + np.array([0, 1e4, 1e6])
    moments = RunningMoments.of(x[:0])
    for part in np.array_split(x, 7):
        moments = moments.merge(RunningMoments.of(part))
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.std(), x.std(axis=0), rtol=1e-9)


def test_a_constant_channel_has_std_zero_and_standardises_to_zero():
    x = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
    x[:, 1] = 0.1
    moments = RunningMoments.of(x)
    assert moments.std()[1] == 0
    z = standardise(x, moments.mean, moments.std())
    assert not z[:, 1].any()
    assert z[:, 0].std() == pytest.approx(1, abs=1e-5)


def test_a_channel_that_varies_little_about_a_large_mean_is_not_constant():
    x = np.random.default_rng(0).normal(size=(5000, 2)) * [1, 0.5] + [0, 1e10]
    moments = RunningMoments.of(x[:777]).merge(RunningMoments.of(x[777:]))
    np.testing.assert_allclose(moments.std(), [x[:, 0].std(), 0.5], rtol=0.02)
    assert standardise(x, moments.mean, moments.std())[:, 1].std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("value", [0.1, -7e30, 1e-300, 60_000.0])
def test_the_same_constant_in_every_part_has_std_exactly_zero(value):
    x = np.full((4000, 1), value)
    moments = RunningMoments.of(x[:0])
    for part in np.array_split(x, 13):
        moments = moments.merge(RunningMoments.of(part))
    assert moments.std()[0] == 0


# The next tests run the pipelines.


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_shards_that_numpy_gives(ray_session, tmp_path, rows, form):
    block = prepare(WRITERS[form](tmp_path / "data", rows), tmp_path / "storage")[5]
    train, val = sides(rows, block)
    assert (block.n_train, block.n_val) == (len(train), len(val))
    for found, expected in zip(arrays(block), (train, val), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert block.manifest["constant_channels"] == [2]
    assert block.std[2] == 1


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_neither_split_nor_statistics_depend_on_how_the_rows_are_cut(ray_session, tmp_path, rows, form, monkeypatch):
    path = WRITERS[form](tmp_path / "data", rows)
    few = prepare(path, tmp_path / "few")[5]
    monkeypatch.setattr(shards, "rows_per_range", lambda info: 23)
    many = prepare(path, tmp_path / "many")[5]
    assert len(many.refs) > 3 * len(few.refs)
    np.testing.assert_allclose(many.mean, few.mean, rtol=1e-6)
    for a, b in zip(arrays(few), arrays(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_pass_takes_a_worker_for_every_four_row_ranges(ray_session, tmp_path, rows, monkeypatch):
    workers, strategy = [], ray.data.TaskPoolStrategy

    def recording(size):
        workers.append(size)
        return strategy(size=size)

    monkeypatch.setattr(ray.data, "TaskPoolStrategy", recording)
    monkeypatch.setattr(shards, "rows_per_range", lambda info: len(rows) // 9)
    path = write_npy(tmp_path / "data", rows, chunks=1)
    n_ranges = len(prepare(path, tmp_path / "storage")[5].refs)
    assert n_ranges >= 9
    assert workers == 2 * [-(-n_ranges // 4)]


def test_games_never_stand_on_both_sides(ray_session, tmp_path, rows, games):
    # Channel 0 holds the row's number, so that the rows can be recognised.
    rows[:, 0] = np.arange(len(rows))
    block = prepare(write_npy(tmp_path / "data", rows, games), tmp_path / "storage")[5]
    assert block.manifest["split"]["by"] == "game_id"
    numbers = [np.rint(part[:, 0] * block.std[0] + block.mean[0]).astype(int) for part in arrays(block)]
    train, val = (set(games[part]) for part in numbers)
    assert train
    assert val
    assert not train & val
    assert sum(len(part) for part in numbers) == len(rows)


def test_by_row_is_taken_where_it_is_asked_for(ray_session, tmp_path, rows, games):
    block = prepare(write_npy(tmp_path / "data", rows, games), tmp_path / "storage", split_by="row")[5]
    np.testing.assert_allclose(arrays(block)[0], sides(rows, block)[0], atol=1e-5)


def test_the_same_rows_are_held_out_in_every_block(ray_session, tmp_path, rows):
    write_npy(tmp_path / "data", rows, block=5, chunks=3)
    path = write_npy(tmp_path / "data", rows * 2 + 1, block=20, chunks=2)
    blocks = prepare(path, tmp_path / "storage")
    for a, b in zip(arrays(blocks[5]), arrays(blocks[20]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def two_blocks(folder, rows) -> DataConfig:
    write_npy(folder, rows, block=5)
    return DataConfig(path=write_npy(folder, rows, block=20), val_split=0.2)


def test_a_block_is_measured_while_the_one_before_it_is_being_standardised(ray_session, tmp_path, rows, monkeypatch):
    measure, standardise, second_measured = shards._measure, shards._standardise, threading.Event()

    def measuring(source, info, *others):
        measured = measure(source, info, *others)
        if info.block == 20:
            second_measured.set()
        return measured

    def standardising(measured, info, *others):
        assert info.block == 20 or second_measured.wait(60), "the second block waits for the whole of the first"
        return standardise(measured, info, *others)

    monkeypatch.setattr(shards, "_measure", measuring)
    monkeypatch.setattr(shards, "_standardise", standardising)
    ready = []
    config = two_blocks(tmp_path / "data", rows)
    blocks = shards.prepare_blocks(config, str(tmp_path / "storage"), batch_size=10, on_ready=ready.append)
    assert list(blocks) == [5, 20]
    assert sorted(ready, key=lambda block: block.block) == list(blocks.values())


def test_no_more_blocks_are_begun_than_may_be_standardised_at_once(ray_session, tmp_path, rows, monkeypatch):
    measure, seen = shards._measure, []

    def measuring(source, info, *others):
        seen.append(("measured", info.block))
        return measure(source, info, *others)

    monkeypatch.setattr(shards, "STANDARDISED_AT_ONCE", 1)
    monkeypatch.setattr(shards, "_measure", measuring)
    shards.prepare_blocks(
        two_blocks(tmp_path / "data", rows),
        str(tmp_path / "storage"),
        batch_size=10,
        on_ready=lambda block: seen.append(("ready", block.block)),
    )
    assert seen == [("measured", 5), ("ready", 5), ("measured", 20), ("ready", 20)]


def test_what_fails_beside_the_next_block_is_raised_before_one_more_is_measured(
    ray_session, tmp_path, rows, monkeypatch
):
    measure, seen, second_begun, failed = shards._measure, [], threading.Event(), threading.Event()

    def measuring(source, info, *others):
        seen.append(info.block)
        if info.block == 20:
            second_begun.set()
            assert failed.wait(60)
        return measure(source, info, *others)

    def standardising(measured, info, *others):
        assert second_begun.wait(60)
        failed.set()
        raise SweepError("storage: the disk is full")

    monkeypatch.setattr(shards, "_measure", measuring)
    monkeypatch.setattr(shards, "_standardise", standardising)
    write_npy(tmp_path / "data", rows, block=35)
    with pytest.raises(SweepError, match="the disk is full"):
        shards.prepare_blocks(two_blocks(tmp_path / "data", rows), str(tmp_path / "storage"), batch_size=10)
    assert seen == [5, 20]


def test_a_block_that_cannot_be_used_costs_nothing_of_those_before_it(ray_session, tmp_path, rows, monkeypatch):
    lines, standardise, second_measured = [], shards._standardise, threading.Event()
    monkeypatch.setattr(shards, "_standardise", lambda *args: second_measured.wait(60) and standardise(*args))
    write_npy(tmp_path / "data", rows, block=5)
    mended = rows.copy()
    rows[7, 0] = np.nan
    config = DataConfig(path=write_npy(tmp_path / "data", rows, block=20), val_split=0.2)
    threading.Timer(2, second_measured.set).start()  # by then the bad row of the other block has been found
    with pytest.raises(DataError, match="row 7: NaN"):
        shards.prepare_blocks(config, str(tmp_path / "storage"), batch_size=10)
    write_npy(tmp_path / "data", mended, block=20)
    shards.prepare_blocks(config, str(tmp_path / "storage"), batch_size=10, on_progress=lines.append)
    assert sorted(" ".join(line.split()[:3]) for line in lines) == ["block 20: prepared", "block 5: reused"]


def test_a_second_preparation_reuses_the_files(ray_session, tmp_path, rows):
    path, lines = write_npy(tmp_path / "data", rows), []
    first = prepare(path, tmp_path / "storage")[5]
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "storage").rglob("*") if f.is_file()}
    config = DataConfig(path=path, val_split=0.2)
    assert shards.prepared_manifests(config, str(tmp_path / "storage")) == {5: first.manifest}
    assert shards.prepared_manifests(config.model_copy(update={"seed": 1}), str(tmp_path / "storage")) == {}
    second = shards.prepare_blocks(config, str(tmp_path / "storage"), batch_size=10, on_progress=lines.append)[5]
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "storage").rglob("*") if f.is_file()} == times
    assert "reused" in lines[0]
    for a, b in zip(arrays(first), arrays(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("in_a_store", [False, True])
def test_some_rows_of_a_shard_are_those_of_the_whole(in_a_store, tmp_path, request):
    place = f"{request.getfixturevalue('object_store').bucket}/by-rows" if in_a_store else str(tmp_path)
    folder = ShardFolder(StoragePath(place))
    z = np.arange(40, dtype=np.float32).reshape(10, 4)
    folder.save_shard(3, z)
    assert np.array_equal(folder.shard(3), z)
    some = folder.shard(3, slice(6, 9))
    assert np.array_equal(some, z[6:9])
    some[:] = 0  # the slice is a copy, so this does not change the shard
    assert np.array_equal(folder.shard(3), z)


@pytest.mark.parametrize("damage", ["no manifest", "a shard is gone", "a shard is short"])
def test_an_unfinished_or_damaged_preparation_is_made_again(ray_session, tmp_path, rows, damage):
    path = write_npy(tmp_path / "data", rows)
    first = arrays(prepare(path, tmp_path / "storage")[5])
    folder = next((tmp_path / "storage" / "prepared").iterdir())
    shard = next(folder.glob("shard-*.npy"))
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "a shard is gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:200])
    for a, b in zip(first, arrays(prepare(path, tmp_path / "storage")[5]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert json.loads((folder / "manifest.json").read_text())["n_train"] == len(first[0])


@pytest.mark.parametrize("change", [{"seed": 1}, {"val_split": 0.3}, {"drop_nonfinite": True}, "data"])
def test_another_question_or_other_data_is_another_key(ray_session, tmp_path, rows, change):
    path = write_npy(tmp_path / "data", rows)
    prepare(path, tmp_path / "storage")
    if change == "data":
        np.save(tmp_path / "data" / "block5" / "chunk_0000.npy", rows[:20])
        change = {}
    prepare(path, tmp_path / "storage", **change)
    assert len(list((tmp_path / "storage" / "prepared").iterdir())) == 2


def test_shards_of_another_format_are_never_taken_for_ones_of_this_format(tmp_path, rows, monkeypatch):
    config = DataConfig(path=str(write_npy(tmp_path / "data", rows)))
    source = open_source(config)
    info = source.infos()[5]
    key = shards._key(source, info, config)
    assert shards._key(source, info, config) == key
    monkeypatch.setattr(shards, "PREPARED_SHARDS", shards.PREPARED_SHARDS + 1)
    assert shards._key(source, info, config) != key


def test_nonfinite_rows_are_named_by_file_and_rows(ray_session, tmp_path, rows):
    rows[[200, 203, 450]] = np.nan
    path = write_npy(tmp_path / "data", rows)
    with pytest.raises(DataError, match=r"chunk_0001\.npy rows 33-36: NaN or Inf \(3 rows in all\)") as caught:
        prepare(path, tmp_path / "storage")
    assert "\n" not in str(caught.value)


def test_nonfinite_rows_are_dropped_and_counted_on_request(ray_session, tmp_path, rows):
    clean, rows = rows.copy(), rows
    rows[17, 1], rows[400, 3] = np.inf, np.nan
    block = prepare(write_npy(tmp_path / "data", rows), tmp_path / "storage", drop_nonfinite=True)[5]
    assert block.manifest["n_dropped"] == 2
    assert block.n_train + block.n_val == len(clean) - 2
    assert all(np.isfinite(part).all() for part in arrays(block))


def test_given_statistics_are_used_only_when_asked_for(ray_session, tmp_path, rows):
    path = write_npy(tmp_path / "data", rows)
    np.savez(tmp_path / "data" / "block5" / "normalization_stats.npz", mean=np.full(6, 7.0), std=np.full(6, 2.0))
    own = prepare(path, tmp_path / "storage")[5]
    given = prepare(path, tmp_path / "storage", use_given_stats=True)[5]
    assert not np.allclose(own.mean, 7)
    assert np.allclose(given.mean, 7)
    assert np.allclose(given.std, 2)


def test_too_few_training_rows_for_a_batch_are_found_after_the_split(ray_session, tmp_path, rows):
    games = np.zeros(len(rows), dtype=int)
    games[:50] = np.arange(1, 51)
    path = write_npy(tmp_path / "data", rows, games)
    seed = next(s for s in range(50) if is_validation(np.zeros(1, dtype=int), s, 0.2)[0])
    with pytest.raises(DataError, match="training rows, fewer than"):
        shards.prepare_blocks(DataConfig(path=path, val_split=0.2, seed=seed), str(tmp_path / "s"), batch_size=100)


def test_a_split_that_leaves_a_side_empty_is_refused(ray_session, tmp_path, rows):
    path = write_npy(tmp_path / "data", rows, np.zeros(len(rows), dtype=int))
    with pytest.raises(DataError, match=r"leaves no (validation|training) rows .*500 rows, split by game"):
        prepare(path, tmp_path / "storage")


def test_unwritable_storage_is_one_line(ray_session, tmp_path, rows):
    (tmp_path / "storage").write_text("a file, not a folder")
    with pytest.raises(SweepError, match=r"storage: .* cannot be created"):
        prepare(write_npy(tmp_path / "data", rows), tmp_path / "storage")


def test_a_shard_that_cannot_be_written_is_one_line(ray_session, tmp_path, rows):
    path = write_npy(tmp_path / "data", rows)
    prepare(path, tmp_path / "storage")
    folder = next((tmp_path / "storage" / "prepared").iterdir())
    (folder / "manifest.json").unlink()
    shard = next(folder.glob("shard-*.npy"))
    shard.unlink()
    shard.mkdir()  # a folder in its place makes writing fail, as a full disk does
    with pytest.raises(SweepError, match=r"storage: .*shard-0.*npy cannot be written: Is a directory$") as caught:
        prepare(path, tmp_path / "storage")
    assert "\n" not in str(caught.value)
    assert not list(folder.glob(".*.part"))


def test_values_that_overflow_are_refused(ray_session, tmp_path):
    x = np.random.default_rng(0).normal(size=(300, 3))
    x[:, 1] *= 1e200
    with pytest.raises(DataError, match="channel 1 overflow"):
        prepare(write_npy(tmp_path / "data", x), tmp_path / "storage")


@pytest.mark.parametrize("original", [False, True], ids=["wrapped", "as_raised"])
def test_an_error_in_a_task_comes_out_without_rays_wrapping(ray_session, tmp_path, rows, monkeypatch, original):
    # An extraction in the same process turns this setting on.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "raise_original_map_exception", original)
    path = write_npy(tmp_path / "data", rows)
    source = shards.open_source(DataConfig(path=path))
    source.infos()
    file = tmp_path / "data" / "block5" / "chunk_0002.npy"
    file.write_bytes(file.read_bytes()[:300])  # the file is cut off after its header was checked
    monkeypatch.setattr(shards, "open_source", lambda config: source)
    with pytest.raises(DataError, match=r"chunk_0002\.npy: cannot be read: truncated") as caught:
        prepare(path, tmp_path / "storage")
    assert "\n" not in str(caught.value)


def test_real_activations_are_split_by_game_with_the_spread_that_was_measured(ray_session, real_data, tmp_path):
    block = prepare(str(real_data), tmp_path, blocks=[20], val_split=0.1)[20]
    train, val = arrays(block)
    assert block.manifest["split"]["by"] == "game_id"
    assert len(train) + len(val) == 40_000
    assert len(val) == pytest.approx(4000, rel=0.15)
    np.testing.assert_allclose(train.mean(axis=0, dtype=np.float64), 0, atol=1e-4)
    np.testing.assert_allclose(train.std(axis=0, dtype=np.float64), 1, atol=1e-4)
    assert np.abs(val.mean(axis=0)).max() < 0.2
