"""The report of one or several sweeps: one HTML page that needs nothing else, a Markdown and CSV twin, figures.

`data` reads sweeps, `curves` measures R² at every k, `answer` says which MSAE to use, `response` and `next_space` what
to run next; `figures` draws in `style`, and `page` puts it together. Nothing is imported before it is needed: torch and
matplotlib take seconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from msae_sweep.report.style import Draw
    from msae_sweep.report.sweep_data import Sweep
    from msae_sweep.sweep_folder.folder import SweepFolder

FOLDER = "report"
"""Of a sweep's own report, in the sweep folder."""
PAGE = "report.html"
"""In it."""


class ReportFiles(NamedTuple):
    """Where a report lies."""

    where: str
    """Folder, in an object store too, of `report.html`, `report.md`, `trials.csv` and `figures/`."""
    next_spaces: list[str]
    """Files in it: the search space proposed after each sweep."""
    notes: list[str]
    """What a reader should know of how it was made, e.g. rows that are gone."""

    @property
    def page(self) -> str:
        """The page."""
        return f"{self.where}/{PAGE}"


def write(places: Sequence[str | Path], out: str | Path | None = None) -> ReportFiles:
    """Write the report of sweeps, side by side if they are several.

    Args:
        places: folders of sweeps, or URIs.
        out: folder to write, or a URI; by default `report/` in the first sweep's folder.

    Raises:
        SweepError: no sweep there, no trial that has ended, or `out` cannot be written.
    """
    from msae_sweep.report.sweep_data import read_all

    return _write(read_all(places), out, float("inf"))


def write_at_the_end(folder: "SweepFolder", draw: "Draw | None" = None) -> ReportFiles:
    """The report of a sweep that just ended; leaves out what would keep the sweep waiting.

    Args:
        draw: who draws the figures; by default this process.
    """
    from msae_sweep.report.curves import MOST_PRODUCTS_AT_ONCE
    from msae_sweep.report.sweep_data import read

    return _write([read(folder)], None, MOST_PRODUCTS_AT_ONCE, draw)


def _write(
    sweeps: "Sequence[Sweep]", out: str | Path | None, most_products: float, draw: "Draw | None" = None
) -> ReportFiles:
    from msae_sweep.errors import SweepError
    from msae_sweep.paths import StoragePath
    from msae_sweep.report import page
    from msae_sweep.report.build import build
    from msae_sweep.report.style import drawn_here

    first, *others = sweeps
    within = FOLDER if not others else f"{FOLDER}/{'-'.join(['with', *(sweep.name for sweep in others)])}"
    folder, where = first.folder, f"{first.folder}/{within}"
    elsewhere = None if out is None else StoragePath(out)
    if elsewhere is not None:  # what is wrong with it is said before the work
        where = str(elsewhere)
        elsewhere.check()
        try:
            if not elsewhere.is_remote:
                elsewhere.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepError(f"--out: {out} cannot be made: {error.strerror}") from None
    report = build(sweeps, most_products, draw or drawn_here)
    files = {f"figures/{d.name}.svg": d.svg_file for d in report.drawings}
    files |= {f"figures/{d.name}.png": d.png_file for d in report.drawings}
    texts = {"report.md": page.markdown(report), "trials.csv": page.trials_csv(report.sweeps)}
    texts |= {f"{advice.name}.yaml": advice.yaml for advice in report.advice.values()}
    texts[PAGE] = page.html(report)  # the last, so that where it is, all is
    try:
        for name, content in (files | {name: text.encode() for name, text in texts.items()}).items():
            if elsewhere is not None:
                (elsewhere / name).write(content)
            else:
                folder.write(folder.path / within / name, content, durable=False)
    except OSError as error:
        raise SweepError(f"{where} cannot be written: {error.strerror or error}") from None
    unfinished = [
        f"{sweep.label}: {state}"
        for sweep, state in zip(report.sweeps, page.states(report), strict=True)
        if not sweep.is_whole
    ]
    missing = [
        f"block {block}: R² at trained levels only; {why}"
        for measured in report.curves.values()
        for block, why in measured.missing.items()
    ]
    return ReportFiles(where, [f"{advice.name}.yaml" for advice in report.advice.values()], [*unfinished, *missing])
