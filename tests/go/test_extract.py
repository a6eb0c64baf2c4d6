"""Tests of the extraction, which turns records and weights into an activation folder through Ray."""

import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import ray
import torch

from msae_sweep.config import DataConfig
from msae_sweep.data import hdf5_writer
from msae_sweep.data.sources.catalog import open_source
from msae_sweep.errors import ConfigError, DataError, FormatError
from msae_sweep.go import extract as extraction
from msae_sweep.go import pipeline, sampling
from msae_sweep.go.activation_folder import ActivationFolder, atomic
from msae_sweep.go.extract import ExtractionSettings, extract
from msae_sweep.go.extraction_actor import ExtractionActor
from msae_sweep.go.game_reading import parsed_games
from msae_sweep.go.leela import Network
from msae_sweep.go.planes import planes
from msae_sweep.go.records import find_units, read_records
from msae_sweep.go.replay import replay
from msae_sweep.go.sampling import Sampling, make_chunks, sampled_plies, sampled_points
from msae_sweep.go.sgf import Game, read_games
from msae_sweep.go.weights import random_weights, read_weights, write_weights
from msae_sweep.sweep_folder import driver_lock

pytestmark = pytest.mark.usefixtures("ray_session")


def sgf(moves: int, seed: int) -> str:
    """Return a record of random moves on empty points that are so far apart that nothing is captured."""
    points = np.random.default_rng(seed).permutation([(x, y) for x in range(0, 19, 2) for y in range(0, 19, 2)])[:moves]
    letters = "abcdefghijklmnopqrs"
    played = "".join(f";{'BW'[i % 2]}[{letters[x]}{letters[y]}]" for i, (x, y) in enumerate(points))
    return f"(;GM[1]SZ[19]{played})"


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Folder with seven games of 12 to 18 moves, one of them a second time, a broken record and a small board."""
    folder = tmp_path_factory.mktemp("records")
    for i in range(7):
        (folder / f"game{i}.sgf").write_text(sgf(12 + i, i))
    (folder / "again.sgf").write_text(sgf(12, 0).replace("GM[1]", "GM[1]PB[somebody else]"))
    (folder / "broken.sgf").write_text("(;GM[1]SZ[19];B[aa];W[aa])")
    (folder / "small.sgf").write_text("(;GM[1]SZ[9];B[aa])")
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """File of a random network with 3 blocks and 8 filters."""
    path = tmp_path_factory.mktemp("network") / "net.txt"
    write_weights(random_weights(3, 8, seed=0), path)
    return path


def settings(network: Path, records: Path, out: Path, **changes: object) -> ExtractionSettings:
    sampling = Sampling(positions_per_game=5, min_move=2, points=3, seed=0)
    return ExtractionSettings(network, records, out, (0, 2), sampling, dtype="float32")._replace(**changes)


@pytest.fixture(scope="module")
def extracted(network, records, tmp_path_factory) -> tuple[ExtractionSettings, extraction.ExtractionSummary]:
    chosen = settings(network, records, tmp_path_factory.mktemp("out") / "activations")
    return chosen, extract(chosen)


def games_of(records: Path) -> dict[int, Game]:
    found = [g for r in read_records(records) for g in read_games(r) if isinstance(g, Game)]
    return {game.game_id: game for game in found}


def contents(folder: Path, block: int) -> dict[str, np.ndarray]:
    rows = np.concatenate([np.load(f) for f in sorted((folder / f"block{block}").glob("chunk_*.npy"))])
    names = ("game_id", "position_id", "ply", "point")
    return {"rows": rows, **{name: np.load(folder / f"{name}.npy") for name in names}}


def test_every_row_is_the_networks_activation_at_its_position_and_point(extracted, network, records):
    chosen, summary = extracted
    assert (summary.games, summary.positions, summary.rows) == (7, 35, 105)
    assert summary.refused == {"broken": 1, "duplicate": 1, "size": 1}
    assert "broken.sgf" in summary.examples[0]
    games, tower = games_of(records), Network(read_weights(network))
    for block in (0, 2):
        found = contents(chosen.out, block)
        assert len(found["rows"]) == 105
        for row, game_id, ply, point in zip(found["rows"], found["game_id"], found["ply"], found["point"], strict=True):
            boards, black = (torch.from_numpy(a) for a in replay(games[game_id], np.array([ply])))
            # The network counts rows from the bottom, points count from the top.
            activations = tower(planes(boards, black, torch.float32).flip(2), [block]).activations[block].flip(2)
            np.testing.assert_allclose(row, activations[0, :, point // 19, point % 19].numpy(), rtol=1e-4, atol=1e-5)
        assert (found["ply"] >= 2).all()
        assert len(np.unique(found["position_id"])) == 35
        stats = np.load(chosen.out / f"block{block}" / "normalization_stats.npz")
        np.testing.assert_allclose(stats["mean"], found["rows"].mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(stats["std"], found["rows"].std(axis=0, ddof=1), atol=1e-5)
        assert stats["count"] == 105


def test_the_folder_is_one_that_run_reads(extracted):
    chosen, _ = extracted
    infos = open_source(DataConfig(path=str(chosen.out))).infos()
    assert {b: (i.n_rows, i.input_dim, i.has_groups) for b, i in infos.items()} == {
        0: (105, 8, True),
        2: (105, 8, True),
    }
    manifest = json.loads((chosen.out / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["blocks_numbered_from"], manifest["first_row"]) == (0, "bottom")
    assert manifest["blocks"] == [0, 2]
    assert manifest["precision"] == "fp32", "what auto stood for"
    assert not (chosen.out / "parts").exists()


def test_names_order_and_archives_change_no_row(extracted, network, records, tmp_path):
    chosen, _ = extracted
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        for i, file in enumerate(sorted(records.iterdir(), reverse=True)):
            info = tarfile.TarInfo(f"deep/{i}.SGF")
            data = file.read_bytes()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    other = settings(network, tmp_path / "all.tar.gz", tmp_path / "out")
    extract(other)
    for name, values in contents(chosen.out, 2).items():
        assert np.array_equal(values, contents(other.out, 2)[name]), name


@pytest.mark.slow
def test_the_command_prints_no_raw_line_of_rays(network, records, tmp_path):
    # Ray's C++ writes to file descriptor 2 of a process whose Ray it is; the tests' own Ray would not show the line.
    command = [sys.executable, "-m", "msae_sweep", "extract", "--weights", str(network), "--games", str(records)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--blocks", "2"],
        capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": "local"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""


def test_the_games_of_one_tar_are_parsed_by_many_tasks(tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for i in range(600):
            data = sgf(90, i).encode()
            info = tarfile.TarInfo(f"{i}.sgf")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    parsed = parsed_games(find_units(tmp_path / "all.tar")).materialize()
    assert parsed.count() == 600
    tasks = re.search(r"Operator \d+ MapBatches\(_parse\): (\d+) tasks", parsed.stats())
    assert tasks is not None, f"fused with the reading:\n{parsed.stats()}"
    assert int(tasks[1]) >= 3


def test_threads_that_share_a_network_write_what_one_writes(extracted, network, records, tmp_path, monkeypatch):
    chosen, _ = extracted
    monkeypatch.setattr(sampling, "CHUNK_POSITIONS", 6)
    folder = ActivationFolder(tmp_path / "out", chosen.blocks, chosen.formats)
    assert folder.begin({})
    taps = ExtractionActor([ray.put(read_weights(network))], chosen, folder)
    chunks = make_chunks(list(games_of(records).values()), chosen.sampling)
    assert [chunk.n_positions for chunk in chunks] == [6, 6, 6, 6, 6, 5]
    batches = [pipeline.pack_boards({"chunk": [pickle.dumps(chunk)]}, chosen.sampling) for chunk in chunks]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(taps, batches))
    assert sum(result["n_positions"][0] for result in results) == 35
    folder.finish({})
    for name, values in contents(chosen.out, 2).items():
        np.testing.assert_allclose(values, contents(folder.path, 2)[name], rtol=1e-5, atol=1e-6, err_msg=name)
    stats = [np.load(out / "block2" / "normalization_stats.npz") for out in (chosen.out, folder.path)]
    np.testing.assert_allclose(stats[0]["std"], stats[1]["std"], rtol=1e-5)


def test_stopped_half_way_it_goes_on_without_repeating_or_losing_a_row(
    extracted, network, records, tmp_path, monkeypatch
):
    chosen, _ = extracted
    monkeypatch.setattr(sampling, "CHUNK_POSITIONS", 10)
    half = settings(network, records, tmp_path / "out")

    def stop(progress: extraction.GamesProgress) -> None:
        if progress.positions:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        extract(half, stop)
    assert interrupt.value.__notes__ == ["finished rows are kept; run the same command to continue"]
    kept = {file: file.stat().st_mtime_ns for file in half.out.glob("parts/index_*.npz")}
    assert kept
    # Another version with the same format may continue.
    manifest = json.loads((half.out / "manifest.json").read_text())
    assert manifest["format"] == 2
    (half.out / "manifest.json").write_text(json.dumps({**manifest, "msae_sweep": "0.0.9", "added later": 1}))
    seen: list[int] = []
    extract(half, lambda progress: seen.append(progress.positions))
    assert seen[0] >= 10, "finished chunks were repeated"
    for name, values in contents(chosen.out, 0).items():
        assert np.array_equal(values, contents(half.out, 0)[name]), name
    assert extract(half).complete_before
    assert json.loads((half.out / "manifest.json").read_text())["added later"] == 1


def test_a_folder_whose_blocks_an_earlier_version_numbered_from_1_is_named_and_not_continued(begun):
    chosen, folder = begun
    manifest = json.loads(folder.manifest.read_text())
    del manifest["blocks_numbered_from"]
    folder.manifest.write_text(json.dumps({**manifest, "format": 1, "msae_sweep": "0.0.1"}))
    with pytest.raises(
        ConfigError, match=r"blocks are numbered from 1, as msae_sweep 0\.0\.1 wrote them; this version"
    ):
        extract(chosen, connect=no_ray)


def test_an_extraction_of_a_newer_version_is_refused_in_one_line_that_names_both_versions(begun):
    chosen, folder = begun
    manifest = json.loads(folder.manifest.read_text())
    folder.manifest.write_text(json.dumps({**manifest, "format": 3, "msae_sweep": "7.8"}))
    with pytest.raises(
        FormatError, match=r"manifest.json: format 3 was written by msae_sweep 7.8, but this is msae_sw"
    ):
        extract(chosen, connect=no_ray)


def test_a_network_that_counts_from_the_top_sees_the_board_so_and_points_are_the_same(
    extracted, network, records, tmp_path
):
    chosen, _ = extracted
    other = settings(network, records, tmp_path / "out", first_row="top")
    extract(other)
    found, games, tower = contents(other.out, 2), games_of(records), Network(read_weights(network))
    assert np.array_equal(found["point"], contents(chosen.out, 2)["point"])
    for i in range(0, 105, 20):
        boards, black = (torch.from_numpy(a) for a in replay(games[found["game_id"][i]], found["ply"][[i]]))
        activations = tower(planes(boards, black, torch.float32), [2]).activations[2]
        row, column = divmod(int(found["point"][i]), 19)
        np.testing.assert_allclose(found["rows"][i], activations[0, :, row, column].numpy(), rtol=1e-4, atol=1e-5)


def test_means_and_all_points(extracted, network, records, tmp_path):
    chosen, _ = extracted
    found = {}
    for points, n_rows in (("mean", 35), ("all", 35 * 361)):
        other = settings(network, records, tmp_path / points, sampling=chosen.sampling._replace(points=points))
        assert extract(other).rows == n_rows
        found[points] = contents(other.out, 2)
    few, everywhere = contents(chosen.out, 2), found["all"]["rows"]
    np.testing.assert_allclose(everywhere[few["position_id"] * 361 + few["point"]], few["rows"], rtol=1e-4, atol=1e-5)
    assert (found["mean"]["point"] == -1).all()
    mean = everywhere.reshape(35, 361, 8).mean(axis=1)
    np.testing.assert_allclose(found["mean"]["rows"], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "formats",
    [
        ("npy", "h5", "parquet"),
        pytest.param(("h5",), marks=pytest.mark.slow),
        pytest.param(("parquet",), marks=pytest.mark.slow),
    ],
)
def test_every_format_holds_the_same_rows(formats, extracted, network, records, tmp_path):
    chosen, _ = extracted
    other = settings(network, records, tmp_path / "out", formats=formats)
    extract(other)
    paths = {"npy": other.out, "h5": other.out / "activations.h5", "parquet": other.out / "parquet"}
    for name in formats:
        for path in {paths[name], other.out}:
            source = open_source(DataConfig(path=str(path)))
            parts = [source.read(r) for r in source.row_ranges(2, 8192)]
            assert np.array_equal(np.concatenate([p.x for p in parts]), contents(chosen.out, 2)["rows"])
            assert all(p.groups is not None for p in parts)


def test_the_hdf5_file_has_the_layout_of_the_original_series(extracted, network, records, tmp_path, monkeypatch):
    chosen, _ = extracted
    monkeypatch.setattr(hdf5_writer, "CHUNK_ROWS", 40)  # 105 rows are then three chunks, the last one partial
    pooled = settings(network, records, tmp_path / "out", formats=("h5",), sampling=Sampling(5, 2, "mean", 0))
    extract(pooled)
    with h5py.File(pooled.out / "activations.h5") as file:
        attributes = {name: file.attrs[name] for name in ("n_positions", "spatial_mode", "pool_mode")}
        assert attributes == {"n_positions": 35, "spatial_mode": "pool", "pool_mode": "mean"}
        assert file.attrs["block_indices"].tolist() == [0, 2]
        assert (file["game_ids"].dtype, file["move_numbers"].dtype) == (np.int32, np.int16)
        assert np.array_equal(file["move_numbers"][:], file["ply"][:])
        assert file["game_ids"][:].tolist() == sorted(file["game_ids"][:].tolist())
        assert set(file["game_ids"][:].tolist()) == set(range(7))
        of_one_game = [set(file["game_id"][:][file["game_ids"][:] == number].tolist()) for number in range(7)]
        assert [len(ids) for ids in of_one_game] == [1] * 7
        for block in (0, 2):
            dataset = file[f"block{block}"]
            assert (dataset.shape, dataset.dtype, dataset.chunks) == ((35, 8), np.float32, (35, 8))
            assert (dataset.compression, dataset.compression_opts) == ("gzip", 4)
            rows = dataset[:]
            np.testing.assert_allclose(dataset.attrs["mean"], rows.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(dataset.attrs["std"], rows.std(axis=0, ddof=1), rtol=1e-3)
            assert dataset.attrs["count"] == 35
    points = settings(network, records, tmp_path / "points", formats=("h5",))
    extract(points)
    with h5py.File(points.out / "activations.h5") as file:
        assert file["block2"].chunks == (40, 8)
        assert np.array_equal(file["block2"][:], contents(chosen.out, 2)["rows"])
        assert file.attrs["spatial_mode"] == "flatten"


def test_the_games_of_the_original_series_files_are_kept_whole_in_a_split(tmp_path):
    with h5py.File(tmp_path / "activations.h5", "w") as file:
        file["block5"] = np.zeros((6, 4), np.float32)
        file["game_ids"] = np.array([0, 0, 1, 1, 2, 2], np.int32)
    source = open_source(DataConfig(path=str(tmp_path / "activations.h5")))
    assert source.infos()[5].has_groups
    assert source.read(source.row_ranges(5, 6)[0]).groups.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (0, 3)}, "--blocks: 3 is not in this network, which has blocks 0 to 2"),
        ({"blocks": ()}, "--blocks"),
        ({"formats": ("csv",)}, "--format: csv must be among npy, h5, parquet"),
        ({"sampling": Sampling(5, 2, 362, 0)}, "--points: 362"),
        ({"sampling": Sampling(5, 400, 3, 0)}, "no game has a position at --min-move 400 moves"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_folder(changes, message, network, records, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        extract(settings(network, records, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_broken_input_is_one_line(network, records, tmp_path):
    text = tmp_path / "net.txt"
    text.write_text("not weights\n")
    with pytest.raises(DataError, match=r"net\.txt"):
        extract(settings(text, records, tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no game records"):
        extract(settings(network, tmp_path / "empty", tmp_path / "out"))
    (tmp_path / "empty" / "a.sgf").write_text("hello")
    with pytest.raises(DataError, match=r"no usable game \(1 broken\); the first broken one: a\.sgf"):
        extract(settings(network, tmp_path / "empty", tmp_path / "out"))


def test_another_extraction_or_other_files_in_the_folder_are_refused(extracted, network, records, tmp_path):
    chosen, _ = extracted
    with pytest.raises(ConfigError, match="contains another extraction, with seed 0 instead of 1"):
        extract(chosen._replace(sampling=chosen.sampling._replace(seed=1)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and contains no extraction"):
        extract(settings(network, records, tmp_path))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_could_not_be_written_leaves_nothing_half(tmp_path):
    target = tmp_path / "rows.npy"

    def half() -> None:
        with atomic(target) as part:
            part.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_what_is_done(network, records, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    chosen = settings(network, records, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ActivationFolder, "finish", full)
        with pytest.raises(DataError, match="No space left on device; finished rows are kept"):
            extract(chosen)
    assert extract(chosen).rows == 105


ON_A_SMALL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
import ray
from msae_sweep import cli

disk, keep, *command = sys.argv[1:]
out = Path(command[command.index("--out") + 1])
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={8 << 20}", "tmpfs", disk], check=True)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
sys.argv = ["msae-sweep", *command]

def run():
    try:
        cli.main()
    except SystemExit as end:
        print("ended with", end.code)

run()
print("whole:", sorted(f.name for f in out.glob("parts/index_*")), "half:", list(out.rglob(".*.part")))
subprocess.run(["mount", "-o", f"remount,size={64 << 20}", disk], check=True)
run()
shutil.copytree(out, keep)
"""
"""Script that runs a command on a full disk, then with room. The disk is a mount that no process outside it can see."""


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["npy", "h5"])
def test_a_disk_that_fills_up_is_one_line_and_with_room_the_same_command_goes_on(formats, network, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here: `unshare -m` needs root")
    (tmp_path / "records").mkdir()
    # 720 positions are 4 chunks of 181. One chunk is 3.5 MB, so the third does not fit. In h5, all 240 positions fit
    # once, but not a second time.
    n_games = 9 if formats == "npy" else 3
    for i in range(n_games):
        (tmp_path / "records" / f"{i}.sgf").write_text(sgf(80, i))
    disk = tmp_path / "disk"
    disk.mkdir()
    chosen = settings(network, tmp_path / "records", tmp_path / "whole", blocks=(2,), formats=(formats,))
    chosen = chosen._replace(sampling=Sampling(None, 0, "all", 0))
    command = [
        "unshare", "-m", sys.executable, "-c", ON_A_SMALL_DISK, str(disk), str(tmp_path / "kept"), "extract",
        "--weights", str(network), "--games", str(chosen.games), "--blocks", "2", "--out", str(disk / "activations"),
        "--points", "all", "--dtype", "float32", "--format", formats,
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if "core_worker" not in line]
    line = "No space left on device; finished rows are kept; run the same command to continue"
    assert said == [f"msae-sweep: {disk}/activations: {line}"]
    assert [text for text in ran.stdout.splitlines() if "ended" in text] == ["ended with 2", "ended with 0"]
    assert "whole: ['index_000000.npz', " in ran.stdout
    assert "half: []" in ran.stdout
    extract(chosen)
    for name in ("manifest.json", "position_id.npy", "ply.npy", "point.npy", "game_id.npy"):
        assert (tmp_path / "kept" / name).read_bytes() == (chosen.out / name).read_bytes(), name
    kept = open_source(DataConfig(path=str(tmp_path / "kept")))
    whole = open_source(DataConfig(path=str(chosen.out)))
    assert kept.infos()[2].n_rows == whole.infos()[2].n_rows == n_games * 80 * 361
    for mine, theirs in zip(kept.row_ranges(2, 65536), whole.row_ranges(2, 65536), strict=True):
        assert np.array_equal(kept.read(mine).x, whole.read(theirs).x)


WITH_A_GPU = """
import sys
import ray
from msae_sweep import cli

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
sys.argv[0] = "msae-sweep"
cli.main()
"""
"""Script that runs a command where Ray reports a GPU. The network itself runs on the device that torch finds."""


@pytest.mark.slow
def test_where_ray_has_gpus_the_same_rows_are_written(extracted, network, records, tmp_path):
    chosen, _ = extracted
    command = [
        sys.executable, "-c", WITH_A_GPU, "extract", "--weights", str(network), "--games", str(records),
        "--blocks", "0,2", "--out", str(tmp_path / "out"), "--positions-per-game", "5", "--skip-first", "2",
        "--points", "3", "--dtype", "float32",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Deprecat" not in ran.stderr
    for name, values in contents(chosen.out, 2).items():
        np.testing.assert_allclose(values, contents(tmp_path / "out", 2)[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_output_that_is_a_file_is_refused(network, records, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="contains no extraction; give another folder"):
        extract(settings(network, records, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_what_a_killed_writer_left_half_is_taken_for_nothing_and_goes(extracted, network, records, tmp_path):
    chosen, _ = extracted
    other = settings(network, records, tmp_path / "out")
    with pytest.raises(RuntimeError):
        extract(other, _raises)
    half = [other.out / "parts" / ".block0_000000.npy.1.part", other.out / ".activations.h5.1.part"]
    for file in half:
        file.write_bytes(b"half")
    # These rows have no index, because the chunk was never complete.
    (other.out / "parts" / "block0_000000.npy").write_bytes(b"half")
    extract(other)
    assert not any(file.exists() for file in half)
    for name, values in contents(chosen.out, 0).items():
        assert np.array_equal(values, contents(other.out, 0)[name]), name


def _raises(_: extraction.GamesProgress) -> None:
    raise RuntimeError


def no_ray() -> None:
    pytest.fail("Ray was started")


@pytest.fixture
def begun(tmp_path, network, records) -> tuple[ExtractionSettings, ActivationFolder]:
    """Settings and folder of an extraction that has begun, and in which a file is being written."""
    chosen = settings(network, records, tmp_path / "out", precision="fp32")
    folder = ActivationFolder(chosen.out, chosen.blocks, chosen.formats)
    with folder.held():
        folder.begin(extraction._identity(chosen))
    (folder.parts / ".block0_000000.npy.1.part").write_bytes(b"half")
    return chosen, folder


def test_a_second_extraction_into_a_folder_is_refused_and_touches_nothing(begun):
    chosen, folder = begun
    with folder.held():
        line = f"out: process {os.getpid()} on .* is writing an extraction there; wait for it, or give another folder"
        with pytest.raises(ConfigError, match=line):
            extract(chosen, connect=no_ray)
        assert (folder.parts / ".block0_000000.npy.1.part").exists()
    assert sorted(file.name for file in folder.path.iterdir()) == ["manifest.json", "parts"]


@pytest.mark.parametrize("alive", [True, False])
def test_an_extraction_on_another_machine_is_left_alone_as_long_as_it_lives(begun, monkeypatch, alive):
    chosen, folder = begun
    # A lock that is held on another machine is not visible here.
    (folder.path / "driver.json").write_text(json.dumps({"driver": "process 1 on elsewhere", "beat": "a"}))
    monkeypatch.setattr(driver_lock, "STALE_SECONDS", 0.2)
    read, beats = driver_lock._read, itertools.count()
    monkeypatch.setattr(driver_lock, "_read", lambda place: {**read(place), **({"beat": next(beats)} if alive else {})})

    class Reached(Exception):
        pass

    def reached() -> None:
        raise Reached

    with pytest.raises(ConfigError if alive else Reached, match="process 1 on elsewhere is writing" if alive else None):
        extract(chosen, connect=reached)
    assert (folder.path / "driver.json").exists() == alive


def test_a_folder_that_cannot_be_made_is_found_before_ray_starts(network, records, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out: .*file/out cannot be written: .*file is not a folder"):
        extract(settings(network, records, tmp_path / "file" / "out"), connect=no_ray)


def test_another_network_or_other_games_are_refused_by_name(begun, records, tmp_path):
    chosen, folder = begun
    write_weights(random_weights(3, 8, seed=1), tmp_path / "other.txt")
    with pytest.raises(ConfigError, match=r"was started with other --weights \(weights_sha256 [0-9a-f]{12}…, now"):
        extract(chosen._replace(weights=tmp_path / "other.txt"), connect=no_ray)
    identity = {**extraction._identity(chosen), "games_sha256": "0" * 64}
    with pytest.raises(ConfigError, match="was started with other --games"):
        folder.begin(identity)


def test_an_extraction_goes_on_in_the_precision_it_began_with(network, records, tmp_path, monkeypatch):
    # The first call acts as on a GPU, where `auto` is fp16. The second one runs on a CPU, where it is fp32.
    other = settings(network, records, tmp_path / "out")
    monkeypatch.setattr(extraction, "_precision_of_the_cluster", lambda *_: lambda: "fp16")
    with pytest.raises(RuntimeError):
        extract(other, _raises)
    monkeypatch.undo()
    assert json.loads((other.out / "manifest.json").read_text())["precision"] == "fp16"
    with pytest.raises(ConfigError, match="with precision 'fp16' instead of 'fp32'"):
        extract(other._replace(precision="fp32"), connect=no_ray)
    extract(other)
    rows = contents(other.out, 2)["rows"]
    assert np.array_equal(rows, rows.astype(np.float16)), "some were computed in fp32"


@pytest.mark.parametrize(("gpus", "meant"), [({}, "fp32"), ({"GPU": 1.0}, "fp16")])
def test_what_auto_stands_for_is_asked_where_the_network_will_run(network, records, tmp_path, monkeypatch, gpus, meant):
    class Task:
        """Ray task that runs here, as on a node with a GPU."""

        def __init__(self, function):
            self.function, self.resources = function, {}

        def options(self, **resources):
            self.resources = resources
            return self

        def remote(self):
            assert self.resources == {"num_gpus": 1}
            return self.function()

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, **gpus})
    monkeypatch.setattr(ray, "remote", Task)
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    monkeypatch.setattr(extraction, "device_here", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    chosen = settings(network, records, tmp_path / "out")
    folder = ActivationFolder(chosen.out, chosen.blocks, chosen.formats)
    assert extraction._precision_of_the_cluster(chosen, folder)() == meant
    assert extraction._precision_of_the_cluster(chosen._replace(precision="bf16"), folder)() == "bf16"


def test_without_a_note_of_its_precision_an_extraction_is_not_gone_on_with(begun):
    chosen, folder = begun
    folder._write_manifest({**folder.found(), "precision": "auto"})
    with pytest.raises(ConfigError, match="did not record the precision"):
        extract(chosen._replace(precision="auto"), connect=no_ray)
    folder._write_manifest({**folder.found(), "complete": True})
    assert extraction._as_begun(chosen._replace(precision="auto"), folder).precision == "auto"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"complete": 1}'])
def test_a_manifest_of_something_else_is_one_line(begun, text):
    chosen, folder = begun
    folder.manifest.write_text(text)
    with pytest.raises(ConfigError, match=r"manifest\.json is not the manifest of an extraction"):
        extract(chosen, connect=no_ray)


def test_points_and_positions_follow_from_the_game_and_the_seed_alone(records):
    game = next(iter(games_of(records).values()))
    sampling = Sampling(4, 1, 5, 7)
    plies = sampled_plies(game, sampling)
    points = sampled_points(game, plies, sampling)
    assert points.shape == (4, 5)
    assert (np.diff(points, axis=1) > 0).all()
    assert np.array_equal(points[[2]], sampled_points(game, plies[[2]], sampling))
    assert not np.array_equal(points, sampled_points(game, plies, sampling._replace(seed=8)))


def test_chunks_cover_every_position_once_and_depend_on_no_order(records):
    games = list(games_of(records).values())
    sampling = Sampling(5, 2, 3, 0)
    chunks = make_chunks(games, sampling)
    again = make_chunks(games[::-1], sampling)
    assert [c.first_position for c in chunks] == list(np.cumsum([0, *(c.n_positions for c in chunks)])[:-1])
    assert sum(c.n_positions for c in chunks) == 35
    assert [[g.key for g in c.games] for c in chunks] == [[g.key for g in c.games] for c in again]
