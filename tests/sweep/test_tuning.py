"""Tests of the order in which a sweep's trials start."""

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from msae_sweep.config import parse
from msae_sweep.sweep import tuning
from msae_sweep.sweep.space import plan
from msae_sweep.sweep_folder.folder import SweepFolder

BLOCKS = (35, 5, 20)


def order(tmp_path, monkeypatch, *, gpus: float, at_once: int) -> list[str]:
    """Return the trials of three blocks, with four trials each, in the order of their turns."""
    config = parse("name: x\ndata: {path: planted}\nsearch: {trials_per_block: 4}\n", [])
    monkeypatch.setattr(tuning, "trials_at_once", lambda config, gpus: at_once)
    preparation: Any = SimpleNamespace(input_dims=dict.fromkeys(BLOCKS, 16))
    tracker: Any = None
    made = tuning.Tuning(config, SweepFolder(tmp_path), preparation, gpus, Console(), tracker, "sweep")
    specs = [made._spec(record) for record in plan(config, BLOCKS)]
    assert len({spec["turn"] for spec in specs}) == len(specs)
    return [spec["trial_id"] for spec in sorted(specs, key=lambda spec: spec["turn"])]


def test_blocks_take_turns(tmp_path, monkeypatch):
    assert order(tmp_path, monkeypatch, gpus=0, at_once=8)[:4] == [
        "block35-000",
        "block5-000",
        "block20-000",
        "block35-001",
    ]


@pytest.mark.parametrize("at_once", [1, 3, 9])
def test_workers_on_gpus_begin_with_the_block_that_is_ready_first(tmp_path, monkeypatch, at_once):
    trials = order(tmp_path, monkeypatch, gpus=0.5, at_once=at_once)
    first = [f"block35-{i:03d}" for i in range(min(at_once, 4))]
    assert trials[: len(first)] == first
    assert trials[len(first)] == "block5-000"
    for block in BLOCKS:  # a trial is judged by those with a smaller number in its block, and may wait for them
        of_block = [trial for trial in trials if trial.startswith(f"block{block}-")]
        assert of_block == sorted(of_block)
