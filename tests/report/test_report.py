"""Tests of the report: it agrees with the sweep folder, and its page needs no other files."""

import csv
import html.parser
import io
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from report_sweeps import INPUT_DIM, N_VAL, add_rows_and_models, make, manifest, settings

from msae_sweep import report
from msae_sweep.cli import main
from msae_sweep.config import load
from msae_sweep.errors import SweepError
from msae_sweep.paths import StoragePath
from msae_sweep.report import score_figures
from msae_sweep.report.curves import curves
from msae_sweep.report.recommendation import baselines, recommendations
from msae_sweep.report.score_figures import pareto_front
from msae_sweep.report.sweep_data import read, read_all
from msae_sweep.sae import model_file
from msae_sweep.sae.metrics import total_sum_of_squares
from msae_sweep.sweep.space import plan

ASHA = "{grace_epochs: 1, reduction_factor: 2}"


def rising(params: dict, epoch: int) -> float:
    return 0.5 + 0.04 * np.log(params["learning_rate"] / 1e-4) - 0.3 / epoch


def page_of(written: report.ReportFiles) -> Path:
    return Path(written.where) / "report.html"


@pytest.fixture
def sweep(tmp_path: Path):
    return make(tmp_path / "sweeps" / "made-up", settings(8), rising, blocks=(5, 20), asha=ASHA)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Sweep and its report, for tests that do not change them."""
    folder = tmp_path_factory.mktemp("reported") / "made-up"
    sweep = make(folder, settings(8), rising, blocks=(5, 20), asha=ASHA)
    return sweep, report.write([sweep.path])


class Outside(html.parser.HTMLParser):
    """Parser that collects what a page would load, and every id in it."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {key}={value}")
            if key == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page: Path) -> Outside:
    parser = Outside()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_the_page_loads_nothing_and_its_ids_are_unique_also_with_several_sweeps(reported, sweep, tmp_path):
    other = make(tmp_path / "elsewhere" / "made-up", settings(8, seed=1), rising, blocks=(5, 20), asha=ASHA)
    for written in (reported[1], report.write([sweep.path, other.path], tmp_path / "both")):
        page = parsed(page_of(written))
        assert page.open == []
        assert page.loads == []
        assert len(page.ids) == len(set(page.ids))
        text = page_of(written).read_text(encoding="utf-8")
        # Everything that a figure refers to must be in the page: nothing is drawn if a clip or marker is missing.
        assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= set(page.ids)


def test_every_figure_is_in_the_page_and_lies_beside_it_as_svg_and_png(reported):
    _, written = reported
    names = {path.stem for path in (Path(written.where) / "figures").iterdir()}
    kinds = {re.sub(r"_block\d+$", "", name) for name in names}
    assert {"r2_by_k", "learning_rate", "size", "dead", "weighting", "early_stopping", "training_val_loss"} <= kinds
    text = page_of(written).read_text(encoding="utf-8")
    for name in names:
        assert f'"{name}-figure_1"' in text
        figure = Path(written.where) / "figures" / name
        assert ElementTree.parse(figure.with_suffix(".svg")).getroot().tag.endswith("svg")
        assert figure.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert all(
        f"figures/{name}.png" in (Path(written.where) / "report.md").read_text(encoding="utf-8") for name in names
    )


def test_the_first_thing_said_is_the_best_trial_with_its_numbers(reported):
    sweep, written = reported
    best = max((r for r in sweep.load_records().values() if r.block == 20), key=lambda r: r.best["objective"])
    text = page_of(written).read_text(encoding="utf-8")
    first_screen = text[: text.index("<nav")]
    assert f"Block 20: use {best.trial_id}" in first_screen
    assert f"explains {best.best['r2_k8']:.1%} of the variance with 8 latents" in first_screen
    assert f"{best.params['learning_rate']:.2e}" in first_screen
    assert f"{best.best['objective']:.4f}, is the highest of 8 trials" in first_screen


def test_the_csv_has_every_trial_with_the_metrics_of_its_best_epoch(reported):
    sweep, written = reported
    rows = list(csv.DictReader(io.StringIO((Path(written.where) / "trials.csv").read_text(encoding="utf-8"))))
    records = sweep.load_records()
    assert {row["trial_id"] for row in rows} == set(records)
    for row in rows:
        record = records[row["trial_id"]]
        assert float(row["r2_k8"]) == record.best["r2_k8"]
        assert float(row["learning_rate"]) == record.params["learning_rate"]
        assert (row["status"], int(row["epochs"])) == (record.status, record.epochs)
    of_block = [float(row["objective"]) for row in rows if row["block"] == "5"]
    assert of_block == sorted(of_block, reverse=True)


def test_text_of_others_is_escaped(reported):
    text = page_of(reported[1]).read_text(encoding="utf-8")
    assert "--name &lt;b&gt;" in text  # `make` writes this into the command
    assert "--name <b>" not in text


def test_a_curve_is_the_r2_of_the_validation_rows_at_every_k(sweep):
    rows = add_rows_and_models(sweep)
    view = read(sweep.path)
    measured = curves(view)
    assert not measured.missing
    group = view.groups[0]
    curve = measured.by_trial[group.best.trial_id]
    assert curve.ks == tuple(range(1, 9))
    x = torch.from_numpy(rows[group.block])
    model = model_file.load(sweep.model_file(group.best.trial_id)).model
    code = torch.relu((x - model.pre_bias) @ model.W_enc.T)
    for k, r2 in zip(curve.ks, curve.r2, strict=True):
        values, indices = code.topk(k, dim=1)
        x_hat = torch.zeros_like(code).scatter(1, indices, values) @ model.W_dec + model.pre_bias
        expected = 1 - (x - x_hat).square().sum().item() / total_sum_of_squares([x])
        assert r2 == pytest.approx(expected, abs=1e-5)
    assert sweep.read_json("results/r2_by_k.json")[group.best.trial_id]["n_rows"] == N_VAL


def test_curves_are_kept_and_outlive_models_and_rows(sweep):
    add_rows_and_models(sweep)
    before = curves(read(sweep.path))
    shutil.rmtree(sweep.path.parent / "prepared")
    for trial_id in sweep.load_records():
        sweep.model_file(trial_id).unlink()
    assert curves(read(sweep.path)) == before


def test_a_kept_curve_of_another_epoch_is_not_taken(sweep):
    add_rows_and_models(sweep)
    curves(read(sweep.path))
    kept = sweep.read_json("results/r2_by_k.json")
    trial = read(sweep.path).groups[0].best
    kept[trial.trial_id] |= {"epoch": 1, "r2": [0.0] * 8}
    sweep.write_text(sweep.path / "results" / "r2_by_k.json", str(kept).replace("'", '"'))
    assert curves(read(sweep.path)).by_trial[trial.trial_id].r2 != [0.0] * 8


def test_where_the_rows_are_gone_trained_levels_are_drawn_and_it_is_said(reported):
    sweep, written = reported
    view = read(sweep.path)
    measured = curves(view)
    best = view.groups[0].best
    assert measured.by_trial[best.trial_id].ks == best.levels
    assert measured.by_trial[best.trial_id].r2 == best.r2
    assert any("no longer in" in note for note in written.notes)
    assert "trained levels only" in page_of(written).read_text(encoding="utf-8")


def test_at_a_sweeps_end_curves_that_take_long_are_left_out(sweep):
    add_rows_and_models(sweep)
    view = read(sweep.path)
    of_one = N_VAL * view.groups[0].best.hidden_dim * 2 * INPUT_DIM
    measured = curves(view, most_products=of_one)
    whole = [curve for curve in measured.by_trial.values() if curve.is_whole]
    assert len(whole) == 1
    assert "left out" in next(iter(measured.missing.values()))
    assert not curves(view).missing


def test_baselines_are_the_best_sae_of_every_single_k_on_the_same_data(sweep, tmp_path):
    space = "{k_levels: {grid: [[2], [8]]}, learning_rate: {loguniform: [1e-4, 1e-2]}}"
    alone = [{"k_levels": [k], "learning_rate": rate} for rate in (1e-3, 2e-3) for k in (2, 8)]
    other = make(tmp_path / "sweeps" / "alone", alone, rising, blocks=(5, 20), space=space)
    first, second = read_all([sweep.path, other.path])
    found = baselines([first, second], 5, first)
    assert [trial.levels for trial in found] == [(2,), (8,)]
    assert {trial.training.learning_rate for trial in found} == {2e-3}
    # The MSAE is recommended, whatever the score of an SAE for one k is.
    assert {answer.sweep.name for answer in recommendations([second, first])} == {"made-up"}
    text = page_of(report.write([sweep.path, other.path])).read_text(encoding="utf-8")
    assert "trained for one k alone" in text
    assert "best of 2 trials of 4 epochs, but the MSAE is the best of 8 trials of 4 epochs" in text
    # On other data, their R² cannot be compared.
    data = other.read_json("data.json")
    data["5"]["key"] = "another"
    other.write_text(other.path / "data.json", str(data).replace("'", '"'))
    assert baselines(read_all([sweep.path, other.path]), 5, first) == []


def test_of_two_sweeps_on_the_same_data_the_better_trial_is_recommended(sweep, tmp_path):
    better = make(
        tmp_path / "sweeps" / "better", settings(3), lambda p, e: rising(p, e) + 0.1, blocks=(5, 20), asha=ASHA
    )
    assert {answer.sweep.name for answer in recommendations(read_all([sweep.path, better.path]))} == {"better"}


def test_nothing_on_the_front_is_beaten_and_whatever_is_off_it_is(sweep):
    group = read(sweep.path).groups[0]
    kept = pareto_front(group.ended, lambda trial: trial.hidden_dim)
    for trial in group.ended:
        beaten = any(
            o.hidden_dim <= trial.hidden_dim and o.best["r2_mean"] > trial.best["r2_mean"] for o in group.ended
        )
        assert beaten == (trial not in kept)


def test_an_unfinished_sweep_is_reported_as_far_as_it_is_and_says_so(sweep):
    record = next(r for r in sweep.load_records().values() if r.trial_id == "block5-007")
    record.status, record.reason = "running", ""
    sweep.save_record(record)
    (sweep.path / "data.json").unlink()  # as in a sweep that was run before this file was written
    written = report.write([sweep.path])
    assert "15 of 16 trials have ended" in written.notes[0]
    text = page_of(written).read_text(encoding="utf-8")
    assert "unfinished" in text
    assert "block5-007" in text


def test_a_block_without_a_model_is_named(sweep):
    for record in sweep.load_records().values():
        if record.block == 20:
            record.status = "diverged"
            sweep.save_record(record)
    text = page_of(report.write([sweep.path])).read_text(encoding="utf-8")
    assert "no trial of block 20 has ended with a model" in text
    # The trials of the block are listed all the same.
    assert text.index("<h3>No model</h3>") < text.index("block20-003") < text.index('<h2 id="time">')


def test_a_sweep_in_which_every_trial_failed_is_reported_with_what_became_of_them(sweep):
    for record in sweep.load_records().values():
        record.status, record.reason, record.points = "failed", "RuntimeError: out of | memory <1>", []
        sweep.save_record(record)
    written = report.write([sweep.path])
    assert written.next_spaces == []
    text, twin = (Path(written.where) / "report.html").read_text(), (Path(written.where) / "report.md").read_text()
    for page in (text, twin):
        assert "16 of 16 trials have ended (16 failed)" in page
        assert "No trial has ended with a model" in page
    assert text.count("failed (RuntimeError: out of | memory &lt;1&gt;)") == 16
    assert twin.count("failed (RuntimeError: out of \\| memory <1>)") == 16
    assert parsed(page_of(written)).open == []
    rows = list(csv.DictReader(io.StringIO((Path(written.where) / "trials.csv").read_text())))
    assert {(row["status"], row["rank"]) for row in rows} == {("failed", "")}
    assert len(rows) == 16


def test_a_trial_with_one_epoch_and_a_sweep_with_one_trial_are_reported(tmp_path):
    sweep = make(tmp_path / "tiny", settings(1), rising, epochs=1)
    assert "It is the only trial" in page_of(report.write([sweep.path])).read_text(encoding="utf-8")


def first_screen(written: report.ReportFiles) -> str:
    text = page_of(written).read_text(encoding="utf-8")
    return text[text.index("<body>") : text.index("<nav")]


def test_a_recommendation_that_fails_a_criterion_is_marked_by_colour_and_word(reported, tmp_path):
    sweep = make(tmp_path / "good", settings(2), lambda p, e: 0.9, blocks=(5,))
    assert '<section class="card">' in first_screen(report.write([sweep.path]))
    assert "passes all 3 criteria" in first_screen(report.write([sweep.path]))
    low = first_screen(reported[1])
    assert low.count('<section class="card fails">') == 2
    assert 'verdict">fails 1 of 3 criteria' in low
    assert 'class="fail">fails 1 of 3 criteria' in low  # the verdict is also in the table that a phone shows
    twin = (Path(reported[1].where) / "report.md").read_text(encoding="utf-8")
    assert re.search(r"## Block 5: use block5-00\d \(fails 1 of 3 criteria\)", twin)


def test_further_criteria_are_said_as_met_or_not_and_explained(reported):
    sweep, written = reported
    best = read(sweep.path).groups[0].best
    gap = best.best["r2_k8"] - best.best["r2_k2"]
    page, twin = (page_of(written).read_text(encoding="utf-8"), (Path(written.where) / "report.md").read_text())
    for text in (page, twin):
        assert text.count("Further criteria of the original series:") == 2
        assert text.count("R² (k=8) − R² (k=2) &gt; 0.25: not met" if text is page else "> 0.25: not met") == 2
        assert f"not met with {gap:.4f}" in text
        assert "Nestedness" in text
        assert "a strong MSAE fails it" in text
    rows = csv.DictReader(io.StringIO((Path(written.where) / "trials.csv").read_text(encoding="utf-8")))
    gaps = {row["trial_id"]: float(row["reconstruction_gap"]) for row in rows}
    assert gaps[best.trial_id] == pytest.approx(gap)


def test_the_models_path_can_be_opened_wherever_the_page_is_read(sweep):
    best = read(sweep.path).groups[0].best.trial_id
    path = f"{sweep.path}/trials/{best}/model.pt"
    assert f"<code>{path}</code>" in first_screen(report.write([sweep.path]))
    # Once the sweep has ended, the models of the best trials are in a separate folder.
    sweep.write_text(
        sweep.path / "summary.json", json.dumps({"blocks": {"block5": {"best": best, "data": manifest(5)}}})
    )
    screen = first_screen(report.write([sweep.path]))
    assert f"<code>{sweep.path}/models/msae_block5.pt</code>" in screen
    assert f"{sweep.path}/trials/block20-" in screen


def test_no_claim_is_made_on_epochs_that_nobody_trained(tmp_path):
    # The objective rises by 0.0008 per epoch for ever: little in the last tenth, but much over ten times the epochs.
    sweep = make(tmp_path / "slow", settings(2), lambda p, e: 0.8 + 0.0008 * e, epochs=20)
    written = report.write([sweep.path])
    for name in ("report.html", "report.md"):
        text = (Path(written.where) / name).read_text(encoding="utf-8")
        assert "would change little" not in text
        assert "+0.0016 in the last 2 of 20 epochs (block 5)" in text
        assert "What more epochs would add is not known" in text
        assert "What many more epochs would add has not been tried" in text


def test_a_trial_of_one_epoch_says_so_beside_those_that_trained_on(tmp_path):
    params = [{**p, "weighting": "uniform" if i else "reverse"} for i, p in enumerate(settings(4))]

    def score(p, epoch):
        return 0.8 if p["weighting"] == "reverse" else 0.5 - 0.1 * params.index(p)

    sweep = make(tmp_path / "s", params, score, epochs=4, asha="{grace_epochs: 1, reduction_factor: 3}")
    assert [t.record.epochs for t in read(sweep.path).groups[0].trials] == [4, 1, 1, 1]
    written = report.write([sweep.path])
    folder = Path(written.where)
    assert "uniform (block5-001, stopped at epoch 1)" in (folder / "figures" / "weighting_block5.svg").read_text()
    for kind in ("learning_rate", "size", "dead"):
        assert "small: stopped at epoch 1<" in (folder / "figures" / f"{kind}_block5.svg").read_text()
    page = page_of(written).read_text(encoding="utf-8")
    assert page.count('<tr class=" short">') == 3
    assert "<td>1 of 4</td>" in page
    assert "| 1 of 4 |" in (folder / "report.md").read_text(encoding="utf-8")


def drawn_axes(monkeypatch, draw, *arguments):
    """Return the axes of a figure just before it is written."""
    kept = []
    monkeypatch.setattr(score_figures, "to_drawing", lambda figure, *texts: kept.append(figure.axes[0]))
    draw(*arguments)
    (axes,) = kept
    return axes


@pytest.mark.parametrize("draw", [score_figures.learning_rate, score_figures.against_size, score_figures.against_dead])
def test_the_best_trials_stand_apart_where_others_are_far_below(tmp_path, monkeypatch, draw):
    scores = [0.990, 0.994, 0.60, 0.62, 0.65, -9.0]
    params = settings(len(scores))
    sweep = make(tmp_path / "s", params, lambda p, e: scores[params.index(p)], epochs=1)
    axes = drawn_axes(monkeypatch, draw, read(sweep.path).groups[0])

    def height(score: float) -> float:
        return axes.transAxes.inverted().transform(axes.transData.transform((1e-3, 1 - score)))[1]

    assert 0 < height(0.994) < height(0.990) - 0.08  # more is explained, so the point is drawn lower
    assert height(0.60) < 1 < height(-9.0)
    assert "1 more above" in [text.get_text() for text in axes.texts]
    low, high = axes.get_ylim()
    assert 3 <= len([tick for tick in axes.get_yticks() if low <= tick <= high]) <= 8


def test_two_blocks_fill_the_width_and_every_table_can_be_scrolled(reported):
    text = page_of(reported[1]).read_text(encoding="utf-8")
    assert text.count('<div class="grid two">') >= 6
    assert text.count("<table>") == len(re.findall(r'<div class="scroll[ a-z]*"><table>', text))


def refused(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["msae-sweep", "report", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_wrong_input_is_one_line_and_exit_code_2(monkeypatch, capsys, sweep, tmp_path):
    assert "no sweep.yaml there" in refused(monkeypatch, capsys, str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    assert "cannot be created: File exists" in refused(
        monkeypatch, capsys, str(sweep.path), "--out", str(tmp_path / "file")
    )
    for record in sweep.load_records().values():
        record.status = "running"
        sweep.save_record(record)
    assert "none of its 16 trials has ended" in refused(monkeypatch, capsys, str(sweep.path))


def test_the_command_prints_where_the_report_lies(monkeypatch, capsys, tmp_path):
    sweep = make(tmp_path / "tiny", settings(2), rising, epochs=2)
    monkeypatch.setattr(sys, "argv", ["msae-sweep", "report", str(sweep.path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert f"report: {sweep.path / 'report' / 'report.html'}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_in_an_object_store_is_reported_as_on_a_disk(object_store, sweep, tmp_path):
    add_rows_and_models(sweep)
    storage = StoragePath(object_store.bucket) / "reported"
    for file in sorted(sweep.path.parent.rglob("*")):
        if file.is_file():
            (storage / file.relative_to(sweep.path.parent).as_posix()).write(file.read_bytes())
    here = report.write([sweep.path])
    there = report.write([(storage / sweep.name).uri])
    assert there.notes == here.notes == []
    assert there.page == f"{object_store.bucket}/reported/{sweep.name}/report/report.html"
    for name in ("report.md", "trials.csv"):
        local = (Path(here.where) / name).read_text(encoding="utf-8")
        remote = StoragePath(f"{there.where}/{name}").read().decode()
        assert without_where(remote, storage.uri) == without_where(local, str(sweep.path.parent))
    # The measurements are kept beside the sweep, and the next search space is read from where it lies.
    assert StoragePath(f"{storage.uri}/{sweep.name}/results/r2_by_k.json").is_file()
    assert load(f"{there.where}/{there.next_spaces[0]}", ["training.epochs=3"]).name == "made-up-2"
    elsewhere = report.write([sweep.path], f"{object_store.bucket}/elsewhere")
    assert without_where(StoragePath(elsewhere.page).read().decode(), "") == without_where(
        Path(report.write([sweep.path], tmp_path / "out").page).read_text(encoding="utf-8"), ""
    )


def without_where(text: str, storage: str) -> str:
    text = text.replace(storage, "") if storage else text
    return re.sub(r"Made .* UTC", "", text)


def test_the_search_space_after_a_report_is_one_that_run_takes_with_changes(reported):
    _, written = reported
    (name,) = written.next_spaces
    config = load(f"{written.where}/{name}", ["search.trials_per_block=2", "training.epochs=2", "data.blocks=[5]"])
    assert (config.name, config.training.epochs, config.data.blocks) == ("made-up-2", 2, (5,))
    assert len(plan(config, [5])) == 2


def test_a_folder_that_is_no_sweep_raises_what_the_command_line_prints(tmp_path):
    with pytest.raises(SweepError, match="give the folder of a sweep"):
        report.write([tmp_path])
