"""Tests that a sweep becomes the archive of the original notebook, whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from model_files import example_model_file, sweep

from msae_sweep.cli import main
from msae_sweep.errors import ConfigError
from msae_sweep.models import notebook_archive
from msae_sweep.models.find import find
from msae_sweep.models.notebook_archive import export_archive

FORMAT_1 = Path(__file__).parents[1] / "sweep_folder" / "format_1"
R2 = {"r2_k2": 0.5, "r2_k4": 0.75, "r2_k8": 0.9}
NAMES = [
    "models/msae_block5.pt", "models/msae_block20.pt", "figures/msae_training.png", "results/reconstruction.json",
    "results/hierarchy.json",
]  # fmt: skip


def finished(folder: Path) -> Path:
    """Write what a finished sweep leaves, with a block of which no trial has ended well."""
    sweep(folder)
    (folder / "sweep.yaml").write_text("name: s\ndata: {path: planted}\n")
    blocks = {
        f"block{b}": {"best": f"block{b}-000", "trials": [{"trial_id": f"block{b}-000", "metrics": R2}]}
        for b in (5, 20)
    }
    blocks["block35"] = {"best": None, "trials": []}
    (folder / "summary.json").write_text(json.dumps({"blocks": blocks}))
    (folder / "figures").mkdir()
    (folder / "figures" / "msae_training.png").write_bytes(b"\x89PNG")
    return folder


def test_the_archive_holds_models_as_they_are_with_results_and_figure(tmp_path):
    folder = finished(tmp_path / "sweep")
    written = export_archive(folder, tmp_path / "deeper" / "msae_models.zip")
    assert (written.path, written.names, written.without) == (tmp_path / "deeper" / "msae_models.zip", NAMES, [])
    with zipfile.ZipFile(written.path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == NAMES
        for entry in archive.infolist():
            if entry.filename.startswith(("models/", "figures/")):
                assert archive.read(entry) == (folder / entry.filename).read_bytes()
                assert entry.compress_type == zipfile.ZIP_STORED
        assert json.loads(archive.read("results/reconstruction.json")) == {
            name: {"k2": 0.5, "k4": 0.75, "k8": 0.9} for name in ("block5", "block20")
        }


def test_hierarchy_json_is_in_the_series_layout_without_what_was_not_measured(tmp_path):
    written = export_archive(finished(tmp_path / "sweep"), tmp_path / "m.zip")
    with zipfile.ZipFile(written.path) as archive:
        found = json.loads(archive.read("results/hierarchy.json"))
    assert {key: set(blocks) for key, blocks in found.items()} == {
        key: {"block5", "block20"} for key in ("nestedness", "reconstruction_gap", "reconstruction_r2")
    }
    assert found["nestedness"]["block5"] == {"k2_in_k4": 1.0, "k4_in_k8": 1.0}
    assert found["reconstruction_gap"]["block5"] == pytest.approx(0.4)
    assert found["reconstruction_r2"]["block20"] == {"k2": 0.5, "k4": 0.75, "k8": 0.9}


def test_what_is_unpacked_is_a_folder_of_models_that_everybody_may_read(tmp_path):
    written = export_archive(finished(tmp_path / "sweep"), tmp_path / "m.zip")
    unpack = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])"
    subprocess.run([sys.executable, "-c", unpack, str(written.path), str(tmp_path / "outputs")], check=True)
    found = find(tmp_path / "outputs", 20)
    assert found.file.model.config == example_model_file(20).model.config
    with zipfile.ZipFile(written.path) as archive:
        assert {entry.external_attr >> 16 & 0o777 for entry in archive.infolist()} == {0o644}


def test_a_sweep_of_an_earlier_version_is_archived_and_a_missing_figure_is_said(tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(FORMAT_1 / "sweep", tmp_path / "sweep"))
    shutil.copy(FORMAT_1 / "summary.json", folder / "summary.json")
    (folder / "models").mkdir()
    shutil.copy(folder / "trials" / "block5-000" / "model.pt", folder / "models" / "msae_block5.pt")
    assert not command_line(monkeypatch, "export", folder, "--format", "notebook", "--out", tmp_path / "m.zip")
    assert capsys.readouterr().out == (
        f"{tmp_path}/m.zip: models/msae_block5.pt, results/reconstruction.json, results/hierarchy.json; "
        "without figures/msae_training.png, which the sweep has not written\n"
    )
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        assert set(json.loads(archive.read("results/reconstruction.json"))["block5"]) == {"k2", "k4"}


def test_a_full_disk_leaves_nothing_and_is_one_line(tmp_path, monkeypatch):
    folder = finished(tmp_path / "sweep")

    def full(source, target, size):
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(notebook_archive.shutil, "copyfileobj", full)
    with pytest.raises(ConfigError, match=r"m\.zip cannot be written: No space left on device$"):
        export_archive(folder, tmp_path / "m.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


def command_line(monkeypatch, *arguments: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["msae-sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code  # type: ignore[return-value]


WRONG = {
    "no sweep": (["plain"], "plain: is not a sweep folder; a .zip holds a whole sweep, a .pt one model"),
    "a model file": (["sweep/models/msae_block5.pt"], "msae_block5.pt: is not a sweep folder"),
    "a name in MLflow": (["champion:5"], "champion:5: is not a sweep folder"),
    "nowhere": (["nowhere"], "nowhere: is not a sweep folder"),
    "a sweep without models": (["begun"], "begun: has no models yet; a sweep writes them when it ends"),
    "a model that is gone": (["robbed"], "msae_block20.pt is missing; `msae-sweep resume robbed` writes it again"),
    "a damaged summary": (["damaged"], "summary.json is damaged"),
    "one block": (["sweep", "--block", "5"], "--block: a .zip holds every block of a sweep"),
    "one k": (["sweep", "--k", "4"], "--k: notebook keeps every k"),
    "something there": (["sweep", "--out", "there.zip"], "--out: there.zip exists; give another path"),
    "below a file": (["sweep", "--out", "there.zip/m.zip"], "cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_archived_is_one_line_with_exit_code_2_and_leaves_nothing(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    for name in ("sweep", "begun", "robbed", "damaged"):
        finished(tmp_path / name)
    sweep(tmp_path / "plain")
    (tmp_path / "begun" / "summary.json").unlink()
    (tmp_path / "robbed" / "models" / "msae_block20.pt").unlink()
    (tmp_path / "damaged" / "summary.json").write_text("{")
    (tmp_path / "there.zip").write_text("")
    before = sorted(tmp_path.rglob("*"))
    arguments, says = WRONG[case]
    out = [] if "--out" in arguments else ["--out", "m.zip"]
    assert command_line(monkeypatch, "export", *arguments, "--format", "notebook", *out) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1, error
    assert sorted(tmp_path.rglob("*")) == before
