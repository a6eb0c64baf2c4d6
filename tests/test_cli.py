"""Tests of the command line: help loads nothing heavy; wrong input gives one line and exit code 2 before any trial."""

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import msae_sweep
from msae_sweep.cli import main
from msae_sweep.errors import ConfigError
from msae_sweep.go import extract as extraction
from msae_sweep.go.game_choice import GameChoice
from msae_sweep.go.sampling import Sampling

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "run", "resume", "inspect", "extract", "boards", "report", "ui", "export", "encode", "eval", "import", "track-sync",
)  # fmt: skip

SPACE = """
name: small
data: {path: planted, blocks: [5], planted: {rows: 1000, input_dim: 16, dictionary_size: 32, active: 3}}
space: {learning_rate: {loguniform: [1e-3, 3e-2]}, expansion_factor: {choice: [2, 4]}}
training: {k_levels: [2, 4, 8], batch_size: 64, epochs: 1, aux_k: 8}
search: {trials_per_block: 1}
asha: null
"""


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32)


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def npy(folder: Path, *chunks: np.ndarray) -> Path:
    (folder / "block5").mkdir(parents=True)
    for i, chunk in enumerate(chunks):
        np.save(folder / "block5" / f"chunk_{i:04d}.npy", chunk)
    return folder


def refused(monkeypatch, capsys, space: Path, *arguments: str) -> str:
    """Run the command, assert exit code 2, one line of output and no folder of trials, and return the line."""
    storage = space.parent / "sweeps"
    command = ["msae-sweep", "run", str(space), "--storage", str(storage), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(space.parent)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert not (storage / "small" / "trials").exists()
    return lines[0]


WRONG_SETTINGS = {
    "misspelt key": (["--set", "training.learning_rat=1"], "training.learning_rat: no such key; did you mean"),
    "missing folder": (["--data", "nowhere"], "nowhere does not exist"),
    "no such block": (["--data", "npy", "--set", "data.blocks=[7]"], "no block 7 in .*npy; found 5"),
    "k above hidden_dim": (["--set", "training.k_levels=[64]"], "64 exceeds hidden_dim 32 .*lower k or raise"),
    "unsorted k_levels": (["--set", "training.k_levels=[8, 4]"], r"must ascend without repeats; write \[4, 8\]"),
    "repeated k_levels": (["--set", "training.k_levels=[4, 4]"], r"must ascend without repeats; write \[4\]"),
    "low above high": (["--set", "space.learning_rate={uniform: [2, 1]}"], "low 2 must be below high 1"),
    "fewer rows than a batch": (["--set", "training.batch_size=5000"], "fewer than training.batch_size 5000"),
    "unwritable storage": (["--storage", "space.yaml"], "storage: .* cannot be (created|written)"),
    "a password in a URI": (["--storage", "s3://me:hidden@bucket/sweeps"], "s3://bucket/sweeps.*: a URI must not hold"),
    "folder as tracking URI": (["--tracking-uri", "mlruns"], "write sqlite:///mlflow.db"),
    "no such store": (
        ["--tracking-uri", "foo://bar"],
        "tracking.uri: foo://bar: MLflow does not support the scheme foo",
    ),
    "no such device": (["--set", "training.device=mps"], "training.device: mps is not available"),
    "no such file": (["--set", "data.path=/nowhere/at/all"], "/nowhere/at/all does not exist"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_a_wrong_setting_is_one_line_and_exit_code_2(ray_session, monkeypatch, capsys, space, rows, case):
    npy(space.parent / "npy", rows)
    arguments, says = WRONG_SETTINGS[case]
    assert re.search(says, refused(monkeypatch, capsys, space, *arguments))


def truncated(folder: Path, rows: np.ndarray) -> Path:
    npy(folder, rows)
    file = folder / "block5" / "chunk_0000.npy"
    file.write_bytes(file.read_bytes()[:999])
    return folder


def truncated_h5(folder: Path, rows: np.ndarray) -> Path:
    folder.mkdir()
    with h5py.File(folder / "activations.h5", "w") as file:
        file["block5"] = rows
    (folder / "activations.h5").write_bytes((folder / "activations.h5").read_bytes()[:-999])
    return folder


def with_nan(folder: Path, rows: np.ndarray) -> Path:
    rows[41:44, 3] = np.nan
    return npy(folder, rows)


def object_array(folder: Path, rows: np.ndarray) -> Path:
    (folder / "block5").mkdir(parents=True)
    np.save(folder / "block5" / "chunk_0000.npy", np.array([{}]), allow_pickle=True)
    return folder


def one_game(folder: Path, rows: np.ndarray) -> Path:
    np.save(npy(folder, rows) / "game_id.npy", np.zeros(len(rows), dtype=int))
    return folder


WRONG_DATA = {
    "chunks of different width": (lambda f, r: npy(f, r, r[:, :4]), "chunk_0001.npy: width 4"),
    "truncated npy": (truncated, "chunk_0000.npy: cannot be read: truncated"),
    "truncated h5": (truncated_h5, "cannot be read as HDF5"),
    "1-D array": (lambda f, r: npy(f, r[:, 0]), "1-D array"),
    "object array": (object_array, "object array"),
    "NaN rows": (with_nan, r"chunk_0000.npy rows 41-43: NaN or Inf \(3 rows in all\).*drop_nonfinite"),
    "a side without rows": (one_game, "leaves no (training|validation) rows"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_is_one_line_and_exit_code_2(ray_session, monkeypatch, capsys, space, rows, case):
    write, says = WRONG_DATA[case]
    data = write(space.parent / "data", rows)
    assert re.search(says, refused(monkeypatch, capsys, space, "--data", str(data)))


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_answers_without_torch_or_ray(command):
    heavy = "sorted({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules))"
    code = f"""
import sys
sys.argv = ['msae-sweep', *{command}, '--help']
from msae_sweep.cli import main
try:
    main()
finally:
    print('loaded', {heavy})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert done.stdout.strip().endswith("loaded []")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runn"], "No such command 'runn'"),
        (["run"], "Missing argument 'SPACE'"),
        (["encode", "m.pt"], "Missing option '--out'"),
        (["encode", "m.pt", "--out", "c", "--format", "dense"], "Invalid value for '--format'"),
        (["extract", "--max-games", "0"], "Invalid value for '--max-games'"),
        (["inspect", "--all", "x"], "No such option: --all"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, says):
    done = subprocess.run([sys.executable, "-m", "msae_sweep", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"msae-sweep: {says}")
    assert done.stderr.endswith(" --help\n")


def test_the_version_is_printed_without_anything_else():
    done = subprocess.run([sys.executable, "-m", "msae_sweep", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"msae-sweep {msae_sweep.__version__}\n")


def test_shells_complete_commands():
    environment = {"_MSAE_SWEEP_COMPLETE": "complete_bash", "COMP_WORDS": "msae-sweep ins", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['msae-sweep']; from msae_sweep.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.stdout.split() == ["inspect"]


def test_a_sync_says_once_why_nothing_is_sent(capsys):
    from msae_sweep.cli import _Waiting
    from msae_sweep.track.sender import TrackingStatus

    waiting = _Waiting()
    for error in ("no answer from http://h", "no answer from http://h", ""):
        waiting.heard(TrackingStatus(0, 3, 0, error))
    assert capsys.readouterr().out == "waiting for MLflow: no answer from http://h; trying again\n"


def test_options_replace_what_the_file_says(monkeypatch, space):
    from msae_sweep import cli

    seen = []
    monkeypatch.setattr(cli, "_sweep", lambda config, resume: seen.append((config, resume)))
    options = [
        "--data",
        "123",
        "--storage",
        "somewhere",
        "--name",
        "other",
        "--tracking-uri",
        "http://h:5000",
        "--resume",
    ]
    monkeypatch.setattr(sys, "argv", ["msae-sweep", "run", str(space), *options, "--set", "training.epochs=9"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    ((config, resume),) = seen
    assert (config.data.path, config.storage, config.name) == ("123", "somewhere", "other")
    assert (config.tracking.uri, config.training.epochs, resume) == ("http://h:5000", 9, True)


def test_inspect_prints_a_table(monkeypatch, capsys, tmp_path, rows):
    monkeypatch.setattr(sys, "argv", ["msae-sweep", "inspect", str(npy(tmp_path / "data", rows))])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert "1,000" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["resume", "track-sync"])
def test_a_folder_without_a_sweep_is_one_line(monkeypatch, capsys, tmp_path, command):
    monkeypatch.setattr(sys, "argv", ["msae-sweep", command, str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "no sweep.yaml there" in capsys.readouterr().err


def test_python_m_runs_the_same_command_line():
    done = subprocess.run([sys.executable, "-m", "msae_sweep", "run", "missing.yaml"], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200"})  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "msae-sweep: missing.yaml: no such search-space file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "5;20"], "--blocks: 5;20 must be numbers separated by commas"),
        (["--points", "some"], "--points: some must be mean, all, or 1 to 361"),
        (["--format", "csv"], "--format: csv must be among npy, h5, parquet"),
        ([], "b: no such file or folder"),
        (["--positions", "p"], "--positions: cannot be given together with --games"),
        (["--max-games", "5", "--first-games", "5"], "--first-games: cannot be given together with --max-games"),
        (["--consecutive"], "--consecutive: needs --positions-per-game"),
    ],
)
def test_an_extraction_that_cannot_be_is_one_line_before_anything_starts(
    options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["msae-sweep", "extract", "--weights", "a", "--games", "b", "--out", "c", *options]
    )
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"msae-sweep: {message}")
    assert len(said.splitlines()) == 1


EXTRACT = ["msae-sweep", "extract", "--weights", "w", "--out", "o"]


def settings_of(options: list[str], monkeypatch) -> extraction.ExtractionSettings:
    """Return the settings with which the command line calls the extraction."""
    seen = []

    def stop(settings, *_):
        seen.append(settings)
        raise ConfigError("stopped")

    monkeypatch.setattr(extraction, "extract", stop)
    monkeypatch.setattr(sys, "argv", [*EXTRACT, *options])
    with pytest.raises(SystemExit):
        main()
    return seen[0]


def test_the_notebooks_recipe_is_the_original_series_data_and_gives_way_to_options(monkeypatch):
    recipe = ["--games", "g", "--recipe", "notebook"]
    found = settings_of(recipe, monkeypatch)
    assert found.sampling == Sampling(100, 10, "mean", 0, max_move=150, consecutive=True)
    assert (found.choice, found.dtype, found.formats) == (GameChoice(4999), "float32", ("npy", "h5"))
    written_out = [
        "--games", "g", "--max-games", "4999", "--positions-per-game", "100", "--consecutive", "--min-move", "10",
        "--max-move", "150", "--dtype", "float32", "--format", "npy,h5",
    ]  # fmt: skip
    assert settings_of(written_out, monkeypatch) == found
    other = settings_of([*recipe, "--max-move", "109", "--dtype", "float16", "--seed", "5"], monkeypatch)
    assert other == found._replace(dtype="float16", sampling=found.sampling._replace(max_move=109, seed=5))
    first = settings_of(["--first-games", "7", *recipe], monkeypatch)
    assert first.choice == GameChoice(None, 7)
    both = settings_of([*recipe, "--first-games", "7", "--max-games", "9"], monkeypatch)
    assert both.choice == GameChoice(9, 7), "which is then refused"


def test_the_recipe_for_a_file_of_positions_chooses_none_of_them(monkeypatch):
    found = settings_of(["--positions", "p.hdf5", "--recipe", "notebook"], monkeypatch)
    assert (found.games, found.positions) == (None, Path("p.hdf5"))
    assert (found.sampling, found.choice) == (Sampling(None, 0, "mean", 0), GameChoice())
    assert (found.dtype, found.formats) == ("float32", ("npy", "h5"))
    asked = settings_of(["--positions", "p.hdf5", "--recipe", "notebook", "--min-move", "3"], monkeypatch)
    assert asked.sampling.min_move == 3, "which is then refused"


def test_the_earlier_name_of_min_move_is_understood(monkeypatch):
    assert settings_of(["--games", "g", "--skip-first", "4"], monkeypatch).sampling.min_move == 4


@pytest.mark.parametrize(
    "document", ["README.md", ".github/USAGE.md", "search_spaces/README.md", "tests/bench/README.md"]
)
def test_the_readme_names_only_commands_and_files_that_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^#)]+)", text):
        assert ((ROOT / document).parent / name).exists(), name
    for name in re.findall(r"search_spaces/\w+\.yaml|tests/\w+/\w+\.py|\.github/(?:images/)?\w+\.\w+", text):
        assert (ROOT / name).exists(), name
    for command in re.findall(r"msae-sweep (\w[\w-]*)", text):
        assert command in COMMANDS, command


def test_what_still_runs_when_a_command_has_failed_starts_no_ray_of_its_own():
    code = """
import sys
from msae_sweep.cli import main
sys.argv = ['msae-sweep', 'run', 'missing.yaml']
try:
    main()
finally:
    import ray
    ray.put(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Ray has not been started yet" in done.stderr
