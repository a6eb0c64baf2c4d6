"""Tests of the plan of a sweep, which shows what `run` would do, without Ray and without leaving a trace."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from planted_sweep import SPACE
from rich.console import Console

from msae_sweep.cli import main
from msae_sweep.config import SweepConfig, parse
from msae_sweep.errors import ConfigError, DataError, DeviceError, MsaeSweepError, SweepError
from msae_sweep.sweep import dry_run, run
from msae_sweep.sweep.space import plan
from msae_sweep.sweep_folder.folder import SweepFolder


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    """Simulate a machine where no Ray runs, and fail if one is started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **named: pytest.fail("Ray was started"))


def config(tmp_path: Path, *overrides: str) -> SweepConfig:
    return parse(SPACE, [f"storage={tmp_path}/sweeps", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", *overrides])


def shown(tmp_path: Path, *overrides: str, resume: bool = False) -> str:
    out = io.StringIO()
    dry_run.print_plan(config(tmp_path, *overrides), resume=resume, console=Console(file=out, width=200))
    return out.getvalue()


def test_it_shows_blocks_trials_models_and_destinations_and_leaves_nothing(tmp_path):
    text = shown(tmp_path)
    assert "small: 2 x 4 trials; nothing is started" in text
    for record in plan(config(tmp_path), [5]):
        row = next(line for line in text.splitlines() if line.startswith(f"│   {record.index:03d} "))
        hidden_dim = 16 * record.params["expansion_factor"]
        assert f"{record.params['learning_rate']:.4g}" in row
        assert record.params["weighting"] in row
        assert f" {hidden_dim} " in row
        assert f"{2 * 16 * hidden_dim + 16:,}" in row
    assert text.count("to be prepared") == 2
    assert "3,000" in text
    assert f"results: {tmp_path}/sweeps/small" in text
    assert f"sqlite:///{tmp_path}/mlflow.db, experiment msae-sweep" in text
    assert "planted-block{B}@champion" in text
    assert list(tmp_path.iterdir()) == []


def test_long_plans_are_cut_and_optunas_is_what_it_chooses_from(tmp_path):
    assert "the first 12 of 40" in shown(tmp_path, "search.trials_per_block=40")
    text = shown(tmp_path, "search.algorithm=optuna", "space.k_levels={choice: [[2], [2, 4]]}")
    assert "proposed by optuna while the sweep runs" in text
    assert "choice: [uniform, reverse]" in text
    assert "choice: [[2], [2, 4]]" in text
    assert "32 to 64" in text


def test_of_a_sweep_that_exists_it_counts_what_is_left(tmp_path):
    resolved = run.check_before_ray(config(tmp_path), resume=False)[0]
    folder = SweepFolder.locate(resolved.storage, resolved.name)
    folder.create()
    folder.write_text(folder.config_file, resolved.to_yaml())
    records = plan(resolved, [5, 20])
    for record, status in zip(records[:4], ("completed", "stopped_early", "failed", "running"), strict=True):
        record.status = status
        folder.save_record(record)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert "resume: 2 trials are finished, 2 would be resumed, 4 would begin" in shown(tmp_path, resume=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    with pytest.raises(SweepError, match="continue it with --resume"):
        shown(tmp_path)


REFUSED: dict[str, tuple[list[str], type[MsaeSweepError], str]] = {
    "a block that is not there": (["data.path=/nowhere"], DataError, "/nowhere does not exist"),
    "a k above hidden_dim": (["training.k_levels=[64]"], ConfigError, "exceeds hidden_dim 32"),
    "too many CPUs": (
        ["resources.cpu=9999"],
        DeviceError,
        r"resources\.cpu: 9999 per trial, but no node has more than",
    ),
    "too many GPUs": (["resources.gpu=99"], DeviceError, r"resources\.gpu: 99 per trial, but no node has more than"),
    "a model for no device": (
        ["space.expansion_factor={choice: [2, 1e8]}"],
        ConfigError,
        r"1,600,000,000 latents of width 16 \(block 5\) are 51,200,000,016 parameters.*762\.9 GiB.*lower expansion",
    ),
    "rows for no disk": (
        ["data.planted.rows=1000000000000000"],
        DataError,
        r"2,000,000,000,000,000 rows of 2 blocks take 113\.7 PiB as prepared shards, but .* lower data\.planted\.rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_run_would_refuse_it_refuses_in_the_same_line(tmp_path, case):
    overrides, error, says = REFUSED[case]
    with pytest.raises(error, match=says) as caught:
        shown(tmp_path, *overrides)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "sweeps").write_text("a file")
    with pytest.raises(SweepError, match=r"storage: .* cannot be written: not a folder"):
        shown(tmp_path)


def test_the_command_ends_with_0_and_leaves_nothing(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    command = [sys.executable, "-m", "msae_sweep", "run", "space.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing is started (--dry-run)" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_resume_has_a_dry_run_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(dry_run, "print_plan", lambda config, resume, console: seen.append((config.name, resume)))
    folder = SweepFolder.locate(str(tmp_path / "sweeps"), "small")
    folder.create()
    folder.write_text(folder.config_file, config(tmp_path).to_yaml())
    monkeypatch.setattr(sys, "argv", ["msae-sweep", "resume", str(folder), "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert seen == [("small", True)]
