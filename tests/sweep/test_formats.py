"""Tests of folders that other versions wrote: older ones are read and resumed, newer ones are refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
from planted_sweep import database, results, run_quietly

import msae_sweep
from msae_sweep.errors import FormatError
from msae_sweep.report import sweep_data
from msae_sweep.sweep.resume import load_config
from msae_sweep.sweep_folder.folder import SweepFolder

FORMAT_1 = Path(__file__).parents[1] / "sweep_folder" / "format_1"
"""Folder with the files of a sweep that version 0.1.0 at commit 2ff3a9c wrote.

`sweep/` is the sweep's folder. Its driver was killed when two of four trials had ended and a third one had saved its
state. `summary.json` comes from the same sweep, undisturbed.
"""


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(FORMAT_1 / "sweep", tmp_path / "sweeps" / "old"))


def test_a_sweep_that_an_earlier_commit_wrote_is_resumed_and_ends_as_its_undisturbed_twin(old, ray_session, tmp_path):
    assert "format" not in json.loads((old / "identity.json").read_text())
    before = {file: file.read_bytes() for file in old.glob("trials/block5-00[01]/*")}
    assert len(before) == 4
    resumed = results(run_quietly(load_config(old, database(tmp_path)), tmp_path, resume=True).summary)
    expected = results(json.loads((FORMAT_1 / "summary.json").read_text()))
    for summary in (resumed, expected):
        for trial in summary["blocks"]["block5"]["trials"]:
            # Processors multiply matrices in different orders, so weights trained elsewhere differ in the last bits.
            trial["metrics"] = {key: pytest.approx(value, abs=1e-3) for key, value in trial["metrics"].items()}
        for criterion in summary["blocks"]["block5"]["success_criteria"].values():
            criterion["value"] = round(criterion["value"], 2)
    assert resumed["blocks"]["block5"]["trials"] == expected["blocks"]["block5"]["trials"]
    assert resumed["blocks"]["block5"]["best"] == expected["blocks"]["block5"]["best"]
    assert {file: file.read_bytes() for file in before} == before, "a finished trial ran again"
    assert json.loads((old / "identity.json").read_text())["format"] == 1


def test_a_sweep_that_an_earlier_commit_wrote_is_read(old):
    read = sweep_data.read(old)
    assert [record.status for record in read.records] == ["completed", "completed", "running"]


def test_a_sweep_folder_of_a_newer_version_is_refused_in_one_line_that_names_both_versions(old):
    (old / "identity.json").write_text(json.dumps({"format": 2, "msae_sweep": "7.8"}))
    with pytest.raises(FormatError) as refused:
        SweepFolder.at(old)
    assert str(refused.value) == (
        f"{old}/identity.json: format 2 was written by msae_sweep 7.8, but this is msae_sweep "
        f"{msae_sweep.__version__}, which reads formats up to 1; install a newer msae_sweep"
    )


def test_a_damaged_identity_counts_as_a_folder_of_this_version(old):
    (old / "identity.json").write_text("{")
    assert SweepFolder.at(old).exists()
