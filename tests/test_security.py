"""Tests that untrusted files, settings and paths run no code, and that nearly all attempts are refused in one line."""

import pickle
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from msae_sweep.cli import main

SPACE = """
name: small
data: {path: planted, blocks: [5], planted: {rows: 1000, input_dim: 16, dictionary_size: 32, active: 3}}
training: {k_levels: [2, 4, 8], batch_size: 64, epochs: 1, aux_k: 8}
search: {trials_per_block: 1}
asha: null
"""
ROWS = np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)


class Touch:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """File in the working folder that each of these attempts would create. It must not exist at the end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path / "trap"


def refused(monkeypatch, capsys, *command: str) -> str:
    """Run a command, assert exit code 2 and one line of output, and return the line."""
    monkeypatch.setattr(sys, "argv", ["msae-sweep", *command])
    with pytest.raises(SystemExit) as caught:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2, lines
    assert len(lines) == 1, lines
    return lines[0]


TAGS = [
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [trap]]",
    "!!python/object/apply:os.system ['touch trap']",
    "!!python/object/new:subprocess.check_output [[touch, trap]]",
    "!!python/name:os.system",
    "!!python/module:this",
]


def test_the_traps_work(trap):
    """Check that the attempts which are refused below do run code where nothing refuses them."""
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists()
    trap.unlink()
    yaml.load(TAGS[1], Loader=yaml.UnsafeLoader)
    assert trap.exists()


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_cannot_run_code(trap, monkeypatch, capsys, tag):
    Path("evil.yaml").write_text(SPACE.replace("name: small", f"name: {tag}"))
    assert "python" in refused(monkeypatch, capsys, "run", "evil.yaml")
    assert "python" in refused(monkeypatch, capsys, "run", "space.yaml", "--set", f"training.epochs={tag}")
    sweep = Path("sweeps/small")
    (sweep / "trials").mkdir(parents=True)
    (sweep / "sweep.yaml").write_text(Path("evil.yaml").read_text())
    for command in ("resume", "report", "track-sync"):
        assert "python" in refused(monkeypatch, capsys, command, str(sweep))
    assert not trap.exists()


@pytest.mark.parametrize("path", ["$(touch trap)", "`touch trap`", "x; touch trap", "x | touch trap", "x\ntouch trap"])
def test_a_path_is_not_a_command(ray_session, trap, monkeypatch, capsys, path):
    assert "does not exist" in refused(monkeypatch, capsys, "run", "space.yaml", "--data", path)
    for command in ("inspect", "resume", "report", "import", "track-sync"):
        refused(monkeypatch, capsys, command, path)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../small", "/tmp/small", "a/b", "..", "$(touch trap)", "{{7*7}}", "<b>"])
def test_a_name_stays_within_its_storage(trap, monkeypatch, capsys, name):
    assert "name" in refused(monkeypatch, capsys, "run", "space.yaml", "--name", name)
    assert sorted(p.name for p in trap.parent.iterdir()) == ["space.yaml"]


def objects(trap: Path) -> np.ndarray:
    return np.array([Touch(trap)] * len(ROWS), dtype=object)


def as_chunk(folder: Path, trap: Path) -> None:
    np.save(folder / "block5" / "chunk_0001.npy", objects(trap), allow_pickle=True)


def as_games(folder: Path, trap: Path) -> None:
    np.save(folder / "game_id.npy", objects(trap), allow_pickle=True)


def as_a_pickle_with_a_chunks_name(folder: Path, trap: Path) -> None:
    (folder / "block5" / "chunk_0001.npy").write_bytes(pickle.dumps(Touch(trap)))


@pytest.mark.parametrize("plant", [as_chunk, as_games, as_a_pickle_with_a_chunks_name])
def test_arrays_are_not_unpickled(ray_session, trap, monkeypatch, capsys, plant):
    (folder := trap.parent / "data" / "block5").mkdir(parents=True)
    np.save(folder / "chunk_0000.npy", ROWS)
    plant(folder.parent, trap)
    assert str(folder.parent) in refused(monkeypatch, capsys, "run", "space.yaml", "--data", "data")
    refused(monkeypatch, capsys, "inspect", "data")
    assert not trap.exists()


def test_what_parquet_and_hdf5_say_of_types_is_not_unpickled(ray_session, trap, monkeypatch, capsys):
    """A column that claims to be a pickled Python type is read as its storage type. Pickled objects are refused."""
    evil = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Touch(trap))}
    Path("data").mkdir()
    field = pa.field("block5", pa.list_(pa.float32(), 16), metadata=evil)
    column = pa.array(ROWS.tolist(), pa.list_(pa.float32(), 16))
    pq.write_table(pa.table([column], schema=pa.schema([field])), "data/a.parquet")
    monkeypatch.setattr(sys, "argv", ["msae-sweep", "inspect", "data"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (None, 0)
    assert "1,000" in capsys.readouterr().out
    Path("hdf5").mkdir()
    with h5py.File("hdf5/activations.h5", "w") as file:
        file["block5"] = np.void(pickle.dumps(Touch(trap)))
    refused(monkeypatch, capsys, "run", "space.yaml", "--data", "hdf5")
    assert not trap.exists()


def test_model_files_are_not_unpickled(trap, monkeypatch, capsys):
    torch.save({"model_state_dict": Touch(trap)}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Touch(trap)))
    np.save("rows.npy", ROWS)
    as_notebook = ("--format", "notebook", "--out", "out.pt")
    for file in ("evil.pt", "raw.pt"):
        for command in (
            ("eval", file, "--data", "rows.npy"),
            ("export", file, *as_notebook),
            ("import", file),
        ):
            assert file in refused(monkeypatch, capsys, *command)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["sweep.yaml", "identity.json", "trials/block5-000/trial.json"])
def test_what_a_sweep_folder_of_others_holds_is_not_unpickled(ray_session, trap, monkeypatch, capsys, name):
    sweep = Path("sweeps/small")
    (sweep / name).parent.mkdir(parents=True)
    (sweep / "sweep.yaml").write_text(SPACE)
    (sweep / name).write_bytes(pickle.dumps(Touch(trap)))
    # A resumed sweep rewrites the last two files instead of reading them, so for these the report is requested.
    assert name in refused(monkeypatch, capsys, "resume" if name == "sweep.yaml" else "report", str(sweep))
    assert not trap.exists()


def advising(text: str) -> bool:
    """Return True if code or prose switches off what keeps torch and numpy from running code that a file holds."""
    return bool(re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True", text))


def test_neither_the_package_nor_its_documents_advise_to_unpickle():
    root = Path(__file__).parents[1]
    folders = ("msae_sweep", ".github", "cluster", "search_spaces")
    files = [root / "README.md", *(file for folder in folders for file in (root / folder).rglob("*.*"))]
    texts = [file for file in files if file.suffix in (".py", ".md", ".j2", ".yaml", ".txt")]
    assert len(texts) > 50
    assert [file.name for file in texts if advising(file.read_text(encoding="utf-8"))] == []
    assert advising('torch.load("{path}", weights_only=False)')
