"""Check MLflow's own pages in a real browser, on a sweep that was run: open, filter, compare, download a model.

    python tests/track/check_ui.py SWEEP [--python PYTHON] [--chromium PATH] [--screenshots FOLDER]

SWEEP is a finished sweep with several trials, some of them with weighting `reverse`, whose MLflow store can be reached.
PYTHON is an interpreter that has msae_sweep; this script itself needs only playwright and a Chromium, so that it can
run in another environment. `test_ui_in_browser.py` runs it on a small sweep. It was checked with MLflow 3.17.2.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT_MS = 120_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--chromium", default=chromium())
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args()
    if not options.chromium:
        parser.error("no Chromium found; name one with --chromium")
    for line in check(options.sweep, options.python, options.chromium, options.screenshots):
        print(line, flush=True)
    return 0


def chromium() -> str | None:
    """Return the path of an installed browser, or None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def check(sweep: Path, python: str, browser_path: str, screenshots: Path | None = None) -> Iterator[str]:
    """Run every step and yield its observations."""
    from playwright.sync_api import sync_playwright

    trials = [json.loads(file.read_text()) for file in sorted(sweep.glob("trials/*/trial.json"))]
    with served(python, sweep) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        steps = Steps(page, url, trials, sweep, screenshots)
        for step in (steps.opens, steps.filters, steps.compares, steps.downloads_a_model):
            yield f"{step.__name__}: {step()}"
        browser.close()


@contextlib.contextmanager
def served(python: str, sweep: Path) -> Iterator[str]:
    """Run `msae-sweep ui` and yield its address. Ctrl-C ends it when the block is left."""
    command = [python, "-m", "msae_sweep", "ui", str(sweep), "--no-browser"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), url + process.stdout.read()
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, "Ctrl-C did not end it well"


class Steps:
    """Steps of the check, each of which returns its observations as text."""

    def __init__(self, page: Any, url: str, trials: list[dict], sweep: Path, screenshots: Path | None) -> None:
        self.page, self.url, self.trials, self.sweep, self.screenshots = page, url, trials, sweep, screenshots
        self.levels = sorted({int(key[4:]) for t in trials for key in t["points"][-1] if key.startswith("r2_k")})

    def opens(self) -> str:
        """Check that the page opens with parallel coordinates of settings and R² at every k, for this sweep alone."""
        self.page.goto(self.url)
        self.page.get_by_text("Trials compared").wait_for()
        chart = self.page.locator(".parcoords, [class*=parcoords]").first
        chart.wait_for()
        axes = chart.locator(".label").all_text_contents()
        wanted = ["block", "learning_rate", "expansion_factor", "weighting", "dead_ratio"]
        wanted += [f"r2_k{k}" for k in self.levels]
        # MLflow shortens long names, such as expans...factor.
        patterns = [re.escape(axis).replace(r"\.\.\.", ".*") for axis in axes]
        assert len(axes) == len(wanted), axes
        assert all(re.fullmatch(pattern, name) for pattern, name in zip(patterns, wanted, strict=True)), axes
        self.page.get_by_text(re.compile(rf"^{len(self.trials)}\s*matching runs")).first.wait_for()
        self._shoot("opened")
        return f"{len(self.trials)} trials on the axes {', '.join(axes)}"

    def filters(self) -> str:
        """Filter by a metric and a param, in MLflow's own syntax."""
        largest = f"r2_k{self.levels[-1]}"
        last = {t["trial_id"]: t["points"][-1][largest] for t in self.trials if t["params"]["weighting"] == "reverse"}
        # The bound lies between the middle two values, so that some trials match and some do not.
        ordered = sorted(last.values())
        bound = round((ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2, 4)
        bound = 0.85 if 0 < sum(value > 0.85 for value in ordered) < len(self.trials) else bound
        wanted = {trial_id for trial_id, value in last.items() if value > bound}
        text = f"metrics.{largest} > {bound} and params.weighting = 'reverse'"
        box = self.page.get_by_test_id("search-box")
        box.fill(text)
        box.press("Enter")
        self.page.get_by_text(re.compile(rf"^{len(wanted)}\s*matching run")).first.wait_for()
        found = set(self.page.get_by_role("link", name=re.compile(r"^block\d+-\d+$")).all_text_contents())
        assert found == wanted, (found, wanted)
        self._shoot("filtered")
        return f"{text}: {', '.join(sorted(found))}"

    def compares(self) -> str:
        """Select two of all runs and compare them side by side."""
        self.page.goto("about:blank")
        self.opens()
        boxes = self.page.locator(".ag-row .ag-selection-checkbox:visible")
        for i in (0, 1):
            boxes.nth(i).click()
        self.page.get_by_role("button", name="Compare").click()
        self.page.get_by_text(re.compile(r"Comparing 2 Runs")).first.wait_for()
        self.page.get_by_text("expansion_factor").first.wait_for()
        self._shoot("compared")
        return self.page.url.partition("?")[0]

    def downloads_a_model(self) -> str:
        """Download the model file of a run, and check that its bytes are those in the sweep folder."""
        self.page.go_back()
        link = self.page.get_by_role("link", name=re.compile(r"^block\d+-\d+$")).first
        trial_id = link.text_content()
        link.click()
        self.page.get_by_role("tab", name="Artifacts").click()
        name = f"msae_{trial_id.partition('-')[0]}.pt"
        self.page.get_by_text(name).first.click()
        with self.page.expect_download() as caught:
            self.page.locator(".du-bois-light-btn-icon-only[data-component-id*=artifactview]").first.click()
        got = Path(caught.value.path()).read_bytes()
        here = (self.sweep / "trials" / trial_id / "model.pt").read_bytes()
        assert hashlib.sha256(got).digest() == hashlib.sha256(here).digest(), "another file"
        self._shoot("downloaded")
        return f"{name} of {trial_id}, {len(got)} bytes, the same as in the sweep folder"

    def _shoot(self, name: str) -> None:
        if self.screenshots:
            self.page.wait_for_timeout(1500)
            self.page.screenshot(path=self.screenshots / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
