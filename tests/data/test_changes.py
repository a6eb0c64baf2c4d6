"""Tests that changes of the activations are described, and that copies of the same rows do not count as a change."""

import os
import shutil

import numpy as np
import pytest
from activation_files import WRITERS

from msae_sweep.config import DataConfig
from msae_sweep.data.prepare import changes, passes
from msae_sweep.data.prepare.changes import describe_change
from msae_sweep.data.sources.catalog import open_source

ROWS = np.random.default_rng(0).standard_normal((90, 4)).astype(np.float32)
SPLIT = {"by": "row", "seed": 0, "val_split": 0.2}


def opened(path):
    source = open_source(DataConfig(path=str(path)))
    return source, source.infos()[5]


def written_down(path):
    """Return manifest and origin of a block as a preparation writes them."""
    source, info = opened(path)
    manifest = {
        "source": {"rows": info.n_rows, "dtype": info.dtype, "fingerprint": source.fingerprint(5)},
        "input_dim": info.input_dim,
        "split": SPLIT,
    }
    return manifest, {"files": source.files(5), "content": changes._content(source, info, SPLIT)}


def chunks(folder, *arrays):
    (folder / "block5").mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        np.save(folder / "block5" / f"chunk_{i}.npy", array)
    return folder


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_rows_that_stay_are_no_change_even_if_their_files_were_written_again(tmp_path, write):
    path = write(tmp_path / "data", ROWS)
    manifest, origin = written_down(path)
    assert describe_change(*opened(path), manifest, origin) is None
    for file in tmp_path.rglob("*"):
        os.utime(file, ns=(1, 1))
    said = []
    assert describe_change(*opened(path), manifest, origin, said.append) is None
    assert len(said) == 1
    assert "rewritten since they were prepared; checking whether their rows are the same" in said[0]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_other_rows_of_the_same_size_are_found_by_their_content(tmp_path, write):
    path = write(tmp_path / "data", ROWS)
    manifest, origin = written_down(path)
    other = ROWS.copy()
    other[77, 3] += 1
    shutil.rmtree(tmp_path / "data")
    write(tmp_path / "data", other)
    for file in tmp_path.rglob("*"):  # some file systems give both versions the same time stamp
        os.utime(file, ns=(1, 1))
    changed = describe_change(*opened(path), manifest, origin)
    assert changed is not None
    # Compressed files differ in size.
    assert "was rewritten" in changed or "bytes but had" in changed


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ([ROWS[:40], ROWS[40:80]], "rows is now 80 but was 90"),
        ([ROWS[:40, :3], ROWS[40:, :3]], "input_dim is now 3 but was 4"),
        ([ROWS[:40].astype(np.float64), ROWS[40:].astype(np.float64)], "dtype is now float64 but was float32"),
        ([ROWS[:41], ROWS[41:]], "chunk_0.npy now has 784 bytes but had 768"),
        ([ROWS[:40], ROWS[40:60], ROWS[60:]], "chunk_2.npy is new"),
        ([ROWS[:40], ROWS[40:][::-1]], "chunk_1.npy was rewritten"),
    ],
)
def test_the_line_names_what_changed(tmp_path, arrays, says):
    path = chunks(tmp_path / "data", ROWS[:40], ROWS[40:])
    os.utime(path / "block5" / "chunk_0.npy", ns=(1, 1))
    manifest, origin = written_down(path)
    for i, array in enumerate(arrays):
        np.save(path / "block5" / f"chunk_{i}.npy", array)
    if len(arrays) == 2 and len(arrays[0]) == 40:
        os.utime(path / "block5" / "chunk_0.npy", ns=(1, 1))
    changed = describe_change(*opened(path), manifest, origin)
    assert changed is not None
    assert says in changed
    assert str(path / "block5") in changed


def test_a_file_that_is_gone_and_games_that_move_to_other_rows_are_changes(tmp_path):
    path = chunks(tmp_path / "data", ROWS[:40], ROWS[40:])
    np.save(path / "game_id.npy", np.arange(90) // 10)
    manifest, origin = written_down(path)
    np.save(path / "game_id.npy", np.arange(90) // 9)
    os.utime(path / "game_id.npy", ns=(1, 1))
    manifest["split"] = SPLIT | {"by": "game_id"}
    origin["content"] = "of the rows before"
    assert "game_id.npy was rewritten" in str(describe_change(*opened(path), manifest, origin))
    (path / "game_id.npy").unlink()
    assert "game_id.npy is gone" in str(describe_change(*opened(path), manifest, origin))


def test_of_data_that_an_earlier_version_prepared_only_the_fingerprint_is_known(tmp_path):
    path = chunks(tmp_path / "data", ROWS)
    manifest, _ = written_down(path)
    assert describe_change(*opened(path), manifest, {}) is None
    os.utime(path / "block5" / "chunk_0.npy", ns=(1, 1))
    assert "other names, sizes or modification times than before" in str(describe_change(*opened(path), manifest, {}))


def test_a_range_digest_changes_with_a_row_and_with_its_side():
    held_out = np.zeros(90, dtype=bool)
    before = passes.range_digest(ROWS, held_out)
    assert passes.range_digest(ROWS.copy(), held_out.copy()) == before
    assert passes.range_digest(ROWS[::-1], held_out) != before
    held_out[3] = True
    assert passes.range_digest(ROWS, held_out) != before
