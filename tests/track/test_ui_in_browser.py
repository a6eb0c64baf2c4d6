"""Test of a small sweep in MLflow's own pages in a real browser. `check_ui.py` has the steps."""

import os
import subprocess
import sys
from pathlib import Path

import check_ui
import pytest

SPACE = """
name: small
data: {path: planted, blocks: [5], planted: {rows: 4000, noise: 0.02}}
space:
  learning_rate: {grid: [3.0e-4, 4.0e-3]}
  weighting: {grid: [uniform, reverse]}
training: {expansion_factor: 4, batch_size: 128, epochs: 4}
search: {algorithm: grid}
asha: null
"""


@pytest.mark.slow
def test_the_trials_are_shown_filtered_compared_and_their_models_downloaded(tmp_path: Path):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright")
    browser = check_ui.chromium()
    if browser is None:
        pytest.skip("no Chromium on PATH")
    (tmp_path / "space.yaml").write_text(SPACE)
    # Start a separate Ray instead of using the test session's.
    environment = {**os.environ, "RAY_ADDRESS": "local", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    subprocess.run([sys.executable, "-m", "msae_sweep", "run", "space.yaml"], cwd=tmp_path, env=environment, check=True)
    seen = list(check_ui.check(tmp_path / "sweeps" / "small", sys.executable, browser, tmp_path))
    assert [line.partition(":")[0] for line in seen] == ["opens", "filters", "compares", "downloads_a_model"]
    assert "metrics.r2_k128 > 0.85 and params.weighting = 'reverse': block5-" in seen[1]
