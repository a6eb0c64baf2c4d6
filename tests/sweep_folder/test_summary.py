import io
import re

import pytest
from rich.console import Console

from msae_sweep.report.tables import best_table, criteria_table, further_criteria_table
from msae_sweep.sweep_folder.summary import (
    best_entries,
    block_entry,
    further_criteria,
    reconstruction,
    success_criteria,
)
from msae_sweep.sweep_folder.trial_record import TrialRecord


def record(index: int, objective: float, k_levels=(16, 128), status="completed", epochs=2) -> TrialRecord:
    metrics = {f"r2_k{k}": objective for k in k_levels} | {"objective": objective, "dead_ratio": 0.1}
    points = [{**metrics, "objective": objective - 0.1 * (epochs - e), "epoch": e} for e in range(1, epochs + 1)]
    params = {"learning_rate": 1e-3, "k_levels": list(k_levels)}
    return TrialRecord(f"block5-{index:03d}", 5, index, params, 0, status, "epochs", points)


def entry(*records: TrialRecord) -> dict:
    return block_entry(list(records), {r.trial_id: tuple(r.params["k_levels"]) for r in records}, {"key": "abc"})


def text(table, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def summary(**blocks: dict) -> dict:
    return {"training": {"expansion_factor": 16, "weighting": "uniform"}, "blocks": blocks}


def test_trials_stand_best_first_and_metrics_are_those_of_the_best_epoch():
    block = entry(record(0, 0.5), record(1, 0.9, status="stopped_early"), record(2, 0.7))
    assert [t["trial_id"] for t in block["trials"]] == ["block5-001", "block5-002", "block5-000"]
    assert block["best"] == "block5-001"
    assert block["trials"][0]["best_epoch"] == 2
    assert block["trials"][0]["metrics"]["objective"] == 0.9


def test_diverged_and_failed_trials_are_listed_and_never_best():
    block = entry(record(0, 0.5), record(1, 0.9, status="diverged"), record(2, 0, status="failed", epochs=0))
    assert block["best"] == "block5-000"
    assert {t["status"] for t in block["trials"]} == {"completed", "diverged", "failed"}
    assert entry(record(0, 0, status="failed", epochs=0))["best"] is None


def test_each_set_of_k_levels_has_a_best_of_its_own():
    block = entry(record(0, 0.95, (128,)), record(1, 0.6, (16,)), record(2, 0.7, (16,)))
    assert block["best"] == "block5-000"
    assert [t["trial_id"] for t in best_entries(block)] == ["block5-002", "block5-000"]
    assert text(best_table(summary(block5=block))).count("block5-00") == 2


def test_criteria_pass_above_and_below_the_notebooks_bounds():
    passed = success_criteria({"r2_k16": 0.41, "r2_k128": 0.86, "dead_ratio": 0.29}, (16, 128))
    failed = success_criteria({"r2_k16": 0.40, "r2_k128": 0.85, "dead_ratio": 0.30}, (16, 128))
    assert [c.passed for c in passed] == [True] * 3
    assert [c.passed for c in failed] == [False] * 3


def test_criteria_of_several_levels_are_named_for_the_largest_and_the_smallest():
    criteria = success_criteria({"r2_k2": 0.5, "r2_k8": 0.9, "dead_ratio": 0}, (2, 8))
    assert [c.name for c in criteria] == ["R² (k=8) > 0.85", "R² (k=2) > 0.40", "Dead latents < 30%"]


@pytest.mark.parametrize(("k", "bound"), [(16, "0.40"), (32, "0.40"), (64, "0.85"), (128, "0.85")])
def test_a_single_level_has_one_criterion_for_r2(k, bound):
    criteria = success_criteria({f"r2_k{k}": 0.8, "dead_ratio": 0.1}, (k,))
    assert [c.name for c in criteria] == [f"R² (k={k}) > {bound}", "Dead latents < 30%"]
    assert [c.passed for c in criteria] == [bound == "0.40", True]


def test_the_gap_is_met_above_a_quarter_and_a_better_small_k_makes_it_smaller():
    met, *_ = further_criteria({"r2_k16": 0.60, "r2_k128": 0.90}, (16, 128))
    better, *_ = further_criteria({"r2_k16": 0.70, "r2_k128": 0.90}, (16, 128))
    assert met.name == better.name == "R² (k=128) − R² (k=16) > 0.25"
    assert (met.value, better.value) == (pytest.approx(0.30), pytest.approx(0.20))
    assert (met.met, better.met) == (True, False)
    assert "a strong MSAE fails it" in better.meaning


def test_nestedness_is_met_by_construction_and_the_wish_is_0_92():
    for r2, met in ((0.93, True), (0.92, False)):
        _, nestedness, wish = further_criteria({"r2_k4": 0.1, "r2_k32": r2}, (4, 32))
        assert (nestedness.name, nestedness.value, nestedness.met) == ("Nestedness > 0.80", 1.0, True)
        assert "by construction" in nestedness.meaning
        assert (wish.name, wish.value, wish.met) == ("R² (k=32) > 0.92 (a wish)", r2, met)


def test_a_single_level_has_no_gap_and_a_wish_only_in_the_place_of_128():
    assert further_criteria({"r2_k16": 0.99}, (16,)) == []
    assert [c.name for c in further_criteria({"r2_k64": 0.99}, (64,))] == ["R² (k=64) > 0.92 (a wish)"]


def test_further_criteria_stand_apart_and_change_no_verdict():
    strong, weak = entry(record(0, 0.95)), entry(record(0, 0.5))
    assert len(strong["success_criteria"]) == len(strong["further_criteria"]) == 3
    assert not strong["success_criteria"].keys() & strong["further_criteria"].keys()
    assert all(c["passed"] for c in strong["success_criteria"].values())
    assert not strong["further_criteria"]["R² (k=128) − R² (k=16) > 0.25"]["met"]
    none = entry(record(0, 0, status="failed", epochs=0))
    assert none["further_criteria"] == {}
    shown = text(further_criteria_table(summary(block5=strong, block20=weak, block35=none)))
    assert "0.9500 [met]" in shown
    assert "0.5000 [not met]" in shown
    assert "0.0000 [not met]" in shown
    assert shown.count("a strong MSAE fails it") == 1
    assert "PASS" not in shown
    assert "FAIL" not in shown


def test_the_tables_say_pass_and_fail_and_bear_a_block_without_a_winner():
    good, none = entry(record(0, 0.9)), entry(record(0, 0, status="failed", epochs=0))
    both = summary(block5=good, block20=none)
    assert "0.9000 [PASS]" in text(criteria_table(both))
    assert "no trial finished" in text(best_table(both))
    assert reconstruction(both) == {"block5": {"k16": 0.9, "k128": 0.9}}


def test_equal_objectives_are_ranked_by_number():
    assert entry(record(1, 0.5), record(0, 0.5))["best"] == "block5-000"


@pytest.mark.parametrize("status", ["pending", "running"])
def test_an_unfinished_trial_is_not_the_winner(status):
    assert entry(record(0, 0.9, status=status), record(1, 0.5))["best"] == "block5-001"


@pytest.mark.parametrize("width", [80, 100, 120, 160])
@pytest.mark.parametrize("recovered", [False, True])
def test_no_name_or_heading_is_cut_at_any_usual_width(width, recovered):
    levels = (16, 32, 64, 128)
    blocks = {}
    for number in (5, 20, 135):
        winner = record(1, 0.9, levels)
        winner.trial_id, winner.params = f"block{number}-001", {**winner.params, "learning_rate": 4.25e-3}
        blocks[f"block{number}"] = entry(winner) | ({"dictionary_recovery": 0.981} if recovered else {})
    shown = text(best_table(summary(**blocks)), width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    words = [*(f"block{number}-001" for number in (5, 20, 135)), "R²", *(f"k={k}" for k in levels)]
    words += ["dead", "lr", "expansion", "weighting", "uniform", "epoch", "4.25e-03", "0.9000"]
    for word in [*words, *(["dictionary", "recovered", "0.981"] if recovered else [])]:
        assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", shown), word
    assert shown.count("block135-001") == (1 if width == 160 or (width == 120 and not recovered) else 2)
